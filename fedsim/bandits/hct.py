"""High-confidence tree: Azar, Lazaric, Brunskill, "Online Stochastic Optimization under Correlated
Bandit Feedback", ICML 2014 (arXiv 1402.0562), Algorithm HCT-iid, by one client alone.

A node (h, i) pulled T times has U = μ̂ + ν1 ρ^h + c sqrt(log(1/δ̃(t⁺)) / T) and B = min(U, max B of
its children), with δ̃(t) = min(1, (ρ / 3ν1)^{1/8} δ / t) and t⁺ the next power of two, at which all
U are computed anew. The path of largest B is followed while its nodes have children and at least
τ_h = ⌈c² log(1/δ̃(t⁺)) / (ν1 ρ^h)²⌉ pulls; its end is pulled, and split once it has τ_h pulls.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedsim.bandits.axes import Floats
from fedsim.bandits.cells import ROOT, CellTree
from fedsim.bandits.learners import NEW, State

WORST = 0.0
"""What a failed pull counts as: the path of largest B would come back to a hole for ever."""


class HCT:
    """A tree that grows where the largest upper bound leads. One point an ask."""

    def __init__(
        self, tree: CellTree, nu1: float, rho: float, c: float, failure: float, state: State = NEW
    ) -> None:
        """failure: δ in (0, 1). state: {} to start at the root."""
        self.tree, self.nu1, self.rho, self.c = tree, nu1, rho, c
        self.delta = failure * (rho / (3 * nu1)) ** 0.125
        self.depth: list[int] = np.asarray(state.get("depth", [0])).tolist()
        self.cell: list[int] = np.asarray(state.get("cell", ROOT)).tolist()
        self.parent: list[int] = np.asarray(state.get("parent", [-1])).tolist()
        self.count: list[int] = np.asarray(state.get("count", [0])).tolist()
        self.total: list[float] = np.asarray(state.get("total", [0.0])).tolist()
        self.points = np.array(state.get("points", tree.centres(0, ROOT)))
        self.pulls = int(sum(self.count))
        self.children: list[list[int]] = [[] for _ in self.cell]
        for node, above in enumerate(self.parent):
            if above >= 0:
                self.children[above].append(node)
        self._path: list[int] = []
        self._log = 0.0
        self._u: list[float] = []
        self._b: list[float] = []
        self._refresh()

    def ask(self, limit: int, rng: np.random.Generator) -> Floats:
        """Returns the point at the end of the path of largest B."""
        if self.pulls & (self.pulls - 1) == 0:  # t = pulls + 1 has another t⁺
            self._refresh()
        node, self._path = 0, [0]
        while self.children[node] and self.count[node] >= self._threshold(self.depth[node]):
            node = max(self.children[node], key=self._b.__getitem__)
            self._path.append(node)
        return self.points[[node]]

    def tell(self, points: Floats, values: Floats) -> None:
        """Updates the bounds along the path, and splits its end when that is due."""
        node = self._path[-1]
        value = float(values[0])
        self.count[node] += 1
        self.total[node] += value if math.isfinite(value) else WORST
        self.pulls += 1
        self._u[node] = self._upper(node)
        if not self.children[node] and self.count[node] >= self._threshold(self.depth[node]):
            self._split(node)
        for above in reversed(self._path):
            self._back_up(above)

    def recommend(self) -> Floats | None:
        """Returns the point with the largest lower bound μ̂ − c sqrt(log(1/δ̃) / T)."""
        known = [i for i, count in enumerate(self.count) if count]
        if not known:
            return None
        best = max(known, key=lambda i: self.total[i] / self.count[i] - self._width(self.count[i]))
        point: Floats = self.points[best]
        return point

    def state(self) -> State:
        """Returns the tree."""
        lists: dict[str, list[Any]] = {
            "depth": self.depth, "cell": self.cell, "parent": self.parent, "count": self.count,
            "total": self.total,
        }  # fmt: skip
        return {**{name: np.array(values) for name, values in lists.items()}, "points": self.points}

    def _refresh(self) -> None:
        """Computes every U and B anew, for the t⁺ of the next pull."""
        ahead = 1 << self.pulls.bit_length() if self.pulls else 1  # the power of two ≥ pulls + 1
        self._log = math.log(1 / min(1.0, self.delta / ahead))
        self._u = [self._upper(node) for node in range(len(self.cell))]
        self._b = list(self._u)
        for node in range(len(self.cell) - 1, -1, -1):  # children have larger numbers
            self._back_up(node)

    def _back_up(self, node: int) -> None:
        own = self._u[node]
        if below := self.children[node]:
            own = min(own, max(self._b[child] for child in below))
        self._b[node] = own

    def _split(self, node: int) -> None:
        depth = self.depth[node]
        cells = self.tree.children(depth, np.array([self.cell[node]]))
        for cell in cells.tolist():
            self.children[node].append(len(self.cell))
            self.depth.append(depth + 1)
            self.cell.append(cell)
            self.parent.append(node)
            self.count.append(0)
            self.total.append(0.0)
            self.children.append([])
            self._u.append(math.inf)
            self._b.append(math.inf)
        self.points = np.concatenate([self.points, self.tree.centres(depth + 1, cells)])

    def _upper(self, node: int) -> float:
        count = self.count[node]
        if not count:
            return math.inf
        smoothness = self.nu1 * self.rho ** self.depth[node]
        return self.total[node] / count + smoothness + self._width(count)

    def _width(self, count: int) -> float:
        return self.c * math.sqrt(self._log / count)

    def _threshold(self, depth: int) -> int:
        return math.ceil(self.c**2 * self._log / (self.nu1 * self.rho**depth) ** 2)
