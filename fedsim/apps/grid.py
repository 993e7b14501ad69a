"""The Grid of a Flower app's run: answers at once, and tells the record of all that passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedsim._flower import set_message_id
from fedsim.errors import RunFailed
from fedsim.grids.apps import AppNodes
from fedsim.grids.inline import InlineGrid

PATIENCE = 8
"""How often a ServerApp may ask for the nodes and do nothing else, over `PATIENCE_SECONDS`."""
PATIENCE_SECONDS = 10.0
IDLE_SECONDS = 0.05
"""Processor time of its thread between two questions, up to which it did nothing else."""

Exchange = Callable[[Sequence[Message], Sequence[Message]], None]


class AppGrid(InlineGrid):
    """An InlineGrid for one ClientApp whose nodes handle messages when they are pushed.

    So a message that nobody pulls the reply of is handled too, in its turn, and what the ServerApp
    does to its records afterwards reaches nobody, as over a network. A timeout never expires.
    """

    def __init__(
        self,
        app: ClientApp,
        num_nodes: int,
        *,
        seed: int,
        run_id: int,
        run_config: Mapping[str, Any],
        on_exchange: Exchange,
    ) -> None:
        """on_exchange: told the messages of each push and their replies, in the same order."""
        self._nodes = AppNodes(app, num_nodes, seed, run_id, run_config)
        super().__init__(self._nodes, num_nodes, seed=seed, run_id=run_id)
        self._on_exchange = on_exchange
        self._replies: dict[str, Message] = {}
        self._asked = 0
        self._asked_since = 0.0
        self._answered = 0.0  # in the processor time of the thread that asked

    def get_node_ids(self) -> list[int]:  # type: ignore[override]
        """Returns all node ids, in the order of their partitions.

        Raises RunFailed for a ServerApp that asks for them over and over and does nothing else: it
        waits for more nodes than there will ever be.
        """
        worked = time.thread_time() - self._answered > IDLE_SECONDS
        if self._asked == 0 or worked:
            self._asked, self._asked_since = 0, time.monotonic()
        self._asked += 1
        waited = time.monotonic() - self._asked_since
        if self._asked > PATIENCE and waited > PATIENCE_SECONDS:
            raise RunFailed(
                f"the ServerApp has asked for the nodes {self._asked} times in {waited:.0f} s and"
                f" done nothing else: it seems to wait for more than the {self._num_nodes} that"
                " there are (min_available_nodes?); give it more with --nodes"
            )
        self._answered = time.thread_time()
        return list(super().get_node_ids())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Takes messages, and computes their replies."""
        sent = list(messages)
        message_ids = []
        for message in sent:
            message_ids.append(str(next(self._ids)))
            set_message_id(message, message_ids[-1])
        replies = self._nodes.answer_all(sent)
        for message_id, reply in zip(message_ids, replies, strict=True):
            set_message_id(reply, f"{message_id}-reply")
            self._replies[message_id] = reply
        if sent:
            self._asked = 0
            self._on_exchange(sent, replies)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Returns the replies to the messages; each can be pulled once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Returns the replies, in the order of the messages."""
        return self.pull_messages(self.push_messages(messages))
