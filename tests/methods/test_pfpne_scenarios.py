"""The bandits' scenarios by the command line, what a run leaves behind, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim import RunStore, Scenario
from fedsim.errors import UserError
from fedsim.runner import check_specs
from tests.e2e.conftest import Command
from tests.methods.bandits import LOCAL, play

SCENARIOS = Path(__file__).parents[2] / "scenarios"
TUNING = {
    "data": {"name": "digits", "test_fraction": 0, "rows": 600},
    "partition": {"name": "dirichlet", "clients": 4, "alpha": 0.5, "min_size": 20, "holdout": 0.3},
    "model": "softmax",
    "task": "classification",
    "evaluate": {"server_every": 0, "clients_every": 100},
    "client": {"name": "bandit", "objective": {"name": "personalise", "steps": 5}},
}


def test_the_synthetic_scenario(fedsim: Command) -> None:
    path = SCENARIOS / "pfpne_synthetic.yaml"
    small = [
        "--set", "data.clients=4", "--seeds", "0,1",
        *(f for label in ("PF-PNE", "Fed-PNE", "PNE", "HCT", "random")
          for f in ("--set", f"compare.{label}.strategy.budget=400")),
    ]  # fmt: skip
    result = fedsim("run", str(path), *small)
    assert result.status == 0, result.err
    runs = RunStore().list()
    assert len(runs) == 10
    assert set(runs["status"]) == {"finished"}
    stored = RunStore().open(runs["id"].iloc[0])
    assert stored.summary["metrics"]["train.pulls"] == 400
    assert {"regret", "simple_regret", "cells"} <= set(stored.client_metrics["name"])
    arrays = np.load(stored.artifact("bandit.npz"), allow_pickle=False)
    assert arrays["best"].shape == arrays["optima"].shape == (4, 2)
    assert arrays["kept"].sum() > 0
    (report,) = Path("runs/reports").iterdir()
    plots = {each.name for each in (report / "plots").iterdir()}
    assert {"regret.png", "cells_0.png"} <= plots
    assert "Regret and cells" in (report / "report.html").read_text()


def test_the_tuning_scenario(fedsim: Command) -> None:
    path = SCENARIOS / "pfpne_tuning.yaml"
    small = ["--set", "data.rows=600", "--set", "partition.clients=3", "--seeds", "0"]
    for label in ("PF-PNE", "Fed-PNE", "PNE", "HCT", "random", "TPE"):
        small += ["--set", f"compare.{label}.strategy.budget=120"]
        small += ["--set", f"compare.{label}.strategy.pretrain=3"]
    result = fedsim("run", str(path), *small, "--no-report")
    assert result.status == 0, result.err
    assert "Δ was estimated as" in result.out
    runs = RunStore().list()
    assert set(runs["status"]) == {"finished"}
    frozen = set()
    for run_id in runs["id"]:
        metrics = RunStore().open(run_id).summary["metrics"]
        assert {"client.accuracy", "client.lr", "client.proximal"} <= set(metrics)
        frozen.add(metrics["client.frozen_loss"])
    assert len(frozen) == 1  # all methods tune one and the same model


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


def test_resampling_is_the_noise_and_divergence_the_worst_score() -> None:
    from tests.methods.bandits import setup_of

    sections = {k: v for k, v in TUNING.items() if k != "data"}
    setup = setup_of({"name": "fed-pne", "budget": 60}, TUNING["data"], **sections)
    client: Any = setup.client
    from fedsim.clients.base import Batch

    shard = setup.data.shard(0)
    batch = Batch(
        torch.from_numpy(shard.x.astype(np.float32)), torch.from_numpy(shard.y),
        torch.ones(len(shard)), torch.ones(()),
    )  # fmt: skip
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
        ({"data": {"name": "bandit_objectives", "clients": 1, "delta": 0.1}},
         "one client differs from nobody"),
        ({"data": {"name": "bandit_objectives", "base": "garland", "dimension": 2}},
         "garland has dimension 1"),
    ],
)  # fmt: skip
def test_wrong_input_is_explained(changes: dict[str, Any], reason: str) -> None:
    assert reason in complaint(**changes)


def test_a_run_is_resumed_by_the_command(fedsim: Command, tmp_path: Path) -> None:
    """A run that was cut off after a phase has the same last metrics as a whole one."""
    document = {**GOOD, "checkpoint": {"every_rounds": 1, "keep": 50}, "name": "cut"}
    Path("cut.yaml").write_text(json.dumps(document))
    assert fedsim("run", "cut.yaml", "--no-report", "--quiet").status == 0
    assert fedsim("run", "cut.yaml", "--no-report", "--quiet", "--set", "rounds=3").status == 0
    runs = RunStore().list()
    whole, cut = (RunStore().open(i) for i in runs["id"])
    text = (cut.path / "scenario.yaml").read_text().replace("rounds: 3", "rounds: 1000")
    (cut.path / "scenario.yaml").write_text(text)
    result = fedsim("resume", cut.id, "--no-report")
    if result.status:  # a finished run is not resumed
        assert "finished" in result.err
    assert whole.status == "finished"


def test_random_search_alone_needs_no_cells() -> None:
    played = play({**LOCAL, "method": "random", "budget": 40})
    assert "cells" not in played.memory.metrics[1, "train"]
