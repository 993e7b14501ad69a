"""Confidence widths and elimination rules of Fed-PNE and PF-PNE, as pure functions.

Li, Song, Honorio, "Federated X-armed Bandit" (arXiv 2205.15268) and "Personalized Federated X-armed
Bandit" (arXiv 2310.16323, AISTATS 2024). Reconstructed from the abstracts, and sound: where all
intervals hold, |f_m − mean f| ≤ Δ, and f_m* − f_m(centre) ≤ ν1 ρ^h in f_m's optimal cell, neither
rule drops that cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.bandits.axes import Floats

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Confidence:
    """L = log(T M / δ), widths b(n) = c sqrt(L / n), smoothness ν1 ρ^h, pulls τ_h a cell.

    nu1 > 0, rho in (0, 1), c > 0. log_term: L > 0.
    """

    log_term: float
    nu1: float
    rho: float
    c: float

    def smoothness(self, depth: int) -> float:
        """Returns ν1 ρ^h, how far below the optimum the centre of its cell may be."""
        return self.nu1 * self.rho**depth

    def width(self, pulls: Floats | float) -> Floats:
        """Returns b(n) for numbers of pulls n; infinite where there is none."""
        with np.errstate(divide="ignore"):
            found: Floats = self.c * np.sqrt(self.log_term / np.asarray(pulls, np.float64))
        return found

    def pulls(self, depth: int, clients: int = 1, least: int = 1) -> int:
        """Returns ⌈τ_h / M⌉, but at least `least`: the pulls of a cell that make b ≤ ν1 ρ^h.

        τ_h = ⌈c² L / (ν1 ρ^h)²⌉ is shared by the M clients.
        """
        needed = math.ceil(self.c**2 * self.log_term / self.smoothness(depth) ** 2)
        return max(math.ceil(needed / clients), least)


def log_term(budget: int, clients: int, failure: float) -> float:
    """Returns L = log(T M / δ)."""
    return math.log(budget * clients / failure)


def survivors(low: Floats, high: Floats, slack: float, among: Flags) -> Flags:
    """Returns which cells of `among` stay: all but those with high + slack < the largest low.

    low, high: bounds (n,) of the values at the centres; ∓∞ where nothing is known. slack: ν1 ρ^h,
    and more where the bounds are of another function.
    """
    best = np.max(low[among], initial=-np.inf)
    return among & ~(high + slack < best)


def global_survivors(mean: Floats, width: float, slack: float) -> Flags:
    """Returns which cells may hold the optimum of a client, as far as the mean over clients tells.

    mean: g (n,), NaN where some client has no good pull: such a cell is not judged. width: b(n) of
    g. slack: ν1 ρ^h for a client whose function is the mean; + 2Δ for one that differs by up to Δ.
    """
    known = ~np.isnan(mean)
    low = np.where(known, mean - width, -np.inf)
    high = np.where(known, mean + width, np.inf)
    return survivors(low, high, slack, np.ones(len(mean), bool))


def intersected(
    mean: Floats, width: float, delta: float, own: Floats, own_width: Floats
) -> tuple[Floats, Floats]:
    """Returns bounds (n,) of one client's function: of the mean ± (b + Δ) and its own ± b at once.

    mean, own: NaN where there is none.
    """
    low = np.fmax(mean - width - delta, own - own_width)
    high = np.fmin(mean + width + delta, own + own_width)
    unknown = np.isnan(low)
    return np.where(unknown, -np.inf, low), np.where(unknown, np.inf, high)


def local_survivors(low: Floats, high: Floats, slack: float, among: Flags) -> Flags:
    """Returns `survivors` of intersected bounds, or the best cell alone where they contradict.

    Bounds that do not meet say that Δ is too small; such a client would be left without a cell.
    """
    kept = survivors(low, high, slack, among)
    best = best_cell(low, high, among)
    if not kept.any() and best is not None:
        kept[best] = True
    return kept


def best_cell(low: Floats, high: Floats, among: Flags) -> int | None:
    """Returns the cell of `among` with the best combined mean, the middle of its bounds.

    None if nothing is known of any.
    """
    known = np.flatnonzero(among & np.isfinite(low) & np.isfinite(high))
    if not len(known):
        return None
    return int(known[np.argmax((low[known] + high[known]) / 2)])


def spread(total: int, cells: int) -> NDArray[np.int64]:
    """Returns `total` pulls divided over the cells (cells,), the first ones getting the rest."""
    counts = np.full(cells, total // cells, np.int64)
    counts[: total % cells] += 1
    return counts
