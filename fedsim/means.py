"""Weighted means of stacked or streamed tensors, by a fixed order of operations.

Clients are averaged in leaves, and leaves along a fixed binary tree, so that the bits depend on the
clients and the division into leaves alone: not on threads, workers, or who was done first.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Records = dict[str, dict[str, Tensor]]
"""Arrays by record and name."""

SUM_CHUNK = 32
"""Clients of a leaf where the whole stack is at hand."""


def surely_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Says that no number is NaN or Inf, by one sum over all: False may be an overflow."""
    return math.isfinite(sum(float(t.sum()) for t in tensors.values() if t.is_floating_point()))


def as_new(x: Tensor) -> Tensor:
    """Returns x laid out as a new tensor is.

    Where an axis has length 1, contiguous() leaves its stride as it was, and torch chooses some
    kernels by strides: bits would depend on where a tensor has been.
    """
    stride, expected = 1, []
    for size in reversed(x.shape):
        expected.append(stride)
        stride *= max(size, 1)
    if x.stride() == tuple(reversed(expected)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def mean_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype to average in: at least float32, and float64 for integers."""
    if not dtype.is_floating_point:
        return torch.float64
    return torch.float32 if dtype.itemsize < 4 else dtype


def leaf_mean(x: Tensor, share: Tensor) -> Tensor:
    """Returns Σ share_c x_c over the leading axis of x (clients, *shape), in `mean_dtype`.

    share (clients,) float64 sums to 1. The mean of one may be that one's own memory.
    """
    if len(x) == 1:
        return x[0].to(mean_dtype(x.dtype))
    flat = x.reshape(len(x), x[0].numel()).to(mean_dtype(x.dtype))
    return (share.to(flat.device, flat.dtype) @ flat).reshape(x.shape[1:])


def stack_means(records: Records, weights: Tensor) -> tuple[Records, float]:
    """Returns the weighted means of stacked replies (clients, *shape) and their summed weight.

    weights (clients,) float64 ≥ 0. Without any weight there are no means.
    """
    total = float(weights.sum()) if len(weights) else 0.0
    if not total > 0:
        return {}, 0.0
    share = weights / total
    return {r: {k: leaf_mean(x, share) for k, x in a.items()} for r, a in records.items()}, total


def weighted_mean(stacked: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Returns Σ w_c x_c / Σ w_c over the leading axis of (clients, *shape), in the arrays' dtypes.

    weights (clients,) float64 ≥ 0, not normalised. If all are 0 the mean is NaN.
    """
    tree = MeanTree(-(-len(weights) // SUM_CHUNK))
    for leaf, start in enumerate(range(0, len(weights), SUM_CHUNK)):
        part = slice(start, start + SUM_CHUNK)
        tree.add_stack(leaf, {"": {k: x[part] for k, x in stacked.items()}}, weights[part])
    means = tree.result()
    return means[""] if means else {k: x[0] * torch.nan for k, x in stacked.items()}


@dataclass
class Node:
    """The mean of some neighbouring leaves. owned: its memory is the tree's alone."""

    means: Records
    weight: float
    owned: bool = False


@dataclass(frozen=True)
class TreeParts:
    """What a tree has merged so far.

    nodes: complete subtrees by (level, index); None stands for replies of no weight. dtypes: of the
    replies' arrays, by (record, name).
    """

    nodes: dict[tuple[int, int], Node | None]
    dtypes: dict[tuple[str, str], torch.dtype]


class MeanTree:
    """The weighted mean of leaves that come in any order, from any thread.

    Two neighbours are merged as soon as both are there, so that at most one mean a level waits,
    plus those that came early.
    """

    def __init__(self, leaves: int) -> None:
        self._leaves = leaves
        self._waiting: dict[tuple[int, int], Node | None] = {}
        self._dtypes: dict[tuple[str, str], torch.dtype] = {}
        self._lock = threading.Lock()

    def like(self, records: Records) -> None:
        """Says that the result shall have the dtypes of these replies."""
        for record, arrays in records.items():
            for name, x in arrays.items():
                self._dtypes.setdefault((record, name), x.dtype)

    def add_stack(self, leaf: int, records: Records, weights: Tensor) -> None:
        """Adds a leaf of stacked replies (clients, *shape) with weights (clients,) float64."""
        means, total = stack_means(records, weights)
        self.like(records)
        self.add(leaf, means, total, owned=len(weights) > 1)

    def add(self, leaf: int, means: Records, weight: float, owned: bool = False) -> None:
        """Adds a leaf's means; weight 0 stands for no reply.

        owned: their memory is the tree's from now on, which writes into it.
        """
        self._climb(0, leaf, Node(means, weight, owned) if weight > 0 else None)

    def parts(self) -> TreeParts:
        """Returns what has been added, merged as far as it goes: where another tree continues."""
        with self._lock:
            return TreeParts(dict(self._waiting), dict(self._dtypes))

    def graft(self, parts: TreeParts) -> None:
        """Adds what another tree of as many leaves has merged; the memory is this one's now."""
        for key, dtype in parts.dtypes.items():
            self._dtypes.setdefault(key, dtype)
        for (level, index), node in parts.nodes.items():
            self._climb(level, index, None if node is None else replace(node, owned=True))

    def _climb(self, level: int, leaf: int, node: Node | None) -> None:
        while True:
            width = -(-self._leaves // 2**level)
            other = leaf ^ 1
            if width == 1:
                other = -1
            with self._lock:
                if other < 0 or (other < width and (level, other) not in self._waiting):
                    self._waiting[level, leaf] = node
                    return
                partner = self._waiting.pop((level, other)) if other < width else None
            left, right = (node, partner) if leaf < other else (partner, node)
            node = _merge(left, right)
            level, leaf = level + 1, leaf // 2

    def result(self) -> Records | None:
        """Returns the mean in the arrays' dtypes; None if there was no reply of positive weight.

        Means of integers stay float64.
        """
        if not self._waiting:
            return None
        ((_, node),) = self._waiting.items()
        if node is None:
            return None
        return {r: {k: self._cast(r, k, x) for k, x in a.items()} for r, a in node.means.items()}

    def _cast(self, record: str, name: str, x: Tensor) -> Tensor:
        dtype = self._dtypes.get((record, name), x.dtype)
        x = as_new(x)
        return x.to(dtype) if dtype.is_floating_point else x


class Leaf:
    """The running mean of replies that come one after the other, in their order."""

    def __init__(self) -> None:
        self.means: Records = {}
        self.weight = 0.0

    def add(self, records: Records, weight: float) -> None:
        """Adds one reply (*shape); it is not kept."""
        if not weight > 0:
            return
        if not self.weight:
            self.means = {
                r: {k: x.to(mean_dtype(x.dtype), copy=True) for k, x in a.items()}
                for r, a in records.items()
            }
            self.weight = weight
            return
        self.weight += weight
        share = weight / self.weight
        for record, arrays in records.items():
            for name, x in arrays.items():
                mean = self.means[record][name]
                mean.lerp_(x.to(mean.dtype), share)


def _merge(left: Node | None, right: Node | None) -> Node | None:
    if left is None or right is None:
        return left or right
    weight = left.weight + right.weight
    share = right.weight / weight
    means: Records = {}
    for record, arrays in left.means.items():
        others = right.means[record]
        if left.owned:
            means[record] = {k: x.lerp_(others[k], share) for k, x in arrays.items()}
        else:
            means[record] = {k: x.lerp(others[k], share) for k, x in arrays.items()}
    return Node(means, weight, owned=True)
