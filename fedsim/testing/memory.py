"""A recorder that keeps what a run would write to its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsim.messages import Arrays
from fedsim.runs import exact, tensors


@dataclass
class Memory:
    """Keeps everything that a round loop writes.

    metrics: by (round, split). client_metrics: (round, partitions, values by name). events: (kind,
    round, fields). draws, checkpoints: by round. ended: the rounds that have ended.
    """

    metrics: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)
    client_metrics: list[tuple[int, list[int], dict[str, list[float]]]] = field(
        default_factory=list
    )
    events: list[tuple[str, int | None, dict[str, Any]]] = field(default_factory=list)
    draws: dict[int, Arrays] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    checkpoints: dict[int, tuple[dict[str, Tensor], Any]] = field(default_factory=dict)

    def log_metrics(self, round: int, split: str, metrics: Mapping[str, float]) -> None:
        """Keeps them."""
        self.metrics.setdefault((round, split), {}).update(metrics)

    def log_client_metrics(
        self,
        round: int,
        split: str,
        partitions: Sequence[int],
        metrics: Mapping[str, Sequence[float]],
    ) -> None:
        """Keeps them."""
        self.client_metrics.append(
            (round, list(partitions), {k: list(v) for k, v in metrics.items()})
        )

    def event(self, kind: str, round: int | None = None, **fields: object) -> None:
        """Keeps it."""
        self.events.append((kind, round, fields))

    def end_round(self, round: int) -> None:
        """Notes it."""
        self.ended.append(round)

    def save_draw(self, round: int, draw: Mapping[str, Tensor]) -> None:
        """Keeps it."""
        self.draws[round] = dict(draw)

    def save_checkpoint(
        self,
        round: int,
        values: Mapping[str, Tensor],
        state: object,
        keep: int = 2,
        keep_every: int = 0,
    ) -> None:
        """Keeps what the run's folder would give back: the same through bytes and JSON."""
        saved = tensors.from_bytes(tensors.to_bytes(values))
        self.checkpoints[round] = (saved, exact.loads(exact.dumps(state)))
