"""Graphs that the passes have rewritten compute what the function computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map

from fedsim.clients.base import Batch, Inputs
from fedsim.grids.trace import TraceCache, leaves_of, replay
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
