"""What the passes share: the value that a node will have, and replacing one node by another.

The value's form (sizes, strides, dtype) is known at trace time, as a tensor without memory in
`node.meta["val"]`. Views are recorded for strides, so a replacement must keep the form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from fedsim.grids.record import Form

aten = torch.ops.aten

Node = Any
"""An fx.Node; the declared type of its arguments is a union of all that they could be."""

_UNANNOTATED_VIEWS = frozenset({aten._unsafe_view.default})


def share_mode(graph: fx.Graph) -> None:
    """Puts the forms that the recorder saw into tensors without memory, to compute new forms with.

    They are those of the real tensors: what is said of a convolution's strides without computing it
    may differ.
    """

    def form(seen: Any) -> Any:
        if not isinstance(seen, Form):
            return seen
        return torch.empty_strided(seen.shape, seen.stride, dtype=seen.dtype, device="meta")

    for node in graph.nodes:
        node.meta["val"] = tree_map(form, node.meta.get("val"))


def value(node: Any) -> Tensor | None:
    """Returns the form of a node that is one tensor, else None."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def same_form(a: Tensor | None, b: Tensor | None) -> bool:
    """Says whether two values agree in sizes, strides and dtype."""
    if a is None or b is None:
        return False
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


def dense(tensor: Tensor) -> bool:
    """Says whether each element has memory of its own, without gaps between them."""
    return bool(aten.is_non_overlapping_and_dense(tensor))


def is_view(node: Node) -> bool:
    """Says whether a node's value is in the memory of its first argument."""
    if node.target in _UNANNOTATED_VIEWS:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1:
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write and str(schema.returns[0].type) == "Tensor"


def calls(node: Any, *targets: object) -> bool:
    """Says whether a node calls one of these operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def only_used_once(node: Node) -> bool:
    """Says whether one node uses this one's value, in one place."""
    places = []
    for user in node.users:
        fx.map_arg((user.args, user.kwargs), lambda used: places.append(used is node))
    return sum(places) == 1


def insert(before: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Returns a new node ahead of `before`; raises RuntimeError if it could not be computed."""
    forms, keywords = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
    result = target(*forms, **keywords)
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta["val"] = result
    return node


def replace(node: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Computes the node by another operator, if that gives the same form; says whether it does."""
    try:
        new = insert(node, target, *args, **kwargs)
    except (RuntimeError, ValueError):  # such as a view of what is not laid out for it
        return False
    if not same_form(value(new), value(node)):
        node.graph.erase_node(new)
        return False
    take(node, new)
    return True


def take(node: Node, other: Node) -> None:
    """Uses `other` wherever node was used."""
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)
