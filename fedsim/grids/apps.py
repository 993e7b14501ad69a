"""Runs Flower ClientApps in this process: one Context a node, keyed random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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

from fedsim.grids.nodes import partition_of
from fedsim.messages import ERROR_CODE, Arrays, to_record, to_tensor
from fedsim.random import integer, seeded_globals


class AppNodes:
    """The nodes of a ClientApp; each keeps its Context from message to message."""

    def __init__(
        self,
        app: ClientApp,
        num_nodes: int,
        seed: int,
        run_id: int,
        run_config: Mapping[str, Any] | None = None,
        node_config: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> None:
        """node_config: from a partition to what its Context holds beside the partition's id."""
        self._app, self._num_nodes, self._seed, self._run_id = app, num_nodes, seed, run_id
        self._run_config = dict(run_config or {})
        self._node_config = node_config or (lambda partition: {})
        self._contexts: dict[int, Context] = {}
        self._handled: dict[int, int] = {}  # messages that each node has handled

    def answer(self, message: Message) -> Message:
        """Returns the reply to one message; what the app raises becomes an error reply."""
        node_id = message.metadata.dst_node_id
        if not 0 <= partition_of(node_id) < self._num_nodes:
            return Message(Error(ERROR_CODE, "no such node"), reply_to=message)
        context = self.context(node_id)
        partition, count = partition_of(node_id), self._handled.get(node_id, 0)
        self._handled[node_id] = count + 1
        private = _copy_message(message)
        # A ClientApp draws from global generators: keyed here, so that order does not matter.
        stream = seeded_globals(self._seed, "client-app", partition, count)
        with stream, torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer(self._seed, "client-app-torch", partition, count))
            try:
                reply = self._app(private, context)
            except Exception as error:
                return Message(
                    Error(ERROR_CODE, f"{type(error).__name__}: {error}"), reply_to=message
                )
        if not isinstance(reply, Message):
            reason = f"the ClientApp returned a {type(reply).__name__}, not a Message"
            return Message(Error(ERROR_CODE, reason), reply_to=message)
        return reply

    def context(self, node_id: int) -> Context:
        """Returns the Context that the node keeps."""
        if node_id not in self._contexts:
            partition = partition_of(node_id)
            self._contexts[node_id] = Context(
                run_id=self._run_id,
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

    def state_dict(self) -> tuple[Arrays, dict[str, Any]]:
        """Returns the nodes' states as tensors and a JSON-able dict."""
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
        for node_id, records in plain["nodes"].items():
            state = self.context(int(node_id)).state
            for i, (key, kind, values) in enumerate(records):
                if kind == "array":
                    state[key] = to_record({n: tensors[f"{node_id}/{i}/{n}"] for n in values})
                else:
                    make = MetricRecord if kind == "metric" else ConfigRecord
                    state[key] = make({k: _from_json(v) for k, v in values.items()})
        self._handled = {int(k): v for k, v in plain["handled"].items()}


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
