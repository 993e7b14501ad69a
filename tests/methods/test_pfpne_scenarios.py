"""Tuning a frozen model, and what is said of wrong input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsim import Scenario
from fedsim.clients.base import Batch
from fedsim.errors import UserError
from fedsim.runner import check_specs
from tests.methods.bandits import LOCAL, play, setup_of

TUNING = {
    "data": {"name": "digits", "test_fraction": 0, "rows": 600},
    "partition": {"name": "dirichlet", "clients": 4, "alpha": 0.5, "min_size": 20, "holdout": 0.3},
    "model": "softmax",
    "task": "classification",
    "evaluate": {"server_every": 0, "clients_every": 100},
    "client": {"name": "bandit", "objective": {"name": "personalise", "steps": 5}},
}


def test_a_model_is_trained_frozen_and_then_stays() -> None:
    section = {"name": "fed-pne", "budget": 60, "pretrain": 4, "rho": 0.7}
    played = play(section, TUNING["data"], **{k: v for k, v in TUNING.items() if k != "data"})
    losses = [played.memory.metrics[r, "train"]["loss"] for r in range(1, 5)]
    assert losses == sorted(losses, reverse=True)
    final = played.state.arrays
    at_four = played.memory.checkpoints[4][0]
    for name, value in final.items():
        assert torch.equal(at_four[f"arrays/{name}"], value)
        assert torch.equal(played.kept[f"0/frozen/{name}"], value)
    scores = played.memory.metrics[played.state.round, "client"]
    assert 0 <= scores["accuracy"] <= 1
    assert np.isfinite(scores["frozen_loss"])


def tuner() -> tuple[Any, Batch]:
    """Returns the client of the tuning problem, and its rows."""
    sections = {k: v for k, v in TUNING.items() if k != "data"}
    setup = setup_of({"name": "fed-pne", "budget": 60}, TUNING["data"], **sections)
    shard = setup.data.shard(0)
    batch = Batch(
        torch.from_numpy(shard.x.astype(np.float32)), torch.from_numpy(shard.y),
        torch.ones(len(shard)), torch.ones(()),
    )  # fmt: skip
    return setup.client, batch


def test_a_client_that_missed_the_trained_model_says_so() -> None:
    client, batch = tuner()
    with pytest.raises(ValueError, match=r"never got the trained model: it missed train\.freeze"):
        client.train("train.pull", {}, {}, batch, {}, np.random.default_rng(0))


def test_resampling_is_the_noise_and_divergence_the_worst_score() -> None:
    client, batch = tuner()
    objective = client._objective(batch, {}, {})
    points = np.array([[0.1, 0.01]] * 30 + [[1e30, 0.01]])
    values, _ = objective.pull(points, np.random.default_rng(0))
    assert values[:30].std() > 1e-3
    assert ((values >= 0) & (values <= 1)).all()
    assert values[30] <= 0.5
    again, _ = objective.pull(points, np.random.default_rng(0))
    assert np.array_equal(values, again)


# Wrong input

GOOD: dict[str, Any] = {
    "data": {"name": "bandit_objectives", "clients": 2},
    "partition": "given",
    "strategy": {"name": "pf-pne", "budget": 100, "delta": 0.1},
}
BOX = [{"name": "x", "low": 0.0, "high": 1.0}]


def complaint(**changes: Any) -> str:
    """Returns what is said of the good scenario with some sections changed."""
    with pytest.raises(UserError) as caught:
        check_specs(Scenario.from_dict({**GOOD, **changes}).expand())
    return str(caught.value)


def test_the_good_scenario_is_good() -> None:
    check_specs(Scenario.from_dict(GOOD).expand())
    assert Scenario.from_dict(GOOD).rounds == 1000
    again = Scenario.from_dict(Scenario.from_dict(GOOD).resolved())
    assert again.model is None
    assert again == Scenario.from_dict(GOOD)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy": {"name": "pf-pne"}}, "strategy.budget: is required"),
        ({"strategy": {"name": "pf-pne", "budget": 0}}, "strategy.budget: must be >= 1"),
        ({"strategy": {"name": "pf-pne", "budget": 9, "rho": 1.0}}, "rho: must be > 0 and < 1"),
        ({"strategy": {"name": "pf-pne", "budget": 9, "delta": -1}}, "delta: must be >= 0"),
        ({"strategy": "fedavg"}, "model: is required"),
        ({"strategy": "fedavg"}, "rounds: is required"),
        ({"model": "softmax"}, "task: is missing beside model"),
        ({"data": "digits", "partition": {"name": "iid", "clients": 3}},
         "client.objective: is for data: bandit_objectives"),
        ({"client": "sgd"}, "the client does not honour"),
        ({"client": {"name": "bandit", "objective": {"name": "personalise"}}},
         "client.objective: needs a model and a task"),
        ({"client": {"name": "bandit", "objective": {"name": "function", "path": "os:path"}}},
         "client.objective.axes: is required"),
        ({"client": {"name": "bandit", "objective":
                     {"name": "function", "path": "os:nothing", "axes": BOX}}},
         "module 'os' has no attribute"),
        ({"client": {"name": "bandit", "objective":
                     {"name": "program", "command": ["true"], "axes": BOX * 2}}},
         "axes must have different names"),
        ({"client": {"name": "bandit", "objective": {"name": "program", "command": [],
                                                     "axes": BOX}}}, "command"),
        ({"client": {"name": "bandit", "objective": {"name": "dream"}}}, "objective"),
        ({"strategy": {"name": "pf-pne", "budget": 300}},
         "strategy.pilot_pulls: makes a pilot of 320 pulls"),
        ({"strategy": {"name": "pf-pne", "budget": 99, "delta": 0.1, "pretrain": 2}},
         "strategy.pretrain: is for client.objective: personalise"),
        ({"data": {"name": "bandit_objectives", "clients": 1, "delta": 0.1}},
         "one client differs from nobody"),
        ({"data": {"name": "bandit_objectives", "base": "garland", "dimension": 2}},
         "garland has dimension 1"),
    ],
)  # fmt: skip
def test_wrong_input_is_explained(changes: dict[str, Any], reason: str) -> None:
    assert reason in complaint(**changes)


def test_random_search_alone_needs_no_cells() -> None:
    played = play({**LOCAL, "method": "random", "budget": 40})
    assert "cells" not in played.memory.metrics[1, "train"]
