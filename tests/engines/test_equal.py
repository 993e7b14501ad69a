"""Equal expressions are computed once: torch's own pass, which is slow to import, is the oracle."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.func import grad, vmap
from torch.utils._pytree import tree_map_only

from fedsim.grids.passes.equal import merge_equal
from fedsim.grids.record import Form, record
from fedsim.grids.trace import leaves_of
from tests.engines.test_passes import draw


def loss(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y).tanh() - (x @ y).tanh().exp()).square().sum()


def clients(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    once = vmap(grad(loss, argnums=(0, 1)))(x, y)
    twice = vmap(grad(loss, argnums=(0, 1)))(x, y)
    return tuple(a + 2 * b for a, b in zip(once, twice, strict=True))


def returned_twice(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x + y, x + y, (x * y).sum(), (x * y).sum(), (x * y).exp()


def nearly_equal(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    sums = x + 1, x + 1.0, x.sum(0, keepdim=True), x.sum(0, keepdim=False)
    return tuple(part.cos() for part in sums)


def with_parts(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    values, places = x.max(0)
    again, where = x.max(0)
    return values * again, places + where, y.to(torch.float64), y.to(torch.float64).exp()


def drawn(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (torch.rand_like(x) - torch.rand_like(x)).abs(), torch.empty(3).shape[0] * y


FUNCTIONS = (clients, returned_twice, nearly_equal, with_parts, drawn)


def traced(function: Callable[..., object]) -> fx.GraphModule:
    x, y = (draw(2, 3, 3, seed=seed, dtype=torch.float32) for seed in (0, 1))
    module = record(lambda *xs: leaves_of(function(*xs)), (x, y))
    for node in module.graph.nodes:  # torch's pass looks at tensors there
        node.meta["val"] = tree_map_only(Form, Form.without_memory, node.meta.get("val"))
    return module


def calls(graph: fx.Graph) -> Counter[str]:
    return Counter(str(n.target) for n in graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_calls_are_left_as_by_torch(function: Callable[..., object]) -> None:
    module = traced(function)
    theirs = fx_graph_cse(copy.deepcopy(module.graph))
    before = calls(module.graph)
    merge_equal(module.graph)
    module.graph.lint()
    assert calls(module.graph) == calls(theirs)
    assert (calls(module.graph) == before) is (function in (nearly_equal, drawn))


@pytest.mark.parametrize("function", [clients, returned_twice, nearly_equal, with_parts])
def test_no_bit_changes(function: Callable[..., object]) -> None:
    module = traced(function)
    merge_equal(module.graph)
    module.recompile()
    x, y = (draw(2, 3, 3, seed=seed, dtype=torch.float32) for seed in (2, 3))
    got, want = module(x, y), function(x, y)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))  # type: ignore[call-overload]
    assert len({id(tensor) for tensor in got}) == len(got)


def test_a_zero_keeps_its_sign() -> None:
    def signs(x: Tensor) -> Tensor:
        return torch.copysign(x, torch.full((), -0.0)) - torch.copysign(x, torch.full((), 0.0))

    module = record(lambda *xs: leaves_of(signs(*xs)), (torch.ones(2),))
    merge_equal(module.graph)
    module.recompile()
    assert module(torch.ones(2))[0].equal(torch.full((2,), -2.0))
