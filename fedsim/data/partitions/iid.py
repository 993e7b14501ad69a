"""Partition `iid`: every client holds a uniformly random, equally large share of the rows."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedsim.data.examples import DataInfo, Examples
from fedsim.data.partition import Rows
from fedsim.data.partitions.base import SizedPartitionParams
from fedsim.random import generator


class IID(SizedPartitionParams):
    """Rows are shuffled and dealt out; sizes differ by at most one. Every row is used once."""

    name: Literal["iid"] = "iid"

    def assign(self, examples: Examples, info: DataInfo, seed: int) -> tuple[Rows, int]:
        """See PartitionParams.assign."""
        n = len(examples)
        self.check_enough_rows(n)
        owner = np.arange(n, dtype=np.int64) % self.clients
        return generator(seed, "data.partition.iid").permutation(owner), self.clients
