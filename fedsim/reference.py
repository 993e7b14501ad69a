"""How far a sampler's draws are from a posterior known otherwise: in closed form, or by NUTS.

R-hat and ESS cannot see the bias that averaging leaves in a federated sampler; only this can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.build import pooled
from fedsim.metrics import distances, nuts
from fedsim.metrics.posterior import scalar_names
from fedsim.random import integer
from fedsim.strategies.sampler import Sampler, SamplerParams

if TYPE_CHECKING:
    from fedsim.data import FederatedData
    from fedsim.setup import Setup

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """figures: distances, and the kind of the reference. arrays: the reference itself."""

    figures: dict[str, Any]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def objections(setup: Setup) -> Iterator[str]:
    """Yields why the scenario's posterior.reference does not exist for this run."""
    kind = setup.scenario.posterior.reference
    if kind == "none" or not isinstance(setup.strategy, Sampler):
        return
    if kind == "nuts":
        nuts.require()
        yield from _nuts_objections(setup)
        if setup.data.make is not None:
            yield (
                f"nuts needs all rows at once; those of {setup.data.info.name} are made client by"
                " client"
            )
    else:
        yield from _closed_form_objections(setup)


def _nuts_objections(setup: Setup) -> Iterator[str]:
    if getattr(setup.scenario.model, "name", "") not in ("linear", "softmax"):
        yield "nuts is for the models linear and softmax"
    elif setup.task.name not in ("classification", "binary"):
        yield "nuts is for the tasks classification and binary"
    if _params(setup).prior != "normal":
        yield "nuts is for the normal prior"


def _closed_form_objections(setup: Setup) -> Iterator[str]:
    truth, params = setup.data.truth, _params(setup)
    name = setup.data.info.name
    if not {"mean", "cov"} <= set(truth):
        yield f"data {name} has no posterior in closed form"
    elif setup.model.num_parameters != (d := np.size(truth["mean"])):
        yield (
            f"the closed form of {name} is for a model of {d} parameters, not of"
            f" {setup.model.num_parameters}"
        )
    elif "prior_precision" not in truth:
        if params.prior != "flat":
            yield f"the closed form of {name} has no prior: set strategy.prior: flat"
    elif params.prior != "normal" or params.prior_precision != float(truth["prior_precision"]):
        yield (
            f"the closed form of {name} is for strategy.prior: normal with prior_precision:"
            f" {float(truth['prior_precision']):g}"
        )
    elif getattr(setup.scenario.task, "noise_sd", None) != float(truth["noise_sd"]):
        yield f"the closed form of {name} is for task.noise_sd: {float(truth['noise_sd']):g}"


def _params(setup: Setup) -> SamplerParams:
    assert isinstance(setup.strategy, Sampler)
    return setup.strategy.params


def compare(setup: Setup, draws: Mapping[str, NDArray[Any]]) -> Compared:
    """Returns the distance of draws {name: (chains, draws, *shape)} to the scenario's reference.

    In units of the reference's spread: W1 of the marginals (nuts), errors of mean and covariance,
    and the W2 of the two Gaussians with these moments.
    """
    kind = setup.scenario.posterior.reference
    if kind == "none":
        return Compared({"kind": kind, "note": "none was run"})
    flat, names = flat_draws(draws)
    if kind == "closed_form":
        mean = np.asarray(setup.data.truth["mean"], np.float64).ravel()
        cov = np.atleast_2d(setup.data.truth["cov"]) * _params(setup).temperature
        figures = {"kind": kind, **_moments(flat, mean, cov)}
        return Compared(figures, {"mean": mean, "cov": cov, "names": np.array(names)})
    reference = pooled_nuts(setup)
    pooled = reference.reshape(-1, reference.shape[-1])
    w1 = distances.wasserstein1_marginal(flat, pooled)
    figures = {
        "kind": kind,
        "w1_over_sd_mean": float(w1.mean()),
        "w1_over_sd_max": float(w1.max()),
        **_moments(flat, pooled.mean(0), np.cov(pooled.T)),
    }
    return Compared(figures, {"draws": reference, "names": np.array(names)})


_nuts_draws: dict[tuple[object, ...], tuple[FederatedData, Floats]] = {}
"""The last reference with its data, whose id is thus nobody else's."""


def pooled_nuts(setup: Setup) -> Floats:
    """Returns NUTS draws (chains, draws, d) of the clients' pooled data at the run's prior.

    Runs of one scenario that differ in their sampler alone share one reference.
    """
    params = _params(setup)
    examples = pooled(setup.data.train, setup.data.shards)
    shapes = tuple(setup.model.shapes.values())
    key = (id(setup.data), shapes, params.prior_precision, params.temperature, setup.seed)
    if key not in _nuts_draws:
        _nuts_draws.clear()
        drawn = nuts.linear_posterior(
            examples.x.reshape(len(examples), -1).astype(np.float64),
            examples.y,
            examples.weights(),
            list(shapes),
            precision=params.prior_precision,
            temperature=params.temperature,
            seed=integer(setup.seed, "nuts"),
        )
        _nuts_draws[key] = (setup.data, drawn)
    return _nuts_draws[key][1]


def flat_draws(draws: Mapping[str, NDArray[Any]]) -> tuple[Floats, list[str]]:
    """Returns draws as (chains · draws, d), and the names of the d scalars."""
    columns: list[Floats] = []
    names: list[str] = []
    for name, values in draws.items():
        columns.append(values.reshape(values.shape[0] * values.shape[1], -1).astype(np.float64))
        names += scalar_names(name, values.shape[2:])
    return np.concatenate(columns, axis=1), names


def _moments(flat: Floats, mean: Floats, cov: Floats) -> dict[str, float]:
    own_mean, own_cov = flat.mean(0), np.atleast_2d(np.cov(flat.T))
    return {
        "mean_error_over_sd": distances.relative_mean_error(own_mean, mean, cov),
        "relative_cov_error": distances.relative_cov_error(own_cov, cov),
        "w2_over_sd": distances.bures_w2(own_mean, own_cov, mean, cov) / np.trace(cov) ** 0.5,
    }
