"""Ways to search alone: what they are asked, and PNE, random search and Optuna's TPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fedsim.bandits.axes import Axis, Floats, to_values
from fedsim.bandits.cells import ROOT, CellTree
from fedsim.bandits.rules import Confidence, best_cell, local_survivors, spread
from fedsim.errors import UserError

State = Mapping[str, np.ndarray[Any, Any]]
NEW: State = {}
"""The state of a search that has not begun."""


class Learner(Protocol):
    """Searches one client's box by asking for pulls.

    All that it knows is in its state, so that it can be put away between messages.
    """

    def ask(self, limit: int, rng: np.random.Generator) -> Floats:
        """Returns the points (n, d) to pull next, 1 ≤ n ≤ limit; `tell` follows."""

    def tell(self, points: Floats, values: Floats) -> None:
        """Takes the values (n,) of the points asked for; NaN where a pull failed."""

    def recommend(self) -> Floats | None:
        """Returns the best point (d,) so far; None before anything is known."""

    def state(self) -> State:
        """Returns the state, which the constructor takes."""


class PNE:
    """Phased node elimination by one client alone: a phase of pulls, then elimination.

    Every cell of a depth is pulled ⌈τ_h⌉ times; cells with μ̂ + b + ν1 ρ^h < max (μ̂ − b) are
    dropped, and the others split. A phase that the budget cuts short is pulled and not judged.
    """

    def __init__(
        self, tree: CellTree, confidence: Confidence, least: int, state: State = NEW
    ) -> None:
        """least: the fewest pulls of a cell. state: {} to start at the root."""
        self.tree, self.confidence, self.least = tree, confidence, least
        self.depth = int(state.get("depth", 0))
        self.cells = np.array(state.get("cells", ROOT))
        self.best = np.array(state["best"]) if "best" in state else None
        self._counts = np.zeros(0, np.int64)

    def ask(self, limit: int, rng: np.random.Generator) -> Floats:
        """Returns every cell's centre as often as it is pulled, or as the limit allows."""
        pulls = self.confidence.pulls(self.depth, least=self.least)
        self._counts = spread(min(limit, pulls * len(self.cells)), len(self.cells))
        return np.repeat(self.tree.centres(self.depth, self.cells), self._counts, axis=0)

    def tell(self, points: Floats, values: Floats) -> None:
        """Eliminates and splits, if the phase is complete."""
        pulls = self.confidence.pulls(self.depth, least=self.least)
        if len(values) < pulls * len(self.cells):
            return
        means, good = cell_means(values, self._counts)
        width = self.confidence.width(good)
        low = np.where(good > 0, means - width, -np.inf)
        high = np.where(good > 0, means + width, np.inf)
        everyone = np.ones(len(self.cells), bool)
        best = best_cell(low, high, everyone)
        if best is not None:
            self.best = self.tree.centres(self.depth, self.cells[[best]])[0]
        slack = self.confidence.smoothness(self.depth)
        kept = self.cells[local_survivors(low, high, slack, everyone)]
        below = self.tree.children(self.depth, kept)
        if len(below):
            self.depth, self.cells = self.depth + 1, below
        else:  # the tree has no more depth: the survivors are pulled again
            self.cells = kept

    def recommend(self) -> Floats | None:
        """Returns the best centre of the last complete phase."""
        return self.best

    def state(self) -> State:
        """Returns depth, cells and recommendation."""
        found: dict[str, Any] = {"depth": np.array(self.depth), "cells": self.cells}
        return found if self.best is None else {**found, "best": self.best}


def cell_means(values: Floats, counts: np.ndarray[Any, Any]) -> tuple[Floats, Floats]:
    """Returns the means (n,) of `counts` (n,) values each, NaN left out, and how many were good.

    values: (Σ counts,), cell after cell. A mean of nothing is NaN.
    """
    cell = np.repeat(np.arange(len(counts)), counts)
    fine = np.isfinite(values)
    good = np.bincount(cell[fine], minlength=len(counts)).astype(np.float64)
    total = np.bincount(cell[fine], values[fine], minlength=len(counts))
    with np.errstate(invalid="ignore"):
        return total / good, good


class _History:
    """Points that were tried, as positions in [0, 1]^d, each the mean of `repeats` pulls."""

    def __init__(self, axes: Sequence[Axis], repeats: int, state: State) -> None:
        self.axes, self.repeats = tuple(axes), repeats
        self.tried = np.array(state.get("tried", np.zeros((0, len(self.axes)))))
        self.scores = np.array(state.get("scores", np.zeros(0)))
        self._asked = np.zeros(len(self.axes))

    def ask(self, limit: int, rng: np.random.Generator) -> Floats:
        """Returns one new point, `repeats` times."""
        self._asked = self.propose(rng)
        return np.repeat(to_values(self.axes, self._asked[None]), min(self.repeats, limit), axis=0)

    def tell(self, points: Floats, values: Floats) -> None:
        """Adds the point with the mean of its values."""
        fine = values[np.isfinite(values)]
        self.tried = np.concatenate([self.tried, self._asked[None]])
        self.scores = np.append(self.scores, fine.mean() if len(fine) else np.nan)

    def recommend(self) -> Floats | None:
        """Returns the point with the best mean."""
        if not np.isfinite(self.scores).any():
            return None
        best = int(np.nanargmax(self.scores))
        point: Floats = to_values(self.axes, self.tried[[best]])[0]
        return point

    def state(self) -> State:
        """Returns what was tried."""
        return {"tried": self.tried, "scores": self.scores}

    def propose(self, rng: np.random.Generator) -> Floats:
        """Returns the position (d,) to try next."""
        raise NotImplementedError


class RandomSearch(_History):
    """Points drawn uniformly in the axes' scales."""

    def propose(self, rng: np.random.Generator) -> Floats:
        """Returns a position drawn uniformly."""
        return rng.random(len(self.axes))

    def state(self) -> State:
        """Returns the best point; of the others nothing is needed."""
        if not np.isfinite(self.scores).any():
            return {}
        best = [int(np.nanargmax(self.scores))]
        return {"tried": self.tried[best], "scores": self.scores[best]}


class TPE(_History):
    """Optuna's tree-structured Parzen estimator: Bergstra et al., NeurIPS 2011.

    Each proposal is drawn by a sampler of its own, seeded from the client's stream, out of the
    whole history; so a resumed search proposes the same points. A point whose pulls all fail is a
    failed trial.
    """

    def __init__(self, axes: Sequence[Axis], repeats: int, state: State = NEW) -> None:
        super().__init__(axes, repeats, state)
        self._optuna = import_optuna()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        uniform = self._optuna.distributions.FloatDistribution(0.0, 1.0)
        self._distributions = {f"u{i}": uniform for i in range(len(self.axes))}
        self._study = self._optuna.create_study(direction="maximize")
        for unit, score in zip(self.tried, self.scores, strict=True):
            self._study.add_trial(self._trial(unit, score))

    def propose(self, rng: np.random.Generator) -> Floats:
        """Returns the sampler's next position."""
        sampler = self._optuna.samplers.TPESampler(seed=int(rng.integers(2**31)))
        self._study.sampler = sampler
        trial = self._study.ask(self._distributions)
        # told as a new trial by `tell`, which is all that a resumed search has
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return np.array([trial.params[name] for name in self._distributions])

    def tell(self, points: Floats, values: Floats) -> None:
        """Adds the trial."""
        super().tell(points, values)
        self._study.add_trial(self._trial(self.tried[-1], self.scores[-1]))

    def _trial(self, unit: Floats, score: float) -> Any:
        known = bool(np.isfinite(score))
        kinds = self._optuna.trial.TrialState
        return self._optuna.trial.create_trial(
            params=dict(zip(self._distributions, unit.tolist(), strict=True)),
            distributions=self._distributions,
            state=kinds.COMPLETE if known else kinds.FAIL,
            value=float(score) if known else None,
        )


def import_optuna() -> Any:
    """Returns the module optuna; raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("tpe needs Optuna: pip install 'fedsim-fl[tuning]'") from error
    return optuna
