"""What of a stored run may change while it goes on: the engine's fields that change no number."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedsim import Scenario, ScenarioError
from fedsim.scenario.move import differences, movable, moved
from fedsim.scenario.sections import MOVABLE, EngineParams

STORED = Scenario.from_dict(
    {
        "name": "stored",
        "rounds": 5,
        "data": "digits",
        "partition": {"name": "iid", "clients": 4},
        "model": "softmax",
        "task": "classification",
        "strategy": "fedavg",
    }
).resolved()


def test_every_movable_field_is_one_of_the_engine() -> None:
    assert set(EngineParams.model_fields) >= MOVABLE
    assert {"name", "threads"} <= MOVABLE
    assert not MOVABLE & {"path", "chunk", "dtype", "device", "trace"}, "these change the last bits"


def test_threads_and_memory_may_change() -> None:
    after, changes = moved(STORED, ["engine.threads=3", "engine.state_budget_mb=5"])
    assert (after.engine.threads, after.engine.state_budget_mb) == (3, 5)
    assert changes == {"engine.threads": [None, 3], "engine.state_budget_mb": [1024, 5]}
    assert Scenario.from_dict(after.resolved()) == after


def test_nothing_changed_is_nothing() -> None:
    after, changes = moved(STORED, ["engine.name=inline"])
    assert (after.resolved(), changes) == (STORED, {})


def test_another_engine_is_a_difference_that_may_be() -> None:
    before = Scenario.from_dict(STORED)
    engine = before.engine.model_copy(update={"name": "another"})
    after = before.model_copy(update={"engine": engine})
    assert differences(before, after) == {"engine.name": ["inline", "another"]}
    assert movable("engine.name")


def test_a_run_moves_to_a_cluster_and_back() -> None:
    there, changes = moved(STORED, ["engine.name=ray", "engine.workers=3"])
    assert changes == {"engine.name": ["inline", "ray"], "engine.workers": [None, 3]}
    back, changes = moved(there.resolved(), ["engine.name=inline"])
    assert back.resolved() == STORED
    assert set(changes) == {"engine.name", "engine.workers"}


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("engine.chunk=2", "engine.chunk", 2),
        ("engine.path=mapped", "engine.path", "mapped"),
        ("engine.dtype=float64", "engine.dtype", "float64"),
        ("rounds=9", "rounds", 9),
        ("seed=4", "seeds", [4]),
        ("checkpoint.keep=3", "checkpoint", None),
        ("strategy.fraction_train=0.5", "strategy", None),
    ],
)
def test_anything_else_is_refused_and_named(override: str, field: str, value: Any) -> None:
    with pytest.raises(ScenarioError, match=re.escape(f"{field}: cannot change")) as refused:
        moved(STORED, [override, "engine.threads=2"])
    (problem,) = refused.value.problems
    assert "What may change is engine.address, engine.name, " in str(problem)
    if value is not None:
        assert problem.value == value


def test_a_mistake_is_told_as_in_a_new_run() -> None:
    with pytest.raises(ScenarioError, match=r"--set engine\.threads=0: engine\.threads: must be"):
        moved(STORED, ["engine.threads=0"])
    with pytest.raises(ScenarioError, match=r"--set engine\.name=rey: engine\.name: .*inline"):
        moved(STORED, ["engine.name=rey"])
