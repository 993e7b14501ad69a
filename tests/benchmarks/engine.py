"""fedsim itself as a side: the round loop over the inline Grid, replies checked and averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedsim._flower import quiet
from fedsim.clients.base import Batching, Client, Config, Inputs, Plan, Reply, State
from fedsim.clients.sgd import SGD, SGDParams
from fedsim.data import DataInfo, Examples, FederatedData, Partition
from fedsim.errors import Params
from fedsim.grids.cohort import Cohorts
from fedsim.grids.execution import Execution, choose_path
from fedsim.grids.inline import InlineGrid
from fedsim.grids.shards import Shards
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel, build_task
from fedsim.models.tasks import ClassificationParams
from fedsim.server.loop import LoopConfig, RoundLoop
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from tests.benchmarks.workloads import SEED, Workload

THREADS = 2
"""One for each core of the machines that the references were made for."""


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


class Nowhere:
    """A recorder that keeps nothing: the references keep nothing, either."""

    def log_metrics(self, round: int, split: str, metrics: Mapping[str, float]) -> None:
        """Drops them."""

    def log_client_metrics(
        self,
        round: int,
        split: str,
        partitions: Sequence[int],
        metrics: Mapping[str, Sequence[float]],
    ) -> None:
        """Drops them."""

    def event(self, kind: str, round: int | None = None, **fields: object) -> None:
        """Drops it."""

    def end_round(self, round: int) -> None:
        """Does nothing."""

    def save_draw(self, round: int, draw: Mapping[str, Tensor]) -> None:
        """Drops it."""

    def save_checkpoint(
        self, round: int, tensors: Mapping[str, Tensor], state: object, keep: int = 2
    ) -> None:
        """Drops it."""


class Fedsim:
    """One workload on the inline engine, as a scenario would run it."""

    def __init__(self, workload: Workload) -> None:
        quiet()
        torch.set_num_threads(1)
        data = federated(workload)
        example = torch.zeros((1, *workload.input_shape))
        model = FunctionalModel(workload.model(), example)
        task = build_task(ClassificationParams())
        client: Client
        if workload.lr:
            params = SGDParams(lr=workload.lr, batch_size=workload.batch)
            client = SGD(params, model, task)
        else:
            client = Echo(Params(), model, task)
        path, why = choose_path(model, torch.device("cpu"), "auto")
        execution = Execution(path, 0, THREADS, "float32", "cpu", True, why)
        cohorts = Cohorts(client, Shards(data, torch.float32), execution, SEED)
        strategy = FedAvg(FedAvgParams(fraction_train=workload.cohort / workload.clients))
        config = LoopConfig(rounds=0, seed=SEED, server_every=0, checkpoint_rounds=0)
        grid = InlineGrid(cohorts, workload.clients, seed=SEED)
        self._names = list(model.shapes)
        self._loop = RoundLoop(strategy, grid, model.initial(), config, Nowhere())

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        torch.set_num_threads(1)
        done = self._loop.state.round
        self._loop.config = replace(self._loop.config, rounds=done + rounds)
        self._loop.run()

    def parameters(self) -> list[Tensor]:
        """Returns the global parameters."""
        return [self._loop.state.arrays[name] for name in self._names]


def federated(workload: Workload) -> FederatedData:
    """Returns the workload's data as fedsim holds it."""
    classes = 10 if workload.lr else None
    target = "class" if workload.lr else "none"
    info = DataInfo(workload.name, workload.input_shape, classes, target)  # type: ignore[arg-type]
    if workload.lr:
        x, y = (tensor.flatten(0, 1).numpy() for tensor in workload.data)
    else:
        rows = workload.clients * workload.examples
        x, y = np.zeros((rows, *workload.input_shape), np.float32), np.zeros(rows, np.int64)
    owned = np.arange(len(x)).reshape(workload.clients, workload.examples)
    return FederatedData(
        info=info,
        train=Examples(x, y),
        shards=Partition.of(owned),
        holdouts=None,
        validation=None,
        test=None,
        ood=None,
        truth={},
    )
