"""Replaying a graph is calling the function."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.func import grad

from fedsim.grids.execute import Stepper
from fedsim.grids.trace import TraceCache


def step(state: dict[str, Tensor], rate: Tensor) -> dict[str, Tensor]:
    def loss(w: Tensor) -> Tensor:
        return (w.reshape(-1) ** 2).sum() + state["b"].sum()

    return {"w": state["w"] - rate * grad(loss)(state["w"]), "b": state["b"] + rate}


def test_values_that_change_are_not_baked_in() -> None:
    cache = TraceCache()
    state = {"w": torch.randn(3, 2), "b": torch.zeros(2)}
    for rate in (0.1, 0.01, 0.0):
        got = cache.call("step", step, state, torch.tensor(rate))
        want = step(state, torch.tensor(rate))
        assert torch.equal(got["w"], want["w"])
        assert torch.equal(got["b"], want["b"])
        state = got
    assert len(cache) == 1
    assert cache.seconds > 0


def test_shapes_dtypes_structures_and_keys_have_graphs_of_their_own() -> None:
    cache = TraceCache()
    for rows in (2, 3):
        cache.call("double", lambda x: 2 * x, torch.ones(rows))
    cache.call("double", lambda x: 2 * x, torch.ones(2, dtype=torch.float64))
    assert len(cache) == 3
    assert float(cache.call("triple", lambda x: 3 * x, torch.ones(2)).sum()) == 6
    a = cache.call("sum", lambda t: t["a"] - t["b"], {"a": torch.ones(2), "b": torch.zeros(2)})
    b = cache.call("sum", lambda t: t["c"] - t["d"], {"c": torch.zeros(2), "d": torch.ones(2)})
    assert (float(a.sum()), float(b.sum())) == (2, -2)


def test_inputs_that_were_one_tensor_may_differ_later() -> None:
    cache = TraceCache()
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0])

    def subtract(a: Tensor, b: Tensor) -> Tensor:
        return a - 2 * b

    assert cache.call("f", subtract, x, x).tolist() == [-1.0, -2.0]
    assert cache.call("f", subtract, x, y).tolist() == [-9.0, -12.0]
    assert len(cache) == 1


def test_a_view_is_not_replayed_on_tensors_laid_out_otherwise() -> None:
    cache = TraceCache()

    def flatten(x: Tensor) -> Tensor:
        return x.reshape(-1) * 2

    x = torch.arange(6.0).reshape(2, 3)
    transposed = torch.arange(6.0).reshape(3, 2).T
    assert torch.equal(cache.call("f", flatten, x), flatten(x))
    assert torch.equal(cache.call("f", flatten, transposed), flatten(transposed))
    assert torch.equal(cache.call("f", flatten, x[:1].expand(2, 3)), flatten(x[:1].expand(2, 3)))


def test_threads_share_graphs() -> None:
    cache = TraceCache()
    states = [{"w": torch.full((3, 2), float(i)), "b": torch.zeros(2)} for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda s: cache.call("step", step, s, torch.tensor(0.1)), states))
    assert len(cache) == 1
    for state, result in zip(states, got, strict=True):
        assert torch.equal(result["w"], step(state, torch.tensor(0.1))["w"])


def test_disabled_calls_the_function_itself() -> None:
    cache = TraceCache(enabled=False)
    calls: list[int] = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        return x + 1

    for _ in range(3):
        assert float(cache.call("f", f, torch.zeros(()))) == 1
    assert len(calls) == 3
    assert len(cache) == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_may_use_autograd_itself(enabled: bool) -> None:
    def descend(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(x.square().sum(), x)
        return x.detach() - 0.25 * slope

    stepper = Stepper(TraceCache(enabled), torch.full((3,), 4.0))
    for _ in range(2):
        stepper.advance("step", descend)
    assert stepper.state.tolist() == [1.0, 1.0, 1.0]


def test_what_is_changed_in_place_is_not_taken_for_its_equal() -> None:
    def function(x: Tensor) -> Tensor:
        a, b = torch.zeros_like(x), torch.zeros_like(x)
        a.add_(x)
        return 10 * a + 2 * b

    x = torch.tensor([1.0, -2.0])
    assert torch.equal(TraceCache().call("f", function, x), 10 * x)


def test_inputs_must_not_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="in place"):
        TraceCache().call("f", lambda x: x.add_(1), torch.zeros(2))


def test_random_numbers_of_a_global_generator_are_refused() -> None:
    with pytest.raises(ValueError, match="noise"):
        TraceCache().call("f", lambda x: x + torch.rand_like(x), torch.zeros(2))
