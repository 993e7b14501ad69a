"""A Grid whose messages are computed while the server does something else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import Message

from fedsim._flower import set_message_id
from fedsim.grids.cohort import trained_on
from fedsim.grids.inline import InlineGrid, replies_of
from fedsim.grids.nodes import partition_of
from fedsim.grids.ray_cohorts import RayCohorts
from fedsim.messages import Broadcast


class RayGrid(InlineGrid):
    """Starts each pushed message on a worker at once; pulling returns what is there by then.

    For strategies that do not wait for everybody, on a real clock: which replies come first, and so
    the result, depends on the machines. A client computes one message at a time where its state
    matters: it goes on from what it kept when the message was pushed.
    """

    def __init__(self, clients: RayCohorts, num_nodes: int, *, seed: int = 0) -> None:
        super().__init__(clients, num_nodes, seed=seed)
        self._cohorts = clients
        self._under_way: dict[int, Message] = {}  # by the workers' number
        self._answers: dict[str, Message] = {}
        self._nodes = self.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Starts computing the messages that clients train on; others are answered when pulled."""
        message_ids = []
        for message in messages:
            metadata = message.metadata
            if not (trained_on(metadata.message_type) and metadata.dst_node_id in self._nodes):
                message_ids += InlineGrid.push_messages(self, [message])
                continue
            message_ids.append(str(next(self._ids)))
            set_message_id(message, message_ids[-1])
            number = self._cohorts.start(
                message.content, metadata.message_type, partition_of(metadata.dst_node_id)
            )
            self._under_way[number] = message
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """Returns the replies that are there; each can be pulled once."""
        message_ids = list(message_ids)
        for number, result in self._cohorts.finished().items():
            message = self._under_way.pop(number)
            node_id, of_node = message.metadata.dst_node_id, {message.metadata.dst_node_id: message}
            (reply,) = replies_of(result, [node_id], of_node.__getitem__)
            self._answers[message.metadata.message_id] = reply
        replies = [self._answers.pop(i) for i in message_ids if i in self._answers]
        return [*replies, *InlineGrid.pull_messages(self, message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """Returns the replies of everybody, computed together as engine inline does."""
        if isinstance(messages, Broadcast):
            return super().send_and_receive(messages, timeout=timeout)
        return InlineGrid.pull_messages(self, InlineGrid.push_messages(self, messages))
