"""Rejects replies that would poison an aggregate: NaN, Inf, wrong records, shapes or metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from flwr.app import Array, ArrayRecord, Message
from torch import Tensor

from fedsim.means import surely_finite
from fedsim.messages import Failure, Replies, TensorArray, to_tensor
from fedsim.strategies.base import ReplySchema, Shapes, shapes_of


@dataclass
class Checked:
    """The replies that may be aggregated, and why the others may not."""

    replies: Sequence[Message]
    good: int
    failures: list[Failure]


def check_replies(
    replies: Iterable[Message], asked: Iterable[int], schema: ReplySchema, arrays: ArrayRecord
) -> Checked:
    """Returns the good replies in the order of their nodes.

    `asked`: the nodes that were sent a message; those that did not answer are failures, too, and
    so are further answers of a node and answers of others.
    """
    asked = tuple(asked)
    if isinstance(replies, Replies):
        # what an engine has averaged, it has checked before
        checked = replies if replies.reduced else check_stack(replies, schema, arrays)
        if not checked.failures and checked.node_ids == asked:
            return Checked(checked, len(asked), [])
        failures, waiting = list(checked.failures), Counter(asked)
        waiting.subtract([*checked.node_ids, *(f.node_id for f in failures)])
        kept: Sequence[Message] = replace(checked, failures=[])
        good = len(checked.node_ids)
    else:
        failures, messages, waiting = [], [], Counter(asked)
        for message in sorted(replies, key=lambda m: m.metadata.src_node_id):
            node_id = message.metadata.src_node_id
            if message.has_error():
                reason: str | None = message.error.reason or "error"
            elif waiting[node_id] < 1:
                reason = "answered without being asked, or more than once"
            else:
                reason = _why(message, schema, arrays)
            waiting[node_id] -= 1
            if reason:
                failures.append(Failure(node_id, reason))
            else:
                messages.append(message)
        kept, good = messages, len(messages)
    failures += [Failure(node, "no reply") for node, left in waiting.items() if left > 0]
    return Checked(kept, good, sorted(failures, key=lambda f: f.node_id))


def finite(stacked: Tensor) -> Tensor:
    """Returns for each entry of the leading axis whether all its numbers are finite, (n,) bool."""
    if not stacked.is_floating_point() or not len(stacked):
        return torch.ones(len(stacked), dtype=torch.bool)
    flat = stacked.reshape(len(stacked), stacked[0].numel())
    good = flat.sum(1).isfinite()  # one pass; NaN and Inf survive a sum, but so may an overflow
    if not good.all():
        good = flat.isfinite().all(1)
    return good.cpu()


@dataclass(frozen=True)
class StackCheck:
    """`check_stack` against one schema: data, so that an engine can send it to other processes.

    arrays: the parameters, where the schema takes their shape.
    """

    schema: ReplySchema
    arrays: ArrayRecord | None

    def __call__(self, replies: Replies, numbers: bool) -> Replies:
        """Returns the replies with those that the schema rejects among the failures."""
        return check_stack(replies, self.schema, self.arrays, numbers)


def check_stack(
    replies: Replies, schema: ReplySchema, arrays: ArrayRecord | None, numbers: bool = True
) -> Replies:
    """Returns the replies with those that the schema rejects among the failures.

    numbers: whether the arrays' numbers are looked at, beside their form and the metrics.
    """
    if not replies.node_ids:
        return replies
    layout = {
        record: {name: (tuple(t.shape[1:]), t.dtype) for name, t in tensors.items()}
        for record, tensors in replies.arrays.items()
    }
    sizes = {k: None if v.ndim == 1 else v.shape[1] for k, v in replies.metrics.items()}
    reason = _layout_problem(layout, schema, arrays) or _metric_problem(sizes, schema)
    if reason:
        return replies.select([], [Failure(n, reason) for n in replies.node_ids])
    reasons: dict[int, str] = {}
    if not surely_finite(replies.metrics) or (
        numbers and not all(map(surely_finite, replies.arrays.values()))
    ):
        for record, tensors in replies.arrays.items():
            for name, tensor in tensors.items():
                for i in (~finite(tensor)).nonzero().flatten().tolist():
                    reasons.setdefault(i, f"NaN or Inf in array {record}/{name}")
        for name, values in replies.metrics.items():
            for i in (~finite(values)).nonzero().flatten().tolist():
                reasons.setdefault(i, f"NaN or Inf in metric {name}")
    if schema.weight in replies.metrics and float(replies.metrics[schema.weight].min()) < 0:
        for i in (replies.metrics[schema.weight] < 0).nonzero().flatten().tolist():
            reasons.setdefault(i, f"metric {schema.weight!r} is negative")
    if not reasons:
        return replies
    keep = [i for i in range(len(replies.node_ids)) if i not in reasons]
    rejected = [Failure(replies.node_ids[i], reason) for i, reason in reasons.items()]
    return replies.select(keep, rejected)


def _why(message: Message, schema: ReplySchema, arrays: ArrayRecord) -> str | None:
    """Returns why one Message is rejected, or None."""
    content = message.content
    layout = {}
    for record, values in content.array_records.items():
        try:
            layout[record] = shapes_of(values)
        except AttributeError:
            return f"record {record!r} has an unknown dtype"
    reason = _layout_problem(layout, schema, arrays)
    if reason:
        return reason
    metrics = {k: v for record in content.metric_records.values() for k, v in record.items()}
    sizes = {k: len(v) if isinstance(v, list) else None for k, v in metrics.items()}
    reason = _metric_problem(sizes, schema)
    if reason:
        return reason
    for record, values in content.array_records.items():
        for name, array in values.items():
            try:
                if not bool(finite(_tensor(array)[None])[0]):
                    return f"NaN or Inf in array {record}/{name}"
            except Exception as error:  # bytes from elsewhere may break a decoder in any way
                return f"array {record}/{name} cannot be read: {type(error).__name__}: {error}"
    for name, value in metrics.items():
        if not bool(torch.as_tensor(value, dtype=torch.float64).isfinite().all()):
            return f"NaN or Inf in metric {name}"
    weight = metrics.get(schema.weight, 0)
    negative = isinstance(weight, (int, float)) and weight < 0
    return f"metric {schema.weight!r} is negative" if negative else None


def _tensor(array: Array) -> Tensor:
    tensor = array.tensor if isinstance(array, TensorArray) else to_tensor(array)
    if tuple(tensor.shape) != tuple(array.shape):
        raise ValueError(f"its bytes have shape {tuple(tensor.shape)}, announced {array.shape}")
    if str(tensor.dtype) != f"torch.{array.dtype}":
        raise ValueError(f"its bytes are {tensor.dtype}, announced {array.dtype}")
    return tensor


def _layout_problem(
    layout: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]],
    schema: ReplySchema,
    arrays: ArrayRecord | None,
) -> str | None:
    expected = schema.records
    if expected is None:
        assert arrays is not None
        if len(layout) != 1:
            return f"{len(layout)} array records instead of one"
        expected = {next(iter(layout)): shapes_of(arrays)}
    if set(layout) != set(expected):
        return f"array records {sorted(layout)} instead of {sorted(expected)}"
    for record, shapes in expected.items():
        problem = _shape_problem(layout[record], shapes)
        if problem:
            return f"record {record!r}: {problem}"
    return None


def _shape_problem(got: Shapes, expected: Shapes) -> str | None:
    if set(got) != set(expected):
        different = sorted(set(got) ^ set(expected))
        return f"arrays are missing or not expected: {', '.join(different[:5])}"
    for name, (shape, dtype) in expected.items():
        if got[name][0] != shape:
            return f"array {name!r} has shape {got[name][0]}, expected {shape}"
        if got[name][1] != dtype:
            return f"array {name!r} is {got[name][1]}, expected {dtype}"
    return None


def _metric_problem(sizes: Mapping[str, int | None], schema: ReplySchema) -> str | None:
    """`sizes`: the length of each metric that is a list, None for one number."""
    missing = sorted(schema.metrics - set(sizes))
    if missing:
        return f"metric {missing[0]!r} is missing"
    for name in sorted(schema.metrics | {schema.weight}):
        if sizes.get(name) is not None:
            return f"metric {name!r} is a list of {sizes[name]}, not one number"
    return None
