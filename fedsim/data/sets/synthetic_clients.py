"""Data set `synthetic_clients`: any number of clients, each of whose rows are made when asked for.

The generator synthetic(α, β) of Li et al., Federated Optimization in Heterogeneous Networks
(FedProx), MLSys 2020, section 5.1, which extends Shamir et al. 2014. Client k draws

    u_k ~ N(0, α),  B_k ~ N(0, β),  v_k ~ N(B_k, 1)ᵈ,  W_k ~ N(u_k, 1)ᵈˣᶜ,  b_k ~ N(u_k, 1)ᶜ
    x ~ N(v_k, Σ), Σ = diag(j^-1.2),   y = argmax softmax(W_kᵀ x + b_k)

As in the authors' code, α and β are standard deviations. u_k is one number that is added to all
classes alike, so it moves no argmax: in the formula as published α leaves the labels' law alone.
Reconstructed or added here: each client draws from a stream of its own, by (seed, client); `shared`
makes W_k and b_k agree in part, which with 1 is the common concept of the paper's synthetic IID
(there all features are alike, too); rows are `rows`, a range or log-normal (the authors draw
50 + ⌊LogNormal(4, 2)⌋); the test set is that of clients who never train.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import DataParams
from fedsim.data.examples import Array, DataInfo, Examples, FederatedData
from fedsim.data.partition import Partition, Rows
from fedsim.errors import Problem, ScenarioError
from fedsim.random import generator

SAMPLED = 8
"""Clients whose rows stand for all where only the shape of the data matters."""

MAX_WEIGHTS = 10_000_000


class SyntheticClients(DataParams):
    """Clients with a linear classifier and a region of their own: Li et al.'s synthetic(α, β).

    No table holds the rows: a client's are made from (seed, client) when it is asked, so a million
    clients cost 24 MB. The clients are the data set's own: use `partition: given`.
    """

    name: Literal["synthetic_clients"] = "synthetic_clients"
    clients: int = Field(1000, ge=1, le=10**9, description="Number of clients N.")
    rows: int | list[int] = Field(
        20,
        description="Training rows of each client, at least 1: one number, or [least, most] for "
        "numbers drawn uniformly.",
    )
    rows_sigma: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        description="σ ≥ 0 of log-normal numbers of rows, round(rows · exp(σ z)) with z ~ N(0, 1) "
        "and at least 1; 0: all have `rows`.",
    )
    max_rows: int = Field(
        10_000, ge=1, description="Most rows that a client may have, where they are log-normal."
    )
    features: int = Field(60, ge=1, description="Number of features d.")
    classes: int = Field(10, ge=2, description="Number of classes C.")
    alpha: float = Field(
        0.0,
        ge=0.0,
        description="α ≥ 0, standard deviation of the mean u of a client's weights; u is the same "
        "for all classes and moves no label.",
    )
    beta: float = Field(
        0.0,
        ge=0.0,
        description="β ≥ 0, standard deviation of the mean B of the centre v of a client's "
        "features.",
    )
    shared: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share, in [0, 1], of the variance of W and b that all clients have in "
        "common. 0: each has a concept of its own, as published; 1: one concept for all.",
    )
    test_clients: int = Field(
        100,
        ge=0,
        le=100_000,
        description="Further clients, who never train, whose rows are the server's test set; 0: "
        "no test set.",
    )
    validation_clients: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Further clients whose rows are the server's validation set; 0: none.",
    )

    def build(self, seed: int) -> FederatedData:
        """Returns the federation; raises ScenarioError for numbers that make no sense."""
        self._check()
        made = _Generator(self, seed)
        classes = tuple(map(str, range(self.classes)))
        sizes = self.sizes(seed, "train", self.clients)

        def make(client: int) -> Examples:
            return made.rows("train", client, int(sizes[client]))

        def pooled(part: str, clients: int) -> Examples | None:
            counts = self.sizes(seed, part, clients).tolist()
            parts = [made.rows(part, client, count) for client, count in enumerate(counts)]
            return joined(parts) if parts else None

        return FederatedData(
            info=DataInfo(self.name, (self.features,), self.classes, "class", None, classes),
            train=joined([make(client) for client in range(min(SAMPLED, self.clients))]),
            shards=Partition.sized(sizes),
            validation=pooled("validation", self.validation_clients),
            test=pooled("test", self.test_clients),
            make=make,
        )

    def sizes(self, seed: int, part: str, clients: int) -> Rows:
        """Returns the number of rows of each client of a part (train, test, …), (clients,)."""
        rng = generator(seed, f"data.synthetic_clients.{part}.sizes")
        if isinstance(self.rows, list):
            least, most = self.rows
            uniform: Rows = rng.integers(least, most, clients, np.int64, endpoint=True)
            return uniform
        if not self.rows_sigma:
            return np.full(clients, self.rows, np.int64)
        drawn = np.rint(self.rows * np.exp(self.rows_sigma * rng.standard_normal(clients)))
        sizes: Rows = np.clip(drawn, 1, self.max_rows).astype(np.int64)
        return sizes

    def _check(self) -> None:
        rows, problems = self.rows, []
        if isinstance(rows, list) and (len(rows) != 2 or not 1 <= rows[0] <= rows[1]):
            hint = "Write one number, or [least, most] with 1 ≤ least ≤ most"
            problems.append(Problem("data.rows", "is no range", rows, hint=hint))
        elif isinstance(rows, list) and self.rows_sigma:
            hint = "Write one number, the median, or leave rows_sigma out"
            problems.append(Problem("data.rows", "is a range and log-normal", rows, hint=hint))
        elif isinstance(rows, int) and rows < 1:
            problems.append(Problem("data.rows", "must be at least 1", rows))
        if self.features * self.classes > MAX_WEIGHTS:
            what = f"times classes is {self.features * self.classes}, more than {MAX_WEIGHTS}"
            problems.append(Problem("data.features", what, self.features))
        if problems:
            raise ScenarioError(problems)


class _Generator:
    """Makes clients' rows; the numbers depend on (seed, part, client) alone."""

    def __init__(self, params: SyntheticClients, seed: int) -> None:
        self.params, self.seed = params, seed
        self.scale = np.arange(1, params.features + 1) ** -0.6  # the square root of j^-1.2

    @cached_property
    def common(self) -> Array:
        """What the clients' weights and intercepts have in common, (features + 1, classes)."""
        rng = generator(self.seed, "data.synthetic_clients.common")
        return rng.standard_normal((self.params.features + 1, self.params.classes))

    def rows(self, part: str, client: int, count: int) -> Examples:
        """Returns `count` rows of a client."""
        p = self.params
        rng = generator(self.seed, f"data.synthetic_clients.{part}", client)
        weight_mean, centre_mean = rng.standard_normal(2) * (p.alpha, p.beta)
        centre = centre_mean + rng.standard_normal(p.features)
        x = centre + self.scale * rng.standard_normal((count, p.features))
        weights = weight_mean + p.shared**0.5 * self.common
        if p.shared < 1.0:
            weights = weights + (1.0 - p.shared) ** 0.5 * rng.standard_normal(self.common.shape)
        y = (x @ weights[:-1] + weights[-1]).argmax(axis=1)
        return Examples(x.astype(p.dtype), y.astype(np.int64, copy=False))


def joined(parts: list[Examples]) -> Examples:
    """Returns the rows of all parts; their weights and columns are left out."""
    return Examples(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))
