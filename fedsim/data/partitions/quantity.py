"""Partition `quantity_skew`: clients differ in how many rows they hold, not in which."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.data.partition import Rows
from fedsim.data.partitions.base import SizedPartitionParams
from fedsim.data.partitions.dirichlet import dirichlet_shares
from fedsim.random import generator


class QuantitySkew(SizedPartitionParams):
    """Sizes by a Dirichlet draw or a power law; which rows go where is uniformly random.

    Every client first gets `min_size` rows and the law divides the remaining ones. Every row is
    used once.
    """

    name: Literal["quantity_skew"] = "quantity_skew"
    law: Literal["dirichlet", "power"] = Field(
        "dirichlet",
        description="dirichlet: shares ~ Dir(alpha, …, alpha). power: the i-th largest client's "
        "share is proportional to i^(-exponent), and a random client is the largest.",
    )
    alpha: float = Field(
        0.5, gt=0.0, description="Concentration α > 0 of the Dirichlet law; small is skewed."
    )
    exponent: float = Field(
        1.0, ge=0.0, description="Exponent ≥ 0 of the power law; 0 gives equal sizes."
    )

    def assign(self, examples: Examples, info: DataInfo, seed: int) -> tuple[Rows, int]:
        """See PartitionParams.assign."""
        n = len(examples)
        self.check_enough_rows(n)
        rng = generator(seed, "data.partition.quantity_skew")
        if self.law == "dirichlet":
            shares = dirichlet_shares(np.full(self.clients, self.alpha), rng)
        else:
            powers = np.arange(1, self.clients + 1, dtype=np.float64) ** -self.exponent
            shares = rng.permutation(powers / powers.sum())
        sizes = self.min_size + apportion(shares, n - self.clients * self.min_size)
        return rng.permutation(np.repeat(np.arange(self.clients), sizes)), self.clients


def apportion(shares: Array, total: int) -> Rows:
    """Returns whole numbers that sum to `total`, near shares * total (largest remainders)."""
    exact = shares * total
    counts: Rows = np.floor(exact).astype(np.int64)
    remainders = np.argsort(counts - exact, kind="stable")
    counts[remainders[: total - int(counts.sum())]] += 1
    return counts
