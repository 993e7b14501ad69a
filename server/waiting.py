"""Messages that stay under way over rounds, and the clock that says whose reply is there.

An exchange that waits for fewer replies than there are messages under way (FedBuff's) is served
here: whom to send to is the strategy's choice, made anew whenever replies have come; which replies
have come is the simulated clock's, or else the engine's. With a simulated clock the engine computes
a message when its reply is due, so that every engine gives the same order of replies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.grids.clock import SimulatedClock, first_done
from fedsim.grids.nodes import partition_of
from fedsim.messages import (
    Arrays,
    Broadcast,
    Failure,
    Sent,
    config_of,
    to_record,
    to_tensors,
)
from fedsim.server.check import check_replies
from fedsim.server.traffic import bytes_received, bytes_sent, record_bytes
from fedsim.strategies.base import Exchange

POLL_SECONDS = 0.005
"""Between two looks at an engine that has nothing new."""

LEAST_QUORUM = 0.01
"""Of the replies: a smaller quorum would let a round wait for replies that never are good."""


@dataclass
class Collected:
    """What an exchange has received: good replies, why others were dropped, and the bytes."""

    pairs: list[tuple[Sent, Message]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0


class Waiting:
    """Keeps what is under way, and the simulated time."""

    def __init__(self, grid: Grid, clock: SimulatedClock | None) -> None:
        """clock: None for an engine's own, on which clients take as long as they take."""
        self.grid, self.clock = grid, clock
        self.now = 0.0
        """Simulated seconds since the start; 0 without a clock."""
        self._sent: dict[str, Sent] = {}  # by message id, in the order of sending
        self._arrived: dict[str, Message] = {}  # replies of the engine that were not taken yet
        self._count = 0

    @property
    def busy(self) -> list[int]:
        """The nodes that work on something, a node for each message."""
        return [sent.node_id for sent in self._sent.values()]

    def durations(self, messages: Sequence[Message]) -> list[float] | None:
        """Returns how long each of these takes on the simulated clock; None without one."""
        return None if self.clock is None else self._durations(_parts(messages))

    def collect(
        self,
        server_round: int,
        exchange: Exchange,
        record: ArrayRecord,
        config: Mapping[str, Any],
        wait: int,
        tolerated: int,
    ) -> Collected:
        """Sends and receives until `wait` replies are good.

        Gives up after more than `tolerated` bad replies, and where nothing is under way.
        config: what `configure` gets, with the number of its calls in this round as `dispatch`
        and the nodes that work on something as `in-flight`.
        """
        found = Collected()
        schema = exchange.schema(record)
        dispatch = 0
        while len(found.pairs) < wait and len(found.failures) <= tolerated:
            own = ConfigRecord({**config, "dispatch": dispatch, "in-flight": self.busy})
            messages = exchange.configure(server_round, record, own, self.grid)
            messages = messages if isinstance(messages, Broadcast) else list(messages)
            self._push(messages, server_round)
            found.bytes_down += bytes_sent(messages)
            if not self._sent:
                break
            pulled = self._pull(wait - len(found.pairs))
            replies = [reply for _, reply in pulled]
            found.bytes_up += bytes_received(replies)
            checked = check_replies(replies, [s.node_id for s, _ in pulled], schema, record)
            kept = {id(message) for message in checked.replies}
            found.pairs += [pair for pair in pulled if id(pair[1]) in kept]
            found.failures += checked.failures
            dispatch += 1
        return found

    def _push(self, messages: Sequence[Message], server_round: int) -> None:
        parts = _parts(messages)
        durations = self._durations(parts)
        sent = [
            Sent(node_id, kind, server_round, self._count + i, content, self.now + duration)
            for i, ((node_id, kind, content), duration) in enumerate(
                zip(parts, durations, strict=True)
            )
        ]
        self._count += len(sent)
        self._sent |= zip(self.grid.push_messages(messages), sent, strict=True)

    def _durations(self, parts: Sequence[tuple[int, str, RecordDict]]) -> list[float]:
        if self.clock is None:
            return [0.0] * len(parts)
        contents = {id(content): content for _, _, content in parts}
        told = {
            key: (config_of(content), record_bytes(content.array_records.values()))
            for key, content in contents.items()
        }
        return [
            self.clock.duration(kind, told[id(c)][0], partition_of(node_id), told[id(c)][1])
            for node_id, kind, c in parts
        ]

    def _pull(self, most: int) -> list[tuple[Sent, Message]]:
        """Returns what has come first, one reply at least and `most` at most."""
        if self.clock is None:
            self._fetch(self._sent, lambda: bool(self._arrived))
            due = list(self._arrived)[:most]
        else:
            instant, due = first_done({i: s.finishes for i, s in self._sent.items()}, most)
            self.now = max(self.now, instant)
            self._fetch(due, lambda: self._arrived.keys() >= set(due))
        return [(self._sent.pop(i), self._arrived.pop(i)) for i in due]

    def _fetch(self, message_ids: Iterable[str], enough: Callable[[], bool]) -> None:
        """Asks the engine for replies until there are enough."""
        while True:
            missing = [i for i in message_ids if i not in self._arrived]
            for reply in self.grid.pull_messages(missing) if missing else ():
                answered = reply.metadata.reply_to_message_id
                if answered in self._sent:  # nobody asked for others
                    self._arrived[answered] = reply
            if enough():
                return
            time.sleep(POLL_SECONDS)

    def state_dict(self) -> tuple[Arrays, dict[str, Any]]:
        """Returns what is under way: tensors of the contents, and JSON-able data."""
        contents = {id(sent.content): sent.content for sent in self._sent.values()}
        numbers = {key: str(i) for i, key in enumerate(contents)}
        tensors: Arrays = {}
        for key, content in contents.items():
            for record, arrays in content.array_records.items():
                for name, tensor in to_tensors(arrays).items():
                    tensors[f"{numbers[key]}/{record}/{name}"] = tensor
        return tensors, {
            "count": self._count,
            "contents": {numbers[key]: _layout(content) for key, content in contents.items()},
            "sent": [
                {**vars(sent), "content": numbers[id(sent.content)]} for sent in self._sent.values()
            ],
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Sends again what was under way."""
        contents = {
            number: _content(number, layout, tensors)
            for number, layout in plain["contents"].items()
        }
        self._count = int(plain["count"])
        for fields in plain["sent"]:
            sent = Sent(**{**fields, "content": contents[fields["content"]]})
            message = Message(sent.content, sent.node_id, sent.message_type)
            (message_id,) = self.grid.push_messages([message])
            self._sent[message_id] = sent


def tolerated_failures(wait: int, quorum: float) -> int:
    """Returns how many bad replies may come before `wait` good ones are fewer than the quorum."""
    return int(wait / max(quorum, LEAST_QUORUM) - wait + 1e-9)


def _parts(messages: Sequence[Message]) -> list[tuple[int, str, RecordDict]]:
    """Returns the node, the type and the content of each message."""
    if isinstance(messages, Broadcast):
        return [(node, messages.message_type, messages.content) for node in messages.node_ids]
    return [(m.metadata.dst_node_id, m.metadata.message_type, m.content) for m in messages]


def _layout(content: RecordDict) -> dict[str, Any]:
    """Returns everything of a content but the tensors."""
    return {
        "arrays": {name: list(record) for name, record in content.array_records.items()},
        "configs": {name: dict(record) for name, record in content.config_records.items()},
        "metrics": {name: dict(record) for name, record in content.metric_records.items()},
    }


def _content(number: str, layout: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RecordDict:
    content = RecordDict()
    for record, names in layout["arrays"].items():
        content[record] = to_record({name: tensors[f"{number}/{record}/{name}"] for name in names})
    for record, values in layout["configs"].items():
        content[record] = ConfigRecord(values)
    for record, values in layout["metrics"].items():
        content[record] = MetricRecord(values)
    return content
