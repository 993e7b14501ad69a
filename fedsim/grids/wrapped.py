"""A Grid around another one, for what stands between the round loop and an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim._flower import Run
from fedsim.messages import Arrays


class WrappedGrid(Grid):
    """Passes everything on to the grid inside; subclasses change what goes through."""

    def __init__(self, inner: Grid) -> None:
        self.inner = inner

    def set_run(self, run: Run) -> None:
        """Sets the run of the grid inside."""
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self.inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Returns a new message to a node (deprecated in Flower: call Message)."""
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Returns the ids of all nodes."""
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages; returns their ids."""
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """Returns the replies that have come to the messages of these ids."""
        return list(self.inner.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """Returns the replies to the messages."""
        replies = self.inner.send_and_receive(messages, timeout=timeout)
        return replies if isinstance(replies, Sequence) else list(replies)

    def first_come(self, messages: Sequence[Message], take: Callable[[Message], bool]) -> None:
        """Hands over the replies as they come, if the grid inside has a clock of its own."""
        inner: Any = self.inner
        inner.first_come(messages, take)

    def state_dict(self) -> tuple[Arrays, dict[str, Any]]:
        """Returns the state of the clients, if the grid inside keeps it."""
        inner: Any = self.inner
        return inner.state_dict() if hasattr(inner, "state_dict") else ({}, {})

    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        inner: Any = self.inner
        if hasattr(inner, "load_state_dict"):
            inner.load_state_dict(tensors, plain)
