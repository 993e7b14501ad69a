"""Who takes part in which workload. The first side of a workload is what the others are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tests.benchmarks.batched import BmmLoop, VmapLoop
from tests.benchmarks.engine import Fedsim
from tests.benchmarks.loops import EchoLoop, SequentialLoop, ThreadedLoop
from tests.benchmarks.workloads import Workload


class Session(Protocol):
    """One side at work. It sets its own number of intra-op threads whenever it goes on."""

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds; this is what is timed."""

    def parameters(self) -> list[Tensor]:
        """Returns the global parameters, in the order of the workload's model."""


@dataclass(frozen=True)
class Side:
    """name: as shown in the table. workloads: names. setup: starts a session, untimed."""

    name: str
    workloads: tuple[str, ...]
    setup: Callable[[Workload], Session]


SIDES = [
    Side("sequential torch loop", ("W1", "W2"), SequentialLoop),
    Side("torch.func vmap loop", ("W1",), VmapLoop),
    Side("hand-written bmm loop", ("W1",), BmmLoop),
    Side("torch loop in 2 threads", ("W2",), ThreadedLoop),
    Side("bare loop", ("W3-1k", "W3-1M"), EchoLoop),
    Side("fedsim", ("W1", "W2", "W3-1k", "W3-1M"), Fedsim),
]
