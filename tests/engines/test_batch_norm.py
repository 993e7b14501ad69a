"""Models with batch norm in the engine, against federated averaging by plain torch."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedsim.clients.sgd import SGD
from fedsim.data import FederatedData
from fedsim.grids.execute import at
from fedsim.messages import Arrays
from fedsim.server.evaluation import Evaluator
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.strategies.flower import build_flower, flower_params
from tests.engines import by_hand
from tests.engines.toys import (
    CLASSES,
    FEATURES,
    Memory,
    classification,
    cohorts,
    distance,
    federation,
    functional,
    grid_of,
    run,
    same_bits,
    sgd,
    start,
)

SIZES = (7, 2, 30, 12, 3)  # no minibatch of 4 is left with one row, which torch refuses
ROUNDS = 3
CLIENT: dict[str, Any] = {
    "lr": 0.1, "epochs": 2, "batch_size": 4, "optimizer": {"name": "sgd", "momentum": 0.9}
}  # fmt: skip
PATHS = [
    ("mapped", False),
    pytest.param("mapped", True, marks=pytest.mark.slow),  # tracing takes longer than the run
    ("one_by_one", False),
    ("one_by_one", True),
]


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(),
        nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, CLASSES),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, FEATURES)),
        nn.Conv2d(1, 4, (1, 2)), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(),
        nn.Conv2d(4, 2, (1, 2)), nn.BatchNorm2d(2, affine=False), nn.Flatten(),
        nn.Linear(2 * (FEATURES - 2), CLASSES),
    )  # fmt: skip


def without_statistics() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(),
        nn.Linear(6, CLASSES),
    )  # fmt: skip


MODELS = {"mlp": mlp, "cnn": cnn, "without statistics": without_statistics}


def module(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().double()


def client(name: str, **more: Any) -> SGD:
    return sgd(functional(module(name)), **CLIENT | more)


@cache
def data() -> FederatedData:
    return federation(SIZES, weighted=True, test=20, holdout=4)


@cache
def expected(name: str, local: bool = False) -> tuple[Arrays, list[Arrays]]:
    """Returns what plain torch ends with: the averages, and what the clients keep."""
    made = client(name)
    lanes = by_hand.watch(made, data(), ROUNDS)
    assert all(2 <= len(s.x) <= 4 for own in lanes.values() for lane in own for s in lane)
    kept = made.model.of_batch_norms() if local else frozenset()
    return by_hand.fedavg(module(name), made.model.initial(), lanes, SIZES, momentum, local=kept)


@pytest.mark.parametrize(("path", "trace"), PATHS)
@pytest.mark.parametrize("name", MODELS)
def test_the_engine_is_plain_torch_on_unpadded_batches(name: str, path: str, trace: bool) -> None:
    made = client(name)
    memory = Memory()
    state = run(made, data(), ROUNDS, path=path, trace=trace, recorder=memory)
    want = expected(name)[0]
    assert distance(state.arrays, want) <= 1e-9
    if made.model.statistics:
        ours, theirs, begin = (
            {k: arrays[k] for k in made.model.statistics}
            for arrays in (state.arrays, want, made.model.initial())
        )
        assert distance(ours, theirs) <= 1e-9
        assert distance(ours, begin) > 0.1
    assert not memory.events


def test_a_traced_round_is_the_untraced_one() -> None:
    made = client("mlp", epochs=1)
    few = federation((7, 6))
    traced, untraced = (run(made, few, 1, trace=trace).arrays for trace in (True, False))
    assert distance(traced, untraced) <= 1e-12


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_evaluation_on_the_server_is_torchs(name: str) -> None:
    made, want = client(name), expected(name)[0]
    theirs = by_hand.counting_in_floats(module(name)).eval()
    theirs.load_state_dict(want, strict=False)
    test = data().test
    assert test is not None
    evaluator = Evaluator(made.model, made.task, data(), torch.float64, batch_size=7)
    got = evaluator.evaluate(want, chains=False)["test"]
    nll = cross_entropy(theirs(torch.from_numpy(test.x)), torch.from_numpy(test.y))
    assert got["nll"] == pytest.approx(float(nll.detach()), rel=1e-9)


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
@pytest.mark.parametrize("name", ["mlp", "without statistics"])
def test_evaluation_on_the_clients_is_torchs(name: str, path: str) -> None:
    """Without running statistics, each client's rows are a batch of their own."""
    made, want = client(name), expected(name)[0]
    theirs = by_hand.counting_in_floats(module(name)).eval()
    theirs.load_state_dict(want, strict=False)
    engine = cohorts(made, data(), path=path)
    result = engine.run("evaluate", {"arrays": want}, {"server-round": 1}, range(len(SIZES)))
    engine.close()
    assert result.metrics["loss"].tolist() == pytest.approx(
        [loss_of(theirs, i) for i in range(len(SIZES))], rel=1e-9
    )


def loss_of(theirs: nn.Module, partition: int) -> float:
    """Returns the weighted mean loss on the rows that a client holds out."""
    assert data().holdouts is not None
    rows = data().holdouts[partition]
    train = data().train
    losses = cross_entropy(
        theirs(torch.from_numpy(train.x[rows])), torch.from_numpy(train.y[rows]), reduction="none"
    )
    weight = torch.from_numpy(train.weights()[rows])
    return float(((losses * weight).sum() / weight.sum()).detach())


@pytest.mark.parametrize(("path", "trace"), PATHS)
def test_chains_have_statistics_of_their_own(path: str, trace: bool) -> None:
    made, strategy = client("mlp"), FedAvg(FedAvgParams(chains=2))
    begin = start(made.model, strategy)
    state = run(made, data(), 2, strategy=strategy, path=path, trace=trace)
    lanes = by_hand.watch(made, data(), 2, strategy=strategy)
    for q in range(2):
        want, _ = by_hand.fedavg(module("mlp"), at(begin, q), lanes, SIZES, momentum, (q, 2))
        assert distance(at(state.arrays, q), want) <= 1e-9
    assert state.arrays["1.running_var"].shape == (2, 6)
    assert distance(at(state.arrays, 0), at(state.arrays, 1)) > 1e-2


def looped(made: SGD, rounds: int, path: str, trace: bool) -> tuple[RoundLoop, Memory]:
    """Returns a loop over what travels, which saves a checkpoint every second round."""
    begin = {k: v for k, v in made.model.initial().items() if k not in made.local}
    memory = Memory()
    config = LoopConfig(
        rounds=rounds, seed=0, server_every=0, clients_every=1, checkpoint_rounds=2,
        on_bad_reply="fail",
    )  # fmt: skip
    grid = grid_of(cohorts(made, data(), path=path, trace=trace))
    return RoundLoop(FedAvg(FedAvgParams()), grid, begin, config, memory), memory


@pytest.mark.parametrize(("path", "trace"), PATHS)
def test_local_layers_stay_with_their_client(path: str, trace: bool) -> None:
    """FedBN: the rest is averaged; each client trains on with its own, and evaluates with it."""
    made = client("mlp", batch_norm="local")
    assert made.local == {k for k in made.model.initial() if k.startswith(("1.", "4."))}
    loop, memory = looped(made, ROUNDS, path, trace)
    state = loop.run()
    want, own = expected("mlp", local=True)
    assert {*state.arrays} == {"0.weight", "0.bias", "3.weight", "3.bias", "6.weight", "6.bias"}
    assert distance(state.arrays, want) <= 1e-9
    grid: Any = loop.grid
    kept = grid.state_dict()[0]
    for i, arrays in enumerate(own):
        assert distance({k: kept[f"{i}/{k}"] for k in arrays}, arrays) <= 1e-9
    _, partitions, metrics = memory.client_metrics[-1]
    for i, loss in zip(partitions, metrics["loss"], strict=True):
        theirs = by_hand.counting_in_floats(module("mlp")).eval()
        theirs.load_state_dict({**want, **own[i]}, strict=False)
        assert loss == pytest.approx(loss_of(theirs, i), rel=1e-8)
    grid.close()


def test_local_layers_are_in_the_checkpoint() -> None:
    made = client("mlp", batch_norm="local")
    loop, memory = looped(made, 3, "mapped", False)
    want = loop.run().arrays
    resumed, _ = looped(made, 3, "mapped", False)
    resumed.load(*memory.checkpoints[2])
    assert same_bits(resumed.run().arrays, want)


def test_a_local_proximal_term_pulls_at_what_travels() -> None:
    fedprox = build_flower(flower_params()["FedProx"](name="FedProx", proximal_mu=0.5))
    made = client("mlp", batch_norm="local")
    begin = {k: v for k, v in made.model.initial().items() if k not in made.local}
    one, two = (
        run(made, data(), 2, strategy=fedprox, arrays=begin, path=path).arrays
        for path in ("mapped", "one_by_one")
    )
    assert distance(one, two) <= 1e-9
    free = run(made, data(), 2, arrays=begin).arrays
    assert distance(one, free) > 1e-3


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_clients_without_rows_or_with_one_do_no_harm(path: str) -> None:
    made = client("mlp", steps=3)
    engine = cohorts(made, federation((7, 0, 1, 3)), path=path)
    begin = made.model.initial()
    result = engine.run("train", {"arrays": begin}, {"server-round": 1}, range(4))
    engine.close()
    arrays = result.records["arrays"]
    assert all(value.isfinite().all() for value in arrays.values())
    assert same_bits(at(arrays, 1), begin)  # nothing was there to learn from
    one = at(arrays, 2)  # no variance, no statistics; the last layer's bias still learns
    assert all(torch.equal(one[k], begin[k]) for k in made.model.statistics)
    assert not torch.equal(one["6.bias"], begin["6.bias"])


def test_flowers_strategies_average_the_statistics() -> None:
    made, memory = client("mlp"), Memory()
    flowers = build_flower(flower_params()["FedAvg"](name="FedAvg"))
    state = run(made, data(), ROUNDS, strategy=flowers, recorder=memory)
    assert distance(state.arrays, expected("mlp")[0]) <= 1e-9
    assert state.arrays["4.num_batches_tracked"].shape == ()
    median = build_flower(flower_params()["FedMedian"](name="FedMedian"))
    assert not distance(run(made, data(), 1, strategy=median).arrays, state.arrays) <= 1e-3
    assert not memory.events


def test_what_the_parameters_train_on_is_not_their_start() -> None:
    """The comparisons above would hold for programs that do nothing."""
    made = client("mlp")
    begin = copy.deepcopy(made.model.initial())
    assert distance(expected("mlp")[0], begin) > 0.1
    assert made.task.name == classification().name
