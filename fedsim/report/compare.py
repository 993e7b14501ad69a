"""The final metrics of several runs, side by side: mean and spread over seeds, and what is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.report import sense
from fedsim.report.runlike import RunLike, labels
from fedsim.report.series import XAxis, cost, last

# The first split that any run has is the one whose metrics make the headline.
HEADLINE = ("test", "validation", "client", "train")
METRICS = ("accuracy", "nll", "brier", "ece", "rmse", "r2", "gaussian_nll", "loss")
MAX_METRICS = 6

BEST = (
    "Marked: the best mean, and every one within two standard errors of the difference to it. "
    "Nothing is marked where one seed was run, or where the seeds cannot tell anything apart."
)


@dataclass(frozen=True)
class Cell:
    """The last value of a metric, one per seed, and whether it is marked as best."""

    values: tuple[float, ...]
    best: bool = False

    @property
    def mean(self) -> float:
        """The seeds' mean; NaN if any is."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float | None:
        """The seeds' sample standard deviation; None for one seed."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return sense.number(self.mean, self.sd)


@dataclass(frozen=True)
class Row:
    """One label. cells: by column. costs: mean over the seeds, where logged. statuses: by seed."""

    label: str
    seeds: tuple[int, ...]
    statuses: tuple[str, ...]
    cells: dict[str, Cell]
    costs: dict[XAxis, float]


@dataclass(frozen=True)
class Comparison:
    """columns: "split/name" of the metrics, in order. rows: one per label, in the order given."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def compare(runs: Sequence[RunLike], columns: Sequence[str] | None = None) -> Comparison:
    """Returns the last value of each metric ("split/name"), averaged over the seeds of a label.

    columns: chosen from what was logged if None: the known metrics of the first split of test,
    validation, client, train that any run has (all of them if none is known), then those of "ood".
    """
    chosen = tuple(columns) if columns is not None else headline_columns(runs)
    rows = [_row(label, runs, chosen) for label in labels(list(runs))]
    for column in chosen:
        for row, best in zip(rows, best_of([r.cells[column] for r in rows], column), strict=True):
            cell = row.cells[column]
            row.cells[column] = Cell(cell.values, best)
    return Comparison(chosen, tuple(rows))


def headline_columns(runs: Sequence[RunLike]) -> tuple[str, ...]:
    """Returns the "split/name" columns of a headline table: at most 6, and those of "ood"."""
    logged: dict[str, dict[str, None]] = {}
    for run in runs:
        pairs = run.metrics[["split", "name"]].drop_duplicates()
        for split, name in pairs.itertuples(index=False):
            logged.setdefault(split, {})[name] = None
    split = next((s for s in HEADLINE if s in logged), None)
    if split is None:
        return ()
    names = [name for name in METRICS if name in logged[split]]
    names += [name for name in logged[split] if name not in names and sense.direction(name)]
    names = names or list(logged[split])  # a Flower app calls its metrics as it likes
    outside = [name for name in logged.get("ood", {}) if sense.direction(name) > 0]
    return tuple(f"{split}/{name}" for name in names[:MAX_METRICS]) + tuple(
        f"ood/{name}" for name in outside[:2]
    )


def best_of(cells: Sequence[Cell], column: str) -> list[bool]:
    """Returns which cells to mark as best (see `BEST`)."""
    sign = sense.direction(column)
    known = [i for i, c in enumerate(cells) if np.isfinite(c.mean) and len(c.values) > 1]
    if not sign or len(cells) < 2 or len(known) < len(cells):
        return [False] * len(cells)
    first = max(known, key=lambda i: sign * cells[i].mean)
    marks = [abs(c.mean - cells[first].mean) <= 2 * _error(c, cells[first]) for c in cells]
    marks[first] = True
    return [False] * len(cells) if all(marks) else marks


def _error(a: Cell, b: Cell) -> float:
    return float(np.sqrt((a.sd or 0.0) ** 2 / len(a.values) + (b.sd or 0.0) ** 2 / len(b.values)))


def _row(label: str, runs: Sequence[RunLike], columns: Sequence[str]) -> Row:
    own = [run for run in runs if run.record.label == label]
    frames = [run.metrics for run in own]
    cells = {c: Cell(tuple(last(frame, *c.split("/", 1)) for frame in frames)) for c in columns}
    costs: dict[XAxis, float] = {}
    axes: tuple[XAxis, ...] = ("rounds", "gradients", "bytes", "seconds")
    for axis in axes:
        spent = [cost(frame, axis) for frame in frames]
        totals = [float(s.iloc[-1]) for s in spent if s is not None and len(s)]
        if len(totals) == len(frames):
            costs[axis] = float(np.mean(totals))
    seeds, statuses = [r.record.seed for r in own], [r.status for r in own]
    return Row(label, tuple(seeds), tuple(statuses), cells, costs)
