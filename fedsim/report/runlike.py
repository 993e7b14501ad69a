"""What a report asks of a run: the part of `fedsim.runs.Run` that is read here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pandas as pd


class RecordLike(Protocol):
    """Who a run is."""

    @property
    def label(self) -> str:
        """What is compared: the strategy, or the point of a grid."""

    @property
    def seed(self) -> int:
        """The run's seed; runs of one label differ in it."""


class RunLike(Protocol):
    """One run, as its folder holds it."""

    @property
    def id(self) -> str:
        """The run's id."""

    @property
    def record(self) -> RecordLike:
        """Label and seed."""

    @property
    def status(self) -> str:
        """ "finished", "failed", …"""

    @property
    def scenario(self) -> dict[str, Any]:
        """The resolved scenario."""

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, processor, git state."""

    @property
    def engine(self) -> dict[str, Any]:
        """The recorded execution plan."""

    @property
    def metrics(self) -> pd.DataFrame:
        """Columns round, split, name, value."""

    @property
    def events(self) -> pd.DataFrame:
        """Columns time, kind, round and the events' own fields."""


def labels(runs: list[RunLike]) -> list[str]:
    """Returns the labels in the order in which they first appear."""
    return list(dict.fromkeys(run.record.label for run in runs))
