"""Figures of a sampler's chains: traces with rank histograms, and the spread of R-hat and ESS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedsim.metrics.posterior import ESS_GOOD_PER_CHAIN, Diagnostics
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

RANK_BINS = 20
MAX_RHAT = 2.0  # larger ones are drawn in the last bin and counted in words


@styled
def trace_plot(draws: Mapping[str, NDArray[np.floating]]) -> Figure:
    """Draws the chains of a few scalars, and the histogram of each chain's ranks beside them.

    draws: name → (chains, draws). Chains that agree have flat rank histograms, inside the band
    that holds 95 % of the bins of independent draws (Vehtari et al. 2021, section 4).
    """
    n = max(len(draws), 1)
    fig = new_figure(8.6, 1.75 * n + 0.5)
    axes = fig.subplots(n, 2, squeeze=False, sharex="col", gridspec_kw={"width_ratios": [2.4, 1]})
    for row, (name, values) in zip(axes, draws.items(), strict=False):
        _trace(row[0], np.asarray(values, dtype=np.float64))
        _ranks(row[1], np.asarray(values, dtype=np.float64))
        row[0].set_title(plain(name))
    axes[-1, 0].set_xlabel("Draw", color=MUTED)
    axes[-1, 1].set_xlabel("Rank among all chains' draws", color=MUTED)
    handles, names = axes[0, 0].get_legend_handles_labels()
    if len(names) > 1:
        fig.legend(handles, names, loc="outside upper right", ncols=8, handlelength=1.2)
    return fig


@styled
def diagnostics_plot(found: Mapping[str, Diagnostics], order: Sequence[str] = ()) -> Figure:
    """Draws how R-hat and ESS are spread over the scalars of each label, with the usual limits."""
    n = max(len(found), 1)
    fig = new_figure(8.6, 1.8 * n + 0.5)
    axes = fig.subplots(n, 2, squeeze=False, sharex="col")
    every = [d.ess_bulk for d in found.values()] + [d.ess_tail for d in found.values()]
    known = np.concatenate(every) if every else np.ones(1)
    known = known[np.isfinite(known) & (known > 0)]
    top = max(float(known.max(initial=1.0)), ESS_GOOD_PER_CHAIN) * 1.1
    bottom = max(min(float(known.min(initial=top)), ESS_GOOD_PER_CHAIN) / 1.5, 0.5)
    bins = np.geomspace(bottom, top, 45)
    rhats = [d.rhat[np.isfinite(d.rhat)] for d in found.values()]
    widest = max((float(r.max(initial=1.02)) for r in rhats), default=1.02)
    edges = np.linspace(min(1.0, 0.999), min(max(widest * 1.005, 1.03), MAX_RHAT), 45)
    for i, (row, (label, d)) in enumerate(zip(axes, found.items(), strict=False)):
        shade = colour(place(label, order, i))
        _rhat(row[0], d, edges, shade)
        _ess(row[1], d, bins, shade)
        row[0].set_title(f"{plain(label)}: {len(d.names)} of {d.total} scalars", fontsize=10)
    axes[-1, 0].set_xlabel("Rank-normalised R-hat", color=MUTED)
    axes[-1, 1].set_xlabel("Effective sample size", color=MUTED)
    return fig


def worst_and_typical(
    draws: Mapping[str, NDArray[np.floating]], found: Diagnostics, worst: int = 2
) -> dict[str, NDArray[np.floating]]:
    """Returns the traces of the scalars with the largest R-hat and of a median one, titled so.

    draws: name → (chains, draws, *shape), as given to `diagnostics`.
    """
    from fedsim.metrics.posterior import scalar_names

    if not found.names:
        return {}
    table = found.worst(len(found.names))
    picked = list(table.index[:worst])
    middle = table.index[len(table) // 2]
    picked += [middle] if middle not in picked else []
    chosen = {}
    for key, values in draws.items():
        names = scalar_names(key, values.shape[2:])
        flat = values.reshape(*values.shape[:2], -1)
        chosen.update({name: flat[:, :, i] for i, name in enumerate(names) if name in picked})
    rhat = table["rhat"]
    return {
        f"{name}   R-hat {rhat[name]:.3f}{'' if name in picked[:worst] else ', the median'}":
        chosen[name] for name in picked
    }  # fmt: skip


def _trace(ax: Axes, values: NDArray[np.float64]) -> None:
    for c, chain in enumerate(values):
        ax.plot(chain, color=colour(c), lw=0.7, alpha=0.8, label=f"chain {c + 1}")
    ax.margins(x=0)
    ax.grid(axis="x", visible=False)


def _ranks(ax: Axes, values: NDArray[np.float64]) -> None:
    """Step histograms of ranks; the band is mean ± 1.96 sd of a binomial count."""
    from scipy.stats import rankdata

    chains, length = values.shape
    ranks = rankdata(values).reshape(values.shape)
    edges = np.linspace(0, values.size, RANK_BINS + 1)
    expected = length / RANK_BINS
    sd = np.sqrt(expected * (1 - 1 / RANK_BINS))
    ax.axhspan(
        max(expected - 1.96 * sd, 0), expected + 1.96 * sd, color=REFERENCE, alpha=0.45, lw=0
    )
    for c in range(chains):
        count = np.histogram(ranks[c], edges)[0]
        ax.stairs(count, edges, color=colour(c), lw=1.3)
    ax.set_xlim(0, values.size)
    ax.set_ylim(bottom=0)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False)


def _rhat(ax: Axes, d: Diagnostics, edges: NDArray[np.float64], shade: str) -> None:
    shown = np.clip(d.rhat[~np.isnan(d.rhat)], edges[0], edges[-1])
    ax.hist(shown, edges.tolist(), color=shade, alpha=0.85, lw=0)
    ax.axvline(d.rhat_good, color=INK, lw=1.1, ls=(0, (4, 3)))
    above = int((d.rhat > d.rhat_good).sum())
    words = f"{above} above {d.rhat_good:g}"
    far = int((d.rhat > edges[-1]).sum())
    words += f", {far} beyond {edges[-1]:.2g} in the last bin" if far else ""
    _note(ax, words)
    ax.set_ylabel("Scalars", color=MUTED)


def _ess(ax: Axes, d: Diagnostics, bins: NDArray[np.float64], shade: str) -> None:
    ax.hist(
        np.clip(d.ess_bulk, bins[0], bins[-1]),
        bins.tolist(),
        color=shade,
        alpha=0.85,
        lw=0,
        label="bulk",
    )
    ax.hist(np.clip(d.ess_tail, bins[0], bins[-1]), bins.tolist(), histtype="step",
            color=COLOURS[-1], lw=1.3, label="tail")  # fmt: skip
    ax.axvline(ESS_GOOD_PER_CHAIN * d.chains, color=INK, lw=1.1, ls=(0, (4, 3)))
    ax.set_xscale("log")
    _note(ax, f"{int((d.ess_bulk < ESS_GOOD_PER_CHAIN * d.chains).sum())} below "
              f"{ESS_GOOD_PER_CHAIN * d.chains} (bulk)")  # fmt: skip
    legend(ax, loc="center left")


def _note(ax: Axes, words: str) -> None:
    ax.set_title(words, loc="right", fontsize=9, fontweight="normal")
