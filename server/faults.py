"""Faults on purpose: replies that are lost, late, damaged or turned against the others.

What happens to which reply is drawn from streams of its own, named by the kind of fault, the
round and the client: the same on every engine, with any number of workers and after a resume.
Faults strike between the engine and the round loop, so that they are the same for every strategy,
and only at replies to training messages: what is evaluated is the model, not the faults.

Turning an update round is the sign-flipping attack of Li, Xu, Chen, Giannakis, Ling, "RSA:
Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from Heterogeneous
Datasets", AAAI 2019 (arXiv 1811.03761), applied to x_c − x, because clients here reply with
parameters where theirs reply with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.errors import Problem
from fedsim.grids.apps import copy_message
from fedsim.grids.nodes import partition_of
from fedsim.grids.wrapped import WrappedGrid
from fedsim.messages import (
    ERROR_CODE,
    Arrays,
    Broadcast,
    config_of,
    to_record,
    to_tensors,
    trains,
)
from fedsim.random import generator
from fedsim.scenario.sections import Corrupt, Fault, FaultsParams, SignFlip
from fedsim.server.recorder import Recorder

COUNTED = {
    "drop": "faults_dropped",
    "delay": "faults_late",
    "sign_flip": "faults_flipped",
    "nan": "faults_nan",
    "corrupt": "faults_corrupted",
}
"""The metric of the split `system` that counts each kind of fault, in the order they strike."""

MISSING = frozenset({"drop", "delay"})
"""The kinds after which there is no reply."""

Hit = dict[str, list[int]]
"""The clients that each kind of fault has struck."""


class FaultyGrid(WrappedGrid):
    """Lets replies go wrong between an engine and the round loop.

    It has to see single replies: the engine averages none of them, and each becomes a Message.
    """

    def __init__(
        self, inner: Grid, params: FaultsParams, clients: int, seed: int, recorder: Recorder
    ) -> None:
        """clients: how many there are. seed: the run's, for faults that have none of their own."""
        super().__init__(inner)
        self.recorder = recorder
        self.seed = seed if params.seed is None else params.seed
        self._faults = faults_of(params)
        self._always = {
            kind: chosen(kind, fault, clients, self.seed) for kind, fault in self._faults.items()
        }
        self._counts = dict.fromkeys(self._faults, 0)
        self._pushed: dict[str, Message] = {}

    def take_counts(self) -> dict[str, float]:
        """Returns how many replies each kind of fault has struck since it was last asked."""
        counts = {COUNTED[kind]: float(count) for kind, count in self._counts.items()}
        self._counts = dict.fromkeys(self._faults, 0)
        return counts

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """Returns the replies that arrive, some of them changed."""
        if isinstance(messages, Broadcast):
            if not trains(messages.message_type):
                return super().send_and_receive(messages, timeout=timeout)
            messages.reduction = None
            sent = dict.fromkeys(messages.node_ids, messages.content)
        else:
            messages = list(messages)
            sent = {message.metadata.dst_node_id: message.content for message in messages}
        replies = super().send_and_receive(messages, timeout=timeout)
        nothing = RecordDict()
        return self._arrived([(r, sent.get(r.metadata.src_node_id, nothing)) for r in replies])

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages; returns their ids."""
        messages = list(messages)
        message_ids = list(super().push_messages(messages))
        self._pushed.update(zip(message_ids, messages, strict=True))
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """Returns the replies that have come, some of them changed.

        Where nothing arrives there is an error at the time when it would have come, so that nobody
        waits for it forever.
        """
        replies = super().pull_messages(message_ids)
        asked = [self._pushed.pop(reply.metadata.reply_to_message_id) for reply in replies]
        return self._or_errors(replies, asked)

    def first_come(self, messages: Sequence[Message], take: Callable[[Message], bool]) -> None:
        """Hands over the replies as they come, some of them changed; errors for what is missing."""
        asked = {message.metadata.dst_node_id: message for message in messages}

        def take_what_arrives(reply: Message) -> bool:
            (arrived,) = self._or_errors([reply], [asked[reply.metadata.src_node_id]])
            return take(arrived)

        super().first_come(messages, take_what_arrives)

    def _or_errors(self, replies: Sequence[Message], asked: Sequence[Message]) -> list[Message]:
        """Returns what arrives of the replies to `asked`, and errors in place of the others."""
        pairs = [(r, message.content) for r, message in zip(replies, asked, strict=True)]
        there = {m.metadata.reply_to_message_id: m for m in self._arrived(pairs)}
        return [
            there.get(r.metadata.reply_to_message_id)
            or Message(Error(ERROR_CODE, "no reply"), reply_to=message)
            for r, message in zip(replies, asked, strict=True)
        ]

    def _arrived(self, replies: Sequence[tuple[Message, RecordDict]]) -> list[Message]:
        """`replies`: each with the content that it answers."""
        arrived = []
        struck: dict[tuple[int, str], Hit] = {}
        for reply, sent in replies:
            kind = reply.metadata.message_type
            if reply.has_error() or not trains(kind):
                arrived.append(reply)
                continue
            server_round = int(config_of(sent).get("server-round", 0))
            hit = struck.setdefault((server_round, kind), {})
            changed = self._after_faults(reply, sent, server_round, hit)
            if changed is not None:
                arrived.append(changed)
        for (server_round, kind), hit in struck.items():
            if hit:
                self.recorder.event("faults", server_round, message_type=kind, clients=hit)
        return arrived

    def _after_faults(
        self, reply: Message, sent: RecordDict, server_round: int, hit: Hit
    ) -> Message | None:
        """Returns what arrives of a reply, None if nothing does; notes in `hit` what struck it."""
        client = partition_of(reply.metadata.src_node_id)
        message_type = reply.metadata.message_type
        for kind in COUNTED:
            fault = self._faults.get(kind)
            if fault is None:
                continue
            purpose = f"faults.{kind}.{message_type}"
            rng = generator(self.seed, purpose, server_round, client)
            if not (client in self._always[kind] or rng.random() < (fault.rate or 0.0)):
                continue
            hit.setdefault(kind, []).append(client)
            self._counts[kind] += 1
            if kind in MISSING:
                return None
            reply = copy_message(reply)
            for name, record in list(reply.content.array_records.items()):
                received = sent.array_records.get(name)
                before = None if received is None else to_tensors(received)
                reply.content[name] = to_record(changed(fault, to_tensors(record), before, rng))
        return reply


def faults_of(params: FaultsParams) -> dict[str, Fault]:
    """Returns the faults that a scenario asks for, by kind."""
    asked = {kind: getattr(params, kind) for kind in COUNTED}
    return {kind: fault for kind, fault in asked.items() if fault is not None}


def chosen(kind: str, fault: Fault, clients: int, seed: int) -> frozenset[int]:
    """Returns the clients all of whose replies go wrong."""
    if fault.clients is not None:
        return frozenset(fault.clients)
    if fault.fraction is None:
        return frozenset()
    rng = generator(seed, f"faults.{kind}.clients")
    size = round(fault.fraction * clients)
    return frozenset(rng.choice(clients, size, replace=False).tolist())


def changed(
    fault: Fault, arrays: Arrays, received: Arrays | None, rng: np.random.Generator
) -> Arrays:
    """Returns what a fault makes of a reply's record.

    received: the record of the same name in the message that the reply answers, if it had one.
    """
    if isinstance(fault, SignFlip):
        return {k: _turned(v, (received or {}).get(k), fault.scale) for k, v in arrays.items()}
    if not isinstance(fault, Corrupt):
        return {k: v * torch.nan if v.is_floating_point() else v for k, v in arrays.items()}
    if fault.how == "bits":
        return {k: _flipped(v, fault.share, rng) for k, v in arrays.items()}
    first, *_ = arrays
    return {**arrays, first: arrays[first].flatten()[:-1]}


def objections(params: FaultsParams, clients: int) -> list[Problem]:
    """Returns which faults would strike clients that there are not, or none at all."""
    found = []
    for kind, fault in faults_of(params).items():
        beyond = [client for client in fault.clients or () if client >= clients]
        if beyond:
            what = f"there are {clients} clients, numbered from 0"
            found.append(Problem(f"faults.{kind}.clients", what, beyond[0]))
        if fault.fraction is not None and round(fault.fraction * clients) == 0:
            what = f"is none of {clients} clients"
            found.append(Problem(f"faults.{kind}.fraction", what, fault.fraction))
    return found


def _turned(value: Tensor, received: Tensor | None, scale: float) -> Tensor:
    """Returns x − s · (y − x) for y that answers x, −s · y for what answers nothing alike."""
    if not value.is_floating_point():
        return value
    if received is None or received.shape != value.shape:
        return -scale * value
    received = received.to(value.device, value.dtype)
    return received - scale * (value - received)


def _flipped(value: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """Returns floats of which some have one of their bits flipped."""
    if not value.is_floating_point():
        return value
    size = value.element_size()
    numbers = value.detach().cpu().contiguous().view(INTEGERS[size]).numpy()
    bits = numbers.view(f"u{size}")
    one = np.ones((), bits.dtype) << rng.integers(8 * size, size=bits.shape).astype(bits.dtype)
    struck = np.where(rng.random(bits.shape) < share, bits ^ one, bits)
    flipped = torch.from_numpy(struck.view(numbers.dtype)).view(value.dtype)
    return flipped.to(value.device)


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a float has."""
