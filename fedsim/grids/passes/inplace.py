"""Writes results into memory that nobody reads any more."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fedsim.grids.passes.rewrite import Node, aten, calls, dense, is_view, same_form, value

_LINEAR = frozenset({aten.baddbmm.default, aten.addmm.default, aten.scatter_add.default})
"""Operators that read their first argument only where they write, besides the element-wise."""

_SYMMETRIC = frozenset({aten.add.Tensor, aten.mul.Tensor})


def write_in_place(graph: fx.Graph, donated: int) -> frozenset[int]:
    """Turns operators into their in-place forms; returns the inputs that are written to.

    donated: the first so many inputs are the state that a caller replaces by the first so many
    outputs. Such an input may be written to if the caller keeps no other tensor in its memory,
    now or after any number of steps; so the output that replaces it must be the only one in its
    memory, dense in it, and that memory new or the input's own. What is passed on to another place
    is not.
    """
    nodes: list[Node] = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    (output,) = (node for node in nodes if node.op == "output")
    results: list[Node] = list(output.args[0])
    memory = {node: node for node in nodes}  # the first node whose memory it is in
    for node in nodes:
        if node.op == "call_function":
            memory[node] = _memory(node, memory)
    writable = {node for node in nodes if _is_new(node) and memory[node] is node}
    held = [memory[result] for result in results if isinstance(result, fx.Node)]
    for given, result in zip(inputs[:donated], results[:donated], strict=True):
        mine = memory.get(result)
        if mine is None or not dense(result.meta["val"].without_memory()) or held.count(mine) > 1:
            continue
        if mine is given or mine in writable:
            writable.add(given)
    order = {node: i for i, node in enumerate(nodes)}
    written: set[Node] = set()
    for node in nodes:
        target = _in_place_form(node)
        if target is None:
            continue
        for args in _orders(node):
            over = memory.get(args[0])
            if over not in writable or not same_form(value(args[0]), value(node)):
                continue
            sharing = [other for other in nodes if memory[other] is over]
            last = max(order[user] for other in sharing for user in other.users)
            read = sum(other in node.all_input_nodes for other in sharing)
            if last > order[node] or read > 1 or args.count(args[0]) > 1:
                continue
            node.target, node.args = target, args
            memory.update({other: over for other in nodes if memory[other] is memory[node]})
            written.add(over)
            break
    return frozenset(i for i, given in enumerate(inputs) if given in written)


def _memory(node: Node, memory: dict[Node, Node]) -> Node:
    """Returns the first node whose memory this one's value, or a part of it, may be in."""
    source = node.args[0] if node.args else None
    made_by = source if calls(node, operator.getitem) else node
    if isinstance(source, fx.Node) and (is_view(node) or not _returns_apart(made_by)):
        return memory[source]
    return node


def _is_new(node: Node) -> bool:
    """Says whether a node's value is one tensor in memory of its own, as far as schemas tell."""
    if node.op != "call_function" or value(node) is None:
        return False
    if calls(node, operator.getitem):
        return _returns_apart(node.args[0])
    return _returns_apart(node)


def _returns_apart(node: Node) -> bool:
    """Says whether an operator returns tensors (no lists of them) that share no memory."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and all(
        out.alias_info is None and str(out.type) == "Tensor" for out in schema.returns
    )


def _in_place_form(node: Node) -> Any:
    """Returns the operator that computes the same into its first argument, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_view(node):
        return None
    if torch.Tag.pointwise not in target.tags and target not in _LINEAR:
        return None
    packet = getattr(aten, f"{target._schema.name.removeprefix('aten::')}_", None)
    return getattr(packet, target._overloadname, None)


def _orders(node: Node) -> list[tuple[Any, ...]]:
    """Returns the orders of a node's arguments that give the same value."""
    plain = node.target in _SYMMETRIC and not node.kwargs
    return [node.args, node.args[::-1]] if plain and len(node.args) == 2 else [node.args]
