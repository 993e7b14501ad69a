"""The client's optimisers as small pure functions, equal to torch.optim's (tests compare them).

torch.optim steps one client's tensors at a time and in place; these can be mapped over clients.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedsim.errors import Params, UserError
from fedsim.messages import Arrays

TABLE = 64
"""Learning rates are computed in multiples of this, so that ragged clients share a table."""

OptimizerState = dict[str, Arrays | Tensor]
Update = Callable[[Arrays, Arrays, OptimizerState, Tensor], tuple[Arrays, OptimizerState]]
"""(params, gradients, state, learning rate) -> (params, state)."""


Decay = Annotated[float, Field(ge=0, lt=1)]


class SGDOptimizer(Params):
    """torch.optim.SGD."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Momentum μ, in [0, 1).")
    dampening: float = Field(
        default=0.0, ge=0, le=1, description="Dampening τ of the momentum, in [0, 1]."
    )
    nesterov: bool = Field(default=False, description="Nesterov momentum; needs momentum > 0.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="L2 penalty λ added to the gradient, ≥ 0."
    )


class AdamOptimizer(Params):
    """torch.optim.Adam, or AdamW with decoupled weight decay."""

    name: Literal["adam", "adamw"] = "adam"
    betas: tuple[Decay, Decay] = Field(
        default=(0.9, 0.999), description="Decay rates β1, β2, in [0, 1)."
    )
    eps: float = Field(default=1e-8, gt=0, description="Added to the denominator, > 0.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Penalty λ (decoupled for adamw), ≥ 0."
    )


def init(params: Arrays, optimizer: Params) -> OptimizerState:
    """Returns the optimizer's state before its first step."""
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    if isinstance(optimizer, SGDOptimizer):
        if not optimizer.momentum:
            return {}
        return {"momentum": zeros, "step": _scalar_like(params)}
    return {"mean": zeros, "square": dict(zeros), "step": _scalar_like(params)}


def _scalar_like(params: Arrays) -> Tensor:
    # Derived from a parameter, so that under vmap it is one number a client, not one for all.
    first = next(iter(params.values()))
    return torch.zeros_like(first.reshape(-1)[:1]).sum()


def update(
    params: Arrays, grads: Arrays, state: OptimizerState, lr: Tensor, optimizer: Params
) -> tuple[Arrays, OptimizerState]:
    """Returns parameters and state after one step of learning rate lr ()."""
    if isinstance(optimizer, SGDOptimizer):
        return _sgd(params, grads, state, lr, optimizer)
    if isinstance(optimizer, AdamOptimizer):
        return _adam(params, grads, state, lr, optimizer)
    raise TypeError(f"no optimizer for {type(optimizer).__name__}")


def _sgd(
    params: Arrays, grads: Arrays, state: OptimizerState, lr: Tensor, o: SGDOptimizer
) -> tuple[Arrays, OptimizerState]:
    if o.weight_decay:
        grads = {k: g + o.weight_decay * params[k] for k, g in grads.items()}
    if not o.momentum:
        return {k: torch.addcmul(p, lr, grads[k], value=-1) for k, p in params.items()}, state
    old: Any = state["momentum"]
    step: Any = state["step"]
    # torch's first step copies the gradient undampened
    damp = torch.where(step == 0, torch.ones_like(step), torch.full_like(step, 1 - o.dampening))
    buffer = {k: o.momentum * old[k] + damp * g for k, g in grads.items()}
    direction = {k: g + o.momentum * buffer[k] for k, g in grads.items()} if o.nesterov else buffer
    new = {k: torch.addcmul(p, lr, direction[k], value=-1) for k, p in params.items()}
    return new, {"momentum": buffer, "step": step + 1}


def _adam(
    params: Arrays, grads: Arrays, state: OptimizerState, lr: Tensor, o: AdamOptimizer
) -> tuple[Arrays, OptimizerState]:
    b1, b2 = o.betas
    old_mean: Any = state["mean"]
    old_square: Any = state["square"]
    step: Any = state["step"]
    step = step + 1
    if o.weight_decay and o.name == "adam":
        grads = {k: g + o.weight_decay * params[k] for k, g in grads.items()}
    if o.weight_decay and o.name == "adamw":
        params = {k: p * (1 - lr * o.weight_decay) for k, p in params.items()}
    mean = {k: b1 * old_mean[k] + (1 - b1) * g for k, g in grads.items()}
    square = {k: b2 * old_square[k] + (1 - b2) * g * g for k, g in grads.items()}
    c1, c2 = _correction(b1, step), _correction(b2, step)
    new = {
        k: p - (lr / c1) * mean[k] / ((square[k] / c2).sqrt() + o.eps) for k, p in params.items()
    }
    return new, {"mean": mean, "square": square, "step": step}


def _correction(beta: float, step: Tensor) -> Tensor:
    """Returns 1 − β^step; in float32 the plain difference loses four digits at β = 0.999."""
    return torch.ones_like(step) if beta == 0 else -torch.expm1(step * math.log(beta))


def clip(grads: Arrays, max_norm: float) -> Arrays:
    """Returns gradients of one client scaled to an overall 2-norm ≤ max_norm.

    The same as torch.nn.utils.clip_grad_norm_.
    """
    total = sum((g * g).sum() for g in grads.values())
    assert isinstance(total, Tensor)
    factor = (max_norm / (total.sqrt() + 1e-6)).clamp_max(1.0)
    return {k: g * factor for k, g in grads.items()}


class Schedule(Params):
    """A learning-rate schedule of torch.optim.lr_scheduler, advanced each round or each step."""

    name: str = Field(description="Class in torch.optim.lr_scheduler, such as CosineAnnealingLR.")
    per: Literal["round", "step"] = Field(
        "round", description="Advance once a round, or once a local step (restarting each round)."
    )
    params: dict[str, Any] = Field(default={}, description="Arguments of the class.")

    @model_validator(mode="after")
    def _torch_knows_it(self) -> Schedule:
        try:
            learning_rates(0.1, self, 2, 2)
        except UserError as error:
            raise ValueError(str(error)) from error
        return self


def learning_rates(
    lr: float, schedule: Schedule | None, server_round: int, steps: int
) -> float | np.ndarray[Any, Any]:
    """Returns the learning rate of round `server_round` (from 1): a number, or one per local step.

    Raises UserError if torch refuses the schedule, or says that it has ended before.
    """
    if schedule is None:
        return lr
    arguments = tuple(sorted((k, repr(v)) for k, v in schedule.params.items()))
    needed = server_round if schedule.per == "round" else steps
    rates, end = _table(lr, schedule.name, arguments, -(-needed // TABLE) * TABLE)
    if needed > len(rates):
        raise UserError(f"schedule {schedule.name} has no learning rate after {end}")
    return rates[needed - 1] if schedule.per == "round" else np.array(rates[:needed])


@lru_cache(maxsize=64)
def _table(
    lr: float, name: str, arguments: tuple[tuple[str, str], ...], length: int
) -> tuple[tuple[float, ...], str]:
    """Returns up to `length` learning rates and, if torch gives fewer, where and why they end."""
    kind = getattr(torch.optim.lr_scheduler, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.lr_scheduler.LRScheduler)):
        raise UserError(f"torch.optim.lr_scheduler has no schedule named {name!r}")
    if issubclass(kind, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UserError(f"schedule {name} follows a metric; only schedules of the step number do")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer step is taken on purpose
        try:
            scheduler = kind(optimizer, **{k: ast.literal_eval(v) for k, v in arguments})
        except Exception as error:  # torch raises various types for wrong arguments
            raise UserError(f"schedule {name}: {type(error).__name__}: {error}") from error
        while len(rates) < length:
            rates.append(float(scheduler.get_last_lr()[0]))
            try:
                scheduler.step()
            except Exception as error:  # such as OneCycleLR's after its last step
                return tuple(rates), f"step {len(rates)}: {error}"
    return tuple(rates), ""
