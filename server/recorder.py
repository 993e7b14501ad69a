"""Where the round loop writes, and the writer that keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Recorder(Protocol):
    """Where the loop writes; fedsim.runs.RunWriter is one."""

    def log_metrics(self, round: int, split: str, metrics: Mapping[str, float]) -> None: ...
    def log_client_metrics(
        self,
        round: int,
        split: str,
        partitions: Sequence[int],
        metrics: Mapping[str, Sequence[float]],
    ) -> None: ...
    def event(self, kind: str, round: int | None = None, **fields: object) -> None: ...
    def end_round(self, round: int) -> None: ...
    def save_draw(self, round: int, draw: Mapping[str, Tensor]) -> None: ...
    def save_checkpoint(
        self, round: int, tensors: Mapping[str, Tensor], state: object, keep: int = 2
    ) -> None: ...


class Nowhere:
    """A recorder that keeps nothing."""

    def log_metrics(self, round: int, split: str, metrics: Mapping[str, float]) -> None:
        """Drops them."""

    def log_client_metrics(
        self,
        round: int,
        split: str,
        partitions: Sequence[int],
        metrics: Mapping[str, Sequence[float]],
    ) -> None:
        """Drops them."""

    def event(self, kind: str, round: int | None = None, **fields: object) -> None:
        """Drops it."""

    def end_round(self, round: int) -> None:
        """Does nothing."""

    def save_draw(self, round: int, draw: Mapping[str, Tensor]) -> None:
        """Drops it."""

    def save_checkpoint(
        self, round: int, tensors: Mapping[str, Tensor], state: object, keep: int = 2
    ) -> None:
        """Drops it."""
