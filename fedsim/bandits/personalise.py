"""Tuning how a frozen federated model is personalised: the objective of a real tuning problem.

A client's personalisation takes K full-batch steps from the federated parameters θ0,

    θ ← (θ − η ∇L(θ) + η λ θ0) / (1 + η λ),

a gradient step on its loss L and an exact proximal step on (λ/2) ‖θ − θ0‖². What is tuned is
(log η, log λ). One pull splits the client's training rows at random into two parts, personalises on
one and scores the other: the noise is that of resampling, and nothing else is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.func import grad, vmap

from fedsim.bandits.axes import Axis, Floats
from fedsim.clients.base import Batch, weighted_mean_loss
from fedsim.errors import Params
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel, Task

AT_ONCE = 64
"""Pulls that are computed by one call."""


class PersonaliseParams(Params):
    """Local learning rate and proximal weight of a frozen model's personalisation."""

    name: Literal["personalise"] = "personalise"
    lr: tuple[float, float] = Field(
        (0.001, 3.0), description="Range of the local learning rate η, on a log axis; > 0."
    )
    proximal: tuple[float, float] = Field(
        (0.001, 10.0), description="Range of the proximal weight λ, on a log axis; > 0."
    )
    steps: int = Field(10, ge=1, description="Full-batch steps K of a personalisation, ≥ 1.")
    validation: float = Field(
        0.3, gt=0, lt=1, description="Share of the client's rows that a pull scores, in (0, 1)."
    )
    score: Literal["brier", "accuracy"] = Field(
        "brier",
        description="What a pull returns, the mean over the scored rows of: 1 − ½ Σ (p − y)² over "
        "the classes, a proper score, or whether the true class is the most probable one. Both "
        "are in [0, 1].",
    )
    train_lr: float = Field(
        0.5, gt=0, description="Learning rate of the federated training before (strategy.pretrain)."
    )
    train_steps: int = Field(
        5, ge=1, description="Full-batch local steps in a round of that training, ≥ 1."
    )

    def box(self) -> tuple[Axis, ...]:
        """Returns the axes; raises ValueError for an empty range."""
        ranges = {"lr": self.lr, "proximal": self.proximal}
        return tuple(
            Axis(name=name, low=low, high=high, scale="log") for name, (low, high) in ranges.items()
        )


class Personalisation:
    """See the module."""

    best: float | None = None

    def __init__(
        self, params: PersonaliseParams, model: FunctionalModel, task: Task, frozen: Arrays,
        shard: Batch,
    ) -> None:  # fmt: skip
        """frozen: θ0. shard: the client's training rows, at least 2."""
        self.params, self.model, self.task = params, model, task
        self.frozen, self.shard = frozen, shard
        self.axes = params.box()

    def pull(self, points: Floats, rng: np.random.Generator) -> tuple[Floats, str]:
        """Returns a score for each point (n, 2); one that diverges has the worst score, 0."""
        values = []
        for start in range(0, len(points), AT_ONCE):
            values.append(self._pull(points[start : start + AT_ONCE], rng))
        return np.concatenate(values) if values else np.zeros(0), ""

    def value(self, points: Floats) -> Floats:
        """Nobody knows the values without noise."""
        raise NotImplementedError

    def _pull(self, points: Floats, rng: np.random.Generator) -> Floats:
        rows = len(self.shard.y)
        held = min(max(round(self.params.validation * rows), 1), rows - 1)
        orders = rng.permuted(np.tile(np.arange(rows), (len(points), 1)), axis=1)
        order = torch.from_numpy(orders)
        dtype = self.shard.x.dtype if self.shard.x.is_floating_point() else torch.float32
        settings = torch.from_numpy(points).to(dtype)

        def one(order: Tensor, setting: Tensor) -> Tensor:
            fitted = self._fit(order[held:], setting[0], setting[1], mapped=len(points) > 1)
            return self._score(fitted, order[:held])

        with torch.no_grad():
            if len(points) == 1:  # what vmap would cost is more than the arithmetic
                scores = one(order[0], settings[0])[None]
            else:
                scores = vmap(one)(order, settings)
        return scores.nan_to_num(0.0, 0.0, 0.0).double().numpy()

    def _fit(self, index: Tensor, lr: Tensor, proximal: Tensor, mapped: bool = False) -> Arrays:
        rows = (self.shard.x[index], self.shard.y[index], self.shard.weight[index])
        steps = self.params.steps
        return fit(self.model, self.task, self.frozen, rows, lr, proximal, steps, mapped)

    def _score(self, params: Arrays, rows: Tensor) -> Tensor:
        outputs = self.model.apply(params, self.shard.x[rows])
        return self._by_example(outputs, self.shard.y[rows]).mean()

    def _by_example(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.params.score == "accuracy":
            finite = outputs.isfinite().reshape(len(y), -1).all(-1)
            return torch.where(finite, self.task.metrics["accuracy"](outputs, y), 0.0)
        assert self.task.probabilities is not None
        p = self.task.probabilities(outputs)
        truth = (torch.arange(p.shape[-1]) == y[:, None]).to(p.dtype)
        return 1 - (p - truth).square().sum(-1) / 2

    def test(self, point: Floats, held: Batch) -> dict[str, float]:
        """Returns how the model does on rows that no pull has seen, personalised on all others.

        point: (η, λ). Beside its metrics stand those of the frozen model, as frozen_….
        """
        everything = torch.arange(len(self.shard.y))
        lr, proximal = torch.from_numpy(point).to(self.shard.x.dtype)
        with torch.no_grad():
            own = self._fit(everything, lr, proximal)
            return {
                **_metrics(self.model, self.task, own, held),
                **{
                    f"frozen_{name}": value
                    for name, value in _metrics(self.model, self.task, self.frozen, held).items()
                },
            }


def fit(
    model: FunctionalModel,
    task: Task,
    start: Arrays,
    rows: tuple[Tensor, Tensor, Tensor],
    lr: Tensor,
    proximal: Tensor,
    steps: int,
    mapped: bool = False,
) -> Arrays:
    """Returns the parameters after `steps` full-batch steps from `start`; see the module.

    rows: x (n, *shape), y and weights (n,). lr, proximal: 0-d. mapped: whether this is inside vmap,
    which knows no other gradient than torch.func's; torch.autograd's takes half the time.
    """
    x, y, weight = rows

    def objective(params: Mapping[str, Tensor]) -> Tensor:
        return weighted_mean_loss(task.loss(model.apply(params, x), y), weight)

    slope: Any = grad(objective) if mapped else partial(_gradient, objective)
    params, shrink = dict(start), 1 / (1 + lr * proximal)
    for _ in range(steps):
        gradient = slope(params)
        params = {
            name: (value - lr * gradient[name] + lr * proximal * start[name]) * shrink
            for name, value in params.items()
        }
    return params


def _gradient(objective: Callable[[Mapping[str, Tensor]], Tensor], params: Arrays) -> Arrays:
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        found = torch.autograd.grad(objective(leaves), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def _metrics(model: FunctionalModel, task: Task, params: Arrays, held: Batch) -> dict[str, float]:
    outputs = model.apply(params, held.x)
    found = {"loss": task.loss(outputs, held.y)}
    found |= {name: metric(outputs, held.y) for name, metric in task.metrics.items()}
    return {
        name: float(weighted_mean_loss(values, held.weight).nan_to_num(0.0, 1e9, -1e9))
        for name, values in found.items()
    }
