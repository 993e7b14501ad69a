"""Fewer, larger operations: products with their sums, and the gradient of the cross entropy."""

from __future__ import annotations

import torch
from torch import fx

from fedsim.grids.passes.rewrite import (
    Node,
    aten,
    calls,
    insert,
    only_used_once,
    replace,
    value,
)

_PRODUCTS = {aten.bmm.default: aten.baddbmm.default, aten.mm.default: aten.addmm.default}


def fuse(graph: fx.Graph) -> None:
    """Applies each rule below to each node, in order of computation."""
    for node in list(graph.nodes):
        if node.op == "call_function":
            any(rule(node) for rule in (softmax_less_onehot, product_plus, product_step))
    graph.eliminate_dead_code()


def softmax_less_onehot(node: Node) -> bool:
    """The gradient of Σ −g log softmax(z)[target] is g (softmax(z) − onehot).

    log_softmax's backward is v − exp(log p) Σ v along its axis. Here v is all zeros but for one
    entry w a row, put there by scatter_add; so Σ v = w, and the result is −w exp(log p) with w
    added at the target. It saves the zeros and the sum.
    """
    if not calls(node, aten._log_softmax_backward_data.default):
        return False
    gradient, log_p, dim, dtype = node.args
    if not calls(gradient, aten.scatter_add.default):
        return False
    zeros, axis, index, source = gradient.args
    p, at, w = value(log_p), value(index), value(source)
    if p is None or at is None or w is None or not calls(zeros, aten.new_zeros.default):
        return False
    axes = {int(axis) % p.ndim, int(dim) % p.ndim}
    one = torch.Size(1 if i in axes else size for i, size in enumerate(p.shape))
    if len(axes) != 1 or at.shape != one or w.shape != one or not p.dtype == dtype == w.dtype:
        return False
    if calls(source, aten.neg.default):
        minus = source.args[0]
    elif calls(source, aten.unsqueeze.default) and calls(source.args[0], aten.neg.default):
        minus = insert(node, aten.unsqueeze.default, source.args[0].args[0], source.args[1])
    else:
        minus = insert(node, aten.neg.default, source)
    weighted = insert(node, aten.mul.Tensor, insert(node, aten.exp.default, log_p), minus)
    return replace(node, aten.scatter_add.default, weighted, axis, index, source)


def product_plus(node: Node) -> bool:
    """a + A B, a broadcast to the product's shape, is one call of addmm or baddbmm."""
    if not calls(node, aten.add.Tensor) or node.kwargs:
        return False
    for product, other in (node.args, node.args[::-1]):
        if not calls(product, *_PRODUCTS) or value(other) is None:
            continue
        if only_used_once(product) and replace(
            node, _PRODUCTS[product.target], other, *product.args
        ):
            return True
    return False


def product_step(node: Node) -> bool:
    """p + v s A B, with one number s a matrix, is one call with s multiplied into A or B."""
    if not calls(node, aten.addcmul.default):
        return False
    base, factor, product = node.args
    if not calls(product, *_PRODUCTS):
        factor, product = product, factor
    scale, result = value(factor), value(product)
    if not calls(product, *_PRODUCTS) or scale is None or result is None:
        return False
    if not only_used_once(product) or any(size != 1 for size in scale.shape[-2:]):
        return False
    if scale.dtype != result.dtype or base.meta["val"].shape != result.shape:
        return False
    left, right = product.args
    smaller = 0 if left.meta["val"].numel() <= right.meta["val"].numel() else 1
    factors = [left, right]
    factors[smaller] = _scaled(node, factors[smaller], factor)
    alpha = node.kwargs.get("value", 1)
    return replace(node, _PRODUCTS[product.target], base, *factors, alpha=alpha)


def _scaled(before: Node, matrix: Node, factor: Node) -> Node:
    """Returns factor · matrix, multiplied before it is transposed: the strides stay."""
    if calls(matrix, aten.transpose.int, aten.t.default):
        return insert(
            before, matrix.target, _scaled(before, matrix.args[0], factor), *matrix.args[1:]
        )
    return insert(before, aten.mul.Tensor, matrix, factor)
