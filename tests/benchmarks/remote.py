"""A side in a process of its own, which may be another environment's: `orders` is its far end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks import processes
from tests.benchmarks.session import Session
from tests.benchmarks.workloads import Workload

ROOT = Path(__file__).parents[2]

PATIENCE = 300.0
"""Seconds for one answer, of which a simulation's first round may need many."""

GRACE = 20.0
"""Seconds that a side has to end by itself once nothing more is asked of it."""


class SideError(Exception):
    """A side in a process of its own has failed."""


class Remote(Session):
    """Starts a command in the repository's root and waits until it is ready.

    pause: stop the process (not its descendants) between its turns, where it would go on polling
    at the others' expense.
    """

    def __init__(
        self,
        workload: Workload,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        pause: bool = False,
        patience: float = PATIENCE,
    ) -> None:
        self.workload, self._pause, self._patience = workload, pause, patience
        self._name = " ".join(command[1:])
        self._messages = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            start_new_session=True,  # Ctrl-C is for the benchmark, which ends its sides in order
        )
        try:
            self._answer("ready")
        except BaseException:
            self.close()
            raise

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        self._ask({"do": "advance", "rounds": rounds}, "done")

    def result(self) -> list[float]:
        """Returns what the side arrived at."""
        return [float(value) for value in self._ask({"do": "result"}, "result")]

    def peak_mb(self) -> float | None:
        """Returns the peak resident memory of the process and its descendants."""
        return processes.peak_mb(processes.tree(self._process.pid))

    def close(self) -> None:
        """Lets the side end by itself for GRACE seconds, then ends it and its descendants."""
        family = processes.tree(self._process.pid)
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        processes.end(family)
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._messages.close()

    def _ask(self, order: object, answer: str) -> Any:
        assert self._process.stdin is not None
        if self._pause:
            self._process.send_signal(signal.SIGCONT)
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None
        try:
            return self._answer(answer)
        finally:
            if self._pause:
                self._process.send_signal(signal.SIGSTOP)

    def _answer(self, key: str) -> Any:
        assert self._process.stdout is not None
        watchdog = threading.Timer(self._patience, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise self._failure()
        return json.loads(line)[key]

    def _failure(self) -> SideError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._messages.seek(0)
        said = self._messages.read().strip().splitlines()[-15:]
        return SideError(
            f"{self._name} gave no answer (within {self._patience:g} s), exit status"
            f" {self._process.poll()}; its last lines:\n" + "\n".join(said)
        )


def child(side: str, workload: Workload) -> Remote:
    """Returns a side of this environment in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.child", side, workload.name]
    return Remote(workload, command)
