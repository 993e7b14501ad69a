"""Figures of bandits: regret over pulls, and the cells that were kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from fedsim.bandits.axes import to_unit
from fedsim.bandits.cells import CellTree
from fedsim.report.content import CellPicture
from fedsim.report.curves import seeds_words
from fedsim.report.runlike import RunLike, labels
from fedsim.report.series import values_of
from fedsim.report.style import (
    COLOURS,
    INK,
    MUTED,
    REFERENCE,
    colour,
    dash,
    new_figure,
    plain,
    styled,
)

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
POINTS = 200
MAX_PANELS = 8


@dataclass(frozen=True)
class RegretCurve:
    """One label. pulls: (points,) of a client; values: (seeds, points), NaN before the first."""

    label: str
    pulls: Floats
    values: Floats


def regret_of(runs: Sequence[RunLike], name: str) -> list[RegretCurve]:
    """Returns the curves of metric train/`name` over pulls, for each label that has them.

    Seeds report at different numbers of pulls: the cumulative regret is interpolated between them,
    a simple regret holds until the next one.
    """
    found = []
    for label in labels(list(runs)):
        lines: list[tuple[Floats, Floats]] = []
        for run in runs:
            if run.record.label == label:
                spent = values_of(run.metrics, "train", "pulls")
                measured = values_of(run.metrics, "train", name)
                shared = measured.index.intersection(spent.index)
                lines.append((_floats(spent[shared]), _floats(measured[shared])))
        if not lines or any(not len(x) for x, _ in lines):
            continue
        end = min(float(x[-1]) for x, _ in lines)
        grid: Floats = np.linspace(0, end, POINTS)
        if name == "regret":
            values = [np.interp(grid, [0, *x], [0, *y]) for x, y in lines]
        else:
            grid = np.unique(np.concatenate([x[x <= end] for x, _ in lines]))
            values = [_held(grid, x, y) for x, y in lines]
        found.append(RegretCurve(label, grid, np.array(values)))
    return found


def _floats(values: pd.Series[float]) -> Floats:
    return np.asarray(values, np.float64)


def _held(grid: Floats, x: Floats, y: Floats) -> Floats:
    place = np.searchsorted(x, grid, side="right") - 1
    return np.where(place >= 0, y[np.maximum(place, 0)], np.nan)


@styled
def regret_plot(panels: Mapping[str, Sequence[RegretCurve]]) -> Figure:
    """Draws a panel for each title: the mean over seeds, and a band of ± one sd."""
    fig = new_figure(4.8 * len(panels), 3.8)
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    order = list(dict.fromkeys(c.label for curves in panels.values() for c in curves))
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        for curve in curves:
            at = order.index(curve.label)
            known = np.isfinite(curve.values).all(0)
            x, y = curve.pulls[known], curve.values[:, known]
            mean = y.mean(0)
            stepped = "steps-post" if title.startswith("Simple") else "default"
            ax.plot(x, mean, color=colour(at), ls=dash(at), label=plain(curve.label),
                    drawstyle=stepped)  # fmt: skip
            if len(y) > 1:
                sd = y.std(0, ddof=1)
                step = "post" if title.startswith("Simple") else None
                ax.fill_between(x, np.maximum(mean - sd, 0), mean + sd, color=colour(at),
                                alpha=0.16, lw=0, step=step)  # fmt: skip
        if title.startswith("Simple"):
            _logarithmic(ax, curves)
        ax.set_title(title)
        ax.set_xlabel("Pulls of a client", color=MUTED)
    handles, names = axes[0].get_legend_handles_labels()
    seeds = {len(c.values) for curves in panels.values() for c in curves}
    fig.legend(handles, names, loc="outside upper left", ncols=min(len(handles), 5),
               title=seeds_words(seeds), title_fontsize=8.5, alignment="left")  # fmt: skip
    return fig


def _logarithmic(ax: Axes, curves: Sequence[RegretCurve]) -> None:
    """Takes a logarithmic axis if all values are positive and spread over a decade."""
    means = [np.nanmean(c.values, axis=0) for c in curves]
    values = np.concatenate([m[np.isfinite(m)] for m in means])
    if len(values) and values.min() > 0 and values.max() > 10 * values.min():
        ax.set_yscale("log")


@styled
def cells_plot(picture: CellPicture) -> Figure:
    """Draws what was pulled and kept: a row per depth in one dimension, a panel per depth in two.

    What clients hold on their own follows after the depths of all clients.
    """
    tree = picture.tree
    return _line(picture, tree) if len(tree.axes) == 1 else _square(picture, tree)


def _line(picture: CellPicture, tree: CellTree) -> Figure:
    a = picture.arrays
    fig = new_figure(7.2, 4.2)
    ax = fig.subplots()
    for depth in np.unique(a["depth"]):
        of = a["depth"] == depth
        for kept, shade in ((False, REFERENCE), (True, COLOURS[0])):
            cells = a["cell"][of & (a["kept"].astype(bool) == kept)].astype(np.int64)
            low, high = tree.bounds(int(depth), cells)
            ax.barh(np.full(len(cells), depth), (high - low)[:, 0], left=low[:, 0], height=0.8,
                    color=shade, edgecolor="white", lw=0.4)  # fmt: skip
    for depth in np.unique(a["own_depth"]):
        cells = np.unique(a["own_cell"][a["own_depth"] == depth]).astype(np.int64)
        low, high = tree.bounds(int(depth), cells)
        ax.barh(np.full(len(cells), depth), (high - low)[:, 0], left=low[:, 0], height=0.8,
                color=COLOURS[1])  # fmt: skip
    _recommendations(ax, picture, tree, height=float(np.max(picture.depths)) + 1)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    _ticks(ax, tree, 0, "x")
    ax.set_ylabel("Depth", color=MUTED)
    ax.grid(visible=False)
    return fig


def _square(picture: CellPicture, tree: CellTree) -> Figure:
    a = picture.arrays
    together = [int(d) for d in np.unique(a["depth"])]
    shown = together if len(together) < MAX_PANELS else sorted(
        {together[i] for i in np.linspace(0, len(together) - 1, MAX_PANELS - 1).round().astype(int)}
    )  # fmt: skip
    count = len(shown) + 1
    columns = min(4, count)
    rows = -(-count // columns)
    fig = new_figure(2.5 * columns, 2.6 * rows)
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax, depth in zip(axes, shown, strict=False):
        of = a["depth"] == depth
        for kept, shade in ((False, REFERENCE), (True, COLOURS[0])):
            _fill(ax, tree, depth, a["cell"][of & (a["kept"].astype(bool) == kept)], shade)
        ax.set_title(f"depth {depth}: {int(a['kept'][of].sum())} of {int(of.sum())} kept")
    last = axes[len(shown)]
    for client in np.unique(a["own_client"]):
        own = a["own_client"] == client
        depth = int(a["own_depth"][own][0])
        _fill(last, tree, depth, a["own_cell"][own], COLOURS[1], alpha=0.35)
    _recommendations(last, picture, tree)
    last.set_title("recommended")
    for ax in axes[count:]:
        ax.set_axis_off()
    for ax in axes[:count]:
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_aspect("equal")
        ax.grid(visible=False)
        _ticks(ax, tree, 0, "x")
        _ticks(ax, tree, 1, "y")
    return fig


def _fill(
    ax: Axes, tree: CellTree, depth: int, cells: NDArray[np.generic], shade: str, alpha: float = 1.0
) -> None:
    low, high = tree.bounds(depth, cells.astype(np.int64))
    patches = [
        Rectangle((x, y), width, height)
        for (x, y), (width, height) in zip(low, high - low, strict=True)
    ]
    ax.add_collection(
        PatchCollection(patches, facecolor=shade, edgecolor="white", lw=0.4, alpha=alpha)
    )


def _recommendations(
    ax: Axes, picture: CellPicture, tree: CellTree, height: float | None = None
) -> None:
    """Marks the clients' recommended points, and their optima where they are known."""
    for name, marker, shade in (("optima", "x", INK), ("best", "o", COLOURS[2])):
        points = picture.arrays.get(name)
        if points is None or not len(points):
            continue
        unit = to_unit(tree.axes, points.astype(np.float64))
        y = np.full(len(unit), height) if height is not None else unit[:, 1]
        ax.plot(unit[:, 0], y, marker, color=shade, ms=4, mew=1, alpha=0.7, ls="none",
                label={"optima": "optimum", "best": "recommended"}[name])  # fmt: skip
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, loc="best", frameon=True)


def _ticks(ax: Axes, tree: CellTree, axis: int, which: str) -> None:
    """Labels the unit interval with the axis' own values."""
    at = np.linspace(0, 1, 3)
    own = tree.axes[axis]
    words = [f"{v:.3g}" for v in own.value(at)]
    if which == "x":
        ax.set_xticks(at, words)
        ax.set_xlabel(plain(own.name), color=MUTED)
    else:
        ax.set_yticks(at, words)
        ax.set_ylabel(plain(own.name), color=MUTED)
