"""Small federations, models and recorders that the tests of engine, strategies and loop share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.clients.base import Batching, Client, DirectClient
from fedsim.clients.sgd import SGD, SGDParams
from fedsim.data import DataInfo, Examples, FederatedData
from fedsim.grids.cohort import Cohorts
from fedsim.grids.execution import Execution
from fedsim.grids.inline import InlineGrid
from fedsim.grids.lanes import Stream
from fedsim.grids.minibatches import positions, stream_keys
from fedsim.grids.shards import Shards
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel, Task, build_task
from fedsim.models.tasks import ClassificationParams
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig, LoopState
from fedsim.strategies.base import Strategy
from fedsim.strategies.fedavg import FedAvg, FedAvgParams

FEATURES, CLASSES = 5, 3
RAGGED = (7, 1, 30, 12, 3)


def federation(
    sizes: Sequence[int] = RAGGED,
    *,
    weighted: bool = False,
    holdout: int = 0,
    test: int = 0,
    seed: int = 0,
) -> FederatedData:
    """Returns clients with the given numbers of rows of CLASSES noisy classes, rows shuffled."""
    rng = np.random.default_rng(seed)
    count = sum(sizes) + holdout * len(sizes)

    def draw(n: int) -> Examples:
        y = rng.integers(0, CLASSES, n)
        x = rng.standard_normal((n, FEATURES)) + np.eye(CLASSES, FEATURES)[y]
        return Examples(x, y, rng.uniform(0.2, 3.0, n) if weighted else None)

    train = draw(count)
    order = rng.permutation(count)
    cuts = np.cumsum([n for size in sizes for n in (size, holdout)])[:-1]
    parts = [np.sort(part) for part in np.split(order, cuts)]
    return FederatedData(
        DataInfo("toy", (FEATURES,), CLASSES, "class"),
        train,
        tuple(parts[::2]),
        tuple(parts[1::2]) if holdout else None,
        test=draw(test) if test else None,
    )


def network(dropout: float = 0.0, hidden: int = 4, seed: int = 1) -> nn.Sequential:
    """Returns a float64 multilayer perceptron, with two dropout layers if asked."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(FEATURES, hidden), nn.Tanh()]
    if dropout:
        layers.append(nn.Dropout(dropout))
    layers += [nn.Linear(hidden, hidden), nn.Tanh()]
    if dropout:
        layers.append(nn.Dropout(dropout))
    layers.append(nn.Linear(hidden, CLASSES))
    return nn.Sequential(*layers).double()


def functional(
    module: nn.Module | None = None, dtype: torch.dtype = torch.float64
) -> FunctionalModel:
    """Returns the module (by default `network()`) as a function of its parameters."""
    module = network() if module is None else module
    return FunctionalModel(module.to(dtype), torch.zeros(1, FEATURES, dtype=dtype))


def classification() -> Task:
    """Returns the task of the toy data."""
    return build_task(ClassificationParams())


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


@dataclass
class Memory:
    """A recorder that keeps everything."""

    metrics: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)
    client_metrics: list[tuple[int, list[int], dict[str, list[float]]]] = field(
        default_factory=list
    )
    events: list[tuple[str, int | None, dict[str, Any]]] = field(default_factory=list)
    draws: dict[int, Arrays] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    checkpoints: dict[int, tuple[dict[str, Tensor], Any]] = field(default_factory=dict)

    def log_metrics(self, round: int, split: str, metrics: Mapping[str, float]) -> None:
        self.metrics.setdefault((round, split), {}).update(metrics)

    def log_client_metrics(
        self,
        round: int,
        split: str,
        partitions: Sequence[int],
        metrics: Mapping[str, Sequence[float]],
    ) -> None:
        self.client_metrics.append(
            (round, list(partitions), {k: list(v) for k, v in metrics.items()})
        )

    def event(self, kind: str, round: int | None = None, **fields: object) -> None:
        self.events.append((kind, round, fields))

    def end_round(self, round: int) -> None:
        self.ended.append(round)

    def save_draw(self, round: int, draw: Mapping[str, Tensor]) -> None:
        self.draws[round] = dict(draw)

    def save_checkpoint(
        self, round: int, tensors: Mapping[str, Tensor], state: object, keep: int = 2
    ) -> None:
        """Keeps what the run folder would give back: the same bytes, through JSON and a copy."""
        from fedsim.runs import exact

        copied = {name: tensor.clone() for name, tensor in tensors.items()}
        self.checkpoints[round] = (copied, exact.loads(exact.dumps(state)))


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


def start(model: FunctionalModel, strategy: Any) -> Arrays:
    """Returns the model's parameters, or for chains as many different ones."""
    own = model.initial()
    if not (isinstance(strategy, Strategy) and strategy.chains):
        return own
    rng = torch.Generator().manual_seed(5)
    return {
        name: value
        + 0.1 * torch.randn((strategy.chains, *value.shape), generator=rng, dtype=value.dtype)
        for name, value in own.items()
    }


def distance(a: Arrays, b: Arrays) -> float:
    """Returns ‖a − b‖ / ‖b‖ over all arrays together."""
    assert a.keys() == b.keys()
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a)
    return float((difference / sum(float(v.double().square().sum()) for v in b.values())) ** 0.5)


def same_bits(a: Arrays, b: Arrays) -> bool:
    """Says whether all arrays are equal to the bit."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def drawn(
    stream: Stream, batching: Batching, n: int, count: int, partition: int, chain: int = 0
) -> np.ndarray[Any, Any]:
    """Returns one client's (count, batch size) positions, drawn for it alone; −1 pads."""
    keys = stream_keys(stream.root("batches"), np.array([partition]), [chain])

    def generator(client: int, own: int) -> np.random.Generator:
        return stream.generator("batches", partition, chain, 0)

    return positions(batching, np.array([n]), np.array([count]), keys, generator)[0, 0]
