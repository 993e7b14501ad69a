"""fedsim itself as a side: a scenario's round loop over the inline Grid, recorded nowhere.

The scenarios name the functions and classes of this module by import path, as a user's would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim._flower import quiet
from fedsim.clients.base import Batching, Client, Config, Inputs, Plan, Reply, State
from fedsim.data import DataInfo, Examples, FederatedData, Partition
from fedsim.errors import Params
from fedsim.messages import Arrays
from fedsim.scenario import Scenario
from fedsim.server.loop import RoundLoop
from fedsim.server.recorder import Nowhere, Recorder
from fedsim.setup import Setup, prepare
from tests.benchmarks.session import Session
from tests.benchmarks.workloads import SEED, WORKLOADS, Workload


class Echo(Client):
    """Returns the parameters plus the client's id."""

    Params = Params

    def plan(self, n_examples: int, config: Config) -> Plan:
        """No data is needed."""
        return Plan(steps=0, batching=Batching("none"))

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> State:
        """Adds the id."""
        identity = inputs.scalars["partition-id"]
        arrays = {name: value + identity for name, value in records["arrays"].items()}
        return arrays, inputs.scalars["num-examples"]

    def finish(self, state: State) -> tuple[Reply, Arrays]:
        """Sends them."""
        arrays, n = state
        return Reply({"arrays": arrays}, {"num-examples": n}), {}


class Engine:
    """A scenario's round loop, which can be run a few rounds at a time."""

    def __init__(self, scenario: Mapping[str, Any], recorder: Recorder | None = None) -> None:
        quiet()
        self.setup: Setup = prepare(Scenario.from_dict(dict(scenario)).expand()[0].scenario)
        self._grid = self.setup.grid()
        config = replace(self.setup.loop_config(), rounds=0, checkpoint_rounds=0)
        self.loop = RoundLoop(
            self.setup.strategy, self._grid, self.setup.arrays, config, recorder or Nowhere()
        )

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        torch.set_num_threads(1)
        done = self.loop.state.round
        self.loop.config = replace(self.loop.config, rounds=done + rounds)
        self.loop.run()

    def close(self) -> None:
        """Ends the engine's threads."""
        self._grid.close()


class Fedsim(Session):
    """One workload on the inline engine.

    strategy: fedsim's own "fedavg", or "FedAvg", Flower's, which lists every node in every round.
    engine: that section of the scenario.
    """

    def __init__(
        self,
        workload: Workload,
        strategy: str = "fedavg",
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        self.workload = workload
        self._engine = Engine({**scenario(workload, strategy), "engine": dict(engine or {})})

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        self._engine.advance(rounds)

    def parameters(self) -> list[Tensor]:
        """Returns the global parameters."""
        names = [name for name, _ in self.workload.model().named_parameters()]
        return [self._engine.loop.state.arrays[name] for name in names]

    def close(self) -> None:
        """Ends the engine's threads."""
        self._engine.close()


def scenario(workload: Workload, strategy: str = "fedavg") -> dict[str, Any]:
    """Returns the workload as a scenario."""
    here = __name__
    chosen: dict[str, Any] = {"name": strategy}
    chosen["fraction_train"] = workload.cohort / workload.clients
    if strategy != "fedavg":
        chosen |= {"fraction_evaluate": 0.0, "min_train_nodes": workload.cohort}
    client: dict[str, Any] = {"name": f"{here}:Echo"}
    if workload.lr:
        client = {"name": "sgd", "lr": workload.lr, "batch_size": workload.batch}
    of = {"workload": workload.name}
    return {
        "name": f"benchmark-{workload.name}",
        "seed": SEED,
        "rounds": 1,
        "data": {"name": "custom", "factory": f"{here}:federated", "arguments": of},
        "partition": "given",
        "model": {"name": "custom", "factory": f"{here}:model", "params": of},
        "task": "classification" if workload.lr else "potential",
        "strategy": chosen,
        "client": client,
        "evaluate": {"server_every": 0},
    }


def model(workload: str) -> nn.Module:
    """Returns the workload's model."""
    return WORKLOADS[workload].model()


def federated(workload: str) -> FederatedData:
    """Returns the workload's data as fedsim holds it; made when asked for if clients share it."""
    w = WORKLOADS[workload]
    learns = bool(w.lr)
    info = DataInfo(w.name, w.input_shape, 10 if learns else None, "class" if learns else "none")
    if learns:
        x, y = (tensor.numpy() for tensor in w.data)
    else:
        x = np.zeros((w.clients, w.examples, *w.input_shape), np.float32)
        y = np.zeros((w.clients, w.examples), np.float32)

    def rows(client: int) -> Examples:
        return Examples(x[client % w.distinct], y[client % w.distinct])

    pool = Examples(x.reshape(-1, *w.input_shape), y.reshape(-1))
    offsets = np.arange(w.clients + 1, dtype=np.int64) * w.examples
    if w.shards:
        return FederatedData(info, pool, Partition(None, offsets), make=rows)
    return FederatedData(info, pool, Partition(np.arange(len(pool)), offsets))
