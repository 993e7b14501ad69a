"""Figures of predicted probabilities: reliability diagrams and out-of-distribution scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike

from fedsim.metrics.classification import Reliability, auroc
from fedsim.report.style import (
    COLOURS,
    INK,
    MUTED,
    REFERENCE,
    colour,
    legend,
    new_figure,
    place,
    plain,
    styled,
)

MAX_COLUMNS = 4
FEW = 10  # bins with fewer examples are drawn hollow: their accuracy is mostly noise
OUTSIDE = COLOURS[1]


@styled
def reliability_diagram(curves: Mapping[str, Reliability], order: Sequence[str] = ()) -> Figure:
    """Draws accuracy against confidence for each label, over the count of examples in each bin.

    order: all labels of a report, for their colours. The shaded gaps are what
    the ECE averages, weighted by the counts below.
    """
    fig, columns, rows = _grid(len(curves), 2.75, 3.7)
    heights = [3, 1] * rows
    axes = fig.subplots(
        2 * rows, columns, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    for ax in axes.ravel():
        ax.set_axis_off()
    for i, (label, curve) in enumerate(curves.items()):
        row, column = divmod(i, columns)
        top, below = axes[2 * row, column], axes[2 * row + 1, column]
        for ax in (top, below):
            ax.set_axis_on()
        _reliability(top, curve, colour(place(label, order, i)))
        top.set_title(plain(label, 26))
        below.bar(curve.edges[:-1], curve.count, np.diff(curve.edges), align="edge",
                  color=REFERENCE, edgecolor="white", lw=0.6)  # fmt: skip
        below.set_xlabel("Confidence", color=MUTED)
        below.set_xlim(0, 1)
        below.set_yscale("symlog", linthresh=10)
        below.set_ylim(bottom=0)
        below.set_yticks([0, 10, 100, 1000, 10_000][: 2 + _digits(curve)])
        below.minorticks_off()
        if column == 0:
            top.set_ylabel("Accuracy", color=MUTED)
            below.set_ylabel("Examples", color=MUTED)
        else:
            top.tick_params(labelleft=False)
    return fig


@styled
def ood_histogram(scores: Mapping[str, tuple[ArrayLike, ArrayLike]], score: str) -> Figure:
    """Draws each label's score on known against unknown inputs, with its AUROC.

    scores: label → (in-distribution, out-of-distribution), higher meaning less certain.
    score: what it is and its unit, "Predictive entropy (nats)".
    """
    fig, columns, rows = _grid(len(scores), 2.9, 2.5)
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    both = [np.concatenate([np.ravel(a), np.ravel(b)]) for a, b in scores.values()]
    everything = np.concatenate(both) if both else np.zeros(1)
    finite = everything[np.isfinite(everything)]
    top = float(finite.max()) if len(finite) else 1.0
    bins = np.linspace(min(float(finite.min()), 0.0) if len(finite) else 0.0, top or 1.0, 36)
    for ax in axes[len(scores) :]:
        ax.set_axis_off()
    for i, (ax, (label, (inside, outside))) in enumerate(zip(axes, scores.items(), strict=False)):
        for values, shade, name in (
            (inside, "#8C959F", "in-distribution"),
            (outside, OUTSIDE, "out-of-distribution"),
        ):
            flat = np.ravel(np.asarray(values, dtype=np.float64))
            weights = np.full(len(flat), 1 / max(len(flat), 1))
            ax.hist(flat, bins.tolist(), weights=weights, color=shade, alpha=0.35, lw=0)
            ax.hist(
                flat,
                bins.tolist(),
                weights=weights,
                histtype="step",
                color=shade,
                lw=1.4,
                label=name,
            )
        ax.set_title(plain(label, 26))
        ax.text(0.97, 0.95, f"AUROC {auroc(inside, outside):.3f}", transform=ax.transAxes,
                ha="right", va="top", fontsize=9.5, color=INK)  # fmt: skip
        if i // columns == rows - 1:
            ax.set_xlabel(score, color=MUTED)
        if i % columns == 0:
            ax.set_ylabel("Share of examples", color=MUTED)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0].set_ylim(top=1.18 * axes[0].get_ylim()[1])  # room for the words
    if scores:
        handles, names = axes[0].get_legend_handles_labels()
        fig.legend(handles, names, loc="outside upper left", ncols=2)
    return fig


def _reliability(ax: Axes, curve: Reliability, shade: str) -> None:
    filled = curve.count > 0
    middle = (curve.edges[:-1] + curve.edges[1:])[filled] / 2
    width = np.diff(curve.edges)[filled]
    confidence, hit, count = curve.confidence[filled], curve.accuracy[filled], curve.count[filled]
    ax.bar(middle, hit - confidence, width, bottom=confidence, color=shade, alpha=0.18, lw=0)
    ax.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
    many = count >= FEW
    ax.plot(confidence[many], hit[many], "o-", color=shade, ms=5, lw=1.6)
    ax.plot(confidence[~many], hit[~many], "o", mec=shade, mfc="white", ms=5,
            label=f"fewer than {FEW} examples" if (~many).any() else None)  # fmt: skip
    legend(ax, loc="lower right", fontsize=8, handletextpad=0.1)
    gap = float(np.sum(count * np.abs(hit - confidence)) / count.sum()) if filled.any() else np.nan
    ax.text(0.04, 0.95, f"ECE {gap:.3f}\n{len(curve.count)} bins", transform=ax.transAxes,
            va="top", fontsize=9.5)  # fmt: skip
    ax.set_ylim(0, 1.02)


def _digits(curve: Reliability) -> int:
    return int(np.floor(np.log10(max(int(curve.count.max(initial=1)), 1))))


def _grid(n: int, width: float, height: float) -> tuple[Figure, int, int]:
    columns = min(max(n, 1), MAX_COLUMNS)
    rows = -(-max(n, 1) // columns)
    return new_figure(width * columns + 0.5, height * rows + 0.3), columns, rows
