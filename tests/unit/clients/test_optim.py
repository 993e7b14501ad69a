"""The client's optimisers, clipping and schedules against torch.optim's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedsim.clients import optim
from fedsim.clients.sgd import SGDParams
from fedsim.errors import UserError

STEPS = 12

OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (optim.SGDOptimizer(), lambda p: torch.optim.SGD(p)),
    "weight decay": (
        optim.SGDOptimizer(weight_decay=0.1),
        lambda p: torch.optim.SGD(p, weight_decay=0.1),
    ),
    "momentum": (optim.SGDOptimizer(momentum=0.9), lambda p: torch.optim.SGD(p, momentum=0.9)),
    "dampening": (
        optim.SGDOptimizer(momentum=0.9, dampening=0.4, weight_decay=0.02),
        lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.4, weight_decay=0.02),
    ),
    "nesterov": (
        optim.SGDOptimizer(momentum=0.8, nesterov=True, weight_decay=0.02),
        lambda p: torch.optim.SGD(p, momentum=0.8, nesterov=True, weight_decay=0.02),
    ),
    "adam": (optim.AdamOptimizer(), lambda p: torch.optim.Adam(p)),
    "adam, decay": (
        optim.AdamOptimizer(betas=(0.7, 0.95), eps=1e-4, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, betas=(0.7, 0.95), eps=1e-4, weight_decay=0.1),
    ),
    "adam without memory": (
        optim.AdamOptimizer(betas=(0.0, 0.0)),
        lambda p: torch.optim.Adam(p, betas=(0.0, 0.0)),
    ),
    "adamw": (
        optim.AdamOptimizer(name="adamw", weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, weight_decay=0.1),
    ),
}


def paths(name: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the parameters after each step of ours and of torch's, on a curved function."""
    ours_kind, make = OPTIMIZERS[name]
    rng = torch.Generator().manual_seed(0)
    start = {n: torch.randn(s, generator=rng, dtype=dtype) for n, s in (("a", (3, 2)), ("b", (4,)))}
    noise = torch.randn(STEPS, 10, generator=rng, dtype=dtype)
    rates = 0.1 / (1 + torch.arange(STEPS, dtype=dtype))

    def gradients(params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        n = noise[step]
        return {"a": params["a"].sin() + n[:6].reshape(3, 2), "b": params["b"] ** 3 + n[6:]}

    ours, state, seen = dict(start), optim.init(start, ours_kind), []
    for step in range(STEPS):
        grads = gradients(ours, step)
        ours, state = optim.update(ours, grads, state, rates[step], ours_kind)
        seen.append(torch.cat([v.reshape(-1) for v in ours.values()]))
    theirs = {n: nn.Parameter(v.clone()) for n, v in start.items()}
    optimizer, expected = make(list(theirs.values())), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = float(rates[step])
        with torch.no_grad():
            for name_, grad in gradients(theirs, step).items():  # type: ignore[arg-type]
                theirs[name_].grad = grad
        optimizer.step()
        expected.append(torch.cat([v.detach().reshape(-1) for v in theirs.values()]))
    return seen, expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_torch_in_float64(name: str) -> None:
    for ours, torchs in zip(*paths(name, torch.float64), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_exact_as_torch_in_float32(name: str) -> None:
    """Adam's 1 − β2^t at t = 1 would lose four digits if it were formed as a difference."""
    for ours, torchs in zip(*paths(name, torch.float32), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_clip_is_torchs(max_norm: float) -> None:
    grads = {"a": torch.randn(3, 2).double(), "b": torch.randn(4).double()}
    leaves = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad.clone()
    nn.utils.clip_grad_norm_(leaves, max_norm)
    for leaf, ours in zip(leaves, optim.clip(grads, max_norm).values(), strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-12, atol=0)


def test_clipping_nothing_is_nothing() -> None:
    zero = {"a": torch.zeros(3)}
    assert torch.equal(optim.clip(zero, 1.0)["a"], zero["a"])


SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("ConstantLR", {"factor": 0.5, "total_iters": 3}),
    ("LinearLR", {"start_factor": 0.1, "total_iters": 5}),
    ("StepLR", {"step_size": 3, "gamma": 0.5}),
    ("MultiStepLR", {"milestones": [2, 7], "gamma": 0.1}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("PolynomialLR", {"total_iters": 8, "power": 2.0}),
    ("CosineAnnealingLR", {"T_max": 10, "eta_min": 0.01}),
    ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 3}),
    ("OneCycleLR", {"max_lr": 1.0, "total_steps": 20}),
]


def torchs(name: str, params: dict[str, Any], count: int) -> list[float]:
    """Returns the learning rates that an optimizer would use at its first `count` steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **params)
    used = []
    for _ in range(count):
        used.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize(("name", "params"), SCHEDULES, ids=[s[0] for s in SCHEDULES])
def test_schedules_are_torchs(name: str, params: dict[str, Any]) -> None:
    expected = torchs(name, params, 20)
    by_round = optim.Schedule(name=name, params=params)
    assert [optim.learning_rates(0.3, by_round, r, 99) for r in range(1, 21)] == expected
    by_step = optim.Schedule(name=name, per="step", params=params)
    for server_round in (1, 50):  # restarts each round
        rates = optim.learning_rates(0.3, by_step, server_round, 20)
        np.testing.assert_array_equal(rates, expected)
    assert np.shape(optim.learning_rates(0.3, by_step, 1, 0)) == (0,)


def test_schedules_of_many_rounds() -> None:
    schedule = optim.Schedule(name="ExponentialLR", params={"gamma": 0.99})
    assert optim.learning_rates(1.0, schedule, 200, 1) == pytest.approx(0.99**199, rel=1e-12)


def test_no_schedule() -> None:
    assert optim.learning_rates(0.3, None, 5, 7) == 0.3


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("Cosine", {}, "has no schedule named 'Cosine'"),
        ("Optimizer", {}, "has no schedule named"),
        ("StepLR", {}, "missing 1 required positional argument"),
        ("StepLR", {"step_size": 3, "speed": 1}, "unexpected keyword argument"),
        ("StepLR", {"step_size": 0}, "modulo by zero"),
        ("LambdaLR", {}, "missing 1 required"),
        ("ReduceLROnPlateau", {}, "follows a metric"),
    ],
)
def test_schedules_that_torch_refuses_are_refused_before_the_run(
    name: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        optim.Schedule(name=name, params=params)


def test_a_schedule_that_ends_serves_the_rounds_it_has() -> None:
    schedule = optim.Schedule(name="OneCycleLR", params={"max_lr": 1.0, "total_steps": 10})
    assert optim.learning_rates(0.3, schedule, 10, 1) > 0
    with pytest.raises(UserError, match="OneCycleLR has no learning rate after step 1"):
        optim.learning_rates(0.3, schedule, 40, 1)


@pytest.mark.parametrize(
    "params",
    [
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": "0.1"},
        {"epochs": 0},
        {"batch_size": 0},
        {"clip_norm": 0.0},
        {"optimizer": {"name": "sgd", "momentum": 1.0}},
        {"optimizer": {"name": "sgd", "nesterov": True}},
        {"optimizer": {"name": "sgd", "nesterov": True, "momentum": 0.9, "dampening": 0.1}},
        {"optimizer": {"name": "adam", "betas": (0.9, 1.0)}},
        {"optimizer": {"name": "adam", "betas": (-0.1, 0.9)}},
        {"optimizer": {"name": "adam", "momentum": 0.9}},
        {"optimizer": {"name": "lion"}},
    ],
)
def test_settings_out_of_range_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SGDParams(**params)
