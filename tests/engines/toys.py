"""What the tests of engine, strategies and loop share, beside what fedsim.testing has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedsim.clients.base import Batching, Client, DirectClient
from fedsim.clients.sgd import SGD, SGDParams
from fedsim.data import FederatedData
from fedsim.grids.cohort import Cohorts
from fedsim.grids.execution import Execution
from fedsim.grids.inline import InlineGrid
from fedsim.grids.lanes import Stream
from fedsim.grids.minibatches import positions, stream_keys
from fedsim.grids.shards import Shards
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig, LoopState
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.testing.federation import (
    CLASSES,
    FEATURES,
    RAGGED,
    classification,
    distance,
    federation,
    functional,
    network,
    same_bits,
    start,
)
from fedsim.testing.memory import Memory

__all__ = [
    "CLASSES",
    "FEATURES",
    "RAGGED",
    "Memory",
    "classification",
    "cohorts",
    "distance",
    "drawn",
    "federation",
    "functional",
    "grid_of",
    "network",
    "run",
    "same_bits",
    "sgd",
    "start",
]


def sgd(model: FunctionalModel, **params: Any) -> SGD:
    """Returns the SGD client with these parameters."""
    return SGD(SGDParams(**params), model, classification())


def cohorts(
    client: Client | DirectClient,
    data: FederatedData,
    *,
    path: str = "mapped",
    chunk: int = 0,
    threads: int = 1,
    dtype: str = "float64",
    trace: bool = False,
    seed: int = 0,
) -> Cohorts:
    """Returns the engine over the data's clients; untraced: tracing takes most of a short run."""
    execution = Execution(path, chunk, threads, dtype, "cpu", trace)  # type: ignore[arg-type]
    return Cohorts(client, Shards(data, getattr(torch, dtype)), execution, seed)


def grid_of(engine: Cohorts) -> InlineGrid:
    """Returns a Grid over all clients of the engine."""
    return InlineGrid(engine, len(engine.shards), seed=engine.seed)


def run(
    client: Client | DirectClient,
    data: FederatedData,
    rounds: int = 3,
    *,
    strategy: Any = None,
    arrays: Arrays | None = None,
    recorder: Memory | None = None,
    config: Mapping[str, Any] = {},
    seed: int = 0,
    **engine: Any,
) -> LoopState:
    """Returns the state after a whole run."""
    made = cohorts(client, data, seed=seed, **engine)
    strategy = strategy or FedAvg(FedAvgParams())
    loop = RoundLoop(
        strategy,
        grid_of(made),
        start(client.model, strategy) if arrays is None else arrays,
        LoopConfig(rounds=rounds, seed=seed, checkpoint_rounds=0, server_every=0, **config),
        recorder or Memory(),
    )
    try:
        return loop.run()
    finally:
        made.close()


def drawn(
    stream: Stream, batching: Batching, n: int, count: int, partition: int, chain: int = 0
) -> np.ndarray[Any, Any]:
    """Returns one client's (count, batch size) positions, drawn for it alone; −1 pads."""
    keys = stream_keys(stream.root("batches"), np.array([partition]), [chain])

    def generator(client: int, own: int) -> np.random.Generator:
        return stream.generator("batches", partition, chain, 0)

    return positions(batching, np.array([n]), np.array([count]), keys, generator)[0, 0]
