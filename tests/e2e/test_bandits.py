"""The bandits' scenarios by the command line, and what their runs leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import RunStore
from fedsim.errors import RunFailed
from fedsim.strategies.pfpne import PFPNE
from tests.e2e.conftest import Command

SCENARIOS = Path(__file__).parents[2] / "scenarios"


def test_the_synthetic_scenario(fedsim: Command) -> None:
    path = SCENARIOS / "pfpne_synthetic.yaml"
    small = [
        "--set", "data.clients=4", "--seeds", "0",
        *(f for label in ("PF-PNE", "Fed-PNE", "PNE", "HCT", "random")
          for f in ("--set", f"compare.{label}.strategy.budget=400")),
    ]  # fmt: skip
    result = fedsim("run", str(path), *small)
    assert result.status == 0, result.err
    runs = RunStore().list()
    assert len(runs) == 5
    assert set(runs["status"]) == {"finished"}
    stored = RunStore().open(runs["id"].iloc[0])
    assert stored.metrics.query("name == 'pulls'")["value"].iloc[-1] == 400
    assert {"regret", "simple_regret", "cells"} <= set(stored.client_metrics["name"])
    arrays = np.load(stored.artifact("bandit.npz"), allow_pickle=False)
    assert arrays["best"].shape == arrays["optima"].shape == (4, 2)
    assert arrays["kept"].sum() > 0
    assert "Cumulative regret" in result.out
    (report,) = Path("runs/reports").iterdir()
    plots = {each.name for each in (report / "plots").iterdir()}
    assert {"regret.png", "cells_0.png"} <= plots
    assert "Regret and cells" in (report / "report.html").read_text()


def test_the_tuning_scenario(fedsim: Command) -> None:
    path = SCENARIOS / "pfpne_tuning.yaml"
    small = ["--set", "data.rows=600", "--set", "partition.clients=3", "--seeds", "0"]
    small += ["--set", "strategy.pilot_pulls=2"]
    for label in ("PF-PNE", "Fed-PNE", "PNE", "HCT", "random", "TPE"):
        small += ["--set", f"compare.{label}.strategy.budget=60"]
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


def test_there_is_nothing_to_tune(fedsim: Command) -> None:
    result = fedsim("tune", str(SCENARIOS / "pfpne_synthetic.yaml"), "--dry-run")
    assert result.status == 2
    assert "client Bandit has no steps that could be mapped" in result.err


def test_a_run_that_failed_between_two_phases_is_resumed_to_the_same_bits(
    fedsim: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {
        "data": {"name": "bandit_objectives", "clients": 3, "delta": 0.1},
        "partition": "given",
        "strategy": {"name": "pf-pne", "budget": 1500, "delta": 0.1},
        "checkpoint": {"every_rounds": 1},
    }
    Path("cut.yaml").write_text(json.dumps(document))
    assert fedsim("run", "cut.yaml", "--no-report", "--quiet").status == 0
    with monkeypatch.context() as patched:
        split = PFPNE.split

        def fails(self: PFPNE, kept: Any) -> None:
            if self.depth == 2:
                raise RunFailed("the power is cut")
            split(self, kept)

        patched.setattr(PFPNE, "split", fails)
        assert fedsim("run", "cut.yaml", "--no-report", "--quiet").status == 1
    whole, cut = (RunStore().open(i) for i in RunStore().list()["id"])
    assert cut.status == "failed"
    assert fedsim("resume", cut.id, "--no-report").status == 0
    cut = RunStore().open(cut.id)
    costs = ("seconds", "clients_per_second", "total_seconds")
    frames = [
        run.metrics[~run.metrics["name"].isin(costs)].reset_index(drop=True) for run in (whole, cut)
    ]
    assert frames[0].equals(frames[1])
    first, second = (np.load(run.artifact("bandit.npz")) for run in (whole, cut))
    assert all(np.array_equal(first[name], second[name]) for name in first.files)
