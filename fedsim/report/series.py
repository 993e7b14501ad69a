"""Metrics of several runs as curves: one per label, seeds stacked, over a chosen x-axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.report.runlike import RunLike, labels

if TYPE_CHECKING:
    import pandas as pd

XAxis = Literal["rounds", "bytes", "gradients", "seconds", "simulated_seconds"]
Floats = NDArray[np.float64]

# The "system" metrics of a round that each axis sums up.
COSTS: dict[str, tuple[str, ...]] = {
    "bytes": ("bytes_up", "bytes_down"),
    "gradients": ("gradients",),
    "seconds": ("seconds",),
    "simulated_seconds": ("simulated_seconds",),
}


@dataclass(frozen=True)
class Series:
    """One label's curve: x (points,), the seeds' mean where it differs; y (seeds, points)."""

    label: str
    x: Floats
    y: Floats


def series(runs: Sequence[RunLike], split: str, name: str, x: XAxis = "rounds") -> list[Series]:
    """Returns the curve of metric `split`/`name` of every label that has it and that x-axis.

    The points are the rounds that all seeds of the label logged: a mean over seeds never changes
    its seeds along the curve.
    """
    found = []
    for label in labels(list(runs)):
        own = [run.metrics for run in runs if run.record.label == label]
        values = [values_of(metrics, split, name) for metrics in own]
        costs = [cost(metrics, x) for metrics in own]
        rounds = _shared(values)
        if not len(rounds) or any(c is None for c in costs):
            continue
        y = np.array([v[rounds].to_numpy(np.float64) for v in values])
        across = [_at(c, rounds) for c in costs if c is not None]
        found.append(Series(label, np.mean(across, axis=0), y))
    return found


def curves_of(runs: Sequence[RunLike], column: str, x: XAxis = "rounds") -> list[Series]:
    """Returns `series` of a metric named "split/name"."""
    split, name = column.split("/", 1)
    return series(runs, split, name, x)


def cost(metrics: pd.DataFrame, x: XAxis) -> pd.Series[float] | None:
    """Returns what a run had spent at the end of each round, by round; None if it is not logged.

    bytes: sent up and down. gradients: per-example gradients over all clients, of one chain where
    there are several. seconds: of the rounds. simulated_seconds: of the rounds, on the simulated
    clock. All are sums of the per-round metrics of the split "system".
    """
    import pandas as pd

    if x == "rounds":
        rounds = np.unique(metrics["round"])
        return pd.Series(rounds.astype(np.float64), index=rounds)
    parts = [values_of(metrics, "system", name) for name in COSTS[x]]
    known = [part for part in parts if len(part)]
    if not known:
        return None
    return pd.concat(known, axis=1).fillna(0.0).sum(axis=1).sort_index().cumsum()


def last(metrics: pd.DataFrame, split: str, name: str) -> float:
    """Returns the value of the latest round that logged `split`/`name`; NaN if none did."""
    values = values_of(metrics, split, name)
    return float(values.iloc[-1]) if len(values) else float("nan")


def values_of(metrics: pd.DataFrame, split: str, name: str) -> pd.Series[float]:
    """Returns a metric by round."""
    rows = metrics[(metrics["split"] == split) & (metrics["name"] == name)]
    return rows.set_index("round")["value"].sort_index()


def _shared(values: Sequence[pd.Series[float]]) -> NDArray[np.int64]:
    shared = set(values[0].index)
    for other in values[1:]:
        shared &= set(other.index)
    return np.array(sorted(shared), dtype=np.int64)


def _at(spent: pd.Series[float], rounds: NDArray[np.int64]) -> Floats:
    """What had been spent by each round; an evaluation before the first round has cost nothing."""
    place = np.searchsorted(spent.index.to_numpy(), rounds, side="right")
    return np.concatenate([[0.0], spent.to_numpy(np.float64)])[place]
