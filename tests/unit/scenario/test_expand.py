"""compare × grid × seeds, and scenarios as plain data."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from fedsim.errors import ScenarioError
from fedsim.scenario import Scenario
from tests.unit.scenario.fakes import (
    COMPONENTS,
    FAHMC,
    IID,
    Classification,
    FedAvg,
    Linear,
    ToyData,
)

BASE: dict[str, Any] = {
    "name": "base",
    "rounds": 10,
    "data": "toy",
    "partition": "iid",
    "model": "linear",
    "task": "classification",
    "strategy": {"name": "fa-hmc", "step_size": 0.1, "leapfrog_steps": 3},
    "client": {"name": "sgd", "optimizer": {"name": "sgd", "momentum": 0.5}},
}


def build(**sections: Any) -> Scenario:
    return Scenario.from_dict({**BASE, **sections}, COMPONENTS)


def test_a_plain_scenario_is_one_run() -> None:
    (spec,) = build(seed=3).expand(COMPONENTS)
    assert (spec.label, spec.group, spec.arm, spec.seed) == ("base", "base", "", 3)
    assert spec.settings == {}
    assert spec.scenario == build(seeds=[3])


def test_order_labels_and_groups() -> None:
    scenario = build(
        seeds=[7, 2],
        compare={"slow": {"rounds": 20}, "base": {}},
        grid={"strategy.step_size": [0.1, 0.01], "client.lr": [1, 2]},
    )
    specs = scenario.expand(COMPONENTS)
    assert [spec.label for spec in specs[:5]] == [
        "slow step_size=0.1 lr=1 seed=7",
        "slow step_size=0.1 lr=1 seed=2",
        "slow step_size=0.1 lr=2 seed=7",
        "slow step_size=0.1 lr=2 seed=2",
        "slow step_size=0.01 lr=1 seed=7",
    ]
    assert len(specs) == 16
    assert len({spec.label for spec in specs}) == 16
    assert len({spec.group for spec in specs}) == 8
    last = specs[-1]
    assert (last.arm, last.seed) == ("base", 2)
    assert last.settings == {"strategy.step_size": 0.01, "client.lr": 2}
    assert last.scenario.strategy == FAHMC(step_size=0.01, leapfrog_steps=3)
    assert [spec.scenario.rounds for spec in specs] == [20] * 8 + [10] * 8
    for spec in specs:
        assert spec.scenario.seeds == (spec.seed,)
        assert spec.scenario.compare == {}
        assert spec.scenario.grid == {}


def test_an_entry_is_merged_and_a_new_name_replaces() -> None:
    scenario = build(
        compare={
            "same": {"strategy": {"step_size": 0.5}},
            "named": {"strategy": {"name": "fa-hmc", "step_size": 0.25}},
            "other": {"strategy": "fedavg", "client": None},
            "nested": {"client": {"optimizer": {"name": "adam"}}},
        }
    )
    same, named, other, nested = (spec.scenario for spec in scenario.expand(COMPONENTS))
    assert same.strategy == FAHMC(step_size=0.5, leapfrog_steps=3)
    assert named.strategy == FAHMC(step_size=0.25, leapfrog_steps=3)
    assert other.strategy == FedAvg(name="fedavg")
    assert other.client is None
    assert nested.resolved()["client"]["optimizer"] == {"name": "adam", "epsilon": 1e-8}
    assert same.client is not None


def test_a_list_is_replaced_not_merged() -> None:
    scenario = build(compare={"a": {"evaluate": {"splits": ["test"]}}})
    assert scenario.expand(COMPONENTS)[0].scenario.evaluate.splits == ("test",)


def test_grid_wins_over_compare_and_names_come_first() -> None:
    scenario = build(
        compare={"a": {"rounds": 3}},
        grid={
            "strategy.leapfrog_steps": [7],
            "strategy": [{"name": "fa-hmc", "step_size": 2.0}],
            "rounds": [4],
        },
    )
    (spec,) = scenario.expand(COMPONENTS)
    assert spec.scenario.rounds == 4
    assert spec.scenario.strategy == FAHMC(step_size=2.0, leapfrog_steps=7)
    assert spec.label == "a leapfrog_steps=7 strategy=fa-hmc rounds=4"


def test_grid_over_whole_components() -> None:
    scenario = build(grid={"partition": ["iid", {"name": "dirichlet", "alpha": 0.1}]})
    assert [spec.label for spec in scenario.expand(COMPONENTS)] == [
        "base partition=iid",
        "base partition=dirichlet",
    ]


def test_too_many_runs_are_refused_at_once() -> None:
    values = [float(value) for value in range(1, 102)]
    with pytest.raises(ScenarioError) as caught:
        build(seeds=list(range(10)), grid={"strategy.step_size": values, "client.lr": values})
    assert str(caught.value) == (
        "grid: compare × grid × seeds makes 102,010 runs; at most 10,000 are allowed"
    )


def test_every_point_is_validated_and_one_mistake_is_said_once() -> None:
    with pytest.raises(ScenarioError) as caught:
        build(
            compare={"a": {}, "b": {"strategy": "fedavg"}},
            grid={"client.lr": [1, 2, -1], "rounds": [1, 2]},
            quorum=3,
        )
    assert str(caught.value).split("\n") == [
        "quorum: must be > 0 and <= 1 (got 3)",
        "grid.client.lr: must be > 0 (got -1)",
    ]


def test_checks_between_sections_are_made_for_every_point() -> None:
    with pytest.raises(ScenarioError) as caught:
        build(compare={"a": {}, "b": {"evaluate": {"clients_every": 2}}})
    assert str(caught.value).startswith("compare.b.evaluate.clients_every: asks clients to eval")


def test_resolved_round_trips_and_is_json() -> None:
    scenario = build(
        description="ä",
        seeds=[1, 2],
        early_stopping={"patience": 3},
        compare={"a": {"rounds": 3}},
        grid={"strategy.step_size": [0.1, 0.2]},
    )
    plain = json.loads(json.dumps(scenario.resolved()))
    assert Scenario.from_dict(plain, COMPONENTS) == scenario
    assert plain["strategy"]["betas"] == [0.9, 0.99]
    assert plain["engine"]["path"] == "auto"
    for spec in scenario.expand(COMPONENTS):
        assert Scenario.from_dict(spec.scenario.resolved(), COMPONENTS) == spec.scenario


def test_from_dict_leaves_its_argument_alone_and_takes_params_and_tuples() -> None:
    data = {**BASE, "seed": 4, "strategy": FAHMC(step_size=0.1), "model": "mlp"}
    data["model"] = {"name": "mlp", "hidden": (3, 4)}
    before = copy.deepcopy(data)
    scenario = Scenario.from_dict(data, COMPONENTS)
    assert data == before
    assert scenario.strategy == FAHMC(step_size=0.1)
    assert scenario.resolved()["model"]["hidden"] == [3, 4]


def test_a_scenario_is_built_from_parameters_in_python() -> None:
    scenario = Scenario(
        rounds=3,
        data=ToyData(),
        partition=IID(),
        model=Linear(),
        task=Classification(),
        strategy=FedAvg(name="fedavg"),
    )
    assert scenario.check() == []
    assert Scenario.from_dict(scenario.resolved(), COMPONENTS) == scenario


@pytest.mark.parametrize(
    "data",
    [
        {**BASE, "rounds": np.float32(3)},
        {**BASE, "data": object()},
        {**BASE, "compare": {"a": {1, 2}}},
        [1, 2],
        "text",
    ],
)
def test_what_is_not_plain_data_is_refused(data: Any) -> None:
    with pytest.raises(ScenarioError):
        Scenario.from_dict(data, COMPONENTS)


def test_data_that_holds_itself_is_refused() -> None:
    data = dict(BASE)
    data["compare"] = {"a": data}
    with pytest.raises(ScenarioError, match="is not plain data"):
        Scenario.from_dict(data, COMPONENTS)
