"""The steps of a round on engine ray at which a process is killed, one after the other.

    python -m tests.e2e.ray_steps STEP run scenario.yaml …

runs the command in a process that dies when it comes to the step. `Schedule` kills workers instead.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import psutil
import pytest

from fedsim.cli.guard import execute
from fedsim.grids import cohort, inline, pool, ray_cohorts
from fedsim.runs import checkpoint, writer
from fedsim.server import evaluation, loop


class Step(NamedTuple):
    """Before or after a function is called; wanted: says whether this call is meant."""

    owner: Any
    name: str
    when: Literal["before", "after"]
    wanted: Callable[..., bool] = lambda *arguments, **named: True


inside: set[str] = set()
"""Whether clients are evaluated just now: "evaluation"."""

STEPS: dict[str, Step] = {
    "as messages are sent": Step(inline.InlineGrid, "send_and_receive", "before"),
    "when one worker has its message, and the other has none": Step(
        pool.Pool, "_start", "after", lambda self, flight: not self._flights
    ),
    "while workers compute": Step(pool.Pool, "_wait", "before"),
    "when one worker has replied, and the other has not": Step(
        pool.Pool, "_land", "after", lambda self, reference: len(self._flights) > 1
    ),
    "as replies have come": Step(inline.InlineGrid, "send_and_receive", "after"),
    "mid-aggregate": Step(loop, "_like", "before"),
    "before clients evaluate": Step(cohort.Cohorts, "_evaluate", "before"),
    "while workers evaluate": Step(
        pool.Pool, "_wait", "before", lambda *arguments: "evaluation" in inside
    ),
    "mid-evaluation": Step(evaluation.Evaluator, "_score_table", "after"),
    "before a checkpoint": Step(loop.RoundLoop, "save", "before"),
    "between its two files": Step(
        checkpoint, "write_through", "before",
        lambda path, *rest: path.name == "state.json" and "checkpoints" in path.parts,
    ),
    "after a checkpoint": Step(loop.RoundLoop, "save", "after"),
    "as the result is written": Step(writer.RunWriter, "save_parameters", "before"),
}  # fmt: skip


class Schedule:
    """Calls `act` at the first coming of each step in turn, once a round at most.

    So whoever is killed is missed, and replaced, before the next one is.
    """

    def __init__(self, steps: Sequence[str], act: Callable[[], None]) -> None:
        self.left, self._act = list(steps), act
        self._round, self._last = 0, -1

    def arm(self, patch: pytest.MonkeyPatch) -> None:
        """Watches for the steps."""
        by_place: dict[tuple[int, str], list[str]] = {}
        for name in self.left:
            step = STEPS[name]
            by_place.setdefault((id(step.owner), step.name), []).append(name)
        for names in by_place.values():
            step = STEPS[names[0]]
            patch.setattr(
                step.owner, step.name, self._watched(getattr(step.owner, step.name), names)
            )
        begin = loop.RoundLoop._round

        def round_(of: loop.RoundLoop, server_round: int) -> None:
            self._round = server_round
            begin(of, server_round)

        patch.setattr(loop.RoundLoop, "_round", round_)
        evaluated = ray_cohorts.RayCohorts._evaluated

        def evaluate(*arguments: Any) -> Any:
            inside.add("evaluation")
            try:
                return evaluated(*arguments)
            finally:
                inside.clear()

        patch.setattr(ray_cohorts.RayCohorts, "_evaluated", evaluate)

    def _watched(self, real: Any, names: Sequence[str]) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            due = self.left and self.left[0] in names and STEPS[self.left[0]]
            if self._round == self._last or (due and not due.wanted(*arguments, **named)):
                due = None
            if due and due.when == "before":
                self._fire()
            result = real(*arguments, **named)
            if due and due.when == "after":
                self._fire()
            return result

        return call

    def _fire(self) -> None:
        del self.left[0]
        self._last = self._round
        self._act()


def family(root: int) -> set[psutil.Process]:
    """Returns what a process has started, and what Ray has for it."""
    try:
        return set(psutil.Process(root).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def workers(root: int) -> list[psutil.Process]:
    """Returns the workers of a driver, by their numbers."""
    found = []
    for each in sorted(family(root), key=lambda process: process.pid):
        with suppress(psutil.NoSuchProcess):
            if each.name().startswith("ray::Actor"):
                found.append(each)
    return found


def some_workers(root: int, patience: float = 120.0) -> list[psutil.Process]:
    """Returns them once there are any."""
    end = time.monotonic() + patience
    while not (found := workers(root)):
        assert time.monotonic() < end, "there is no worker to kill"
        time.sleep(0.05)
    return found


def die() -> None:
    """Ends this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


if __name__ == "__main__":
    Schedule([sys.argv[1]], die).arm(pytest.MonkeyPatch())
    sys.exit(execute(sys.argv[2:]))
