"""Partition `shards`: rows sorted by label, cut into shards, a few dealt to each client."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.examples import DataInfo, Examples
from fedsim.data.partition import Rows
from fedsim.data.partitions.base import LabelPartitionParams
from fedsim.errors import UserError
from fedsim.random import generator


class Shards(LabelPartitionParams):
    """McMahan et al. 2017: most clients see only about `shards_per_client` classes.

    Shards differ in size by at most one row. Every row is used once.
    """

    name: Literal["shards"] = "shards"
    shards_per_client: int = Field(
        2, ge=1, description="Shards that each client is dealt, at least 1."
    )

    def assign(self, examples: Examples, info: DataInfo, seed: int) -> tuple[Rows, int]:
        """See PartitionParams.assign."""
        n, shards = len(examples), self.clients * self.shards_per_client
        self.check_enough_rows(n)
        if shards > n:
            raise UserError(
                f"partition.shards_per_client: {self.clients} clients × {self.shards_per_client} "
                f"shards are {shards} shards and there are {n} training rows; use at most "
                f"{n // self.clients}"
            )
        labels, _ = self.labels(examples, info)
        rng = generator(seed, "data.partition.shards")
        shuffled = rng.permutation(n)
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        shard_of_place = np.arange(n) * shards // n
        client_of_shard = rng.permutation(np.arange(shards) % self.clients)
        owner = np.empty(n, dtype=np.int64)
        owner[by_label] = client_of_shard[shard_of_place]
        return owner, self.clients
