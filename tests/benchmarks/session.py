"""One side at work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tests.benchmarks.workloads import Workload


class Task(Protocol):
    """What the sides of a comparison have to do; `Workload` is one."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def rounds(self) -> int:
        """Rounds timed together, so that a repetition is long enough to be measured."""

    @property
    def warm_up(self) -> int:
        """Rounds before anything is timed, after which the sides' results are compared."""

    @property
    def tolerance(self) -> float: ...
    def disagreement(self, one: Sequence[float], other: Sequence[float]) -> float:
        """Returns how far two results are apart, in the tolerance's unit."""


class Session:
    """Base of all sides. It sets its own number of intra-op threads whenever it goes on."""

    workload: Workload

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds; this is what is timed."""
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        """Returns the global parameters, in the order of the workload's model."""
        raise NotImplementedError

    def result(self) -> list[float]:
        """Returns what is compared with the other sides' result."""
        return [self.workload.result(self.parameters())]

    def peak_mb(self) -> float | None:
        """Returns the peak resident memory of the side's own processes, if it has any."""
        return None

    def measures(self) -> dict[str, float]:
        """Returns what else is known at the end, by name."""
        return {}

    def close(self) -> None:
        """Ends what the side has started."""
