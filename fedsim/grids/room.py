"""How many clients one call may hold on a device with memory of its own.

What a client and chain take is counted, not guessed: its first step is recorded operation by
operation, and the bytes are added that are alive at once. They follow from shapes alone (model,
optimizer, minibatch), so that the same scenario has the same blocks on the same kind of device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fedsim.clients.base import Client, Plan
from fedsim.grids.execute import run_one
from fedsim.grids.lanes import GATHER_FLOATS, Block
from fedsim.grids.record import Form, record, without_compiler
from fedsim.grids.trace import Graph, TraceCache
from fedsim.messages import Arrays

USABLE = 0.5
"""Of a worker's share of the memory. The rest is for the libraries' own, for what the allocator
cannot fill, and for operations that take more for many clients than for one, many times."""


def device_memory(device: torch.device) -> int:
    """Returns the bytes of a device that has memory of its own; 0 for others."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory)


def fitting(memory: int, resident: int, lane: int, chains: int, itemsize: int) -> int:
    """Returns how many clients one block may hold, ≥ 1.

    memory: bytes of the device that are the worker's. resident: bytes of it that data and model
    take. lane: bytes of a client and chain, as `lane_bytes` counts them. chains: of each client; 0
    for none. itemsize: bytes of a number.
    """
    room = int(USABLE * memory) - resident - itemsize * GATHER_FLOATS
    return max(room // max(lane * max(chains, 1), 1), 1)


def lane_bytes(client: Client, block: Block, records: dict[str, Arrays], state: Arrays) -> int:
    """Returns the most bytes that a client and chain takes at once in its first step.

    block: of that client alone, whose plan is `first_step`'s. records, state: of the chain.
    """
    meter = _Meter()
    run_one(client, block, records, state, meter)
    return meter.bytes


def first_step(plan: Plan) -> Plan:
    """Returns the plan cut to one step, if there is any."""
    scalars = {k: v[:1] if isinstance(v, np.ndarray) else v for k, v in plan.scalars.items()}
    return replace(plan, steps=min(plan.steps, 1), scalars=scalars)


class _Meter(TraceCache):
    """Computes what it is given, and notes the most bytes that a part of it takes."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.bytes = 0

    def call(self, key: object, function: Callable[..., Any], *args: Any) -> Any:
        """Returns function(*args)."""
        self._measure(function, args)
        return super().call(key, function, *args)

    def graph(
        self, key: object, function: Callable[..., Any], *args: Any, donate: bool = False
    ) -> Graph:
        """Returns what maps the leaves of args to those of function(*args)."""
        self._measure(function, args)
        return super().graph(key, function, *args, donate=donate)

    def _measure(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        leaves, spec = tree_flatten(args)

        def flat(*inputs: Tensor) -> list[Tensor]:
            return tree_leaves(function(*tree_unflatten(list(inputs), spec)))

        with without_compiler(), torch.no_grad():
            inputs = [leaf.detach() for leaf in leaves]
            flat(*inputs)  # whatever is made once is made outside
            graph = record(flat, inputs).graph
        given = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        self.bytes = max(self.bytes, given + peak_bytes(graph))


def peak_bytes(graph: fx.Graph) -> int:
    """Returns the most bytes that a graph's values take at once, its inputs and constants apart.

    A value is freed after its last use, as the code is that fedsim makes of graphs.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    owner: dict[fx.Node, fx.Node] = {}  # whose memory a value is in
    for node in nodes:
        shared = _shares_memory_of(node)
        owner[node] = node if shared is None else owner[shared]
    last = dict.fromkeys(nodes, len(nodes))
    for position, node in enumerate(nodes):
        last[owner[node]] = position
        for used in node.all_input_nodes:
            last[owner[used]] = position
    for kept in next(node for node in graph.nodes if node.op == "output").all_input_nodes:
        last[owner[kept]] = len(nodes)
    alive = peak = 0
    ends: dict[int, int] = {}  # bytes by the position after which they are free
    for position, node in enumerate(nodes):
        if node.op == "call_function" and owner[node] is node:
            size = _bytes(node.meta["val"])
            alive += size
            ends[last[node]] = ends.get(last[node], 0) + size
        peak = max(peak, alive)
        alive -= ends.get(position, 0)
    return peak


def _shares_memory_of(node: fx.Node) -> fx.Node | None:
    """Returns the value whose memory a value is a view of; None if it has its own."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    if node.target is operator.getitem or any(each.alias_info is not None for each in returns):
        return node.all_input_nodes[0]
    return None


def _bytes(value: Any) -> int:
    forms: Iterable[Any] = value if isinstance(value, tuple) else (value,)
    return sum(f.shape.numel() * f.dtype.itemsize for f in forms if isinstance(f, Form))
