"""`--set field.path=value`."""

from __future__ import annotations

import pytest

from fedsim.errors import ScenarioError
from fedsim.scenario import Scenario
from fedsim.scenario.loader import parse
from fedsim.scenario.parse import from_document
from tests.unit.scenario.fakes import COMPONENTS

TEXT = """\
rounds: 10
data: toy
partition: iid
model: linear
task: classification
strategy:
  name: fa-hmc
  step_size: 0.1
  leapfrog_steps: 5
  betas: [0.8, 0.9]
client:
  name: sgd
  optimizer: {name: sgd, momentum: 0.5}
"""


def scenario(*overrides: str, text: str = TEXT) -> Scenario:
    return from_document(parse(text, "s.yaml"), overrides, COMPONENTS)


@pytest.mark.parametrize(
    ("overrides", "section", "expected"),
    [
        (
            ["strategy.step_size=5e-2"],
            "strategy",
            {"name": "fa-hmc", "step_size": 0.05, "leapfrog_steps": 5, "betas": [0.8, 0.9]},
        ),
        (
            ["strategy.betas.1=0.5", "strategy.betas.0=0.25"],
            "strategy",
            {"name": "fa-hmc", "step_size": 0.1, "leapfrog_steps": 5, "betas": [0.25, 0.5]},
        ),
        # a mapping is merged while its name stays
        (
            ["strategy={name: fa-hmc, leapfrog_steps: 3}"],
            "strategy",
            {"name": "fa-hmc", "step_size": 0.1, "leapfrog_steps": 3, "betas": [0.8, 0.9]},
        ),
        # a new name drops the old parameters, at any depth and whatever the order of the options
        (["strategy.name=fedavg"], "strategy", {"name": "fedavg", "fraction": 1.0}),
        (["strategy=fedavg"], "strategy", {"name": "fedavg", "fraction": 1.0}),
        (
            ["strategy.fraction=0.5", "strategy.name=fedavg"],
            "strategy",
            {"name": "fedavg", "fraction": 0.5},
        ),
        (
            ["strategy.fraction=0.5", "strategy=fedavg"],
            "strategy",
            {"name": "fedavg", "fraction": 0.5},
        ),
        (
            ["client.optimizer.name=adam"],
            "client",
            {"name": "sgd", "lr": 0.1, "optimizer": {"name": "adam", "epsilon": 1e-8}},
        ),
        # the same name again drops nothing
        (
            ["client.optimizer.name=sgd"],
            "client",
            {"name": "sgd", "lr": 0.1, "optimizer": {"name": "sgd", "momentum": 0.5}},
        ),
        (["client=null"], "client", None),
        (["engine.threads=3"], "engine", {"threads": 3}),
        (["seeds=[4, 5]"], "seeds", [4, 5]),
        (["grid.strategy.step_size=[0.1, 0.2]"], "grid", {"strategy.step_size": [0.1, 0.2]}),
        (["compare.2020.rounds=7"], "compare", {"2020": {"rounds": 7}}),
        (["rounds=3", "rounds=4"], "rounds", 4),
        (["description=a = b"], "description", "a = b"),
    ],
)
def test_values(overrides: list[str], section: str, expected: object) -> None:
    got = scenario(*overrides).resolved()[section]
    if section == "engine":
        assert isinstance(expected, dict)
        got = {key: got[key] for key in expected}
    if section == "strategy" and isinstance(expected, dict) and expected["name"] == "fa-hmc":
        expected = {**expected, "burn_in": "auto"}
    assert got == expected


def test_seed_replaces_seeds() -> None:
    assert scenario("seed=7").seeds == (7,)
    assert scenario("seed=7", text=TEXT + "seeds: [1, 2]\n").seeds == (7,)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "strategy.stepsize=1",
            "--set strategy.stepsize=1: strategy.stepsize: unknown key. Did you mean step_size?",
        ),
        (
            "stratgy.step_size=1",
            "--set stratgy.step_size=1: stratgy: unknown key. Did you mean strategy?",
        ),
        (
            "strategy.step_size=abc",
            "--set strategy.step_size=abc: strategy.step_size: must be a number (got 'abc')."
            " This is text",
        ),
        ("rounds=0", "--set rounds=0: rounds: must be >= 1 and <= 1000000 (got 0)"),
        (
            "strategy.betas.2=1",
            "--set strategy.betas.2=1: strategy.betas.2: there is no such item:"
            " strategy.betas is a list of 2",
        ),
        (
            "strategy.betas.x=1",
            "--set strategy.betas.x=1: strategy.betas.x: there is no such item:"
            " strategy.betas is a list of 2",
        ),
        (
            "rounds.x=1",
            "--set rounds.x=1: rounds.x: cannot be set: rounds has no fields below it",
        ),
        (
            "strategy.name=fedvag",
            "--set strategy.name=fedvag: strategy.name: there is no strategy of this name"
            " (got 'fedvag'). Did you mean fedavg?",
        ),
        # step_size stands in line 8 of the file, but this one comes from the option
        (
            "strategy={name: fa-hmc, step_size: -1}",
            "--set strategy={name: fa-hmc, step_size: -1}: strategy.step_size:"
            " must be > 0 (got -1)",
        ),
        (
            "strategy={name: fedavg, step_size: 1}",
            "--set strategy={name: fedavg, step_size: 1}: strategy.step_size: unknown key."
            " Known keys: fraction, name",
        ),
        ("rounds", "--set rounds: must have the form field.path=value"),
        ("=3", "--set =3: must have the form field.path=value"),
        ("strategy..x=3", "--set strategy..x=3: must have the form field.path=value"),
        (
            "rounds=!!python/name:os.system 3",
            "--set rounds=!!python/name:os.system 3: rounds: tag"
            " 'tag:yaml.org,2002:python/name:os.system' is not allowed. Write the plain value",
        ),
    ],
)
def test_mistakes_name_the_option(override: str, expected: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario(override)
    assert str(caught.value) == expected


def test_a_mistake_of_the_file_is_cured_by_an_override() -> None:
    broken = TEXT.replace("0.1", "-0.1")
    with pytest.raises(ScenarioError, match=r"s\.yaml:8: strategy\.step_size: must be > 0"):
        scenario(text=broken)
    scenario("strategy.step_size=0.1", text=broken)


def test_mistakes_of_file_and_options_come_together() -> None:
    with pytest.raises(ScenarioError) as caught:
        scenario("quorum=2", "x", "engine.device=tpu", text=TEXT.replace("10", "ten"))
    assert [(p.line, p.file) for p in caught.value.problems] == [
        (1, "s.yaml"),
        (None, "--set x"),
        (None, "--set engine.device=tpu"),
        (None, "--set quorum=2"),
    ]
