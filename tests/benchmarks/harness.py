"""Times sides against each other: they take turns, so that a busy machine slows all of them."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from tests.benchmarks.remote import SideError
from tests.benchmarks.session import Session, Task


@dataclass(frozen=True)
class Entry:
    """One side of a comparison: how it starts, and how many rounds a repetition of it has."""

    key: str
    name: str
    task: Task
    start: Callable[[], Session]
    rounds: int


@dataclass(frozen=True)
class Timing:
    """One side's seconds a round, one entry a repetition, and what it arrived at.

    result: after the warm-up. peak_mb: resident memory of a side with processes of its own.
    measures: whatever else the side knows of itself. failure: why there are no times.
    """

    key: str
    name: str
    task: str
    seconds: list[float]
    result: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def median(self) -> float:
        """Median seconds a round."""
        return median(self.seconds)

    def ratio(self, other: Timing) -> float:
        """Median over the repetitions of this side's time over the other's."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


class DisagreementError(Exception):
    """The sides did not compute the same thing: their times cannot be compared."""


class _Runner:
    """A side at work; once it has failed, nothing more is asked of it."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.session: Session | None = None
        self.seconds: list[float] = []
        self.result: list[float] = []
        self.failure = ""

    def start(self) -> None:
        """Sets the side up and runs the rounds that are not counted."""
        self.session = self.entry.start()
        self.session.advance(self.entry.task.warm_up)
        self.result = self.session.result()

    def time(self) -> None:
        """Runs one repetition."""
        assert self.session is not None
        gc.collect()
        start = time.perf_counter()
        self.session.advance(self.entry.rounds)
        self.seconds.append((time.perf_counter() - start) / self.entry.rounds)

    def attempt(self, step: Callable[[], None]) -> None:
        """Does one step; the failure of a side in another process is that side's alone."""
        if self.failure:
            return
        try:
            step()
        except SideError as error:
            self.failure = str(error)
            print(f"{self.entry.name} fails: {error}", file=sys.stderr)

    def timing(self) -> Timing:
        """Returns what has been measured."""
        entry, session = self.entry, self.session
        if self.failure or session is None:
            return Timing(entry.key, entry.name, entry.task.name, [], failure=self.failure)
        return Timing(
            entry.key,
            entry.name,
            entry.task.name,
            self.seconds,
            self.result,
            session.peak_mb(),
            session.measures(),
        )

    def close(self) -> None:
        """Ends the side."""
        if self.session is not None:
            self.session.close()


def measure(entries: Sequence[Entry], repetitions: int) -> list[Timing]:
    """Runs the sides in turn, and in the opposite order every other time.

    Raises DisagreementError if a result is further than the task's tolerance from that of the
    first side with the same task.
    """
    runners = [_Runner(entry) for entry in entries]
    with ExitStack() as stack:
        for runner in runners:
            stack.callback(runner.close)
            runner.attempt(runner.start)
        _check(runners)
        for repetition in range(repetitions):
            for runner in runners if repetition % 2 else reversed(runners):
                runner.attempt(runner.time)
        return [runner.timing() for runner in runners]


def _check(runners: Sequence[_Runner]) -> None:
    first: dict[str, _Runner] = {}
    for runner in runners:
        if runner.failure:
            continue
        task = runner.entry.task
        other = first.setdefault(task.name, runner)
        apart = task.disagreement(runner.result, other.result)
        if not apart <= task.tolerance:
            raise DisagreementError(
                f"{task.name}: {runner.entry.name} is at {_shown(runner.result)} after"
                f" {task.warm_up} rounds and {other.entry.name} at {_shown(other.result)}: they"
                f" differ by {apart:.2g}, and {task.tolerance:g} is allowed"
            )


def _shown(result: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in result)
