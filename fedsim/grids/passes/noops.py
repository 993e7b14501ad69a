"""Removes what vmap and autograd leave behind: operations that change nothing."""

from __future__ import annotations

from typing import Any

from torch import fx

from fedsim.grids.passes.rewrite import (
    Node,
    aten,
    calls,
    is_view,
    only_used_once,
    replace,
    same_form,
    take,
    value,
)

_POINTWISE = frozenset(
    {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.addcmul.default}
)


def remove_noops(graph: fx.Graph) -> None:
    """Applies each rule below to each node, in order of computation."""
    for node in list(graph.nodes):
        if node.op == "call_function":
            any(
                rule(node)
                for rule in (
                    drop_identity,
                    return_to_ancestor,
                    view_from_afar,
                    drop_neutral_number,
                    reciprocal,
                    broadcast_implicitly,
                    sum_without_keeping,
                )
            )
    graph.eliminate_dead_code()


def uniform(node: Any) -> float | None:
    """Returns the number that all of a node's elements are equal to, if the graph says so."""
    if not isinstance(node, fx.Node):
        return float(node) if isinstance(node, (int, float)) else None
    if calls(node, aten.ones_like.default, aten.ones.default, aten.new_ones.default):
        return 1.0
    if calls(node, aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default):
        return 0.0
    if calls(node, aten.full.default, aten.full_like.default):
        return uniform(node.args[1])
    if calls(node, aten.scalar_tensor.default) or (node.op == "call_function" and is_view(node)):
        return uniform(node.args[0])
    return None


def drop_identity(node: Node) -> bool:
    """clone, _to_copy: the same values in the same layout; nothing is changed in place yet."""
    if not calls(node, aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default):
        return False
    source = node.args[0]
    if not same_form(value(source), value(node)):
        return False
    take(node, source)
    return True


def return_to_ancestor(node: Node) -> bool:
    """A view with the sizes and strides of what it is a view of, is that.

    For all of its elements are among that one's (which is not so for as_strided). This covers
    expand and view to the same shape, transposes of transposes, squeeze of unsqueeze.
    """
    source = node
    while is_view(source) and not calls(source, aten.as_strided.default):
        source = source.args[0]
        if same_form(value(source), value(node)):
            take(node, source)
            return True
    return False


def view_from_afar(node: Node) -> bool:
    """A view of a view is a view of the first, if its strides come out the same."""
    if any(not is_view(n) or calls(n, aten.as_strided.default) for n in (node, node.args[0])):
        return False
    return replace(node, aten.view.default, node.args[0].args[0], list(node.meta["val"].shape))


def drop_neutral_number(node: Node) -> bool:
    """x · 1, x / 1, x + 0 and x − 0 are x (but for the sign of a zero)."""
    if calls(node, aten.mul.Tensor, aten.mul.Scalar):
        neutral, sides = 1.0, [0, 1]
    elif calls(node, aten.div.Tensor, aten.div.Scalar):
        neutral, sides = 1.0, [0]
    elif calls(node, aten.add.Tensor, aten.add.Scalar):
        neutral, sides = 0.0, [0, 1]
    elif calls(node, aten.sub.Tensor, aten.sub.Scalar):
        neutral, sides = 0.0, [0]
    else:
        return False
    if node.kwargs:
        return False
    for side in sides:
        kept, other = node.args[side], node.args[1 - side]
        if not isinstance(kept, fx.Node) or uniform(other) != neutral:
            continue
        if same_form(value(kept), value(node)):
            take(node, kept)
            return True
    return False


def reciprocal(node: Node) -> bool:
    """1 / y, rounded once either way."""
    if not calls(node, aten.div.Tensor) or uniform(node.args[0]) != 1.0:
        return False
    return replace(node, aten.reciprocal.default, node.args[1])


def broadcast_implicitly(node: Node) -> bool:
    """Element-wise operators broadcast by themselves what was expanded for them."""
    if node.target not in _POINTWISE:
        return False
    args = tuple(arg.args[0] if calls(arg, aten.expand.default) else arg for arg in node.args)
    return args != tuple(node.args) and replace(node, node.target, *args, **node.kwargs)


def sum_without_keeping(node: Node) -> bool:
    """A sum that keeps its axes, viewed without them, is a sum that does not keep them."""
    if not is_view(node) or not calls(source := node.args[0], aten.sum.dim_IntList):
        return False
    if source.kwargs or len(source.args) != 3 or not only_used_once(source):
        return False
    return replace(node, aten.sum.dim_IntList, *source.args[:2])
