"""The engine `inline`: a Flower Grid in this process, with nothing serialised."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsim._flower import Run, set_identity, set_message_id
from fedsim.grids.cohort import Cohorts
from fedsim.messages import (
    ERROR_CODE,
    Arrays,
    Broadcast,
    Failure,
    Replies,
    config_of,
    to_record,
    to_tensor,
    to_tensors,
)
from fedsim.random import integer, seeded_globals

FIRST_NODE_ID = 2
"""Node of partition 0; Flower keeps 1 for the SuperLink."""


def node_of(partition: int) -> int:
    """Returns the node id of a partition."""
    return partition + FIRST_NODE_ID


def partition_of(node_id: int) -> int:
    """Returns the partition of a node id."""
    return node_id - FIRST_NODE_ID


class InlineGrid(Grid):
    """Answers messages at once, with our clients (`Cohorts`) or with any Flower ClientApp.

    Node ids follow from the partitions and come in order; each node keeps a Context (ClientApp) or
    its arrays (our clients). One grid at a time in a process: Flower's task identity is global.
    """

    def __init__(
        self,
        clients: Cohorts | ClientApp,
        num_nodes: int,
        *,
        seed: int = 0,
        run_config: Mapping[str, Any] | None = None,
        node_config: Callable[[int], Mapping[str, Any]] | None = None,
        run_id: int = 1,
    ) -> None:
        self._clients, self._num_nodes, self._seed = clients, num_nodes, seed
        self._run_config = dict(run_config or {})
        self._node_config = node_config or (lambda partition: {})
        self._contexts: dict[int, Context] = {}
        self._handled: dict[int, int] = {}  # messages that each ClientApp node has handled
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
            return self._cohort(messages.content, messages.message_type, messages.node_ids)
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, messages: list[Message]) -> Sequence[Message]:
        if isinstance(self._clients, ClientApp):
            return [self._call_app(message, self._clients) for message in messages]
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

    def _cohort(self, content: RecordDict, message_type: str, node_ids: Sequence[int]) -> Replies:
        assert isinstance(self._clients, Cohorts)
        node_ids = sorted(node_ids)  # the order of the messages must not matter
        known = [n for n in node_ids if n in self.get_node_ids()]
        unknown = [Failure(n, "no such node") for n in node_ids if n not in self.get_node_ids()]
        records = {name: to_tensors(r) for name, r in content.array_records.items()}
        partitions = [partition_of(n) for n in known]
        request = _request(message_type)
        if not known:
            return Replies((), {}, {}, unknown, request)
        done = self._clients.run(message_type, records, config_of(content), partitions)
        failures = [Failure(known[i], reason) for i, reason in done.errors.items()]
        return Replies(
            tuple(known[i] for i in done.good),
            done.records,
            done.metrics,
            unknown + failures,
            request,
        )

    def _call_app(self, message: Message, app: ClientApp) -> Message:
        """Runs a Flower ClientApp on one message; what it raises becomes an error reply."""
        node_id = message.metadata.dst_node_id
        if node_id not in self.get_node_ids():
            return Message(Error(ERROR_CODE, "no such node"), reply_to=message)
        context = self._context(node_id)
        partition, count = partition_of(node_id), self._handled.get(node_id, 0)
        self._handled[node_id] = count + 1
        private = _copy_message(message)
        # A ClientApp draws from global generators: keyed here, so that order does not matter.
        stream = seeded_globals(self._seed, "client-app", partition, count)
        with stream, torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer(self._seed, "client-app-torch", partition, count))
            try:
                reply = app(private, context)
            except Exception as error:
                return Message(
                    Error(ERROR_CODE, f"{type(error).__name__}: {error}"), reply_to=message
                )
        if not isinstance(reply, Message):
            reason = f"the ClientApp returned a {type(reply).__name__}, not a Message"
            return Message(Error(ERROR_CODE, reason), reply_to=message)
        return reply

    def _context(self, node_id: int) -> Context:
        if node_id not in self._contexts:
            partition = partition_of(node_id)
            self._contexts[node_id] = Context(
                run_id=self._run.run_id,
                node_id=node_id,
                node_config={
                    "partition-id": partition,
                    "num-partitions": self._num_nodes,
                    **self._node_config(partition),
                },
                state=RecordDict(),
                run_config=dict(self._run_config),
            )
        return self._contexts[node_id]

    def record(self) -> dict[str, Any]:
        """Returns what was decided and spent while running: blocks and seconds of tracing."""
        if not isinstance(self._clients, Cohorts):
            return {}
        cache = self._clients.cache
        return {
            "blocks": self._clients.bounds,
            "graphs": len(cache),
            "trace_seconds": round(cache.seconds, 3),
        }

    def close(self) -> None:
        """Ends the engine's threads."""
        if isinstance(self._clients, Cohorts):
            self._clients.close()

    def state_dict(self) -> tuple[Arrays, dict[str, Any]]:
        """Returns the clients' own state as tensors and a JSON-able dict."""
        if isinstance(self._clients, Cohorts):
            return {
                f"{partition}/{name}": tensor.cpu()
                for partition, state in self._clients.states.items()
                for name, tensor in state.items()
            }, {}
        tensors: Arrays = {}
        nodes: dict[str, list[Any]] = {}
        for node_id, context in self._contexts.items():
            for i, (key, record) in enumerate(context.state.items()):
                values: Any
                if isinstance(record, ArrayRecord):
                    kind, values = "array", list(record)
                    for name, array in record.items():
                        tensors[f"{node_id}/{i}/{name}"] = to_tensor(array)
                else:
                    kind = "metric" if isinstance(record, MetricRecord) else "config"
                    values = {k: _jsonable(v) for k, v in record.items()}
                nodes.setdefault(str(node_id), []).append([key, kind, values])
        return tensors, {"nodes": nodes, "handled": {str(k): v for k, v in self._handled.items()}}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        if isinstance(self._clients, Cohorts):
            for key, tensor in tensors.items():
                partition, _, name = key.partition("/")
                self._clients.states.setdefault(int(partition), {})[name] = tensor
            return
        for node_id, records in plain["nodes"].items():
            state = self._context(int(node_id)).state
            for i, (key, kind, values) in enumerate(records):
                if kind == "array":
                    state[key] = to_record({n: tensors[f"{node_id}/{i}/{n}"] for n in values})
                else:
                    make = MetricRecord if kind == "metric" else ConfigRecord
                    state[key] = make({k: _from_json(v) for k, v in values.items()})
        self._handled = {int(k): v for k, v in plain["handled"].items()}


def _request(message_type: str) -> Callable[[int], Message]:
    def request(node_id: int) -> Message:
        return Message(RecordDict(), node_id, message_type)

    return request


def _copy_message(message: Message) -> Message:
    """Returns a copy that a ClientApp may change: over a network it would have its own, too."""
    content = RecordDict()
    for key, record in message.content.items():
        if isinstance(record, ArrayRecord):
            own = ArrayRecord()
            for name, array in record.items():
                own[name] = array
            content[key] = own
        else:
            content[key] = copy.deepcopy(record)
    return Message(content=content, metadata=copy.copy(message.metadata))  # type: ignore[call-overload, no-any-return]


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list):
        return [_jsonable(v) for v in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    return value
