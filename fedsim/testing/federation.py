"""A small federation, a small model, and how two sets of parameters are compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import nn

from fedsim.data import DataInfo, Examples, FederatedData, Partition
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel, Task, build_task
from fedsim.models.tasks import ClassificationParams
from fedsim.strategies.base import Strategy

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
        Partition.of(parts[::2]),
        Partition.of(parts[1::2]) if holdout else None,
        test=draw(test) if test else None,
    )


def network(dropout: float = 0.0, hidden: int = 4, seed: int = 1) -> nn.Sequential:
    """Returns a float64 multilayer perceptron, with two dropout layers if asked."""
    with torch.random.fork_rng(devices=[]):
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


def start(model: FunctionalModel, strategy: FlowerStrategy) -> Arrays:
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
