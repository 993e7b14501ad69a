"""Everything wrong is found before the run: what `prepare` refuses, and what it builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsim.errors import ScenarioError, UserError
from fedsim.runner import check_specs
from fedsim.scenario import Scenario
from fedsim.setup import Setup, prepare

HERE = "tests.unit.test_setup"
BASE: dict[str, Any] = {
    "name": "toy",
    "seed": 0,
    "rounds": 2,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 4},
    "model": {"name": "softmax"},
    "task": {"name": "classification"},
    "strategy": {"name": "fedavg"},
}


def prepared(**sections: Any) -> Setup:
    (spec,) = Scenario.from_dict(BASE | sections).expand()
    return prepare(spec.scenario)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets)


def each(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 99]


SAMPLER = {"name": "fa-hmc", "step_size": 0.01}
CUSTOM = {"name": "custom", "target": "class"}

LINEAR_GAUSSIAN: dict[str, Any] = {
    "data": {"name": "bayesian_linear", "features": 3},
    "partition": {"name": "given"},
    "task": {"name": "regression"},
    "posterior": {"reference": "closed_form"},
    "strategy": SAMPLER,
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a closed form of other parameters": (
        LINEAR_GAUSSIAN | {"model": {"name": "linear"}},
        "closed form of bayesian_linear is for a model of 3 parameters, not of 4",
    ),
    "a loss that is averaged": (
        {"task": CUSTOM | {"loss": f"{HERE}:mean_loss"}},
        r"task: loss returns shape \(\) for 2 examples.*one value per example",
    ),
    "a loss that does not fit the outputs": (
        {"task": CUSTOM | {"loss": f"{HERE}:hinge"}},
        "task: loss does not take the model's outputs for digits: IndexError",
    ),
    "a metric that is averaged": (
        {"task": CUSTOM | {"loss": f"{HERE}:each", "metrics": {"m": f"{HERE}:mean_loss"}}},
        r"task: m returns shape \(\) for 2 examples",
    ),
    "a task of another kind": ({"task": {"name": "regression"}}, "does not fit the data digits"),
    "a client that ignores the sampler": (
        {"strategy": SAMPLER, "client": {"name": "sgd"}},
        r"the client does not honour .*step-size",
    ),
    "a client that needs a sampler": (
        {"client": {"name": "fa-hmc"}},
        "FedAvg does not send .*step-size.*, which the client needs",
    ),
    "a strategy of Flower's that nobody serves": (
        {"strategy": {"name": "FedXgbBagging"}},
        "XGBoost trees",
    ),
    "a strategy that would wait forever": (
        {"strategy": {"name": "FedAvg", "min_available_nodes": 5}},
        "waits for 5 nodes",
    ),
    "a schedule that torch lacks": (
        {"client": {"name": "sgd", "schedule": {"name": "Cosine"}}},
        "no schedule named 'Cosine'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_run(name: str) -> None:
    sections, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as refused:
        prepared(**sections)
    assert refused.value.exit_status == 2


def test_every_strategy_of_flower_can_be_named() -> None:
    setup = prepared(strategy={"name": "FedProx", "proximal_mu": 0.1})
    assert type(setup.strategy).__name__ == "FedProx"
    assert type(setup.client).__name__ == "SGD"


def test_chains_start_from_models_of_their_own() -> None:
    setup = prepared(strategy={"name": "fedavg", "chains": 3})
    alone = prepared()
    for name, value in setup.arrays.items():
        assert torch.equal(value[0], alone.arrays[name])
        assert not torch.equal(value[0], value[1])
        assert not torch.equal(value[1], value[2])
    assert setup.chains == 3


def test_a_clock_counts_the_examples_that_the_clients_plan() -> None:
    """The speed of each client divides the seconds; the work is that of its minibatches."""
    sections = {"clock": {"seconds_per_example": 0.5, "speeds": "equal"}}
    config = {"server-round": 1}
    sizes = [len(shard) for shard in prepared().data.shards]
    for client, examples in (
        ({"name": "sgd", "epochs": 3}, [3 * n for n in sizes]),
        ({"name": "sgd", "steps": 2, "batch_size": 10}, [20 for _ in sizes]),
    ):
        clock = prepared(client=client, **sections).clock()
        assert clock is not None
        seconds = [clock.duration("train", config, p, 0) for p in range(4)]
        assert seconds == [0.5 * n for n in examples]
    corrected = prepared(strategy=SAMPLER | {"control_variate": True}, **sections).clock()
    assert corrected is not None
    asked = {**config, "prior-precision": 1.0, "total-examples": sum(sizes)}
    assert corrected.duration("train.gradient", asked, 1, 0) == 0.5 * sizes[1]
    assert prepared().clock() is None


def test_the_plan_is_a_function_of_the_scenario() -> None:
    plan = prepared(engine={"threads": 2}).plan()
    assert plan == prepared(engine={"threads": 2}).plan()
    assert (plan["path"], plan["threads"], plan["clients"]) == ("mapped", 2, 4)
    assert plan["why"]
    assert prepared(engine={"path": "one_by_one"}).plan()["path"] == "one_by_one"
    assert prepared(model={"name": "cnn"}).plan()["path"] == "one_by_one"


def test_float64_is_not_for_apples_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert prepared().execution.device == "mps"
    assert prepared(engine={"dtype": "float64"}).execution.device == "cpu"
    with pytest.raises(UserError, match="float64"):
        prepared(engine={"dtype": "float64", "device": "mps"})


def test_a_file_that_changed_between_two_calls_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    data = {"name": "csv", "path": str(file), "target": "y"}
    sizes = []
    for rows in (40, 60):
        lines = [f"{i},{i * i},{i % 2}" for i in range(rows)]
        file.write_text("\n".join(["a,b,y", *lines]) + "\n")
        specs = Scenario.from_dict(BASE | {"data": data}).expand()
        check_specs(specs)
        sizes.append(len(prepare(specs[0].scenario).data.train))
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"early_stopping": {"metric": "validation/nll"}}, "the data has no validation split"),
        ({"early_stopping": {"metric": "test/nope"}}, "test has accuracy, brier, ece, nll"),
        ({"model": {"name": "linear", "outputs": 3}}, "has outputs for 3 classes; digits has 10"),
        ({"strategy": {"name": "FedAvg", "fraction_train": 5.0}}, "must be in [0, 1], not 5"),
        ({"strategy": {"name": "Bulyan", "num_malicious_nodes": 1}}, "needs 4·1 + 3 = 7 replies"),
        ({"strategy": "fedbuff"}, "Write clock: {} for clients of log-normal speeds"),
    ],
)
def test_what_would_fail_or_wait_in_the_first_round_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    scenario = {
        "rounds": 1,
        "data": {"name": "digits", "rows": 200},
        "partition": {"name": "iid", "clients": 4},
        "model": "softmax",
        "task": "classification",
        "strategy": "fedavg",
    }
    with pytest.raises(ScenarioError) as caught:
        prepare(Scenario.from_dict(scenario | changes).expand()[0].scenario)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"device": "cuda"}, "engine.device: torch finds no such device on this machine"),
        ({"device": "mps"}, "engine.device: torch finds no such device on this machine"),
        (
            {"device": "mps", "dtype": "float64"},
            "engine.device: Apple's GPUs compute in float32, and engine.dtype is float64"
            " (got 'mps'). Take engine.device: cpu, or engine.dtype: float32",
        ),
    ],
)
def test_a_device_that_is_not_there_or_cannot_is_refused(
    engine: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ScenarioError) as caught:
        prepared(engine=engine)
    assert said in str(caught.value)
