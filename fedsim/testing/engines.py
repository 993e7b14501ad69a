"""The engines that the contract suite runs on, and what it puts between them and the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.clients.base import Client, DirectClient
from fedsim.data import FederatedData
from fedsim.grids.cohort import Cohorts
from fedsim.grids.execution import Execution
from fedsim.grids.inline import InlineGrid
from fedsim.grids.shards import Shards
from fedsim.grids.wrapped import WrappedGrid
from fedsim.messages import Broadcast, to_record, to_tensors

MakeGrid = Callable[[Client | DirectClient, FederatedData, str, int], Grid]


@dataclass(frozen=True)
class Engine:
    """An engine to test.

    make: (client, data, "float32" or "float64", workers) → a Grid over the data's clients, of seed
    0; its `close()`, if it has one, is called in the end. workers: threads, processes or whatever
    shares the work out: results must not depend on it.
    same_bits_as: the name of the engine whose results are the same to the bit; None where only the
    numbers agree.
    """

    make: MakeGrid
    same_bits_as: str | None = None


def inline(path: Literal["mapped", "one_by_one"]) -> Engine:
    """Returns the engine `inline` on one of its two paths; untraced, which is quicker to start."""

    def make(
        client: Client | DirectClient, data: FederatedData, dtype: str, workers: int
    ) -> InlineGrid:
        execution = Execution(path, 0, workers, dtype, "cpu", False)
        cohorts = Cohorts(client, Shards(data, getattr(torch, dtype)), execution, 0)
        return InlineGrid(cohorts, len(data.shards), seed=0)

    return Engine(make)


ENGINES: Mapping[str, Engine] = {
    "inline, mapped": inline("mapped"),
    "inline, one by one": inline("one_by_one"),
}


class EveryReply(WrappedGrid):
    """Has the engine send every reply, as a Message of its own, where it might send their mean.

    change: what becomes of a Message, None if it is lost. It may be changed in place.
    """

    def __init__(
        self, inner: Grid, change: Callable[[Message], Message | None] = lambda message: message
    ) -> None:
        super().__init__(inner)
        self.change = change

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """Returns the replies that are left, changed."""
        if isinstance(messages, Broadcast):
            messages.reduction = None
        changed = map(self.change, super().send_and_receive(messages, timeout=timeout))
        return [message for message in changed if message is not None]


class Serialised(EveryReply):
    """Sends and receives the bytes of arrays, as to another machine."""

    def __init__(self, inner: Grid) -> None:
        super().__init__(inner, _reply_in_bytes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """Returns the replies to messages that were bytes on their way."""
        if isinstance(messages, Broadcast):
            content = in_bytes(messages.content)
            sent: list[Message] = [
                Message(content, node, messages.message_type) for node in messages.node_ids
            ]
        else:
            sent = list(messages)
        return super().send_and_receive(sent, timeout=timeout)


def _reply_in_bytes(message: Message) -> Message:
    if message.has_content():
        for name, record in in_bytes(message.content).items():
            message.content[name] = record
    return message


def in_bytes(content: RecordDict) -> RecordDict:
    """Returns the content with plain Flower Arrays, which hold nothing but bytes."""
    copied = RecordDict()
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = ArrayRecord()
            for key, array in record.items():
                arrays[key] = Array(array.dtype, tuple(array.shape), array.stype, bytes(array.data))
            copied[name] = arrays
        else:
            copied[name] = record
    return copied


def poison(message: Message, kind: str, weight: str) -> Message:
    """Spoils the first array of every record of a reply, or its metric `weight`, in place.

    kind: one of POISONS.
    """
    content = message.content
    for name, own in list(content.array_records.items()):
        arrays = to_tensors(own)
        first = next(iter(arrays))
        spoiled = _POISONED[kind](arrays[first]) if kind in _POISONED else arrays[first]
        if spoiled is None:
            del arrays[first]
        else:
            arrays[first] = spoiled
        content[name] = to_record(arrays)
    for record in content.metric_records.values():
        if weight in record and kind == "no weight":
            del record[weight]
        elif weight in record and kind == "negative weight":
            record[weight] = -1.0
    return message


_POISONED: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "NaN": lambda t: t * float("nan"),
    "Inf": lambda t: t + float("inf"),
    "another shape": lambda t: t.flatten()[:-1],
    "another dtype": lambda t: t.half(),
    "no array": lambda t: None,
}
POISONS = (*_POISONED, "no weight", "negative weight")
