"""What every side has to do: the data, the model, the clients of each round and their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.random import generator
from tests.benchmarks import models

SEED = 20
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """Federated averaging with a fixed number of equal clients.

    clients: population. cohort: clients of a round. examples: rows a client holds. batch: rows of a
    minibatch. lr: learning rate of local SGD, one pass over the rows a round. spread: standard
    deviation of the classes' centres in each input dimension; 1 is that of the noise.
    rounds: rounds timed together, so that a repetition is long enough to be measured.
    warm_up: rounds before anything is timed, after which the sides' results are compared.
    tolerance: how far these may lie apart, relative; sides may draw their own clients and batches,
    which changes the loss a little. shards: number of different shards, by default one a client;
    client i holds shard i mod shards, so that a million clients need no table of their own.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    clients: int
    cohort: int
    rounds: int
    warm_up: int
    tolerance: float
    input_shape: tuple[int, ...] = (1,)
    examples: int = 1
    batch: int = 1
    lr: float = 0.0
    spread: float = 0.4
    shards: int = 0

    @property
    def distinct(self) -> int:
        """The number of different shards."""
        return self.shards or self.clients

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """x (shards, examples, *input_shape) float32 and y (shards, examples) int64 in 0..9.

        Each class is a point in input space plus unit noise.
        """
        draw = generator(SEED, "benchmark data", self.distinct)
        y = draw.integers(0, 10, (self.distinct, self.examples))
        size = int(np.prod(self.input_shape))
        centres = draw.standard_normal((10, size), dtype=np.float32) * np.float32(self.spread)
        x = draw.standard_normal((*y.shape, size), dtype=np.float32)
        x += centres[y]
        return torch.from_numpy(x.reshape(*y.shape, *self.input_shape)), torch.from_numpy(y)

    def chosen(self, round_: int) -> Integers:
        """Returns the clients of a round, (cohort,), sorted."""
        draw = generator(SEED, "benchmark cohort", round_)
        return np.sort(draw.choice(self.clients, self.cohort, replace=False))

    def orders(self, round_: int) -> Integers:
        """Returns the order of each client's rows in a round, (cohort, examples)."""
        rows = np.tile(np.arange(self.examples), (self.cohort, 1))
        return generator(SEED, "benchmark order", round_).permuted(rows, axis=1)

    def disagreement(self, one: Sequence[float], other: Sequence[float]) -> float:
        """Returns how far two results are apart, relative."""
        return abs(one[0] - other[0]) / abs(other[0])

    def result(self, parameters: Sequence[Tensor]) -> float:
        """Returns what all sides must agree on: the mean training loss of up to 100 clients, or,
        where there is nothing to learn, the mean of the parameters.
        """
        if not self.lr:
            return float(parameters[0].double().mean())
        model = self.model()
        with torch.no_grad():
            for mine, final in zip(model.parameters(), parameters, strict=True):
                mine.copy_(final)
            x, y = (tensor[:100].flatten(0, 1) for tensor in self.data)
            return float(F.cross_entropy(model(x), y))


def _echo(name: str, size: int, rounds: int, warm_up: int) -> Workload:
    title = f"100 clients return {size:,} floats plus their id; the mean is the next round's"
    return Workload(name, title, lambda: models.Vector(size), 100, 100, rounds, warm_up, 1e-5)


W1 = Workload(
    "W1",
    "MLP 64-64-10, 100 of 1,000 clients × 60 rows, 1 epoch, batches of 20",
    models.mlp,
    clients=1000,
    cohort=100,
    rounds=10,
    warm_up=10,
    tolerance=0.03,
    input_shape=(64,),
    examples=60,
    batch=20,
    lr=0.1,
)
W2 = Workload(
    "W2",
    "CNN 32-64-128-10 on 28×28, 20 of 200 clients × 100 images, 1 epoch, batches of 20",
    models.cnn,
    clients=200,
    cohort=20,
    rounds=1,
    warm_up=3,
    tolerance=0.03,
    input_shape=(1, 28, 28),
    examples=100,
    batch=20,
    lr=0.05,
    spread=1.0,
)
COHORTS = [
    replace(W1, name=f"cohort-{n}", title=f"W1 with {n:,} of 1,000 clients", cohort=n, rounds=k)
    for n, k in ((10, 20), (100, 5), (1000, 1))
]
POPULATIONS = [
    replace(
        W1,
        name=f"population-{n}",
        title=f"W1's MLP, 100 of {n:,} clients × 20 rows",
        clients=n,
        examples=20,
        shards=100,
        rounds=5,
    )
    for n in (100, 1_000, 10_000, 100_000, 1_000_000)
]
WORKLOADS = {
    workload.name: workload
    for workload in (
        W1,
        W2,
        _echo("W3-1k", 1_000, rounds=50, warm_up=5),
        _echo("W3-1M", 1_000_000, rounds=3, warm_up=2),
        *COHORTS,
        *POPULATIONS,
    )
}
