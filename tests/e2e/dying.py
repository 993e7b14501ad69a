"""Runs the command in processes that kill themselves, or are killed, at any moment.

    python -m tests.e2e.dying

reads one line of JSON for each process to start, from standard input: the command's arguments,
where it is to die, and what slows it down. It answers with a line: the process's id as it starts,
unless it is to be waited for, and how it ended. Everything is imported once and each process is a
fork, as importing takes longer than a small run; the main process never computes, so that there
are no threads that a fork would lose.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsim.cli import app, interrupt, tune  # noqa: F401 (loads what a run needs)
from fedsim.cli.guard import execute
from fedsim.grids import cohort, inline, states, worker
from fedsim.runs import checkpoint, database, draws, files, lines, writer
from fedsim.server import evaluation, loop
from fedsim.strategies import sampler

Place = tuple[Any, str]


def die() -> None:
    """Ends this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def before(place: Place, wanted: Callable[..., bool] = lambda *_, **__: True) -> Any:
    """Dies where the function is called."""
    return place, wanted, lambda real, *a, **k: die()


def after(place: Place, wanted: Callable[..., bool] = lambda *_, **__: True) -> Any:
    """Dies where the function has done its work."""

    def act(real: Any, *arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        die()

    return place, wanted, act


def halfway(place: Place, wanted: Callable[..., bool] = lambda *_, **__: True) -> Any:
    """Dies when half of the bytes are written."""

    def act(real: Any, descriptor: int, data: Any) -> None:
        os.write(descriptor, bytes(data)[: len(data) // 2])
        die()

    return place, wanted, act


def _is_file(name: str) -> Callable[..., bool]:
    def wanted(path: Path, *_: Any) -> bool:
        return path.name == name and "checkpoints" in path.parts

    return wanted


def _writes(name: str) -> Callable[..., bool]:
    def wanted(descriptor: int, *_: Any) -> bool:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith(name)

    return wanted


STEPS: dict[str, Any] = {
    "before configure": before((sampler.Sampler, "configure_train")),
    "after configure": after((sampler.Sampler, "configure_train")),
    "as messages are sent": before((inline.InlineGrid, "send_and_receive")),
    "while clients compute": after((worker, "run_mapped")),
    "as a client's state is kept": before((states.ClientStates, "scatter")),
    "as replies have come": after((inline.InlineGrid, "send_and_receive")),
    "while replies are checked": before((loop, "check_replies")),
    "mid-aggregate": before((loop, "_like")),
    "as a draw is absorbed": after((evaluation.Evaluator, "absorb")),
    "while clients evaluate": before((cohort.Cohorts, "_evaluate")),
    "mid-evaluation": after((evaluation.Evaluator, "_score_table")),
    "at a round's end": before((writer.RunWriter, "end_round")),
    "while metrics are flushed": halfway((lines, "write_some"), _writes("/metrics.jsonl")),
    "while events are flushed": halfway((lines, "write_some"), _writes("/events.jsonl")),
    "while the index is written": after((database, "put_metrics")),
    "while draws are written": before((draws, "write_bytes")),
    "before a checkpoint": before((loop.RoundLoop, "save")),
    "while its arrays are written": halfway((files, "write_some"), _writes("arrays.safetensors")),
    "between its two files": before((checkpoint, "write_through"), _is_file("state.json")),
    "before it is renamed": before((checkpoint, "_remove")),
    "after it is renamed, before pruning": before((checkpoint, "kept")),
    "while an old one is pruned": before(
        (checkpoint.shutil, "rmtree"), lambda p, *_, **__: ".tmp-old" in str(p) and Path(p).exists()
    ),
    "after a checkpoint": after((loop.RoundLoop, "save")),
    "as the result is written": before((writer.RunWriter, "save_parameters")),
    "before the run is marked finished": before((writer.RunWriter, "finish")),
    "after the run is marked finished": after((writer.RunWriter, "finish")),
}


def arm(step: str, count: int) -> None:
    """Makes this process die at the count-th time that it comes to a step."""
    (owner, name), wanted, act = STEPS[step]
    real = getattr(owner, name)
    calls = 0

    def armed(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if wanted(*arguments, **named):
            calls += 1
            if calls == count:
                return act(real, *arguments, **named)
        return real(*arguments, **named)

    setattr(owner, name, armed)


def slow(seconds: float) -> None:
    """Makes each round take longer."""
    real = loop.RoundLoop._round

    def waiting(self: loop.RoundLoop, server_round: int) -> None:
        time.sleep(seconds)
        real(self, server_round)

    loop.RoundLoop._round = waiting  # type: ignore[method-assign]


def start(order: dict[str, Any]) -> int:
    """Forks a process that runs the command; returns its id."""
    child = os.fork()
    # What it starts belongs to its group, and must go with it; both sides set it, whoever is first.
    os.setpgid(child, child)
    if child:
        return child
    null = os.open(os.devnull, os.O_RDWR)
    errors = os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor, target in ((null, 0), (null, 1), (errors, 2)):
        os.dup2(descriptor, target)
    status = 70
    try:
        writer.COMMIT_SECONDS = 0.0  # every round is flushed
        if order["step"] is not None:
            arm(order["step"], order["count"])
        slow(order["slow"])
        status = execute(order["arguments"])
        if order["learn"] is not None:
            Path(order["learn"]).write_text("\n".join(sys.modules))
    finally:
        sys.stderr.flush()
        os._exit(status)


def learn(path: Path) -> None:
    """Imports all that a process had imported by its end, so that the next ones need not."""
    for name in path.read_text().splitlines():
        with suppress(Exception):
            importlib.import_module(name)


def main() -> None:
    """Serves orders until standard input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        child = start(order)
        if not order["wait"]:
            print(child, flush=True)  # noqa: T201
        _, ended = os.waitpid(child, 0)
        if order["learn"] is not None:
            learn(Path(order["learn"]))
        print(os.waitstatus_to_exitcode(ended), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
