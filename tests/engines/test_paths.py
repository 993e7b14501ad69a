"""Mapped, one by one, in any chunks, on any number of threads: the same run.

Compared norm-wise over all parameters. One round in float32: 1e-5; whole runs in float64: 1e-9.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.clients.base import Batching, Client, Config, Inputs, Plan, Reply
from fedsim.errors import Params
from fedsim.grids.execute import at
from fedsim.messages import Arrays
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.strategies.flower import build_flower, flower_params
from tests.engines.toys import (
    RAGGED,
    Memory,
    classification,
    cohorts,
    distance,
    federation,
    functional,
    network,
    run,
    same_bits,
    sgd,
)

SLOW = pytest.mark.slow
VERY_RAGGED = (300, 1, 2, 64, 33, 5, 150, 1)

# name: (client parameters, dropout, chains)
RUNS: dict[str, tuple[dict[str, Any], float, int]] = {
    "plain": ({}, 0.0, 0),
    "momentum": (
        {"optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}},
        0.0,
        0,
    ),
    "adam, clipped": ({"optimizer": {"name": "adam"}, "lr": 0.01, "clip_norm": 0.5}, 0.0, 0),
    "round schedule": ({"schedule": {"name": "ExponentialLR", "params": {"gamma": 0.5}}}, 0.0, 0),
    "step schedule": (
        {"schedule": {"name": "CosineAnnealingLR", "per": "step", "params": {"T_max": 7}}},
        0.0,
        0,
    ),
    "dropout": ({}, 0.4, 0),
    "dropout, full batches": ({"batch_size": None, "epochs": 3}, 0.4, 0),
    "steps": ({"steps": 5}, 0.0, 0),
    "ensemble": ({"optimizer": {"name": "adamw", "weight_decay": 0.1}, "lr": 0.01}, 0.0, 3),
    "ensemble with dropout, full batches": ({"batch_size": None, "epochs": 2}, 0.4, 2),
}


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the client's parameters with batches of 4 and two epochs where none are given."""
    return {"batch_size": 4, "epochs": 2, "lr": 0.2} | dict(given)


@pytest.mark.parametrize("name", RUNS)
def test_whole_runs_agree_on_both_paths(name: str) -> None:
    given, dropout, chains = RUNS[name]
    model = functional(network(dropout))
    data = federation(weighted=True)
    client = sgd(model, **options(given))
    results = []
    for path in ("mapped", "one_by_one"):
        strategy = FedAvg(FedAvgParams(chains=chains))
        memory = Memory()
        state = run(client, data, 3, strategy=strategy, recorder=memory, path=path)
        results.append((state.arrays, memory.metrics[3, "train"], state.totals.gradients))
    (mapped, mapped_metrics, spent), (single, single_metrics, single_spent) = results
    assert distance(mapped, single) <= 1e-9
    assert spent == single_spent > 0
    assert mapped_metrics == pytest.approx(single_metrics, rel=1e-9)
    assert distance(mapped, {k: v.expand_as(mapped[k]) for k, v in model.initial().items()}) > 1e-3


def test_very_ragged_shards_agree_over_a_whole_run() -> None:
    data = federation(VERY_RAGGED, weighted=True)
    client = sgd(
        functional(network(0.2)),
        batch_size=8,
        lr=0.1,
        optimizer={"name": "sgd", "momentum": 0.9},
        schedule={"name": "StepLR", "per": "step", "params": {"step_size": 10}},
    )
    mapped = run(client, data, 2, path="mapped").arrays
    assert distance(run(client, data, 2, path="one_by_one").arrays, mapped) <= 1e-9
    assert distance(run(client, data, 2, path="mapped", chunk=3).arrays, mapped) <= 1e-12


@pytest.mark.parametrize("name", ["plain", "adam, clipped", "dropout", "ensemble"])
def test_one_round_agrees_in_float32(name: str) -> None:
    given, dropout, chains = RUNS[name]
    client = sgd(functional(network(dropout), torch.float32), **options(given))
    mapped, single = (
        run(client, federation(weighted=True), 1, strategy=FedAvg(FedAvgParams(chains=chains)),
            path=path, dtype="float32").arrays
        for path in ("mapped", "one_by_one")
    )  # fmt: skip
    assert next(iter(mapped.values())).dtype == torch.float32
    assert distance(mapped, single) <= 1e-5


def test_the_proximal_term_agrees_and_acts() -> None:
    client = sgd(functional(), **options({}))
    data = federation()

    def result(mu: float, path: str) -> Arrays:
        params = flower_params()["FedProx"](name="FedProx", proximal_mu=mu)
        return run(client, data, 2, strategy=build_flower(params), path=path).arrays

    strong = result(2.0, "mapped")
    assert distance(result(2.0, "one_by_one"), strong) <= 1e-9
    start = client.model.initial()
    assert distance(strong, start) < 0.9 * distance(result(0.0, "mapped"), start)


@pytest.mark.parametrize("name", ["plain", "dropout, full batches", "ensemble"])
def test_results_do_not_depend_on_the_chunk(name: str) -> None:
    given, dropout, chains = RUNS[name]
    client = sgd(functional(network(dropout)), **options(given))
    results = [
        run(client, federation(), 2, strategy=FedAvg(FedAvgParams(chains=chains)), chunk=chunk)
        for chunk in (1, 2, len(RAGGED))
    ]
    for other in results[1:]:
        assert distance(other.arrays, results[0].arrays) <= 1e-12


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_threads_change_no_bit(path: str) -> None:
    client = sgd(functional(network(0.3)), **options(RUNS["momentum"][0]))
    one, four = (
        run(client, federation(), 2, path=path, chunk=2, threads=threads).arrays
        for threads in (1, 4)
    )
    assert same_bits(one, four)


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_the_same_seed_is_the_same_run_and_another_is_not(path: str) -> None:
    client = sgd(functional(network(0.3)), **options({}))
    first, again, other = (
        run(client, federation(), 2, path=path, seed=seed).arrays for seed in (4, 4, 5)
    )
    assert same_bits(first, again)
    assert distance(first, other) > 1e-6


@pytest.mark.parametrize(
    ("path", "chains"), [("mapped", 0), ("one_by_one", 0), pytest.param("mapped", 2, marks=SLOW)]
)
def test_a_traced_run_is_an_untraced_run(path: str, chains: int) -> None:
    client = sgd(
        functional(network(0.3)),
        **options(RUNS["momentum"][0]),
        schedule={"name": "StepLR", "params": {"step_size": 1, "gamma": 0.5}},
    )
    traced, eager = (
        run(client, federation((7, 1, 12)), 3, strategy=FedAvg(FedAvgParams(chains=chains)),
            path=path, trace=trace).arrays
        for trace in (True, False)
    )  # fmt: skip
    assert distance(traced, eager) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_traced_run_is_an_untraced_run(name: str) -> None:
    given, dropout, chains = RUNS[name]
    client = sgd(functional(network(dropout)), **options(given))
    traced, eager = (
        run(client, federation(weighted=True), 3, strategy=FedAvg(FedAvgParams(chains=chains)),
            trace=trace, chunk=2).arrays
        for trace in (True, False)
    )  # fmt: skip
    assert distance(traced, eager) <= 1e-12


def test_graphs_are_reused_over_rounds_and_schedules() -> None:
    client = sgd(functional(), **options(RUNS["round schedule"][0]))
    made = cohorts(client, federation((8, 8, 8, 8)), chunk=2, trace=True)
    counts = []
    for server_round in (1, 2, 3):
        config = {"server-round": server_round}
        made.run("train", {"arrays": client.model.initial()}, config, range(4))
        counts.append(len(made.worker.cache))
    made.close()
    assert counts == [3, 3, 3]  # init, step, finish


def test_a_client_computes_the_same_whoever_else_is_asked() -> None:
    client = sgd(functional(network(0.3)), **options({}))
    made = cohorts(client, federation())
    records, config = {"arrays": client.model.initial()}, {"server-round": 1}
    everyone = made.run("train", records, config, range(5)).records["arrays"]
    alone = made.run("train", records, config, [2]).records["arrays"]
    backwards = made.run("train", records, config, [4, 3, 2, 1, 0]).records["arrays"]
    made.close()
    assert distance(at(alone, 0), at(everyone, 2)) < 1e-13
    assert same_bits({k: v.flip(0) for k, v in backwards.items()}, everyone)


class ExplosiveParams(Params):
    """No settings."""


class Explosive(Client):
    """Its loss is infinite for a row of another client at this client's parameters."""

    Params = ExplosiveParams

    def plan(self, n_examples: int, config: Config) -> Plan:
        return Plan(steps=1, batching=Batching("full"))

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> Any:
        return {"sum": inputs.scalars["num-examples"] * 0, "n": inputs.scalars["num-examples"]}

    def step(self, state: Any, inputs: Inputs) -> Any:
        (batch,) = inputs.batches
        losses = torch.exp(batch.x[:, 0])
        return state | {"sum": state["sum"] + (losses * batch.weight).sum()}

    def finish(self, state: Any) -> tuple[Reply, Arrays]:
        return Reply({"arrays": {"sum": state["sum"]}}, {"num-examples": state["n"]}), {}


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_a_poisonous_row_harms_its_owner_alone(path: str) -> None:
    data = federation()
    data.train.x[0] = 1e6  # exp(1e6) is infinite, and 0 · ∞ is NaN
    owner = next(c for c, rows in enumerate(data.shards) if 0 in rows)
    made = cohorts(Explosive(ExplosiveParams(), functional(), classification()), data, path=path)
    sums: Tensor = made.run("train", {"arrays": {}}, {}, range(5)).records["arrays"]["sum"]
    made.close()
    assert not sums[owner].isfinite()
    assert sums[[c for c in range(5) if c != owner]].isfinite().all()
