"""What every side has to do: the data, the model, the clients of each round and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    tolerance: how far the sides' final results may lie apart, relative; sides may draw their own
    clients and batches, which changes the loss a little.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    clients: int
    cohort: int
    rounds: int
    tolerance: float
    input_shape: tuple[int, ...] = (1,)
    examples: int = 1
    batch: int = 1
    lr: float = 0.0
    spread: float = 0.4

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """x (clients, examples, *input_shape) float32 and y (clients, examples) int64 in 0..9.

        Each class is a point in input space plus unit noise.
        """
        draw = generator(SEED, "benchmark data", self.clients)
        y = draw.integers(0, 10, (self.clients, self.examples))
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

    def result(self, parameters: list[Tensor]) -> float:
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


def _echo(name: str, size: int, rounds: int) -> Workload:
    title = f"100 clients return {size:,} floats plus their id; the mean is the next round's"
    return Workload(name, title, lambda: models.Vector(size), 100, 100, rounds, 1e-5)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "W1",
            "MLP 64-64-10, 100 of 1,000 clients × 60 rows, 1 epoch, batches of 20",
            models.mlp,
            clients=1000,
            cohort=100,
            rounds=10,
            tolerance=0.03,
            input_shape=(64,),
            examples=60,
            batch=20,
            lr=0.1,
        ),
        Workload(
            "W2",
            "CNN 32-64-128-10 on 28×28, 20 of 200 clients × 100 images, 1 epoch, batches of 20",
            models.cnn,
            clients=200,
            cohort=20,
            rounds=1,
            tolerance=0.1,
            input_shape=(1, 28, 28),
            examples=100,
            batch=20,
            lr=0.05,
            spread=1.0,
        ),
        _echo("W3-1k", 1_000, rounds=50),
        _echo("W3-1M", 1_000_000, rounds=3),
    )
}
