"""Figures that compare labels: metric curves over a cost, and bars of final values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from fedsim.report import sense
from fedsim.report.compare import Comparison
from fedsim.report.series import Series, XAxis
from fedsim.report.style import MUTED, colour, dash, new_figure, plain, styled

X_LABELS: dict[XAxis, str] = {
    "rounds": "Communication rounds",
    "bytes": "Bytes sent, up and down",
    "gradients": "Per-example gradients, all clients, one chain",
    "seconds": "Seconds",
    "simulated_seconds": "Simulated seconds",
}
SETTLED = 0.2  # the y-axis is chosen from what comes after this share of a curve's points


@styled
def metric_curves(
    curves: Mapping[str, Sequence[Series]], x: XAxis = "rounds", *, columns: int | None = None
) -> Figure:
    """Draws a panel for every metric: the mean over seeds, and a band of ± one sd.

    curves: metric name → one Series per label (`fedsim.report.series.series`). The y-axis fits what
    comes after the first fifth of each curve, so that the start does not hide the differences.
    """
    n = max(len(curves), 1)
    columns = min(columns or (2 if n <= 4 else 3), n)
    rows = -(-n // columns)
    fig = new_figure((4.6 if columns < 3 else 3.7) * columns, 3.0 * rows + 0.5)
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    order = list(dict.fromkeys(s.label for panel in curves.values() for s in panel))
    for ax, (metric, panel) in zip(axes, curves.items(), strict=False):
        _panel(ax, metric, panel, order)
        _x_axis(ax, x)
    for ax in axes[len(curves) :]:
        ax.set_axis_off()
    seeds = {len(s.y) for panel in curves.values() for s in panel}
    handles: dict[str, Artist] = {}
    for ax in axes[: len(curves)]:
        found, names = ax.get_legend_handles_labels()
        handles.update((str(n), artist) for n, artist in zip(names, found, strict=True))
    if handles:
        fig.legend(
            list(handles.values()),
            list(handles.keys()),
            loc="outside upper left",
            ncols=min(len(handles), 4),
            title=seeds_words(seeds),
            title_fontsize=8.5,
            alignment="left",
        )
    return fig


@styled
def comparison_bars(comparison: Comparison) -> Figure:
    """Draws final values, a panel per metric: a dot per seed, a bar for ± one sd, the mean.

    Each metric has a scale of its own rather than bars from zero, so that the spread over seeds
    can be seen beside the differences.
    """
    order = [row.label for row in comparison.rows]
    n = max(len(comparison.columns), 1)
    columns = n if n <= 4 else 3
    rows = -(-n // columns)
    fig = new_figure(2.6 * columns + 1.4, (0.42 * max(len(order), 2) + 1.0) * rows)
    axes = fig.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for ax, column in zip(axes, comparison.columns, strict=False):
        for at, row in enumerate(comparison.rows):
            cell = row.cells[column]
            y, mean, sd = np.asarray(cell.values), cell.mean, cell.sd or 0.0
            ax.plot([mean - sd, mean + sd], [at, at], color=colour(at), lw=7, alpha=0.3,
                    solid_capstyle="butt")  # fmt: skip
            ax.plot(y, np.full(len(y), at), "o", color=colour(at), ms=3.5, alpha=0.75, mew=0)
            ax.plot([mean], [at], "|", color=colour(at), ms=15, mew=2.4)
        ax.set_title(plain(sense.heading(column)))
        ax.set_yticks(range(len(order)), [plain(label, 28) for label in order])
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.margins(x=0.12)
        ax.grid(axis="y", visible=False)
    for ax in axes[len(comparison.columns) :]:
        ax.set_axis_off()
    return fig


def _panel(ax: Axes, metric: str, panel: Sequence[Series], order: Sequence[str]) -> None:
    settled = []
    for curve in panel:
        at = order.index(curve.label)
        mean = curve.y.mean(0)
        ax.plot(curve.x, mean, color=colour(at), ls=dash(at), label=plain(curve.label))
        low = high = mean
        if len(curve.y) > 1:
            sd = curve.y.std(0, ddof=1)
            low, high = mean - sd, mean + sd
            ax.fill_between(curve.x, low, high, color=colour(at), alpha=0.16, lw=0)
        if len(curve.x):
            ax.plot(curve.x[-1], mean[-1], "o", color=colour(at), ms=4.5)
        start = int(SETTLED * len(mean))
        settled += [low[start:], high[start:]]
        _mark_divergence(ax, curve.x, mean, colour(at))
    shown = np.concatenate(settled) if settled else np.zeros(0)
    shown = shown[np.isfinite(shown)]
    if len(shown) and np.ptp(shown) > 0:
        pad = 0.08 * np.ptp(shown)
        ax.set_ylim(shown.min() - pad, shown.max() + pad)
    ax.set_title(plain(sense.heading(metric)))


def _mark_divergence(ax: Axes, x: np.ndarray, mean: np.ndarray, shade: str) -> None:
    """Says where a curve became NaN instead of letting it end without a word."""
    bad = np.flatnonzero(~np.isfinite(mean))
    if len(bad):
        ax.axvline(x[bad[0]], color=shade, lw=1, ls=":")
        ax.annotate("NaN", (x[bad[0]], 0.02), xycoords=("data", "axes fraction"), fontsize=8,
                    color=shade, xytext=(3, 0), textcoords="offset points")  # fmt: skip


def _x_axis(ax: Axes, x: XAxis) -> None:
    ax.set_xlabel(X_LABELS[x], color=MUTED)
    if x in ("bytes", "gradients"):
        ax.xaxis.set_major_formatter(EngFormatter(unit="B" if x == "bytes" else "", sep=" "))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=x == "rounds"))
    ax.set_xlim(left=0)


def seeds_words(counts: set[int]) -> str:
    """Returns what a band over these numbers of seeds is."""
    if counts <= {1}:
        return "One seed: no spread is known"
    low, high = min(counts), max(counts)
    return f"Mean ± sd over {low if low == high else f'{low} to {high}'} seeds"
