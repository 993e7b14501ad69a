"""A client's potential: its share of the negative log posterior, and its gradient.

With w_c = n_c / n the client's potential is f_c = NLL_c / w_c − log prior, so that Σ_c w_c f_c is
the negative log posterior of all data and the prior counts once. All samplers use it.

A minibatch B of a shard of n_c rows estimates ∇f_c by (n_c/|B|) Σ_B ∇NLL_i / w_c − ∇ log prior.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad

from fedsim.clients.base import Batch, Config, Inputs
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel, Task

SETTINGS = frozenset(
    {"prior", "prior-df", "prior-precision", "total-examples", "num-clients", "weighted-by"}
)
"""The message settings that the potential obeys."""


def neg_log_prior(params: Arrays, kind: str, precision: Tensor, df: float) -> Tensor:
    """Returns −log prior up to a constant, as a 0-d tensor, summed over independent entries.

    normal: ½ λ θ². laplace: sqrt(2 λ) |θ|. student_t: a t density with `df` degrees of freedom and
    scale 1/sqrt(λ). flat: 0. λ is `precision` (for laplace: of the same variance 1/λ).
    """
    total = precision * 0
    for value in params.values():
        if kind == "normal":
            total = total + 0.5 * precision * (value * value).sum()
        elif kind == "laplace":
            total = total + (2 * precision).sqrt() * value.abs().sum()
        elif kind == "student_t":
            total = total + 0.5 * (df + 1) * torch.log1p(precision * value * value / df).sum()
    return total


def potential_gradient(
    model: FunctionalModel, task: Task, params: Arrays, batch: Batch, inputs: Inputs
) -> Arrays:
    """Returns the estimate of ∇f_c at params: scale/w_c · Σ weight ∇loss + ∇(−log prior).

    Dropout layers are off: the potential is a function of the parameters alone.
    """
    prior, df = str(inputs.static["prior"]), float(str(inputs.static["prior-df"]))
    factor = batch.scale / inputs.scalars["client-weight"]

    def potential(params: Arrays) -> Tensor:
        losses = task.loss(model.apply(params, batch.x), batch.y)
        nll = (losses * batch.weight).sum()
        return factor * nll + neg_log_prior(params, prior, inputs.scalars["prior-precision"], df)

    gradient: Arrays = grad(potential)(params)
    return gradient


def potential_scalars(n_examples: int, config: Config) -> dict[str, float]:
    """Returns the scalars that ∇f_c needs; w_c follows from what the server sent."""
    if config.get("weighted-by", "examples") == "uniform":
        share = 1 / int(config["num-clients"])
    else:
        share = n_examples / int(config["total-examples"])
    return {
        # a client without rows has no likelihood; the guard keeps its gradient the prior's
        "client-weight": share or 1.0,
        "prior-precision": float(config["prior-precision"]),
    }


def prior_static(config: Config) -> dict[str, str | float]:
    """Returns what of the prior steers control flow."""
    return {
        "prior": str(config.get("prior", "normal")),
        "prior-df": float(config.get("prior-df", 4.0)),
    }
