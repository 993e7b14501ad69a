"""Recorded graphs compute what the function computes, and what cannot be recorded is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from fedsim.grids.record import Form, record


def test_a_graph_computes_its_function_on_other_numbers() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        values, _ = (x @ w).relu().max(0)  # an operator of two results
        return values.sum() + torch.ones(()) * w.square().sum()

    def function(w: Tensor, x: Tensor) -> list[Tensor]:
        return [vmap(grad(loss), in_dims=(0, None))(w, x), w]

    w, x = torch.randn(4, 3), torch.randn(5, 3)
    module = record(function, (w, x))
    others = torch.randn(4, 3), torch.randn(5, 3)
    for got, want in zip(module(*others), function(*others), strict=True):
        torch.testing.assert_close(got, want)


def test_forms_are_those_of_the_tensors() -> None:
    module = record(lambda x: [x.t(), x.max(0).values], (torch.randn(2, 3),))
    last = next(n for n in module.graph.nodes if n.op == "output").args[0]
    assert last[0].meta["val"] == Form(
        torch.Size([3, 2]), (1, 3), torch.float32, torch.device("cpu")
    )
    assert last[1].meta["val"].shape == (3,)


def test_a_tensor_that_the_function_brings_is_a_constant() -> None:
    own = torch.arange(3.0)
    module = record(lambda x: [x + own, x * own], (torch.ones(3),))
    assert sum(node.op == "get_attr" for node in module.graph.nodes) == 1
    assert module(torch.full((3,), 2.0))[0].tolist() == [2.0, 3.0, 4.0]


def test_reading_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="reads the value of a tensor"):
        record(lambda x: [x if float(x.sum()) > 0 else -x], (torch.ones(3),))


@pytest.mark.parametrize(
    "select", [lambda x: x[x > 0], lambda x: x[x.nonzero()[:, 0]], lambda x: x.masked_select(x > 0)]
)
def test_a_shape_that_depends_on_values_is_refused(select: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="the shape of a result depends on a tensor's values"):
        record(lambda x: [select(x).sum() / len(select(x))], (torch.tensor([1.0, 0.0, 2.0]),))


def test_rows_by_number_are_no_shape_that_depends_on_values() -> None:
    rows = torch.tensor([2, 0])
    module = record(lambda x, i: [x[i], x[:, rows]], (torch.eye(3), rows))
    assert module(torch.eye(3), torch.tensor([1, 1]))[0].tolist() == [[0.0, 1.0, 0.0]] * 2


def test_the_compiler_is_not_loaded() -> None:
    code = (
        "import sys, torch\n"
        "from fedsim.grids.trace import TraceCache\n"
        "def loss(x):\n"
        "    return (torch.log_softmax(x * 2 + 1, -1)[0].exp() / torch.ones(3)).sum()\n"
        "f = torch.func.vmap(torch.func.grad(lambda x: loss(x * x)))\n"
        "cache = TraceCache()\n"
        "x = torch.rand(4, 3)\n"
        "assert cache.call('f', f, x).shape == (4, 3) and len(cache) == 1\n"
        "print([m for m in ('_dynamo', '_inductor') if f'torch.{m}' in sys.modules])\n"
        "assert torch.allclose(cache.call('f', f, x), f(x))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\nTrue\n"


def test_whoever_asks_for_the_compiler_gets_it() -> None:
    code = (
        "import sys, torch\n"
        "from fedsim.grids.record import without_compiler\n"
        "with without_compiler():\n"
        "    stand_in = torch._dynamo\n"
        "    assert 'torch._dynamo' not in sys.modules\n"
        "    config = stand_in.config\n"
        "    assert torch._dynamo is sys.modules['torch._dynamo'] is not stand_in\n"
        "assert torch._dynamo.config is config\n"
        "with without_compiler():\n"
        "    assert torch._dynamo.config is config\n"
        "print(torch.func.grad(torch.sin)(torch.tensor(0.0)).item())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1.0\n"
