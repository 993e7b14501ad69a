"""What data looks like after loading: examples, what is known of them, and who holds which rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.data.partition import Partition

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Examples:
    """A set of n examples.

    x: (n, *feature) float32 or float64.
    y: (n,) int64 class indices, or (n,) or (n, k) floats of x's dtype.
    weight: (n,) floats ≥ 0, the importance of each example's loss; None means 1 for all.
    columns: further (n,) arrays by name, such as the hospital a row came from; natural
        partitions use them and models never see them.
    """

    x: Array
    y: Array
    weight: Array | None = None
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Array) -> Examples:
        """Returns the examples at `rows` (integer indices or a boolean mask), in that order."""
        return Examples(
            x=self.x[rows],
            y=self.y[rows],
            weight=None if self.weight is None else self.weight[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
        )

    def with_x(self, x: Array) -> Examples:
        """Returns the same examples with other features."""
        return replace(self, x=x)

    def weights(self) -> Array:
        """Returns (n,) float64 weights, ones where none are given."""
        if self.weight is None:
            return np.ones(len(self))
        return np.asarray(self.weight, dtype=np.float64)


@dataclass(frozen=True)
class DataInfo:
    """What is known of a data set before any row is looked at.

    name: the data set's name in the scenario.
    input_shape: shape of one example's features; images are (channels, height, width).
    num_classes: number of classes C of y in 0..C-1; None unless target is "class".
    target: "class", "real", or "none" where y means nothing (a row is a potential).
    feature_names: one name for each of the features of a flat input, or None.
    class_names: C names, or None.
    ood: which out-of-distribution set was built ("fashion_mnist", "mnist5k", "corrupted").
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int | None
    target: Literal["class", "real", "none"]
    feature_names: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    ood: str | None = None


@dataclass(frozen=True, eq=False)
class FederatedData:
    """Examples and who holds them.

    info: what is known of the data set.
    train: every example that some client may hold; with `make` a few that stand for them.
    shards: for each client the sorted int64 rows of `train` that it trains on; disjoint. Tuples
        and lists of arrays become a Partition. With `make` its rows are None.
    holdouts: for each client the sorted rows of `train` that it evaluates on, disjoint from
        all shards; None where the partition holds nothing out.
    validation, test, ood: held by the server; None where the scenario asks for none.
    truth: what a generator knows of the answer, computed for exactly the rows in `shards`:
        the posterior's "mean" and "cov", generating "coefficients", …; empty for real data.
    make: returns the examples that a client (0..N-1) trains on, as many as `shards` says and the
        same ones at each call, from any thread; None where `train` holds them all.
    """

    info: DataInfo
    train: Examples
    shards: Partition
    holdouts: Partition | None = None
    validation: Examples | None = None
    test: Examples | None = None
    ood: Examples | None = None
    truth: Mapping[str, Array] = field(default_factory=dict)
    make: Callable[[int], Examples] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", Partition.of(self.shards))
        if self.holdouts is not None:
            object.__setattr__(self, "holdouts", Partition.of(self.holdouts, "holdouts"))

    @property
    def clients(self) -> int:
        """The number of clients."""
        return len(self.shards)

    def shard(self, client: int) -> Examples:
        """Returns the examples that a client trains on."""
        if self.make is not None:
            return self.make(client)
        return self.train.take(self.shards[client])

    def holdout(self, client: int) -> Examples:
        """Returns the examples that a client evaluates on; none of them where none are held."""
        rows = np.zeros(0, np.int64) if self.holdouts is None else self.holdouts[client]
        return self.train.take(rows)
