"""Test functions of bandits over boxes, scaled to maxima of about 1, and their tilted families.

Himmelblau and Rastrigin as usual, negated and scaled; DoubleSine: Grill, Valko, Munos, "Black-box
optimization of noisy functions with unknown smoothness", NeurIPS 2015; Garland: Valko, Carpentier,
Munos, "Stochastic Simultaneous Optimistic Optimization", ICML 2013.

A client's function is base(x) + w · u(x), where u scales the box to [−1, 1]^d. With weights w_m
whose mean is 0 the mean over clients is the base, and sup |f_m − mean f| = ‖w_m‖₁ exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.bandits.axes import Axis, Floats


@dataclass(frozen=True)
class Base:
    """A function of (n, d) points in [low, high]^d; dimension 0: any."""

    value: Callable[[Floats], Floats]
    low: float
    high: float
    dimension: int


def garland(x: Floats) -> Floats:
    """x (1 − x) (4 − sqrt |sin 60x|): its maximum is 4x (1 − x) = 0.99777 at x = π/6, a cusp."""
    t = x[:, 0]
    values: Floats = t * (1 - t) * (4 - np.sqrt(np.abs(np.sin(60 * t))))
    return values


RHO_1, RHO_2 = 0.3, 0.8


def double_sine(x: Floats) -> Floats:
    """An oscillation between two envelopes that meet at the maximum, 1 at x = ½."""
    u = 2 * np.abs(x[:, 0] - 0.5)
    safe = np.where(u > 0, u, 1.0)
    lower, upper = safe ** -math.log2(RHO_2), safe ** -math.log2(RHO_1)
    wave = (np.sin(np.pi * np.log2(safe)) + 1) / 2
    return np.where(u > 0, 1 + wave * (lower - upper) - lower, 1.0)


def himmelblau(x: Floats) -> Floats:
    """1 − ((x² + y − 11)² + (x + y² − 7)²) / 890 on [−5, 5]²: four maxima of 1, minimum 0."""
    a, b = x[:, 0], x[:, 1]
    return 1 - ((a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2) / 890


def rastrigin(x: Floats) -> Floats:
    """1 − Σ (x_i² + 10 − 10 cos 2π x_i) / (21 d) on [−1, 1]^d: maximum 1 at 0."""
    values: Floats = 1 - (x**2 + 10 - 10 * np.cos(2 * np.pi * x)).sum(1) / (21 * x.shape[1])
    return values


BASES: dict[str, Base] = {
    "garland": Base(garland, 0.0, 1.0, 1),
    "double_sine": Base(double_sine, 0.0, 1.0, 1),
    "himmelblau": Base(himmelblau, -5.0, 5.0, 2),
    "rastrigin": Base(rastrigin, -1.0, 1.0, 0),
}


@dataclass(frozen=True)
class Tilted:
    """One client's function. base: a name of BASES. weights: w (d,)."""

    base: str
    weights: Floats

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The box."""
        b = BASES[self.base]
        return tuple(Axis(name=f"x{i}", low=b.low, high=b.high) for i in range(len(self.weights)))

    def value(self, points: Floats) -> Floats:
        """Returns the values (n,) at points (n, d)."""
        b = BASES[self.base]
        unit = (2 * points - b.low - b.high) / (b.high - b.low)
        return b.value(points) + unit @ self.weights

    def optimum(self) -> Floats:
        """Returns a point (d,) where the function is largest.

        Right for tilts that are small beside the base's own variation: the best of a fine grid
        and of the base's cusps, then polished where the base is smooth.
        """
        if self.base == "himmelblau":
            return self._polished(self._grid(401), starts=8)
        if self.base == "rastrigin":
            d = len(self.weights)  # a sum over the axes, each on its own
            each = [Tilted("rastrigin", np.array([w * d])) for w in self.weights]
            return np.concatenate([f._polished(f._grid(20_001), starts=3) for f in each])
        cusps = np.arange(20) * np.pi / 60 if self.base == "garland" else np.array([0.5])
        points = np.concatenate([cusps[:, None], self._polished(self._grid(100_001), 5)[None]])
        best: Floats = points[np.argmax(self.value(points))]
        return best

    def _grid(self, count: int) -> Floats:
        b = BASES[self.base]
        line = np.linspace(b.low, b.high, count)
        return np.stack(np.meshgrid(*[line] * len(self.weights)), -1).reshape(-1, len(self.weights))

    def _polished(self, grid: Floats, starts: int) -> Floats:
        """Returns the best point that a local search finds from the best of the grid."""
        from scipy.optimize import minimize

        b = BASES[self.base]
        values = self.value(grid)
        order = np.argsort(-values, kind="stable")
        chosen: list[Floats] = []
        for point in grid[order[:2000]]:  # the best ones that lie apart
            if all(np.abs(point - c).max() > 0.05 * (b.high - b.low) for c in chosen):
                chosen.append(point)
            if len(chosen) == starts:
                break

        def falls(x: Floats) -> float:
            return -float(self.value(x[None])[0])

        bounds = [(b.low, b.high)] * len(self.weights)
        exact: Any = {"ftol": 1e-15, "gtol": 1e-10}
        found = [
            minimize(falls, start, method="L-BFGS-B", bounds=bounds, options=exact).x
            for start in chosen
        ]
        points = np.array([*found, *chosen])
        best: Floats = points[np.argmax(self.value(points))]
        return best


def tilts(directions: Floats, delta: float) -> Floats:
    """Returns weights (M, d) of mean 0 whose largest ‖w_m‖₁ is delta, from directions (M, d)."""
    centred = directions - directions.mean(0)
    largest = np.abs(centred).sum(1).max()
    if delta == 0 or largest == 0:
        return np.zeros_like(directions)
    scaled: Floats = centred * (delta / largest)
    return scaled
