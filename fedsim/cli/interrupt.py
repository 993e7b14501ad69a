"""Ctrl-C and SIGTERM: the run is marked interrupted and the process gone within a second.

The first signal raises KeyboardInterrupt in the main thread, which unwinds the run as any error
would. Python delivers it only between two of its own instructions, and a single torch operation
may take minutes, so a second thread, woken by the signal itself, waits `GRACE` seconds and then
does the least that is needed: marks the run and ends the process under everything that computes.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

GRACE = 0.6  # seconds
SHOW_CURSOR = "\x1b[?25h"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Handles both signals between `with` and its end; in the main thread only.

    Attributes:
      signal: the number of the signal that arrived, 0 if none has.
      run: the folder of the run that is going on, None if there is none.
      waiting: how many runs come after it.
      out: the folder of runs as given on the command line, None if it was not.
      resumable: whether `fedsim resume` can continue the run.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.run: Path | None = None
        self.waiting = 0
        self.out: str | None = None
        self.resumable = True
        self._ending = threading.Lock()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            # A signal that the parent ignores (nohup) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._raise)
        _active.append(self)
        threading.Thread(target=self._watch, name="fedsim-interrupts", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        _active.remove(self)
        os.close(self._writer)  # ends the watching thread

    def end(self) -> NoReturn:
        """Says what was interrupted and how to go on, and ends the process; returns to no one."""
        self._ending.acquire()  # kept: whoever comes second waits for the end
        with suppress(Exception):
            self._mark()
        with suppress(Exception):
            if sys.stderr.isatty():
                sys.stderr.write(SHOW_CURSOR)
            sys.stderr.write(self._words())
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(128 + (self.signal or signal.SIGINT))

    def forget(self) -> None:
        """Gives a forked process the handlers from before: its signals are not the command's."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        """Python's handler: the first signal unwinds the main thread, later ones change nothing."""
        if not self.signal:
            self.signal = number
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while received := os.read(self._reader, 1):
            if received[0] in self._before:
                threading.Event().wait(GRACE)
                self.signal = self.signal or received[0]
                self.end()

    def _mark(self) -> None:
        """Marks the run in its folder, unless its writer has done so; the index follows it."""
        if self.run is None:
            return
        path = self.run / "run.json"
        record = json.loads(path.read_bytes())
        if record["status"] == "running":
            record["status"] = "interrupted"
            # Not a name that the run's writer uses: it may be writing at this moment.
            temporary = self.run / f".tmp-interrupted.{os.getpid()}"
            temporary.write_text(json.dumps(record, indent=2))
            os.replace(temporary, path)

    def _words(self) -> str:
        lines = ["interrupted" if self.signal == signal.SIGINT else "terminated"]
        if self.run is not None and self.run.exists():
            command = ["fedsim", "resume", self.run.name]
            if self.out is not None:
                command += ["--out", self.out]
            if self.resumable:
                lines = [f"{lines[0]}; continue the run with", f"  {shlex.join(command)}"]
            else:
                lines = [f"{lines[0]}; what the run had logged is in {self.run}"]
        if self.waiting:
            runs = "1 more run was" if self.waiting == 1 else f"{self.waiting} more runs were"
            lines.append(f"{runs} not started")
        return "\nfedsim: " + "\n".join(lines) + "\n"


def note(
    run: Path | None, waiting: int = 0, out: Path | None = None, resumable: bool = True
) -> None:
    """Tells this process's interrupt handling, if there is one, how far the command is.

    run: the folder of the run that is going on. waiting: runs after it. out: the folder of runs as
    given on the command line. resumable: whether `fedsim resume` can continue the run.
    """
    for interrupts in _active:
        interrupts.run, interrupts.waiting, interrupts.resumable = run, waiting, resumable
        interrupts.out = None if out is None else str(out)


def _forked() -> None:
    """Ends the interrupt handling in a process that was just forked.

    A worker of a multiprocessing pool is ended by SIGTERM, and the pipe that wakes the watching
    thread is the parent's, too: the whole command would end with its first worker.
    """
    for interrupts in _active:
        interrupts.forget()
    _active.clear()


_active: list[Interrupts] = []
os.register_at_fork(after_in_child=_forked)
