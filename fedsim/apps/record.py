"""Records a Flower app's run from outside of it: from its messages and its strategy's results."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from fedsim.grids.nodes import partition_of
from fedsim.runs import RunWriter
from fedsim.runs.progress import Progress
from fedsim.server.traffic import record_bytes

MAX_LIST = 32
"""Longest list in a MetricRecord that is recorded, as name.0, name.1, …"""
MAX_REASONS = 20
SHOWN_FIRST = ("test", "client", "train")
MAX_ROUND = 1_000_000
"""A larger number is none of a round: a group_id may be a clock's time or a UUID."""
SPLITS = {"evaluate": "client"}
"""Splits of message types; any other type is a split of its own name, as "train" and "query"."""


@dataclass
class Costs:
    """What a round or a run has cost. bytes: of the arrays' numbers."""

    bytes_up: float = 0.0
    bytes_down: float = 0.0
    seconds: float = 0.0
    messages: float = 0.0
    dropped: float = 0.0

    def add(self, other: Costs) -> None:
        """Adds another's costs."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class _Node:
    """One reply's metrics."""

    partition: int
    metrics: dict[str, float]


@dataclass
class Recorder:
    """Writes what passes, round by round.

    The round of a message is what its strategy says, else the entry "server-round" of its
    ConfigRecords, else its group_id, if it is at most MAX_ROUND; else a round ends when a node gets
    a second message of a type.
    A second strategy's rounds, and its round 0, come after the first's.

    Attributes:
      first_failure: the first error reply, as a sentence; None if there was none.
      round: the current one. arrays: what the last strategy ended with, or last aggregated.
      totals: of all complete rounds. not_finite: metrics ("split/name") whose newest value is NaN
        or Inf, each with the round since when.
    """

    writer: RunWriter
    progress: Progress
    round: int = 0
    arrays: ArrayRecord | None = None
    first_failure: str | None = None
    totals: Costs = field(default_factory=Costs)
    not_finite: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._costs = Costs()
        self._began = time.monotonic()
        self._shown: dict[str, float] = {}
        self._sent: set[tuple[str, int]] = set()
        self._logged: set[tuple[int, str]] = set()
        self._offset = 0
        self._starts = 0
        self._depth = 0

    # From the strategy

    def started(self, strategy: str, rounds: int | None) -> None:
        """Takes that a Strategy.start begins; may be nested."""
        self._depth += 1
        if self._depth > 1:
            return
        self._offset = self.round + 1 if self._starts or self.round > 1 else 0
        self._starts += 1
        if rounds is not None:
            planned = self._offset + rounds
            self.writer.plan_rounds(planned)
            self.progress.plan(planned)
        self.writer.event("strategy_started", None, strategy=strategy, first_round=self._offset)

    def ended(self) -> None:
        """Takes that a Strategy.start is over, however it ended."""
        self._depth -= 1

    def enter(self, server_round: int) -> None:
        """Takes that a strategy is at this round, as it counts."""
        self._enter(self._offset + server_round)

    def aggregated(self, server_round: int, split: str, metrics: object) -> None:
        """Logs the metrics of a whole round, as the strategy counts it."""
        if not isinstance(metrics, Mapping):
            return
        found = numbers(metrics)
        self._enter(self._offset + server_round)
        self._log(split, found)

    def missed(self, server_round: int, split: str, metrics: object) -> None:
        """Logs the metrics of a whole round unless some were logged when it ran."""
        if (self._offset + server_round, split) in self._logged or not isinstance(metrics, Mapping):
            return
        self._logged.add((self._offset + server_round, split))
        self.writer.log_metrics(self._offset + server_round, split, numbers(metrics))

    # From the Grid

    def exchange(self, messages: Sequence[Message], replies: Sequence[Message]) -> None:
        """Logs replies, given in the order of the messages that they answer."""
        sizes: dict[int, int] = {}
        by_type: dict[str, list[tuple[Message, Message]]] = {}
        for message, reply in zip(messages, replies, strict=True):
            by_type.setdefault(message.metadata.message_type, []).append((message, reply))
        for kind, pairs in by_type.items():
            self._enter(self._round_of([message for message, _ in pairs]))
            self._sent |= {(kind, message.metadata.dst_node_id) for message, _ in pairs}
            for message, reply in pairs:
                content = message.content
                if id(content) not in sizes:
                    sizes[id(content)] = _bytes(content)
                self._costs.bytes_down += sizes[id(content)]
                self._costs.bytes_up += _bytes(reply.content) if reply.has_content() else 0
            self._costs.messages += len(pairs)
            self._log_replies(kind, [reply for _, reply in pairs])

    def close(self) -> None:
        """Ends the last round."""
        self._end_round()

    # Inside

    def _round_of(self, messages: Sequence[Message]) -> int:
        message = messages[0]
        for record in message.content.config_records.values():
            number = record.get("server-round")
            if type(number) is int and 0 <= number <= MAX_ROUND:
                return self._offset + number
        group = message.metadata.group_id
        if group.isdecimal() and int(group) <= MAX_ROUND:
            return self._offset + int(group)
        kind = message.metadata.message_type
        again = any((kind, each.metadata.dst_node_id) in self._sent for each in messages)
        return self.round + 1 if again and not self._depth else max(self.round, 1)

    def _enter(self, number: int) -> None:
        if number != self.round:
            self._end_round()
            self.round = number

    def _end_round(self) -> None:
        """Logs the round's costs, unless nothing happened in it."""
        self._sent = set()
        if self._costs.messages:
            now = time.monotonic()
            self._costs.seconds, self._began = now - self._began, now
            self.totals.add(self._costs)
            system = {f"total_{name}": value for name, value in vars(self.totals).items()}
            system |= vars(self._costs)
            system["clients_per_second"] = self._costs.messages / max(self._costs.seconds, 1e-9)
            self.writer.log_metrics(self.round, "system", system)
            self._costs = Costs()
            first = sorted(self._shown, key=_rank)
            self.progress.update(self.round, {name: self._shown[name] for name in first}, system)
        self.writer.end_round(self.round)

    def _log(self, split: str, metrics: Mapping[str, float]) -> None:
        if metrics:
            self._logged.add((self.round, split))
            self.writer.log_metrics(self.round, split, metrics)
            self._shown |= {f"{split}/{name}": value for name, value in metrics.items()}
            for name, value in metrics.items():
                if math.isfinite(value):
                    self.not_finite.pop(f"{split}/{name}", None)
                else:
                    self.not_finite.setdefault(f"{split}/{name}", self.round)

    def _log_replies(self, kind: str, replies: Sequence[Message]) -> None:
        split = SPLITS.get(kind, kind)
        failed = {
            str(reply.metadata.src_node_id): reply.error.reason or "error"
            for reply in replies
            if reply.has_error()
        }
        if failed:
            self._costs.dropped += len(failed)
            first = dict(list(failed.items())[:MAX_REASONS])
            node, reason = next(iter(first.items()))
            if self.first_failure is None:
                self.first_failure = (
                    f"round {self.round}, {kind}: client {partition_of(int(node))} (node {node}):"
                    f" {reason}"
                )
            self.writer.event(
                "bad_replies", self.round, message_type=kind, count=len(failed), nodes=first
            )
        nodes = [
            _Node(partition_of(reply.metadata.src_node_id), _metrics(reply.content))
            for reply in replies
            if reply.has_content()
        ]
        names = dict.fromkeys(name for node in nodes for name in node.metrics)
        by_clients: dict[tuple[int, ...], dict[str, list[float]]] = {}
        for name in names:
            having = [node for node in nodes if name in node.metrics]
            clients = tuple(node.partition for node in having)
            by_clients.setdefault(clients, {})[name] = [node.metrics[name] for node in having]
        for clients, columns in by_clients.items():
            self.writer.log_client_metrics(self.round, split, clients, columns)
        # A strategy aggregates the two types that it sends by itself; of the rest, the means.
        if not (self._depth and kind in ("train", "evaluate")):
            values = {name: [n.metrics[name] for n in nodes if name in n.metrics] for name in names}
            self._log(split, {name: sum(each) / len(each) for name, each in values.items()})


def numbers(metrics: Mapping[Any, object], prefix: str = "") -> dict[str, float]:
    """Returns the numbers of a MetricRecord; a list's as name.0, name.1, …"""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, int | float):
            found[f"{prefix}{name}"] = float(value)
        elif isinstance(value, list) and len(value) <= MAX_LIST:
            found |= {f"{prefix}{name}.{i}": float(each) for i, each in enumerate(value)}
    return found


def _metrics(content: RecordDict) -> dict[str, float]:
    """Returns a reply's numbers; with their record's name before them where there are several."""
    records = content.metric_records
    prefixes = {key: f"{key}." if len(records) > 1 else "" for key in records}
    return {
        name: value
        for key, record in records.items()
        for name, value in numbers(dict(record), prefixes[key]).items()
    }


def _rank(name: str) -> int:
    split = name.partition("/")[0]
    return SHOWN_FIRST.index(split) if split in SHOWN_FIRST else len(SHOWN_FIRST)


def _bytes(content: RecordDict) -> int:
    return record_bytes(content.array_records.values())
