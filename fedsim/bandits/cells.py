"""The deterministic tree of cells that all clients share: a box, split k-ary, axis after axis.

Depth 0 has one cell, 0: the box. A cell i of depth h is split along axis h mod d into k parts,
whose numbers at depth h + 1 are k·i, …, k·i + k − 1. Linear and log axes are split into equal parts
in their own scale. On an integer axis a cell holds a range of whole numbers; parts that would hold
none do not exist, so that a cell of one number has one child there, itself: all that is left to do
is to pull it more often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.bandits.axes import Axis, Floats, to_values

Cells = NDArray[np.int64]
CELLS_FILE = "bandit.npz"
"""The artifact in which a run keeps its cells."""

ROOT: Cells = np.zeros(1, np.int64)


class CellTree:
    """Cells by depth and number; every method takes the cells (n,) of one depth."""

    def __init__(self, axes: Sequence[Axis], arity: int = 2) -> None:
        """arity: parts k ≥ 2 that a cell is split into."""
        self.axes, self.arity = tuple(axes), arity
        self.max_depth = int(62 / math.log2(arity))
        """Cells of greater depth have no numbers."""

    def children(self, depth: int, cells: Cells) -> Cells:
        """Returns the cells of depth + 1 that the cells are split into, in order.

        At `max_depth` there are none.
        """
        if depth >= self.max_depth:
            return cells[:0]
        below = (cells[:, None] * self.arity + np.arange(self.arity)).reshape(-1)
        axis = depth % len(self.axes)
        if self.axes[axis].scale != "integer":
            return below
        low, high = self._bounds(depth + 1, below)
        return below[high[:, axis] > low[:, axis]]

    def parents(self, cells: Cells) -> Cells:
        """Returns the cells one depth above."""
        return cells // self.arity

    def bounds(self, depth: int, cells: Cells) -> tuple[Floats, Floats]:
        """Returns the cells' lowest and highest corners (n, d), as positions in [0, 1]."""
        low, high = self._bounds(depth, cells)
        sizes = np.array([axis.count or 1 for axis in self.axes], np.float64)
        return low / sizes, high / sizes

    def centres(self, depth: int, cells: Cells) -> Floats:
        """Returns the cells' centres (n, d) in the axes' own values.

        Of a range of whole numbers it is the middle one, the lower of two.
        """
        low, high = self.bounds(depth, cells)
        unit = (low + high) / 2
        for i, axis in enumerate(self.axes):
            if axis.scale == "integer":
                first, last = low[:, i] * axis.count, high[:, i] * axis.count
                unit[:, i] = (np.floor((np.rint(first) + np.rint(last) - 1) / 2) + 0.5) / axis.count
        return to_values(self.axes, unit)

    def _bounds(self, depth: int, cells: Cells) -> tuple[Floats, Floats]:
        """Returns the corners (n, d): in [0, 1], or from 0 to the number of whole numbers."""
        count = len(self.axes)
        low = np.zeros((len(cells), count))
        high = np.ones((len(cells), count)) * [axis.count or 1 for axis in self.axes]
        for step in range(depth):
            part = cells // self.arity ** (depth - 1 - step) % self.arity
            axis = step % count
            start, width = low[:, axis], high[:, axis] - low[:, axis]
            first, last = width * part / self.arity, width * (part + 1) / self.arity
            if self.axes[axis].scale == "integer":
                first, last = np.floor(first), np.floor(last)
            low[:, axis], high[:, axis] = start + first, start + last
        return low, high
