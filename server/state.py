"""What the round loop is told, what it keeps from round to round, and what it has spent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fedsim.grids.clock import SimulatedClock
from fedsim.messages import Arrays

Metrics = dict[str, float]


@dataclass(frozen=True)
class Stopping:
    """Ends the run when split/name has not improved by min_delta for `patience` evaluations."""

    split: str
    name: str
    mode: Literal["min", "max"]
    patience: int
    min_delta: float
    restore_best: bool


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs of a scenario."""

    rounds: int
    seed: int
    server_every: int = 1
    clients_every: int = 0
    on_bad_reply: Literal["drop", "fail"] = "drop"
    quorum: float = 0.5
    stopping: Stopping | None = None
    checkpoint_rounds: int = 10
    checkpoint_seconds: float | None = None
    keep: int = 2
    keep_every: int = 0
    save_draws: bool = True
    clock: SimulatedClock | None = None
    over_sampling: float = 1.0


@dataclass
class Totals:
    """What has been spent so far; gradients are per-example gradients of one chain."""

    bytes_up: float = 0.0
    bytes_down: float = 0.0
    gradients: float = 0.0
    seconds: float = 0.0
    dropped: float = 0.0
    draws: float = 0.0
    simulated_seconds: float = 0.0
    late: float = 0.0


@dataclass
class LoopState:
    """Everything that changes from round to round, beside the strategy, grid and evaluator."""

    arrays: Arrays
    round: int = 0
    totals: Totals = field(default_factory=Totals)
    best: float | None = None
    best_round: int = 0
    waited: int = 0
    best_arrays: Arrays | None = None
    stopped: bool = False
