"""What the passes share: the value that a node will have, and replacing one node by another.

The value's Form is known at trace time, in `node.meta["val"]`. Views are recorded for strides, so a
replacement must keep the form. That of a new node is found by computing it once, with zeros: what
torch says of tensors without memory may differ (a convolution's strides), and for most operators it
loads its compiler to say it.
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


def value(node: Any) -> Form | None:
    """Returns the form of a node that is one tensor, else None."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Form) else None


def same_form(a: Form | None, b: Form | None) -> bool:
    """Says whether two values agree in sizes, strides, dtype and device."""
    return a is not None and a == b


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
    result = target(*_zeros(args), **_zeros(kwargs))
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta["val"] = tree_map(lambda x: Form.of(x) if isinstance(x, Tensor) else x, result)
    return node


def _zeros(args: Any) -> Any:
    values = fx.map_arg(args, lambda node: node.meta["val"])
    return tree_map(lambda x: x.zeros() if isinstance(x, Form) else x, values)


def replace(node: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Computes the node by another operator, if that gives the same form; says whether it does."""
    try:
        new = insert(node, target, *args, **kwargs)
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the operator
        raise
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
