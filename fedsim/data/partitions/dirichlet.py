"""Partitions `dirichlet` and `label_quantity`: Dirichlet-distributed shares of every class."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.data.partition import Rows
from fedsim.data.partitions.base import LabelPartitionParams, redraw_until_large_enough


class Dirichlet(LabelPartitionParams):
    """Label skew: each class is divided over the clients by shares ~ Dir(alpha, …, alpha).

    Yurochkin et al. 2019, Li et al. 2022 (NIID-Bench). Every row is used once. Small alpha also
    makes the clients' sizes unequal; a draw in which a client has less than `min_size` rows is
    thrown away and drawn again.
    """

    name: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(
        gt=0.0,
        description="Concentration α > 0 of the Dirichlet distribution: 0.1 gives each client a "
        "few classes, 100 is nearly iid.",
    )
    self_balancing: bool = Field(
        False,
        description="Give no rows of further classes to a client that already has its equal "
        "share n/N of all rows (Li et al.); keeps the sizes closer together.",
    )
    max_tries: int = Field(100, ge=1, description="Most draws before giving up, at least 1.")

    def assign(self, examples: Examples, info: DataInfo, seed: int) -> tuple[Rows, int]:
        """See PartitionParams.assign."""
        self.check_enough_rows(len(examples))
        labels, distinct = self.labels(examples, info)
        concentration = np.full(self.clients, self.alpha)

        def draw(rng: np.random.Generator) -> Rows:
            full = len(labels) / self.clients if self.self_balancing else None
            return divide_classes(labels, len(distinct), concentration, rng, full)

        owner = redraw_until_large_enough(
            draw, self, self.max_tries, seed, f"Raise alpha (now {self.alpha:g})"
        )
        return owner, self.clients


class LabelQuantity(LabelPartitionParams):
    """Both skews: client sizes s ~ Dir(size_alpha, …), then every class by Dir(alpha · N · s).

    A client's expected share of every class is its s; alpha says how far the classes stray from
    that. With large alpha only the sizes are skewed. Every row is used once.
    """

    name: Literal["label_quantity"] = "label_quantity"
    alpha: float = Field(
        gt=0.0, description="Concentration α > 0 of each class over the clients; small is skewed."
    )
    size_alpha: float = Field(
        gt=0.0, description="Concentration > 0 of the clients' expected sizes; small is skewed."
    )
    max_tries: int = Field(100, ge=1, description="Most draws before giving up, at least 1.")

    def assign(self, examples: Examples, info: DataInfo, seed: int) -> tuple[Rows, int]:
        """See PartitionParams.assign."""
        self.check_enough_rows(len(examples))
        labels, distinct = self.labels(examples, info)
        tiny = np.finfo(np.float64).tiny

        def draw(rng: np.random.Generator) -> Rows:
            sizes = rng.dirichlet(np.full(self.clients, self.size_alpha))
            concentration = np.maximum(self.alpha * self.clients * sizes, tiny)
            return divide_classes(labels, len(distinct), concentration, rng)

        owner = redraw_until_large_enough(
            draw,
            self,
            self.max_tries,
            seed,
            f"Raise size_alpha (now {self.size_alpha:g}) or alpha (now {self.alpha:g})",
        )
        return owner, self.clients


def divide_classes(
    labels: Rows,
    num_classes: int,
    concentration: Array,
    rng: np.random.Generator,
    full: float | None = None,
) -> Rows:
    """Returns (n,) owners: the rows of each class, shuffled and cut by Dirichlet shares.

    concentration: (N,) of the Dirichlet distribution. full: clients that hold this many rows
    take none of the classes that follow.
    """
    clients = len(concentration)
    owner = np.empty(len(labels), dtype=np.int64)
    held = np.zeros(clients, dtype=np.int64)
    for label in rng.permutation(num_classes):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = dirichlet_shares(concentration, rng)
        if full is not None:
            # A class that falls only to full clients is cut by its shares as drawn.
            open_shares = np.where(held < full, shares, 0.0)
            shares = open_shares / open_shares.sum() if open_shares.sum() > 0 else shares
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        counts = np.diff(np.concatenate([[0], np.minimum(cuts, len(rows)), [len(rows)]]))
        owner[rows] = np.repeat(np.arange(clients), counts)
        held += counts
    return owner


def dirichlet_shares(concentration: Array, rng: np.random.Generator) -> Array:
    """Returns shares (N,) ~ Dir(concentration), which sum to 1 at any concentration > 0.

    Gamma variates are drawn as logarithms, log G(a) = log G(a + 1) + log(U) / a, because those
    of a concentration below 1e-3 are all zero in floating point.
    """
    with np.errstate(over="ignore"):  # log(U)/a overflows to -inf: a share of zero
        logs = np.log(rng.gamma(concentration + 1.0))
        logs = logs + np.log1p(-rng.random(len(concentration))) / concentration
    if not np.isfinite(logs.max()):
        # Every variate underflowed: in this limit one client, chosen by concentration, has all.
        winner = rng.choice(len(logs), p=concentration / concentration.sum())
        return np.where(np.arange(len(logs)) == winner, 1.0, 0.0)
    shares: Array = np.exp(logs - logs.max())
    shares /= shares.sum()
    return shares
