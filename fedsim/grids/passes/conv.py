"""What is slow around convolutions on a CPU."""

from __future__ import annotations

import operator

from torch import fx

from fedsim.grids.passes.rewrite import Node, aten, calls, insert, replace, same_form, take, value

_POOL_DEFAULTS: tuple[object, ...] = ([], [], [0, 0], [1, 1], False)
"""Kernel size, stride, padding, dilation and rounding up."""


def pool_before_relu(graph: fx.Graph) -> None:
    """Pools a convolution's outputs first, so that there are fewer numbers to take the relu of.

    Values: relu is monotone, so the maximum of relu(x) over a window is relu of x's maximum m.

    Gradients: of a window with m > 0 the same element is chosen, as relu changes no positive
    number and lowers none below another (the first of several in both orders); relu's slope there
    is 1. Of a window with m ≤ 0 all of relu(x) is 0, so whichever element is chosen has slope 0,
    and after the swap relu at m has slope 0. The sum over windows that overlap is that of the same
    terms. NaN is the maximum of its window in both orders and passes its gradient.
    """
    for relu in list(graph.nodes):
        if calls(relu, aten.relu.default):
            _swap(relu)
    graph.eliminate_dead_code()


def _swap(relu: Node) -> None:
    """Swaps relu and pooling, forwards and backwards, unless something else looks at relu(x)."""
    pools = [n for n in relu.users if calls(n, aten.max_pool2d_with_indices.default)]
    scatters = [n for n in relu.users if calls(n, aten.max_pool2d_with_indices_backward.default)]
    masks = [n for n in relu.users if calls(n, aten.threshold_backward.default)]
    if len(pools) != 1 or len(relu.users) != 1 + len(scatters) + len(masks):
        return
    (pool,) = pools
    parts = {n.args[1]: n for n in pool.users if calls(n, operator.getitem)}
    if set(parts) != {0, 1} or len(parts) != len(pool.users):
        return
    pooled, index = parts[0], parts[1]
    own = [*pool.args[1:], *_POOL_DEFAULTS[len(pool.args) - 1 :]]
    for scatter in scatters:
        _, source, *settings, chosen = scatter.args
        if source is not relu or chosen is not index or settings != own[: len(settings)]:
            return
        if any(user not in masks or user.args[0] is not scatter for user in scatter.users):
            return
    if any(mask.args[0] not in scatters or mask.args[1:] != (relu, 0) for mask in masks):
        return
    x = relu.args[0]
    new_pool = insert(pool, pool.target, x, *pool.args[1:])
    most = insert(pool, operator.getitem, new_pool, 0)
    where = insert(pool, operator.getitem, new_pool, 1)
    new_pooled = insert(pool, aten.relu.default, most)
    if not same_form(value(new_pooled), value(pooled)):
        return
    for mask in masks:
        scatter = mask.args[0]
        gradient = insert(mask, aten.threshold_backward.default, scatter.args[0], new_pooled, 0)
        replace(mask, scatter.target, gradient, x, *scatter.args[2:-1], where)
    pooled.replace_all_uses_with(new_pooled)
    index.replace_all_uses_with(where)


def bias_gradients_by_sums(graph: fx.Graph) -> None:
    """Sums a convolution's output gradients for the bias itself.

    That is what convolution_backward returns for it; oneDNN takes longer to do so.
    """
    for node in list(graph.nodes):
        if not calls(node, aten.convolution_backward.default):
            continue
        gradient, *between, wanted = node.args
        form = value(gradient)
        if form is None or form.device.type != "cpu" or not wanted[2] or not any(wanted[:2]):
            continue
        new = insert(node, node.target, gradient, *between, [*wanted[:2], False])
        for part in list(node.users):
            if part.args[1] < 2:
                take(part, insert(part, operator.getitem, new, part.args[1]))
            else:
                axes = [axis for axis in range(form.ndim) if axis != 1]
                take(part, insert(part, aten.sum.dim_IntList, gradient, axes))
    graph.eliminate_dead_code()
