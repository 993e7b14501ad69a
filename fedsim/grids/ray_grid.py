"""A Grid whose messages are computed while the server does something else."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence

from flwr.app import Message

from fedsim._flower import set_message_id
from fedsim.grids.cohort import computed_alone
from fedsim.grids.inline import InlineGrid, replies_of
from fedsim.grids.nodes import partition_of
from fedsim.grids.ray_cohorts import Kept, RayCohorts
from fedsim.messages import Broadcast

POLL_SECONDS = 0.005
"""Between two looks at workers that have finished nothing new."""


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
        self._forgotten: dict[int, int] = {}  # the nodes at work on what nobody waits for
        self._answers: dict[str, tuple[Message, Kept]] = {}
        self._nodes = self.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Starts computing the messages that clients train on; others are answered when pulled."""
        message_ids = []
        for message in messages:
            metadata = message.metadata
            if not (computed_alone(metadata.message_type) and metadata.dst_node_id in self._nodes):
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
        self._look()
        replies = [self._taken(i) for i in message_ids if i in self._answers]
        return [*replies, *InlineGrid.pull_messages(self, message_ids)]

    def first_come(self, messages: Sequence[Message], take: Callable[[Message], bool]) -> None:
        """Hands over each reply as it comes, until `take` says that no more are needed.

        A worker gets its next message when it is done with the last, so that nobody waits behind a
        slow client while another worker is idle. What is left over then is not begun, or ignored
        when it is done: its worker is busy until then, and the client keeps nothing of it. Nor does
        the client get another message before, so that it does not occupy one worker after another.
        """
        left, open_ids = list(messages), set[str]()
        while left or open_ids:
            self._look()  # who was forgotten may be done
            busy = self._forgotten.values()
            able = [message for message in left if message.metadata.dst_node_id not in busy]
            for message in able[: self._cohorts.idle()] if able else ():
                left.remove(message)
                open_ids.update(self.push_messages([message]))
            waiting = len(open_ids)
            for message_id in list(open_ids):  # no more than there are workers
                for reply in self.pull_messages([message_id]):
                    open_ids.remove(message_id)
                    if not take(reply):
                        self._forget(open_ids)
                        return
            if len(open_ids) == waiting:
                time.sleep(POLL_SECONDS)

    def _look(self) -> None:
        """Takes from the workers what they have finished."""
        for number, (result, kept) in self._cohorts.finished().items():
            if self._forgotten.pop(number, None) is not None:
                continue
            message = self._under_way.pop(number)
            node_id, of_node = message.metadata.dst_node_id, {message.metadata.dst_node_id: message}
            (reply,) = replies_of(result, [node_id], of_node.__getitem__)
            self._answers[message.metadata.message_id] = reply, kept

    def _taken(self, message_id: str) -> Message:
        """Returns a reply that has come; from here on its client goes on from what it kept."""
        reply, kept = self._answers.pop(message_id)
        for partitions, states in kept:
            self._cohorts.states.scatter(partitions, states)
        return reply

    def _forget(self, message_ids: Collection[str]) -> None:
        """Ignores the replies to some messages, those that have come and those that will."""
        for message_id in message_ids:
            self._answers.pop(message_id, None)
        for number, message in list(self._under_way.items()):
            if message.metadata.message_id in message_ids:
                self._forgotten[number] = self._under_way.pop(number).metadata.dst_node_id
                self._cohorts.ignore(number)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """Returns the replies of everybody, computed together as engine inline does."""
        if isinstance(messages, Broadcast):
            return super().send_and_receive(messages, timeout=timeout)
        return InlineGrid.pull_messages(self, InlineGrid.push_messages(self, messages))
