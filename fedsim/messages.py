"""Flower's messages without their cost: tensors stay tensors until somebody asks for bytes.

Flower's Array serialises when it is built and a Message takes some 70 µs, so a cohort of clients
is sent as one `Broadcast` and answered by one `Replies`. Both are sequences of ordinary Messages,
built one by one only for those who index them (Flower's own strategies, another Grid).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, overload

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from torch import Tensor

from fedsim._flower import SType
from fedsim.errors import RunFailed
from fedsim.means import weighted_mean

Arrays = dict[str, Tensor]
"""One ArrayRecord as tensors, by name."""

BFLOAT16 = "fedsim.bfloat16"
"""The stype of bfloat16 arrays (raw little-endian bytes): NumPy has no such type."""

ERROR_CODE = 1


class TensorArray(Array):
    """A Flower Array that holds a tensor and serialises it when `data` is first read.

    Put it into a record with `record[key] = array`: the ArrayRecord constructor would rebuild it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__.update(
            tensor=tensor.detach(),
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            stype=BFLOAT16 if tensor.dtype == torch.bfloat16 else SType.NUMPY,
            serialised=None,
        )

    @property
    def tensor(self) -> Tensor:
        """The tensor itself, not a copy: read it, never write to it."""
        return self.__dict__["tensor"]  # type: ignore[no-any-return]

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The serialised tensor, as Flower would have made it."""
        if self.__dict__["serialised"] is None:
            if self.stype == BFLOAT16:
                raw = self.tensor.cpu().contiguous().view(torch.int16).numpy().tobytes()
            else:
                buffer = BytesIO()
                np.save(buffer, self.tensor.cpu().numpy(), allow_pickle=False)
                raw = buffer.getvalue()
            self.__dict__["serialised"] = raw
        return self.__dict__["serialised"]  # type: ignore[no-any-return]

    def numpy(self) -> np.ndarray[Any, Any]:
        """Returns a copy: Flower's strategies write into what they get."""
        if self.stype == BFLOAT16:
            raise TypeError("NumPy has no bfloat16; use a strategy of fedsim or float32 parameters")
        return np.array(self.tensor.cpu().numpy())


def to_record(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    """Returns an ArrayRecord that holds the tensors themselves."""
    record = ArrayRecord()
    for name, tensor in arrays.items():
        record[name] = TensorArray(tensor)
    return record


def to_tensor(array: Array) -> Tensor:
    """Returns the Array as a tensor; raises TypeError for an stype it does not know."""
    if isinstance(array, TensorArray):
        return array.tensor
    if array.stype == BFLOAT16:
        raw = np.frombuffer(array.data, dtype=np.int16)
        return torch.from_numpy(raw.copy()).view(torch.bfloat16).reshape(array.shape)
    return torch.from_numpy(array.numpy())


def to_tensors(record: ArrayRecord) -> Arrays:
    """Returns the record's arrays as tensors."""
    return {name: to_tensor(array) for name, array in record.items()}


@dataclass(frozen=True)
class Reduction:
    """Lets an engine average replies as they come and keep none of them.

    check: returns some replies with the bad ones among the failures; with False it leaves the
        arrays' numbers unread, which the engine then sees to (their mean shows a NaN or Inf).
    weights: returns their weights, (clients,) float64 ≥ 0, not normalised.
    """

    check: Callable[[Replies, bool], Replies]
    weights: Callable[[Replies], Tensor]


class Broadcast(Sequence[Message]):
    """One content for many nodes, as a sequence of Messages that are built when indexed.

    reduction: if given, an engine may answer with the replies' weighted means alone.
    """

    def __init__(
        self,
        content: RecordDict,
        message_type: str,
        node_ids: Sequence[int],
        reduction: Reduction | None = None,
    ) -> None:
        self.content = content
        self.message_type = message_type
        self.node_ids = tuple(node_ids)
        self.reduction = reduction

    def __len__(self) -> int:
        return len(self.node_ids)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Message(self.content, self.node_ids[index], self.message_type)


@dataclass(frozen=True)
class Failure:
    """A node without a usable reply, and why."""

    node_id: int
    reason: str


@dataclass
class Replies(Sequence[Message]):
    """The replies of a cohort, stacked along a leading axis of clients.

    node_ids: the nodes that replied well, in the order of the stack.
    arrays: by record and array name, tensors of shape (clients, *shape).
    metrics: by name, float64 tensors of shape (clients,), or (clients, k) for lists.
    failures: nodes whose reply is missing or was rejected.
    request: builds the instruction message that a node's reply answers.
    means: where the engine has averaged the replies, their weighted means by record and array name
        (None if every weight is 0); `arrays` is empty then, and there are no Messages.
    bytes_up: the numbers' bytes that such replies, now gone, had in all.
    """

    node_ids: tuple[int, ...]
    arrays: dict[str, Arrays]
    metrics: dict[str, Tensor]
    failures: list[Failure] = field(default_factory=list)
    request: Callable[[int], Message] | None = None
    integers: frozenset[str] = frozenset({"num-examples"})
    reduced: bool = False
    means: dict[str, Arrays] | None = None
    bytes_up: int = 0

    def mean(self, record: str, weights: Tensor) -> Arrays:
        """Returns Σ w_c x_c / Σ w_c of a record's arrays.

        weights: (clients,), not normalised; those that the engine used where it has averaged.
        Raises RunFailed if all are 0.
        """
        if not float(weights.sum()) > 0 or (self.reduced and self.means is None):
            raise RunFailed("every reply has weight 0; at least one client needs examples")
        if self.means is not None:
            return self.means[record]
        return weighted_mean(self.arrays[record], weights)

    def __len__(self) -> int:
        return len(self.node_ids) + len(self.failures)

    def __iter__(self) -> Iterator[Message]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index >= len(self.node_ids):
            failure = self.failures[index - len(self.node_ids)]
            return self._reply(failure.node_id, Error(ERROR_CODE, failure.reason))
        if self.reduced:
            raise TypeError("these replies were averaged as they came; none of them was kept")
        content = RecordDict()
        for record, arrays in self.arrays.items():
            content[record] = to_record({name: a[index] for name, a in arrays.items()})
        if self.metrics:
            content["metrics"] = MetricRecord(
                {name: self._metric(name, value[index]) for name, value in self.metrics.items()}
            )
        return self._reply(self.node_ids[index], content)

    def _metric(self, name: str, value: Tensor) -> Any:
        number: Any = value.tolist()
        return int(number) if name in self.integers else number

    def _reply(self, node_id: int, what: RecordDict | Error) -> Message:
        if self.request is None:
            raise TypeError("these replies answer no messages")
        return Message(what, reply_to=self.request(node_id))

    def select(self, keep: Sequence[int], rejected: Iterable[Failure]) -> Replies:
        """Returns the replies at the positions `keep`, with `rejected` added to the failures."""
        index = torch.as_tensor(keep, dtype=torch.int64)
        return Replies(
            tuple(self.node_ids[i] for i in keep),
            {r: {k: a[index] for k, a in arrays.items()} for r, arrays in self.arrays.items()},
            {k: v[index] for k, v in self.metrics.items()},
            [*self.failures, *rejected],
            self.request,
            self.integers,
            self.reduced,
            self.means,
            self.bytes_up,
        )


@dataclass(frozen=True)
class Sent:
    """A message that is under way, perhaps for several rounds.

    server_round: the round whose parameters it carries. number: how many messages were under way
    or answered before it. finishes: the simulated second at which its reply is there.
    """

    node_id: int
    message_type: str
    server_round: int
    number: int
    content: RecordDict
    finishes: float = 0.0


class Received(list[Message]):
    """Replies to messages of different rounds, each with what it answers; ordered by sending."""

    def __init__(self, pairs: Iterable[tuple[Sent, Message]] = ()) -> None:
        ordered = sorted(pairs, key=lambda pair: pair[0].number)
        super().__init__(message for _, message in ordered)
        self.sent = [sent for sent, _ in ordered]


def stack(replies: Iterable[Message]) -> Replies:
    """Returns the replies of any engine as `Replies`, ordered by node id.

    Replies that differ from the first in records, names, shapes or dtypes become failures.
    """
    if isinstance(replies, Replies):
        order = sorted(range(len(replies.node_ids)), key=replies.node_ids.__getitem__)
        return replies if order == list(range(len(order))) else replies.select(order, ())
    good: list[Message] = []
    failures: list[Failure] = []
    requests: dict[int, Message] = {}
    for message in sorted(replies, key=lambda m: m.metadata.src_node_id):
        node_id = message.metadata.src_node_id
        requests[node_id] = message
        if message.has_error():
            failures.append(Failure(node_id, message.error.reason or "error"))
        elif good and _layout(message) != _layout(good[0]):
            failures.append(Failure(node_id, "its records differ from the other replies'"))
        else:
            good.append(message)
    contents = [message.content for message in good]
    first = contents[0] if contents else RecordDict()
    arrays = {
        record: {
            name: torch.stack([to_tensor(c.array_records[record][name]) for c in contents])
            for name in first.array_records[record]
        }
        for record in first.array_records
    }
    metrics = {
        name: torch.tensor([c.metric_records[record][name] for c in contents], dtype=torch.float64)
        for record in first.metric_records
        for name in first.metric_records[record]
    }
    node_ids = tuple(message.metadata.src_node_id for message in good)
    return Replies(node_ids, arrays, metrics, failures, _answered(requests))


def _layout(message: Message) -> object:
    content = message.content
    return (
        [
            [(r, k, tuple(a.shape), a.dtype) for k, a in sorted(record.items())]
            for r, record in sorted(content.array_records.items())
        ],
        [
            [(r, k, len(v) if isinstance(v, list) else None) for k, v in sorted(record.items())]
            for r, record in sorted(content.metric_records.items())
        ],
    )


def _answered(replies: Mapping[int, Message]) -> Callable[[int], Message]:
    """Returns what builds the request that a node's reply answered."""

    def request(node_id: int) -> Message:
        reply = replies[node_id]
        message = Message(RecordDict(), node_id, reply.metadata.message_type)
        message.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
        return message

    return request


def nodes_of(messages: Sequence[Message]) -> Sequence[int]:
    """Returns the nodes that messages go to."""
    if isinstance(messages, Broadcast):
        return messages.node_ids
    return [message.metadata.dst_node_id for message in messages]


def trains(message_type: str) -> bool:
    """Says whether messages of a type ask for training, by whichever action."""
    return message_type.partition(".")[0] == "train"


def config_of(content: RecordDict) -> dict[str, Any]:
    """Returns the scalars of the message's ConfigRecords, merged."""
    merged: dict[str, Any] = {}
    for record in content.config_records.values():
        merged.update(record)
    return merged


def make_content(
    records: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> RecordDict:
    """Returns a RecordDict of named ArrayRecords and one ConfigRecord called "config".

    A ConfigRecord is taken as it is.
    """
    content = RecordDict()
    for record, arrays in records.items():
        content[record] = to_record(arrays)
    content["config"] = config if isinstance(config, ConfigRecord) else ConfigRecord(dict(config))
    return content
