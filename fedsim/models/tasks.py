"""Tasks: what the model's outputs mean. Losses and metrics return one value per example."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedsim.errors import Params, UserError
from fedsim.registry import import_path

PerExample = Callable[[Tensor, Tensor], Tensor]
"""(outputs (n, ...), targets (n, ...)) -> (n,)."""


@dataclass(frozen=True)
class Task:
    """loss: negative log-likelihood per example (nats); metrics: further values per example."""

    name: str
    loss: PerExample
    metrics: dict[str, PerExample]
    target: Literal["class", "real", "any"]
    probabilities: Callable[[Tensor], Tensor] | None = None
    """Class probabilities from outputs, for calibration; None if there are no classes."""


class ClassificationParams(Params):
    """Classes; the loss is the cross entropy of the outputs taken as logits."""

    name: Literal["classification"] = "classification"


class BinaryParams(Params):
    """Two classes, one logit: logistic regression's usual form. Needs a model of one output."""

    name: Literal["binary"] = "binary"


class RegressionParams(Params):
    """Real targets with Gaussian noise; the loss is the Gaussian negative log-likelihood."""

    name: Literal["regression"] = "regression"
    noise_sd: float = Field(1.0, gt=0, description="Standard deviation σ of the noise, > 0.")


class PotentialParams(Params):
    """The model's output is the potential -log density itself (Gaussian clients)."""

    name: Literal["potential"] = "potential"


class CustomTaskParams(Params):
    """Any loss by import path."""

    name: Literal["custom"] = "custom"
    loss: str = Field(
        description="Import path package.module:function of a loss (outputs, targets) -> one value"
        " per example, shape (n,)."
    )
    metrics: dict[str, str] = Field(
        default={}, description="Further per-example functions of the same form, by metric name."
    )
    target: Literal["class", "real", "any"] = Field(
        "any", description="The kind of target that the loss takes."
    )


TASKS: dict[str, type[Params]] = {
    "classification": ClassificationParams,
    "binary": BinaryParams,
    "regression": RegressionParams,
    "potential": PotentialParams,
    "custom": CustomTaskParams,
}


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    # what F.cross_entropy computes, without the operations for labels that it ignores
    log_p = torch.log_softmax(outputs, -1)
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _correct(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).to(outputs.dtype)


def _binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    logits = outputs.reshape(targets.shape)
    return functional.binary_cross_entropy_with_logits(
        logits, targets.to(logits.dtype), reduction="none"
    )


def _same_side(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs.reshape(targets.shape) > 0) == (targets > 0)).to(outputs.dtype)


def _two_probabilities(outputs: Tensor) -> Tensor:
    positive = torch.sigmoid(outputs.reshape(-1))
    return torch.stack([1 - positive, positive], dim=-1)


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs.reshape(targets.shape) - targets) ** 2).reshape(len(targets), -1).sum(-1)


def build_task(params: Params) -> Task:
    """Returns the task of a scenario's `task` section."""
    if isinstance(params, ClassificationParams):
        return Task(
            "classification",
            _cross_entropy,
            {"accuracy": _correct},
            "class",
            lambda outputs: torch.softmax(outputs, -1),
        )
    if isinstance(params, BinaryParams):
        return Task(
            "binary", _binary_cross_entropy, {"accuracy": _same_side}, "class", _two_probabilities
        )
    if isinstance(params, RegressionParams):
        sd = params.noise_sd
        constant = math.log(sd) + 0.5 * math.log(2 * math.pi)

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            width = targets[0].numel() if targets.ndim > 1 else 1
            return 0.5 * _squared_error(outputs, targets) / sd**2 + constant * width

        return Task("regression", loss, {"mse": _squared_error}, "real")
    if isinstance(params, PotentialParams):
        return Task("potential", lambda outputs, targets: outputs, {}, "any")
    if isinstance(params, CustomTaskParams):
        return Task(
            "custom",
            _callable(params.loss),
            {name: _callable(path) for name, path in params.metrics.items()},
            params.target,
        )
    raise TypeError(f"no task for {type(params).__name__}")


def _callable(path: str) -> Any:
    found = import_path(path)
    if not callable(found):
        raise UserError(f"{path!r} is a {type(found).__name__}, not a function")
    return found
