"""The engine `inline`: a Flower Grid in this process, with nothing serialised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import (
    Message,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim._flower import Run, set_identity, set_message_id
from fedsim.grids.apps import AppNodes
from fedsim.grids.cohort import Cohorts
from fedsim.grids.nodes import FIRST_NODE_ID, partition_of
from fedsim.messages import (
    Arrays,
    Broadcast,
    Failure,
    Reduction,
    Replies,
    config_of,
    to_tensors,
)


class InlineGrid(Grid):
    """Answers messages at once, with our clients (`Cohorts`) or with any Flower ClientApp.

    Node ids follow from the partitions and come in order; each node keeps a Context (ClientApp) or
    its arrays (our clients). One grid at a time in a process: Flower's task identity is global.
    """

    def __init__(
        self,
        clients: Cohorts | AppNodes | ClientApp,
        num_nodes: int,
        *,
        seed: int = 0,
        run_config: Mapping[str, Any] | None = None,
        node_config: Callable[[int], Mapping[str, Any]] | None = None,
        run_id: int = 1,
    ) -> None:
        self._num_nodes = num_nodes
        self._apps: AppNodes | None = None
        if isinstance(clients, ClientApp):
            clients = AppNodes(clients, num_nodes, seed, run_id, run_config, node_config)
        if isinstance(clients, AppNodes):
            self._apps = clients
        self._clients = clients
        self._pending: dict[str, Message] = {}
        self._ids = itertools.count(1)
        self.set_run(Run.create_empty(run_id))

    def set_run(self, run: Run) -> None:
        """Sets the run, and the identity that Flower's Message needs."""
        self._run = run
        set_identity(run.run_id)

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Returns a new message to a node (deprecated in Flower: call Message)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """Returns all node ids, in the order of their partitions."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self._num_nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Takes messages; they are computed when their replies are pulled."""
        message_ids = []
        for message in messages:
            message_id = str(next(self._ids))
            set_message_id(message, message_id)
            self._pending[message_id] = message
            message_ids.append(message_id)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        """Returns the replies to the messages; each can be pulled once."""
        return self._answer([self._pending.pop(i) for i in message_ids if i in self._pending])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        """Returns the replies; a cohort of our clients comes back as `Replies`."""
        if isinstance(messages, Broadcast) and isinstance(self._clients, Cohorts):
            return self._cohort(
                messages.content, messages.message_type, messages.node_ids, messages.reduction
            )
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, messages: list[Message]) -> Sequence[Message]:
        if self._apps is not None:
            return self._apps.answer_all(messages)
        # One group for each content, so that its clients are computed together; a node that was
        # sent the same content twice is in two groups and answers twice.
        groups: dict[tuple[int, str, int], dict[int, Message]] = {}
        for message in messages:
            content, node_id = id(message.content), message.metadata.dst_node_id
            message_type = message.metadata.message_type
            turn = 0
            while node_id in groups.setdefault((content, message_type, turn), {}):
                turn += 1
            groups[content, message_type, turn][node_id] = message
        answers: list[Sequence[Message]] = []
        for (_, message_type, _), requests in groups.items():
            content_of_all = next(iter(requests.values())).content
            replies = self._cohort(content_of_all, message_type, tuple(requests))
            replies.request = requests.__getitem__
            answers.append(replies)
        return answers[0] if len(answers) == 1 else [m for group in answers for m in group]

    def _cohort(
        self,
        content: RecordDict,
        message_type: str,
        node_ids: Sequence[int],
        reduction: Reduction | None = None,
    ) -> Replies:
        assert isinstance(self._clients, Cohorts)
        known, nodes = sorted(node_ids), self.get_node_ids()  # the messages' order is no matter
        failures: list[Failure] = []
        if known and not (known[0] in nodes and known[-1] in nodes):
            failures = [Failure(n, "no such node") for n in known if n not in nodes]
            known = [n for n in known if n in nodes]
        request = _request(message_type)
        if not known:
            return Replies((), {}, {}, failures, request)
        records = {name: to_tensors(r) for name, r in content.array_records.items()}
        partitions = [partition_of(n) for n in known]
        done = self._clients.run(message_type, records, config_of(content), partitions, reduction)
        failures += [Failure(known[i], reason) for i, reason in done.errors.items()]
        return Replies(
            tuple(known if len(done.good) == len(known) else [known[i] for i in done.good]),
            done.records,
            done.metrics,
            failures,
            request,
            reduced=done.reduced,
            means=done.means,
            bytes_up=done.bytes_up,
        )

    def record(self) -> dict[str, Any]:
        """Returns what was decided and spent while running."""
        return self._clients.record()

    def close(self) -> None:
        """Ends the engine's threads or workers."""
        self._clients.close()

    def state_dict(self) -> tuple[Arrays, dict[str, Any]]:
        """Returns the clients' own state as tensors and a JSON-able dict."""
        if isinstance(self._clients, Cohorts):
            return self._clients.states.state_dict(), {}
        assert self._apps is not None
        return self._apps.state_dict()

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        if isinstance(self._clients, Cohorts):
            self._clients.states.load_state_dict(tensors)
            return
        assert self._apps is not None
        self._apps.load_state_dict(tensors, plain)


def _request(message_type: str) -> Callable[[int], Message]:
    def request(node_id: int) -> Message:
        return Message(RecordDict(), node_id, message_type)

    return request
