"""Gathers a cohort's replies: stacks them, or averages and forgets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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


class Numbers:
    """The metrics of replies whose arrays are in a mean already, as numbers of Python.

    Tensors that live until the end of a round would take pieces of the memory that a large reply
    has left and the next one needs: replies of 4 MB would take 4 MB each.
    """

    def __init__(self) -> None:
        self._groups: dict[frozenset[str], tuple[list[int], dict[str, list[float]]]] = {}
        self._errors: dict[int, str] = {}
        self._bytes = 0

    def add(self, done: CohortResult) -> None:
        """Takes what is left of replies: no arrays, and metrics (clients,) float64."""
        self._errors |= done.errors
        self._bytes += done.bytes_up
        names = frozenset(done.metrics)
        good, metrics = self._groups.setdefault(names, ([], {name: [] for name in done.metrics}))
        good += done.good
        for name, values in done.metrics.items():
            metrics[name] += values.tolist()

    def results(self) -> list[CohortResult]:
        """Returns what was taken, a part for each set of metrics."""
        parts = [CohortResult([], {}, {}, self._errors, bytes_up=self._bytes)]
        for good, metrics in self._groups.values():
            tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in metrics.items()}
            parts.append(CohortResult(good, {}, tensors))
        return parts


class Collector:
    """Takes replies one by one; stacks those of one form, or averages them by leaves.

    It rejects no reply for differing from others, since those may be at other workers: `joined`
    does.
    """

    def __init__(self, reduction: Reduction | None, tree: MeanTree) -> None:
        self._reduction, self._tree = reduction, tree
        self._leaf = Leaf()
        self._groups: dict[object, list[tuple[int, Reply]]] = {}  # by form
        self._numbers = Numbers()
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
        if self._reduction is not None:
            size = bytes_of(reply.records)
            node = (node_of(partition),)
            single = tree_map(lambda t: t[None], (reply.records, reply.metrics))
            checked = self._reduction.check(Replies(node, single[0], plain(single[1])), True)
            if checked.failures:
                self._numbers.add(CohortResult([], {}, {}, bytes_up=size))
                return checked.failures[0].reason
            self._tree.like(reply.records)
            self._leaf.add(reply.records, float(self._reduction.weights(checked)[0]))
            self._numbers.add(CohortResult([position], {}, checked.metrics, bytes_up=size))
            return None
        self._groups.setdefault(_form(reply), []).append((position, reply))
        return None

    def results(self) -> list[CohortResult]:
        """Returns what has been collected, a part for each form; means are in the tree."""
        parts = [CohortResult([], {}, {}, self._errors), *self._numbers.results()]
        for group in self._groups.values():
            replies = [reply for _, reply in group]
            records, metrics = tree_map(
                lambda *t: torch.stack(t), *((r.records, r.metrics) for r in replies)
            )
            parts.append(CohortResult([i for i, _ in group], records, plain(metrics)))
        return parts


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


def joined(parts: Sequence[CohortResult], averaged: bool = False) -> CohortResult:
    """Returns the parts' results as one, in the order of the cohort, however it was divided.

    averaged: the arrays are in a mean already; metrics that not all replies have are left out.
    Otherwise replies of another form than the first client's become errors.
    """
    errors = {i: reason for part in parts for i, reason in part.errors.items()}
    size = sum(part.bytes_up for part in parts)
    some = [part for part in parts if part.good]
    if averaged:
        some = _with_common_metrics(some)
    elif some:
        form = _stacked_form(min(some, key=lambda part: min(part.good)))
        for part in some:
            if _stacked_form(part) != form:
                errors |= dict.fromkeys(part.good, "its records differ from the other replies'")
        some = [part for part in some if _stacked_form(part) == form]
    if not some:
        return CohortResult([], {}, {}, errors, bytes_up=size)
    good = [i for part in some for i in part.good]
    records, metrics = some[0].records, some[0].metrics
    if len(some) > 1:
        metrics = {k: torch.cat([part.metrics[k] for part in some]) for k in metrics}
        records = {
            r: {k: torch.cat([part.records[r][k] for part in some]) for k in arrays}
            for r, arrays in records.items()
        }
    ordered = sorted(good)
    if good != ordered:
        back = torch.tensor(sorted(range(len(good)), key=good.__getitem__))
        records, metrics = tree_map(lambda t: t[back], (records, metrics))
    return CohortResult(ordered, records, metrics, errors, bytes_up=size)


def common_metrics(parts: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Returns the names that all parts' metrics (clients, …) have, with entries of one shape."""
    shapes = [{name: value.shape[1:] for name, value in part.items()} for part in parts]
    first = shapes[0] if shapes else {}
    return [name for name in first if all(own.get(name) == first[name] for own in shapes)]


def _with_common_metrics(parts: Sequence[CohortResult]) -> list[CohortResult]:
    """Returns the parts with the metrics that all of them have, in one shape."""
    names = common_metrics([part.metrics for part in parts])
    if all(len(part.metrics) == len(names) for part in parts):
        return list(parts)
    return [replace(part, metrics={n: part.metrics[n] for n in names}) for part in parts]


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
    arrays = [
        (record, name, t.shape, t.dtype)
        for record, own in reply.records.items()
        for name, t in own.items()
    ]
    return frozenset(arrays), frozenset((name, t.shape) for name, t in reply.metrics.items())


def _stacked_form(part: CohortResult) -> object:
    """Returns what two parts' stacked replies must share to be one stack."""
    return (
        {
            record: {name: (t.shape[1:], t.dtype) for name, t in arrays.items()}
            for record, arrays in part.records.items()
        },
        set(part.metrics),
    )
