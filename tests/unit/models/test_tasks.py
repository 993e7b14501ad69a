"""Losses and metrics return one value per example, and the right one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fedsim.errors import UserError
from fedsim.models import TASKS, build_task


def made(name: str, **params: Any) -> Any:
    return build_task(TASKS[name](name=name, **params))


def test_classification() -> None:
    task = made("classification")
    logits, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    np.testing.assert_allclose(task.loss(logits, y), -np.log(p[np.arange(6), y]), rtol=1e-12)
    np.testing.assert_array_equal(task.metrics["accuracy"](logits, y), p.argmax(1) == y.numpy())
    np.testing.assert_allclose(task.probabilities(logits), p, rtol=1e-12)
    assert task.target == "class"


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_regression_is_the_gaussian_density(shape: tuple[int, ...]) -> None:
    task = made("regression", noise_sd=0.3)
    outputs = torch.randn(5, *shape).double()
    y = torch.randn(5, *(shape if shape != (1,) else ())).double()
    density = stats.norm(outputs.reshape(y.shape), 0.3).logpdf(y).reshape(5, -1).sum(1)
    np.testing.assert_allclose(task.loss(outputs, y), -density, rtol=1e-12)
    squares = ((outputs.reshape(y.shape) - y) ** 2).reshape(5, -1).sum(1)
    np.testing.assert_allclose(task.metrics["mse"](outputs, y), squares)
    assert task.probabilities is None


def test_potential_is_the_output() -> None:
    outputs = torch.randn(4)
    assert made("potential").loss(outputs, torch.zeros(4)) is outputs


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.reshape(-1) - targets).abs()


HERE = "tests.unit.models.test_tasks"


def test_losses_of_the_user() -> None:
    task = made("custom", loss=f"{HERE}:absolute", metrics={"off": f"{HERE}:absolute"})
    outputs, y = torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 3.0])
    assert task.loss(outputs, y).tolist() == [2.0, 1.0]
    assert task.metrics["off"](outputs, y).tolist() == [2.0, 1.0]


@pytest.mark.parametrize("path", [f"{HERE}:HERE", f"{HERE}:nothing", "nowhere_at_all:x", "x"])
def test_losses_that_are_none(path: str) -> None:
    with pytest.raises(UserError):
        made("custom", loss=path)
    with pytest.raises(UserError):
        made("custom", loss=f"{HERE}:absolute", metrics={"m": path})


def test_constants_of_the_likelihood_are_in_nats() -> None:
    """NLL of a perfect prediction: ½ log 2πσ²."""
    loss = made("regression", noise_sd=2.0).loss(torch.zeros(1), torch.zeros(1))
    assert float(loss) == pytest.approx(0.5 * math.log(2 * math.pi * 4.0))
