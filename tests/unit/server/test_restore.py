"""A checkpoint is taken by the strategy and model it is of, and refused by all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.errors import UserError
from fedsim.server.evaluation import Evaluator
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.strategies.flower import build_flower, parse_flower
from tests.engines.toys import (
    Memory,
    classification,
    cohorts,
    federation,
    functional,
    grid_of,
    network,
    same_bits,
    sgd,
)


class Renamed(FedAvg):
    """Another class, as after a change of the code."""


class Counting(FedAvg):
    """Has a state, which it knows only under one name."""

    name = "calls"

    def state_dict(self) -> dict[str, Any]:
        return {self.name: 3}

    def load_state_dict(self, state: Any) -> None:
        self.calls = state[self.name]


def loop(strategy: Any = None, hidden: int = 4, dtype: str = "float64", test: int = 20) -> Any:
    torch_dtype = getattr(torch, dtype)
    model = functional(network(hidden=hidden), torch_dtype)
    data = federation(test=test)
    memory = Memory()
    config = LoopConfig(rounds=2, seed=0, checkpoint_rounds=1)
    made = RoundLoop(
        strategy or FedAvg(FedAvgParams()),
        grid_of(cohorts(sgd(model), data, dtype=dtype)),
        model.initial(),
        config,
        memory,
        Evaluator(model, classification(), data, torch_dtype),
    )
    return made, memory


@pytest.fixture(scope="module")
def saved() -> Any:
    made, memory = loop()
    made.run()
    return memory.checkpoints[1]


def test_the_same_run_takes_it(saved: Any) -> None:
    whole, _ = loop()
    resumed, _ = loop()
    resumed.load(*saved)
    assert same_bits(resumed.run().arrays, whole.run().arrays)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"strategy": Renamed(FedAvgParams())}, "is of the strategy FedAvg, and .* has Renamed"),
        ({"hidden": 6}, r"'0.weight' is \(4, 5\) float64 there, and \(6, 5\) float64 in the model"),
        ({"dtype": "float32"}, r"float64 there, and \(.*\) float32 in the model"),
        ({"strategy": FedAvg(FedAvgParams(chains=2))}, r"'0.weight' is \(4, 5\) float64 there"),
    ],
)
def test_another_strategy_or_model_is_refused(saved: Any, other: Any, sentence: str) -> None:
    made, _ = loop(**other)
    if made.chains:
        made.state.arrays = {k: v.expand(2, *v.shape) for k, v in made.state.arrays.items()}
    before = dict(made.state.arrays)
    with pytest.raises(UserError, match=rf"cannot go on from its checkpoint: .*{sentence}"):
        made.load(*saved)
    assert made.state.round == 0
    assert made.state.arrays == before


def test_arrays_of_other_names_are_named(saved: Any) -> None:
    made, _ = loop()
    made.state.arrays["extra"] = torch.zeros(1)
    with pytest.raises(UserError, match="differ in the arrays extra"):
        made.load(*saved)


def test_a_wrapped_strategy_is_told_from_a_bare_one() -> None:
    inside = {"name": "DifferentialPrivacyServerSideFixedClipping", "strategy": "FedAvg",
              "noise_multiplier": 0.1, "clipping_norm": 1.0, "num_sampled_clients": 5}  # fmt: skip
    made, memory = loop(build_flower(parse_flower(inside)))
    made.run()
    bare, _ = loop(build_flower(parse_flower("FedAvg")))
    with pytest.raises(UserError, match=r"FixedClipping around FedAvg, and the run now has FedAvg"):
        bare.load(*memory.checkpoints[1])


def test_a_state_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made, memory = loop(Counting(FedAvgParams()))
    made.run()
    monkeypatch.setattr(Counting, "name", "turns")
    resumed, _ = loop(Counting(FedAvgParams()))
    with pytest.raises(UserError, match=r"Counting does not take its state \(KeyError: 'turns'\)"):
        resumed.load(*memory.checkpoints[1])


def test_what_is_no_checkpoint_of_a_loop_is_refused(saved: Any) -> None:
    tensors, plain = saved
    made, _ = loop()
    with pytest.raises(UserError, match="it lacks totals"):
        made.load(tensors, {k: v for k, v in plain.items() if k != "totals"})


def test_predictions_of_other_rows_are_refused() -> None:
    class Drawing(FedAvg):
        def is_draw(self, server_round: int) -> bool:
            return True

    def drawing(test: int) -> Any:
        made, memory = loop(Drawing(FedAvgParams(chains=2)), test=test)
        made.state.arrays = {k: v.expand(2, *v.shape) for k, v in made.state.arrays.items()}
        return made, memory

    made, memory = drawing(20)
    made.run()
    again, _ = drawing(20)
    again.load(*memory.checkpoints[1])
    other, _ = drawing(21)
    with pytest.raises(UserError, match="predictions of 20 test rows, and the data now has 21"):
        other.load(*memory.checkpoints[1])
