"""Posterior marginals over a reference: the figure that shows the bias no diagnostic can see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedsim.metrics.distances import wasserstein1_marginal
from fedsim.report.style import (
    INK,
    MUTED,
    REFERENCE,
    colour,
    dash,
    new_figure,
    place,
    plain,
    styled,
)

Floats = NDArray[np.float64]

POINTS = 240
TAIL = 0.001  # the x-axis of a panel leaves out this share of all draws on either side


@styled
def posterior_marginals(
    draws: Mapping[str, Floats],
    reference: Floats,
    names: Sequence[str],
    *,
    reference_label: str = "reference (NUTS on the pooled data)",
    title: str = "",
    columns: int = 4,
    order: Sequence[str] = (),
) -> Figure:
    """Draws one panel per scalar: the methods' densities as lines over the reference's as an area.

    draws: label → (n, d); reference: (m, d); names: d. order: all
    labels of a report, for their colours. The figures in a panel are W1 to the
    reference in its standard deviations, by label in the order of the legend. Densities are
    Gaussian kernel estimates with Scott's bandwidth.
    """
    d = reference.shape[1]
    columns = min(columns, d)
    rows = -(-d // columns)
    fig = new_figure(2.3 * columns, 1.65 * rows + (1.1 if title else 0.8))
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[d:]:
        ax.set_axis_off()
    distance = {label: wasserstein1_marginal(x, reference) for label, x in draws.items()}
    at = {label: place(label, order, j) for j, label in enumerate(draws)}
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        own = {label: x[:, i] for label, x in draws.items()}
        _panel(ax, own, reference[:, i], reference_label, at)
        ax.set_title(plain(name, 24), fontsize=9.5, fontweight="normal")
        for j, label in enumerate(draws):
            ax.text(0.985, 0.97 - 0.145 * j, f"{distance[label][i]:.2f}", color=colour(at[label]),
                    transform=ax.transAxes, ha="right", va="top", fontsize=8.5)  # fmt: skip
    handles, labels = axes[0].get_legend_handles_labels()
    if title:
        fig.suptitle(plain(title, 90), x=0.01, ha="left", fontsize=12, fontweight="bold")
    fig.legend(handles, labels, loc="outside lower left", ncols=len(handles), handlelength=1.8)
    axes[0].annotate("W1 / sd", (0.985, 1.0), xycoords="axes fraction", ha="right", va="bottom",
                     fontsize=7.5, color=MUTED)  # fmt: skip
    return fig


def _panel(
    ax: Axes, draws: Mapping[str, Floats], reference: Floats, label: str, at: Mapping[str, int]
) -> None:
    everything = [x[np.isfinite(x)] for x in (reference, *draws.values())]
    low = min(float(np.quantile(x, TAIL)) for x in everything if len(x))
    high = max(float(np.quantile(x, 1 - TAIL)) for x in everything if len(x))
    pad = 0.08 * (high - low) or 1.0
    x = np.linspace(low - pad, high + pad, POINTS)
    area = density(reference, x)
    ax.fill_between(x, area, color=REFERENCE, lw=0, label=plain(label))
    ax.plot(x, area, color=MUTED, lw=0.7)
    for name, values in draws.items():
        j = at[name]
        ax.plot(x, density(values, x), color=colour(j), ls=dash(j), lw=1.7, label=plain(name))
    ax.set_yticks([])
    ax.set_ylim(0, 1.12 * ax.get_ylim()[1])
    ax.set_xlim(x[0], x[-1])
    ax.locator_params(axis="x", nbins=4)
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8, length=2)


def density(values: Floats, x: Floats) -> Floats:
    """Returns the kernel density estimate at `x`; NaN where the draws hold NaN or never move."""
    from scipy.stats import gaussian_kde

    if not np.isfinite(values).all() or len(values) < 2 or not np.ptp(values) > 0:
        return np.full(x.shape, np.nan)
    return np.asarray(gaussian_kde(values)(x), dtype=np.float64)
