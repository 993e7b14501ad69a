"""Runs a sampler through the real engine, and rebuilds by name the random numbers it used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fedsim.clients import fahmc
from fedsim.clients.base import Batching, Client
from fedsim.data import DataInfo, Examples, FederatedData
from fedsim.grids.cohort import Cohorts
from fedsim.grids.execution import Execution
from fedsim.grids.inline import InlineGrid
from fedsim.grids.lanes import SHARED, Stream
from fedsim.grids.nodes import partition_of
from fedsim.grids.shards import Shards
from fedsim.messages import Arrays
from fedsim.models import TASKS, build_model, build_task
from fedsim.models.zoo import LinearParams, LocationParams
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig
from fedsim.strategies.base import Strategy
from tests.engines.toys import drawn
from tests.oracles.gaussian import Array, GaussianClients

SEED = 11
Path = Literal["mapped", "one_by_one"]


def bernoulli(outputs: Tensor, targets: Tensor) -> Tensor:
    """Logistic regression: −log P(y) for logits (n, 1) and targets (n,) of 0.0 and 1.0."""
    logits = outputs.reshape(targets.shape)
    return softplus(logits) - targets * logits


BERNOULLI = {"loss": "tests.methods.sampling:bernoulli", "target": "real"}
"""Options of the task `custom` for it."""


class Memory:
    """A recorder that keeps draws and metrics in lists."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, Arrays]] = []
        self.metrics: dict[tuple[int, str], dict[str, float]] = {}
        self.checkpoints: list[tuple[int, dict[str, Tensor], Any]] = []

    def log_metrics(self, round: int, split: str, metrics: Mapping[str, float]) -> None:
        self.metrics.setdefault((round, split), {}).update(metrics)

    def log_client_metrics(
        self,
        round: int,
        split: str,
        partitions: Sequence[int],
        metrics: Mapping[str, Sequence[float]],
    ) -> None: ...

    def event(self, kind: str, round: int | None = None, **fields: object) -> None: ...

    def end_round(self, round: int) -> None: ...

    def save_draw(self, round: int, draw: Mapping[str, Tensor]) -> None:
        self.draws.append((round, dict(draw)))

    def save_checkpoint(
        self,
        round: int,
        tensors: Mapping[str, Tensor],
        state: object,
        keep: int = 2,
        keep_every: int = 0,
    ) -> None:
        self.checkpoints.append((round, dict(tensors), state))


@dataclass
class Problem:
    """Data, model and the name of the one parameter array, flattened to θ (d,)."""

    data: FederatedData
    model: Any
    task: Any
    shape: tuple[int, ...]
    name: str

    @property
    def dim(self) -> int:
        """The number of parameters."""
        return int(np.prod(self.shape))


def gaussian_problem(problem: GaussianClients, rows: Sequence[int] | None = None) -> Problem:
    """Gaussian potentials as rows of `location`; client c holds rows[c] copies (1 by default).

    Each row weighs 1/n, so that f_c is the client's potential, with w_c = rows[c] / n.
    """
    clients, dim = problem.mean.shape
    counts = list(rows) if rows is not None else [1] * clients
    x = np.concatenate([problem.mean, problem.precision.reshape(clients, -1)], axis=1)
    owner = np.repeat(np.arange(clients), counts)
    examples = Examples(x[owner], np.zeros(len(owner)), np.full(len(owner), 1 / len(owner)))
    info = DataInfo("gaussian", (dim + dim * dim,), None, "none")
    return _problem(examples, owner, info, LocationParams(), "potential", (dim,))


def regression_problem(
    shards: Sequence[tuple[Array, Array]], task: str = "regression", **options: object
) -> Problem:
    """Rows (X_c, y_c) of every client under the model `linear` without intercept."""
    X, y = (np.concatenate(parts) for parts in zip(*shards, strict=True))
    owner = np.repeat(np.arange(len(shards)), [len(part) for _, part in shards])
    info = DataInfo("regression", (X.shape[1],), None, "real")
    shape = (1, X.shape[1])
    return _problem(Examples(X, y), owner, info, LinearParams(bias=False), task, shape, **options)


def _problem(
    examples: Examples,
    owner: Array,
    info: DataInfo,
    model: Any,
    task: str,
    shape: tuple[int, ...],
    **options: object,
) -> Problem:
    shards = tuple(np.flatnonzero(owner == c) for c in range(int(owner.max()) + 1))
    built = build_model(model, info, 0, torch.float64)
    (name,) = built.shapes
    data = FederatedData(info, examples, shards)
    return Problem(data, built, build_task(TASKS[task](**options)), shape, name)


@dataclass
class Chains:
    """What a run left: θ after every round, and the recorder."""

    theta: Array  # (rounds, chains, d)
    memory: Memory
    cohorts: list[list[int]] = field(default_factory=list)  # partitions asked, by round

    def metric(self, round: int, name: str, split: str = "train") -> float:
        """Returns one metric of a round."""
        return self.memory.metrics[round, split][name]


def make_grid(
    problem: Problem,
    batch_size: int | None = None,
    path: Path = "mapped",
    chunk: int = 0,
    trace: bool = False,
    client: Client | None = None,
    seed: int = SEED,
) -> InlineGrid:
    """Returns the engine over the problem's clients, in float64."""
    if client is None:
        params = fahmc.FAHMCClientParams(batch_size=batch_size)
        client = fahmc.FAHMC(params, problem.model, problem.task)
    execution = Execution(path, chunk, 2, "float64", "cpu", trace)
    cohorts = Cohorts(client, Shards(problem.data, torch.float64), execution, seed)
    return InlineGrid(cohorts, problem.data.clients, seed=seed)


def run(
    strategy: Strategy,
    problem: Problem,
    start: Array,
    rounds: int,
    grid: InlineGrid | None = None,
    seed: int = SEED,
    **options: Any,
) -> Chains:
    """Runs the loop from `start` (chains, d) and keeps θ after every round."""
    grid = grid or make_grid(problem, seed=seed, **options)
    memory = Memory()
    theta: list[Array] = []
    arrays = {problem.name: torch.from_numpy(np.array(start)).reshape(len(start), *problem.shape)}

    def keep(round: int, metrics: object, system: object) -> None:
        theta.append(loop.state.arrays[problem.name].reshape(len(start), -1).numpy().copy())

    config = LoopConfig(rounds, seed, checkpoint_rounds=0)
    loop = RoundLoop(strategy, grid, arrays, config, memory, None, keep)
    try:
        loop.run()
    finally:
        grid.close()
    cohorts = [
        [partition_of(n) for n in strategy.sample(
            {"seed": seed, "server-round": r}, grid, strategy.common.fraction_train
        )]
        for r in range(1, rounds + 1)
    ]  # fmt: skip
    return Chains(np.stack(theta), memory, cohorts)


def momentum_noise(
    dim: int, clients: int, rounds: int, trajectories: int, leapfrogs: int, chain: int
) -> tuple[Array, Array]:
    """Returns the chain's ξ (R, T, d) and ξ_c (R, T, C, d), from the names of their streams."""
    shared = np.empty((rounds, trajectories, dim))
    private = np.empty((rounds, trajectories, clients, dim))
    for r in range(rounds):
        stream = Stream(SEED, r + 1, "train")
        for t in range(trajectories):
            step = t * leapfrogs
            shared[r, t] = stream.generator("shared", SHARED, chain, step).standard_normal(dim)
            for c in range(clients):
                private[r, t, c] = stream.generator("private", c, chain, step).standard_normal(dim)
    return shared, private


def minibatches(
    sizes: Sequence[int], rounds: int, steps: int, per_step: int, size: int, chain: int
) -> Array:
    """Returns (R, steps, per_step, C, size) positions in each client's shard."""
    out = np.empty((rounds, steps, per_step, len(sizes), size), np.int64)
    for r in range(rounds):
        stream = Stream(SEED, r + 1, "train")
        for c, n in enumerate(sizes):
            rows = drawn(stream, Batching("sampled", size), n, steps * per_step, c, chain)
            out[r, :, :, c] = rows.reshape(steps, per_step, size)
    return out
