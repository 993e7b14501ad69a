"""Strategies and clients of the user's own, named by import path."""

from __future__ import annotations

import pytest

from fedsim.errors import ScenarioError
from fedsim.scenario import Imported, Scenario
from tests.unit.scenario import fakes
from tests.unit.scenario.test_expand import BASE

HERE = "tests.unit.scenario.fakes"


def build(strategy: object) -> Scenario:
    return Scenario.from_dict({**BASE, "strategy": strategy}, fakes.COMPONENTS)


def test_parameters_are_checked_by_the_class_and_round_trip() -> None:
    scenario = build({"name": f"{HERE}:OwnMethod", "params": {"step_size": 0.5}})
    strategy = scenario.strategy
    assert isinstance(strategy, Imported)
    assert strategy.params == fakes.FAHMC(step_size=0.5)
    assert strategy.load() is fakes.OwnMethod
    assert scenario.resolved()["strategy"]["params"]["leapfrog_steps"] == 10
    assert Scenario.from_dict(scenario.resolved(), fakes.COMPONENTS) == scenario


def test_a_class_without_parameter_model_takes_any() -> None:
    strategy = build({"name": f"{HERE}:BareMethod", "params": {"x": [1]}}).strategy
    assert isinstance(strategy, Imported)
    assert strategy.params == {"x": [1]}
    assert isinstance(build(f"{HERE}:BareMethod").strategy, Imported)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (
            {"name": f"{HERE}:OwnMethod", "params": {"step_size": -1, "x": 2}},
            "strategy.params.step_size: must be > 0 (got -1)\n"
            "strategy.params.x: unknown key. Known keys: betas, burn_in, leapfrog_steps, name,"
            " step_size",
        ),
        (f"{HERE}:OwnMethod", "strategy.params.step_size: is required. Step size η, > 0"),
        (
            {"name": f"{HERE}:OwnMethod", "step_size": 1},
            "strategy.step_size: unknown key. Known keys: name, params",
        ),
        (
            {"name": f"{HERE}:OwnMethod", "params": [1]},
            "strategy.params: must be a mapping (key: value) (got [1])",
        ),
        (
            f"{HERE}:Nothing",
            f"strategy: module '{HERE}' has no attribute 'Nothing' (got '{HERE}:Nothing')",
        ),
        (
            "no.such:Thing",
            "strategy: cannot import 'no.such': ModuleNotFoundError: No module named 'no'"
            " (got 'no.such:Thing')",
        ),
        (
            "os:",
            "strategy: has the wrong form (got 'os:'). Import path, package.module:attribute",
        ),
    ],
)
def test_mistakes(strategy: object, expected: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        build(strategy)
    assert str(caught.value) == expected
