"""Times sides against each other: they take turns, so that a busy machine slows all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tests.benchmarks.sides import Session, Side
from tests.benchmarks.workloads import Workload


@dataclass(frozen=True)
class Timing:
    """One side's seconds a round, one entry a repetition, and what it arrived at."""

    side: str
    seconds: list[float]
    result: float

    @property
    def median(self) -> float:
        """Median seconds a round."""
        return median(self.seconds)

    def ratio(self, other: Timing) -> float:
        """Median over the repetitions of this side's time over the other's."""
        return median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


class DisagreementError(Exception):
    """The sides did not compute the same thing: their times cannot be compared."""


def measure(workload: Workload, sides: Sequence[Side], repetitions: int) -> list[Timing]:
    """Runs every side for the same number of rounds; the first repetition is not counted.

    The order of the sides is reversed every other time. Raises DisagreementError if a final result
    is further than the workload's tolerance from the first side's.
    """
    sessions = [side.setup(workload) for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for repetition in range(repetitions + 1):
        turns = list(range(len(sides)))
        for turn in turns if repetition % 2 else reversed(turns):
            spent = _time(sessions[turn], workload.rounds)
            if repetition:
                seconds[turn].append(spent)
    results = [workload.result(session.parameters()) for session in sessions]
    timings = [
        Timing(side.name, times, result)
        for side, times, result in zip(sides, seconds, results, strict=True)
    ]
    _check(workload, timings)
    return timings


def _time(session: Session, rounds: int) -> float:
    gc.collect()
    start = time.perf_counter()
    session.advance(rounds)
    return (time.perf_counter() - start) / rounds


def _check(workload: Workload, timings: Sequence[Timing]) -> None:
    first = timings[0]
    for other in timings[1:]:
        if not abs(other.result - first.result) <= workload.tolerance * abs(first.result):
            raise DisagreementError(
                f"{workload.name}: {other.side} ends at {other.result:.6g}, {first.side} at"
                f" {first.result:.6g}; more than {workload.tolerance:.0%} apart"
            )
