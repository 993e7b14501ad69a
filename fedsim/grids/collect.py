"""Gathers a cohort's replies: stacks them, or averages and forgets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedsim.clients.base import Reply
from fedsim.grids.nodes import node_of
from fedsim.means import Leaf, MeanTree, stack_means, surely_finite
from fedsim.messages import Arrays, Reduction, Replies

Outcome = tuple[Reply, Arrays] | str
"""A client's reply and the state it keeps, or why there is none."""


@dataclass
class CohortResult:
    """The replies of a cohort, or of a part of it.

    good: positions in the cohort of those who replied, ascending. records: their stacked arrays;
    empty if they were averaged into `means` (None: all weights are 0). metrics: (good,) each.
    errors: why the others did not reply, or were rejected. bytes_up: of replies not kept.
    """

    good: list[int]
    records: dict[str, Arrays]
    metrics: dict[str, Tensor]
    errors: dict[int, str] = field(default_factory=dict)
    reduced: bool = False
    means: dict[str, Arrays] | None = None
    bytes_up: int = 0


class Collector:
    """Takes replies one by one; stacks them, or averages them by leaves and forgets them."""

    def __init__(self, reduction: Reduction | None, tree: MeanTree) -> None:
        self._reduction, self._tree = reduction, tree
        self._leaf = Leaf()
        self._form: object = None
        self._arrays: list[dict[str, Arrays]] = []
        self._metrics: list[dict[str, Tensor]] = []
        self._good: list[int] = []
        self._bytes = 0
        self._errors: dict[int, str] = {}

    def add(self, position: int, partition: int, out: Reply | str) -> bool:
        """Takes the next client's reply, or why there is none; returns whether it is good."""
        problem = out if isinstance(out, str) else self._take(position, partition, out)
        if problem is not None:
            self._errors[position] = problem
        return problem is None

    def end_leaf(self, leaf: int) -> None:
        """Says that what came since the last call makes up this leaf of the tree."""
        if self._reduction is not None:
            self._tree.add(leaf, self._leaf.means, self._leaf.weight, owned=True)
            self._leaf = Leaf()

    def _take(self, position: int, partition: int, reply: Reply) -> str | None:
        form = _form(reply)
        if self._form is not None and form != self._form:
            return "its records differ from the other replies'"
        metrics = {name: value[None] for name, value in reply.metrics.items()}
        if self._reduction is None:
            self._arrays.append(reply.records)
        else:
            self._bytes += bytes_of(reply.records)
            node = (node_of(partition),)
            single = Replies(node, tree_map(lambda t: t[None], reply.records), plain(metrics))
            checked = self._reduction.check(single, True)
            if checked.failures:
                return checked.failures[0].reason
            self._tree.like(reply.records)
            self._leaf.add(reply.records, float(self._reduction.weights(checked)[0]))
        self._form = form  # of a reply that was accepted
        self._metrics.append(metrics)
        self._good.append(position)
        return None

    def result(self) -> CohortResult:
        """Returns what has been collected; means are in the tree."""
        metrics = {
            name: torch.cat([one[name] for one in self._metrics])
            for name in (self._metrics[0] if self._metrics else {})
        }
        done = CohortResult(self._good, {}, plain(metrics), self._errors, bytes_up=self._bytes)
        if self._arrays:
            done.records = tree_map(lambda *t: torch.stack(t), *self._arrays)
        return done


def reduced(
    done: CohortResult, partitions: Sequence[int], reduction: Reduction, tree: MeanTree, leaf: int
) -> CohortResult:
    """Averages a block's replies into a leaf of the tree; returns the rest.

    partitions: of the good ones.
    """
    nodes = tuple(map(node_of, partitions))
    replies = Replies(nodes, done.records, done.metrics)
    # the numbers are read once, by the mean: a NaN or Inf of any client is in it
    checked = reduction.check(replies, False)
    means, weight = stack_means(checked.arrays, reduction.weights(checked))
    if not weight or not all(map(surely_finite, means.values())):
        checked = reduction.check(replies, True)
        means, weight = stack_means(checked.arrays, reduction.weights(checked))
    tree.like(done.records)
    tree.add(leaf, means, weight, owned=len(checked.node_ids) > 1)
    good, errors = done.good, {}
    if checked.failures:
        position = dict(zip(nodes, done.good, strict=True))
        good = [position[node] for node in checked.node_ids]
        errors = {position[failure.node_id]: failure.reason for failure in checked.failures}
    return CohortResult(good, {}, checked.metrics, errors, bytes_up=bytes_of(done.records))


def joined(parts: Sequence[CohortResult]) -> CohortResult:
    """Returns the parts' results as one, in the order of the cohort.

    Parts whose replies have another form than the first's become errors.
    """
    some = [part for part in parts if part.good]
    errors = {i: reason for part in parts for i, reason in part.errors.items()}
    size = sum(part.bytes_up for part in parts)
    form = _stacked_form(some[0]) if some else None
    for part in some:
        if _stacked_form(part) != form:
            errors |= dict.fromkeys(part.good, "its records differ from the other replies'")
    some = [part for part in some if _stacked_form(part) == form]
    if not some:
        return CohortResult([], {}, {}, errors, bytes_up=size)
    if len(some) == 1 and not errors and some[0].good == list(range(len(some[0].good))):
        return some[0]  # one block in the cohort's order
    good = [i for part in some for i in part.good]
    records, metrics = some[0].records, some[0].metrics
    if len(some) > 1:
        metrics = {k: torch.cat([part.metrics[k] for part in some]) for k in metrics}
        records = {
            r: {k: torch.cat([part.records[r][k] for part in some]) for k in arrays}
            for r, arrays in records.items()
        }
    order = sorted(range(len(good)), key=good.__getitem__)
    if good != sorted(good):
        back = torch.tensor(order)
        records, metrics = tree_map(lambda t: t[back], (records, metrics))
    return CohortResult(sorted(good), records, metrics, errors, bytes_up=size)


def plain(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns (clients,) float64 metrics on the CPU, averaged over chains."""
    # to the CPU first: Apple's GPUs have no float64
    doubles = {k: v.cpu().double() for k, v in metrics.items()}
    return {k: v if v.ndim == 1 else v.reshape(len(v), -1).mean(1) for k, v in doubles.items()}


def bytes_of(records: dict[str, Arrays]) -> int:
    """Returns the bytes of the arrays' numbers."""
    return sum(t.numel() * t.element_size() for a in records.values() for t in a.values())


def _form(reply: Reply) -> object:
    """Returns what two replies must share to be stacked."""
    return (
        {
            record: {name: (t.shape, t.dtype) for name, t in arrays.items()}
            for record, arrays in reply.records.items()
        },
        {name: t.shape for name, t in reply.metrics.items()},
    )


def _stacked_form(part: CohortResult) -> object:
    """Returns what two parts' stacked replies must share to be one stack."""
    return (
        {
            record: {name: (t.shape[1:], t.dtype) for name, t in arrays.items()}
            for record, arrays in part.records.items()
        },
        set(part.metrics),
    )
