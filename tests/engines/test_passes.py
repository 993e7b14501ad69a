"""Graphs that the passes have rewritten compute what the function computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import conv2d, max_pool2d
from torch.utils._pytree import tree_flatten, tree_map

from fedsim.clients.base import Batch, Inputs
from fedsim.grids.execute import Stepper
from fedsim.grids.passes import simplify
from fedsim.grids.record import record
from fedsim.grids.trace import TraceCache, leaves_of, replay
from fedsim.models import FunctionalModel
from tests.engines.toys import CLASSES, FEATURES, functional, network, sgd

ROWS, CLIENTS, CHAINS = 6, 4, 3

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"optimizer": {"name": "sgd", "weight_decay": 0.1}},
    "momentum": {"optimizer": {"name": "sgd", "momentum": 0.9, "dampening": 0.1}},
    "nesterov": {"optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True}},
    "adam": {"optimizer": {"name": "adam", "weight_decay": 0.1}},
    "adamw": {"optimizer": {"name": "adamw", "weight_decay": 0.1}},
    "clipped": {"clip_norm": 0.1},
}
NETWORKS: dict[str, nn.Module] = {
    "tanh, dropout": network(dropout=0.3),
    "relu": nn.Sequential(nn.Linear(FEATURES, 7), nn.ReLU(), nn.Linear(7, CLASSES)),
}


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(case: str, net: str, proximal: bool, lead: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Returns a step over the axes in `lead`, a state for it and the inputs of four steps."""
    model = functional(copy.deepcopy(NETWORKS[net]), dtype)
    client = sgd(model, **CASES[case])
    static = {"proximal": proximal}

    def batch(seed: int) -> Batch:
        x = draw(*lead, ROWS, FEATURES, seed=seed, dtype=dtype)
        y = x[..., :CLASSES].argmax(-1)
        weight = draw(*lead, ROWS, seed=seed + 1, dtype=dtype).clamp_min(0)
        return Batch(x, y, weight, torch.ones(lead, dtype=dtype))

    def scalars(step: int) -> dict[str, Tensor]:
        values = {"lr": 0.1 / (step + 1), "proximal-mu": 0.3, "steps": 4.0, "num-examples": 6.0}
        return {name: torch.full(lead, value, dtype=dtype) for name, value in values.items()}

    def noise(seed: int) -> Any:
        shapes = model.dropouts.items()
        u = {n: draw(*lead, 1, ROWS, *s, seed=seed, dtype=dtype).sigmoid() for n, s in shapes}
        return {"dropout": u} if u else {}

    def step(state: Any, batches: Any, noise: Any, scalars: Any) -> Any:
        return client.step(state, Inputs(batches, noise, scalars, static))

    arrays = {k: v.expand(*lead, *v.shape) for k, v in model.initial().items()}
    inputs = [((batch(9 * s),), noise(9 * s + 3), scalars(s)) for s in range(4)]

    def init(arrays: Any, scalars: Any) -> Any:
        return client.init({"arrays": arrays}, {}, Inputs((), {}, scalars, static))

    for _ in lead:
        step, init = vmap(step), vmap(init)
    return step, tree_map(torch.Tensor.contiguous, init(arrays, inputs[0][2])), inputs


@pytest.mark.parametrize(
    ("case", "net", "lead"),
    [
        *((case, "tanh, dropout", (CLIENTS,)) for case in CASES),
        *(("plain", "relu", lead) for lead in ((), (CLIENTS,), (CLIENTS, CHAINS))),
        ("adam", "relu", (CLIENTS, CHAINS)),
    ],
)
def test_steps_are_those_of_the_function(case: str, net: str, lead: tuple[int, ...]) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        step, state, inputs = problem(case, net, case == "plain", lead, dtype)
        graph = TraceCache().graph("step", step, state, *inputs[0], donate=True)
        assert graph.overwrites, "nothing is computed in place"
        got = [t.clone() for t in leaves_of(state)]
        for given in inputs:
            before = [t.clone() for t in leaves_of(given)]
            got = replay(graph, got + leaves_of(given))
            state = step(state, *given)
            assert all(map(torch.equal, before, leaves_of(given))), "an input was overwritten"
        for a, b in zip(got, tree_flatten(state)[0], strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert float((a - b).norm()) <= tolerance * (1 + float(b.norm()))


def test_what_is_not_donated_is_not_overwritten() -> None:
    step, state, inputs = problem("momentum", "relu", True, (CLIENTS,), torch.float64)
    graph = TraceCache().graph("step", step, state, *inputs[0])
    before = [t.clone() for t in leaves_of(state)]
    replay(graph, leaves_of(state) + leaves_of(inputs[0]))
    assert not graph.overwrites
    assert all(map(torch.equal, before, leaves_of(state)))


def test_a_state_that_stays_or_moves_is_not_overwritten() -> None:
    def step(state: dict[str, Tensor]) -> dict[str, Tensor]:
        x = state["x"]
        return {"x": x + 1, "last": x, "first": state["first"], "twice": state["twice"] * 2}

    state = {name: torch.full((2,), float(i)) for i, name in enumerate(("x", "last", "first"))}
    state["twice"] = torch.ones(2)
    graph = TraceCache().graph("step", step, state, donate=True)
    assert graph.overwrites == {3}
    got, want = [t.clone() for t in state.values()], state
    for _ in range(3):
        got, want = replay(graph, got), step(want)
    assert all(map(torch.equal, got, want.values()))


def test_two_results_in_one_memory_are_not_overwritten() -> None:
    def step(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y = state[0] + state[1]
        return y, y.view(2, 3)

    state = (torch.ones(2, 3), torch.ones(2, 3))
    graph = TraceCache().graph("step", step, state, donate=True)
    assert not graph.overwrites


CUTS: dict[str, Any] = {
    "chunk": lambda x: x.chunk(2),
    "split": lambda x: x.split([3, 1]),
    "unbind": lambda x: x.unbind(0),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("double", [False, True], ids=["given", "computed"])
def test_parts_that_are_read_later_are_not_overwritten(cut: str, double: bool) -> None:
    def step(state: tuple[Tensor]) -> tuple[Tensor]:
        x = state[0] * 2 if double else state[0]
        parts = CUTS[cut](x)
        moved = x + 1
        return (moved * torch.cat([part.reshape(-1) for part in parts]),)

    state = (torch.tensor([1.0, 2.0, 3.0, 4.0]),)
    graph = TraceCache().graph("step", step, state, donate=True)
    got, want = [state[0].clone()], state
    for _ in range(3):
        got, want = replay(graph, got), step(want)
    assert torch.equal(got[0], want[0])


def test_what_is_one_number_for_all_clients_is_not_overwritten() -> None:
    def step(state: tuple[Tensor, Tensor], shared: Tensor) -> tuple[Tensor, Tensor]:
        x, last = state
        return x + 3 * last, 2 * shared

    mapped = vmap(step, ((0, 0), None))  # the second result has no axis of its own: stride 0
    state = (torch.ones(CLIENTS), torch.ones(CLIENTS))
    stepper, want = Stepper(TraceCache(), state), state
    for number in (1.0, 2.0, 3.0):
        stepper.advance("step", mapped, torch.tensor(number))
        want = mapped(want, torch.tensor(number))
    assert all(map(torch.equal, stepper.state, want))


class Convolutions(nn.Module):
    """Two convolutions whose outputs are pooled in windows that overlap, are padded, or neither."""

    def __init__(self, stride: int, padding: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 3, 3)
        self.pool = nn.MaxPool2d(2, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.first(x).relu())
        return self.pool(self.second(x).relu()).flatten(1)[:, :CLASSES]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("stride", "padding"), [(2, 0), (1, 0), (2, 1)])
def test_steps_of_convolutions(stride: int, padding: int, layout: torch.memory_format) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        torch.manual_seed(3)
        module = Convolutions(stride, padding).to(dtype)
        client = sgd(FunctionalModel(module, torch.zeros(1, 1, 9, 9, dtype=dtype)))
        x = draw(ROWS, 1, 9, 9, seed=1, dtype=dtype).to(memory_format=layout)
        y = torch.arange(ROWS) % CLASSES
        one = torch.ones((), dtype=dtype)
        scalars = {"lr": 0.1 * one, "proximal-mu": one, "steps": one, "num-examples": one}
        batch = Batch(x, y, torch.ones(ROWS, dtype=dtype), one)

        def step(state: Any, batch: Any, scalars: Any) -> Any:
            return client.step(state, Inputs((batch,), {}, scalars, {"proximal": False}))  # noqa: B023

        arrays = {
            k: v.to(memory_format=layout) if v.ndim == 4 else v
            for k, v in client.model.initial().items()
        }
        state = client.init({"arrays": arrays}, {}, Inputs((), {}, scalars, {"proximal": False}))
        graph = TraceCache().graph("step", step, state, batch, scalars, donate=True)
        got = [t.clone() for t in leaves_of(state)]
        for _ in range(3):
            got = replay(graph, got + leaves_of((batch, scalars)))
            state = step(state, batch, scalars)
        for a, b in zip(got, tree_flatten(state)[0], strict=True):
            assert float((a - b).norm()) <= tolerance * (1 + float(b.norm()))


def operators(function: Any, *args: Tensor) -> list[str]:
    """Returns the names of the operators of the simplified graph."""
    module = record(lambda *xs: leaves_of(function(*xs)), args)
    simplify(module)
    return [n.target.__name__ for n in module.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(("size", "stride", "padding"), [(2, 2, 0), (3, 1, 1), (3, 2, 0)])
def test_pooling_before_relu_changes_no_bit(size: int, stride: int, padding: int) -> None:
    def function(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            pooled = max_pool2d(x.relu(), size, stride, padding)
            return (pooled * weight).sum(), pooled

        return grad(total, has_aux=True)(x)

    # few distinct values: ties at positive numbers, at zero, and windows that are all negative
    x = torch.randint(-2, 2, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    x[0, 0, :3, :3] = -1.0
    x[0, 1, 0, 0] = float("nan")
    x[0, 1, 4, 4] = -0.0
    weight = draw(*max_pool2d(x, size, stride, padding).shape, seed=2, dtype=torch.float32)
    names = operators(function, x, weight)
    assert names.index("max_pool2d_with_indices.default") < names.index("relu.default")
    got, want = TraceCache().call("pool", function, x, weight), function(x, weight)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_a_convolution_s_bias_has_its_gradient_by_a_sum() -> None:
    def function(w: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        def loss(w: Tensor, b: Tensor) -> Tensor:
            return conv2d(x, w, b).square().sum()

        return grad(loss, (0, 1))(w, b)

    shapes = ((4, 3, 3, 3), (4,), (2, 3, 6, 6))
    given = [draw(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    module = record(lambda *xs: leaves_of(function(*xs)), given)
    simplify(module)
    (node,) = [n for n in module.graph.nodes if "convolution_backward" in str(n.target)]
    assert node.args[-1] == [False, True, False]
    for got, want in zip(module(*given), function(*given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_relu_stays_where_something_else_looks_at_it() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.relu()
        return max_pool2d(y, 2), y

    x = draw(1, 1, 4, 4, seed=0, dtype=torch.float64)
    assert operators(function, x)[0] == "relu.default"
    assert all(map(torch.equal, TraceCache().call("pool", function, x), function(x)))


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: x.mT.mT.unsqueeze(0).squeeze(0).expand(3, 4).clone() + 0.0, 0),
        (lambda x: x * torch.ones_like(x), 0),
        (lambda x: torch.ones_like(x) / x, 1),
        (lambda x: x.reshape(2, 6).reshape(12).reshape(4, 3) * 2, 2),
        (lambda x: x[0].expand(3, 4) + x, 2),
        (lambda x: x.sum(0, keepdim=True).reshape(4), 1),
        (lambda x: x[0] + x @ x.mT @ x, 4),
        (lambda x: torch.exp(x) - torch.exp(x), 2),
    ],
    ids=["views", "times one", "reciprocal", "view of view", "expand", "sum", "product", "twice"],
)
def test_rules(function: Any, count: int) -> None:
    x = draw(3, 4, seed=5, dtype=torch.float64)
    assert len(operators(function, x)) == count
    got, want = TraceCache().call("rule", function, x), function(x)
    assert float((got - want).norm()) <= 1e-14 * float(want.norm())
    assert got.shape == want.shape
    assert got.stride() == want.stride()


def test_a_log_softmax_far_from_its_target_has_its_gradient() -> None:
    def function(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
        def loss(z: Tensor) -> Tensor:
            return (-torch.log_softmax(z, -1).gather(-1, y[:, None])[:, 0] * w).sum()

        return grad(loss)(z)

    z = draw(5, 4, seed=0, dtype=torch.float64)
    z[0, 1], z[1, 2], z[2] = -float("inf"), 800.0, 0.0
    y, w = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0]).double()
    assert "_log_softmax_backward_data.default" not in operators(function, z, y, w)
    torch.testing.assert_close(
        TraceCache().call("loss", function, z, y, w), function(z, y, w), rtol=0, atol=1e-14
    )
