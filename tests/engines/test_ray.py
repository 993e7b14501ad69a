"""The engine ray: the numbers of the engine inline to the bit, whoever computes, whoever dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsim.clients.base import Batch, Batching, Client, Config, DirectClient, Inputs, Plan, Reply
from fedsim.data import DataInfo, Examples, FederatedData
from fedsim.errors import Params, RunFailed, ScenarioError, UserError
from fedsim.grids import connection, pool
from fedsim.grids.ray_cohorts import RayCohorts, divided
from fedsim.messages import Arrays
from fedsim.scenario import Scenario
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopState
from fedsim.setup import Setup, prepare
from tests.engines.toys import Memory, same_bits
from tests.engines.warm import warm
from tests.methods.bandits import play

ray = pytest.importorskip("ray")
CPUS = 8
pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all of them
__all__ = ["warm"]  # the fixture, for this module


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One cluster for all tests; its CPUs are a matter of bookkeeping."""
    connection._started_here(
        num_cpus=CPUS,
        object_store_memory=200 * 10**6,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


def images(clients: int = 7) -> FederatedData:
    """Returns clients of different sizes that hold 6×6 images of three classes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 40, clients)
    y = rng.integers(0, 3, sizes.sum())
    x = rng.standard_normal((len(y), 1, 6, 6)).astype(np.float32) + y[:, None, None, None]
    rows = np.split(np.arange(len(y)), np.cumsum(sizes)[:-1])
    held, train = tuple(part[:2] for part in rows), tuple(part[2:] for part in rows)
    return FederatedData(DataInfo("toy", (1, 6, 6), 3, "class"), Examples(x, y), train, held)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "FedAvg": {"strategy": "fedavg", "client": {"name": "sgd", "lr": 0.1, "batch_size": 8}},
    "FedAdam": {"strategy": "FedAdam", "client": {"name": "sgd", "lr": 0.1, "batch_size": 8}},
    "FA-HMC": {"strategy": {"name": "fa-hmc", "step_size": 0.01, "leapfrog_steps": 2, "chains": 2}},
}


def scenario(model: str, strategy: Mapping[str, Any], engine: Mapping[str, Any]) -> Setup:
    here = __name__
    plain = {
        "name": "toy",
        "rounds": 3,
        "data": {"name": "custom", "factory": f"{here}:images"},
        "partition": "given",
        "model": {"name": "custom", "factory": f"{here}:{model}"},
        "task": "classification",
        "engine": {"trace": False, "chunk": 2, **engine},
        "evaluate": {"server_every": 0, "clients_every": 1},
        **strategy,
    }
    return prepare(Scenario.from_dict(plain).expand()[0].scenario)


def finish(setup: Setup) -> tuple[LoopState, Memory]:
    memory, grid = Memory(), setup.grid()
    try:
        state = RoundLoop(setup.strategy, grid, setup.arrays, setup.loop_config(), memory).run()
    finally:
        grid.close()
    return state, memory


def on_ray(workers: int, **engine: Any) -> dict[str, Any]:
    return {"name": "ray", "workers": workers, **engine}


def assert_the_same(model: str, name: str, workers: int, **engine: Any) -> None:
    expected, log = finish(scenario(model, STRATEGIES[name], engine))
    found, other = finish(scenario(model, STRATEGIES[name], on_ray(workers, **engine)))
    assert same_bits(found.arrays, expected.arrays)
    assert other.client_metrics == log.client_metrics
    for key, metrics in log.metrics.items():
        if key[1] != "system":
            assert other.metrics[key] == metrics
    assert found.totals.bytes_up == expected.totals.bytes_up
    assert found.totals.gradients == expected.totals.gradients


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("model", "name", "workers"),
    [("mlp", "FedAvg", 2), ("cnn", "FedAvg", 2), ("mlp", "FedAdam", 2), ("mlp", "FA-HMC", 2)],
)
def test_the_bits_are_those_of_inline(model: str, name: str, workers: int) -> None:
    assert_the_same(model, name, workers)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_the_bits_are_those_of_inline_for_all(
    model: str, name: str, workers: int, trace: bool
) -> None:
    assert_the_same(model, name, workers, trace=trace)


class Troubled(DirectClient):
    """Adds one, and does in its only round what its partition says."""

    class Params(Params):
        """flag: a file whose presence says that the worker has died already."""

        flag: str = ""

    params: Params

    def initial_client_state(self) -> Arrays:
        return {"asked": torch.zeros(())}

    def train(
        self,
        message_type: str,
        records: dict[str, Arrays],
        config: Config,
        shard: Batch,
        client_state: Arrays,
        rng: np.random.Generator,
    ) -> tuple[Reply, Arrays]:
        partition, server_round = int(shard.x[0, 0, 0, 0]), int(config["server-round"])
        flag = Path(self.params.flag)
        if partition == 5 and server_round == 2 and self.params.flag and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if partition == 2 and server_round == 2:
            raise ValueError("I cannot")
        if partition == 3 and server_round == 2:
            records = {"arrays": {k: v * torch.nan for k, v in records["arrays"].items()}}
        if partition == 4 and server_round == 3 and "late" in config:
            time.sleep(60)
        asked = client_state["asked"] + 1
        added = {k: v + asked * rng.standard_normal() for k, v in records["arrays"].items()}
        return Reply({"arrays": added}, {"num-examples": 1.0, "asked": asked}), {"asked": asked}


class Late(Troubled):
    """One of its clients is hung in round 3."""

    def train(self, message_type: str, records: Any, config: Any, *rest: Any) -> Any:
        return super().train(message_type, records, {**config, "late": 1}, *rest)


def numbered() -> FederatedData:
    x = np.arange(7, dtype=np.float32)[:, None, None, None].repeat(6, 2).repeat(6, 3)
    rows = tuple(np.array([i]) for i in range(7))
    info = DataInfo("toy", (1, 6, 6), 3, "class")
    return FederatedData(info, Examples(x, np.arange(7) % 3), rows)


def troubled(
    engine: Mapping[str, Any], flag: str = "", kind: str = "Troubled", **more: Any
) -> Setup:
    here = __name__
    strategy = {
        "data": {"name": "custom", "factory": f"{here}:numbered"},
        "strategy": "fedavg",
        "client": {"name": f"{here}:{kind}", "params": {"flag": flag}},
        "evaluate": {"server_every": 0},
        **more,
    }
    return scenario("mlp", strategy, engine)


def test_who_dies_fails_or_hangs_changes_nothing_for_others(tmp_path: Path) -> None:
    _, log = finish(troubled({}, rounds=2))
    flag = tmp_path / "flag"
    setup = troubled(on_ray(2), str(flag), kind="Late", deadline=5.0, rounds=4)
    _, other = finish(setup)
    assert flag.exists()  # a worker died in round 2, and was not missed
    for key, metrics in log.metrics.items():
        if key[1] != "system":
            assert other.metrics[key] == metrics
    of_round = {server_round: fields for _, server_round, fields in other.events}
    # partition 2 raises, 3 sends NaN; partition 4 is hung in round 3
    assert of_round[2]["count"] == 2
    raised, poisoned = of_round[2]["nodes"]["4"], of_round[2]["nodes"]["5"]
    assert "NaN or Inf in array" in poisoned
    assert "ValueError: I cannot (log: " in raised
    path = raised.rpartition(":")[2].rstrip(")")
    assert "ValueError: I cannot" in Path(path).read_text()
    assert of_round[3]["nodes"] == {"6": "no answer within 5 s (deadline)"}
    assert set(of_round) == {2, 3}


def test_all_workers_may_die_between_rounds() -> None:
    setup = troubled(on_ray(2), rounds=2)
    expected, _ = finish(troubled({}, rounds=2))
    grid = setup.grid()
    cohorts = grid._clients
    assert isinstance(cohorts, RayCohorts)

    class Killing(Memory):
        def end_round(self, round: int) -> None:
            if round == 1:
                for place in cohorts._pool.places:
                    os.kill(place.pid, signal.SIGKILL)

    loop = RoundLoop(setup.strategy, grid, setup.arrays, setup.loop_config(), Killing())
    assert same_bits(loop.run().arrays, expected.arrays)
    facts = cohorts.record()
    grid.close()
    assert facts["workers_lost"] >= 1  # one can have computed all
    assert [seen["from_round"] for seen in facts["workers"]][:2] == [1, 2]
    assert {place["device"] for seen in facts["workers"] for place in seen["workers"]} == {"cpu"}


class Deadly(DirectClient):
    """Kills whoever computes it."""

    Params = Params

    def train(self, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_client_that_kills_every_worker_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "TRIES", 2)
    with pytest.raises(RunFailed, match="workers died one after the other over the same clients"):
        finish(troubled(on_ray(1), kind="Deadly", client={"name": f"{__name__}:Deadly"}))


class Broken(Client):
    """Fails when it is mapped."""

    Params = Params

    def plan(self, n_examples: int, config: Config) -> Plan:
        return Plan(0, Batching("none"))

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> Any:
        raise ArithmeticError("not with me")


def test_a_block_that_fails_ends_the_run_with_the_reason_and_the_log() -> None:
    with pytest.raises(RunFailed, match=r"Broken failed in train of round 1: ArithmeticError: not"):
        finish(troubled(on_ray(2), client={"name": f"{__name__}:Broken"}))


def test_what_is_asked_of_a_cluster_is_checked() -> None:
    for section, what in (
        ({"workers": 2}, "engine.workers: is for the engine ray"),
        ({"address": "auto"}, "engine.address: is for the engine ray"),
        ({"client_resources": {"cpus": 2}}, "engine.client_resources: is for the engine ray"),
        ({"name": "ray", "client_resources": {"cpus": 0}}, "cannot both be 0"),
        ({"name": "ray", "address": "here"}, "engine.address"),
        ({"name": "ray", "device": "cuda"}, "engine.device: needs GPUs for the workers"),
    ):
        with pytest.raises(ScenarioError, match=what):
            troubled(section)
    with pytest.raises(ScenarioError, match="deadline: needs the engine ray"):
        troubled({}, deadline=1.0)
    for engine, what in (
        (on_ray(CPUS + 1), f"has room for {CPUS}"),
        ({"name": "ray", "client_resources": {"gpus": 1}}, "1 GPUs .* has 8 CPUs$"),
    ):
        with pytest.raises(UserError, match=what):
            troubled(engine).grid()


@given(
    st.lists(st.integers(1, 100), min_size=0, max_size=40),
    st.integers(1, 9),
)
def test_runs_of_neighbours_are_complete_and_about_equal(costs: list[int], parts: int) -> None:
    found = divided(costs, parts, lambda cost: cost)
    assert [cost for run in found for cost in run] == costs
    assert len(found) == min(parts, len(costs))
    assert all(len(run) for run in found)
    if found:
        fair = sum(costs) / len(found)
        assert max(map(sum, found)) <= fair + 2 * max(costs) or len(costs) < 2 * parts


@pytest.mark.usefixtures("warm")
def test_asynchronous_rounds_on_a_real_clock() -> None:
    strategy = {
        "strategy": {"name": "fedbuff", "concurrency": 4, "buffer_size": 2},
        "client": {"name": "sgd", "lr": 0.1, "batch_size": 8},
        "rounds": 30,
    }
    state, log = finish(scenario("mlp", strategy, on_ray(2)))
    losses = [log.metrics[r, "client"]["loss"] for r in range(1, 31)]
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    assert state.totals.dropped == 0
    assert max(log.metrics[r, "train"]["staleness_max"] for r in range(1, 31)) >= 1


@pytest.mark.usefixtures("warm")
def test_asynchronous_rounds_on_a_simulated_clock_are_those_of_inline() -> None:
    strategy = {
        "strategy": {"name": "fedbuff", "concurrency": 4, "buffer_size": 2},
        "client": {"name": "sgd", "lr": 0.1, "batch_size": 8},
        "clock": {},
        "rounds": 5,
    }
    expected, _ = finish(scenario("mlp", strategy, {}))
    found, _ = finish(scenario("mlp", strategy, on_ray(2)))
    assert same_bits(found.arrays, expected.arrays)


def test_over_sampling_on_a_simulated_clock_is_that_of_inline() -> None:
    """Partition 2 raises in round 2 and 3 sends NaN: others are computed in their place."""
    rounds = {
        "strategy": {"name": "fedavg", "fraction_train": 0.6},
        "clock": {"sigma": 1.0, "jitter": 0.5},
        "over_sampling": 1.6,
        "quorum": 0.1,
        "rounds": 4,
    }
    expected, log = finish(troubled({}, **rounds))
    found, other = finish(troubled(on_ray(2), **rounds))
    assert same_bits(found.arrays, expected.arrays)
    for (_, r, fields), (_, at, theirs) in zip(other.events, log.events, strict=True):
        assert (r, fields["nodes"].keys()) == (at, theirs["nodes"].keys())  # reasons name logs
    for name in ("late", "dropped", "simulated_seconds", "bytes_up", "bytes_down"):
        assert getattr(found.totals, name) == getattr(expected.totals, name)
    assert found.totals.late > 0
    assert found.totals.dropped > 0


class Sleeping(Troubled):
    """Partition 4 takes longer than anybody waits, and counts how often it is asked."""

    def train(self, message_type: str, records: Any, config: Any, shard: Batch, *rest: Any) -> Any:
        if int(shard.x[0, 0, 0, 0]) == 4:
            time.sleep(300)
        return super().train(message_type, records, {**config, "server-round": 1}, shard, *rest)


def test_over_sampling_on_a_real_clock_does_not_wait_for_a_client_that_sleeps() -> None:
    setup = troubled(
        on_ray(2),
        kind="Sleeping",
        client={"name": f"{__name__}:Sleeping"},
        strategy={"name": "fedavg", "fraction_train": 0.7},
        over_sampling=1.4,
        rounds=4,
    )
    memory, grid = Memory(), setup.grid()
    loop = RoundLoop(setup.strategy, grid, setup.arrays, setup.loop_config(), memory)
    began = time.monotonic()
    state = loop.run()  # five of seven are needed, and everybody is asked
    assert time.monotonic() - began < 100
    assert (state.totals.late, state.totals.dropped) == (4 * 2, 0)
    assert isinstance(grid._clients, RayCohorts)
    kept = {p: float(own["asked"]) for p, own in grid._clients.states.items()}
    grid.close()
    assert 4 not in kept
    assert sum(kept.values()) == 4 * 5  # who was computed and not needed keeps nothing


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "pf-pne", "budget": 600, "pilot_depth": 2},
        {"name": "local-search", "method": "hct", "budget": 60},
    ],
    ids=["pf-pne", "hct"],
)
def test_bandits_search_the_same(strategy: Mapping[str, Any]) -> None:
    """Replies whose shapes change, clients' sets that grow and shrink, and no model at all."""
    data = {"clients": 5, "delta": 0.05}
    inline = play(strategy, data)
    there = play(strategy, data, engine={"name": "ray", "workers": 2})
    assert there.kept.keys() == inline.kept.keys()
    assert all(torch.equal(there.kept[key], inline.kept[key]) for key in inline.kept)
    assert there.memory.client_metrics == inline.memory.client_metrics
