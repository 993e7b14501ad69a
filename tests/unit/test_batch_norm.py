"""Scenarios of models with batch norm: what is refused before the run, and a run of FedBN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import Scenario, run
from fedsim.errors import ScenarioError
from tests.unit.test_setup import SAMPLER, prepared

CNN = {"name": "cnn", "channels": (4,), "hidden": (), "norm": "batch"}
LOCAL = {"name": "sgd", "batch_norm": "local"}
ON_CLIENTS = {"server_every": 0, "clients_every": 1}
DATA = {"name": "digits", "rows": 120, "test_fraction": 0.2}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a sampler": (
        {"strategy": SAMPLER},
        "batch norm layer '1' mixes the examples of a batch.*a posterior.*fa-hmc cannot train it."
        " Use GroupNorm or LayerNorm",
    ),
    "another sampler": ({"strategy": {"name": "sghmc", "step_size": 0.1}}, "client sghmc cannot"),
    "an adaptive strategy": (
        {"strategy": {"name": "FedAdam"}},
        "FedAdam would move the running variances of batch norm layer '1'.*negative. Use",
    ),
    "noise": (
        {"strategy": {"name": "DifferentialPrivacyServerSideFixedClipping", "clipping_norm": 1.0,
                      "noise_multiplier": 0.1, "num_sampled_clients": 4,
                      "strategy": {"name": "FedAvg"}}},
        "FixedClipping would move the running variances",
    ),
    "local layers on the server": (
        {"client": LOCAL},
        r"evaluate.server_every: the server cannot evaluate on test: batch norm layers stay.*"
        r"\(got 1\). Set evaluate: {server_every: 0, clients_every: 1}",
    ),
    "local layers that are not there": (
        {"client": LOCAL, "model": {"name": "softmax"}},
        "client.batch_norm: the model has no batch norm layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_run(name: str) -> None:
    sections, message = REFUSED[name]
    with pytest.raises(ScenarioError, match=message) as refused:
        prepared(**{"data": DATA, "model": CNN} | sections)
    assert len(refused.value.problems) == 1


def test_what_is_not_refused() -> None:
    adaptive, samples = {"name": "FedAdam"}, {"strategy": SAMPLER}
    prepared(data=DATA, model=CNN | {"norm": "group"}, strategy=adaptive)
    prepared(data=DATA, model=CNN | {"norm": "group"}, **samples)
    prepared(data=DATA, model=CNN, strategy={"name": "FedMedian"})
    setup = prepared(data=DATA | {"test_fraction": 0}, model=CNN, client=LOCAL)
    assert set(setup.arrays) == {"0.weight", "0.bias", "5.weight", "5.bias"}
    prepared(data=DATA, model=CNN, client=LOCAL, evaluate={"server_every": 0}, strategy=adaptive)


def test_what_travels() -> None:
    setup = prepared(data=DATA, model=CNN, strategy={"name": "fedavg", "chains": 2})
    assert setup.arrays["1.running_var"].shape == (2, 4)
    assert "1.num_batches_tracked" not in setup.arrays
    assert torch.equal(setup.arrays["1.running_var"], torch.ones(2, 4))


@pytest.mark.parametrize("local", [False, True])
def test_a_run(local: bool, tmp_path: Path) -> None:
    scenario = {
        "name": "normed",
        "rounds": 3,
        "data": {"name": "digits", "rows": 300, "test_fraction": 0.3},
        "partition": {"name": "iid", "clients": 3, "holdout": 0.2},
        "model": CNN,
        "task": "classification",
        "strategy": "fedavg",
        "client": {"name": "sgd", "lr": 0.1, "epochs": 3}
        | ({"batch_norm": "local"} if local else {}),
        "evaluate": ON_CLIENTS if local else {"clients_every": 1},
    }
    finished = run(Scenario.from_dict(scenario), out=tmp_path)
    metrics = finished.metrics
    splits = {"client"} if local else {"client", "test"}
    accuracy = metrics[(metrics["name"] == "accuracy") & (metrics["round"] == 3)]
    assert splits == set(accuracy["split"])
    assert (accuracy["value"] > 0.5).all()
    made = [path.name for path in finished.path.rglob("predictions_*.npz")]
    assert made == ([] if local else ["predictions_test.npz"])
