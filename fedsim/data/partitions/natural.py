"""Partitions `natural` and `given`: the data says who holds what."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.examples import DataInfo, Examples
from fedsim.data.partition import Rows
from fedsim.data.partitions.base import PartitionParams, column_of
from fedsim.errors import UserError


class Natural(PartitionParams):
    """One client for each distinct value of a column, in sorted order.

    Every row is used once, unless `clients` or `drop_small` leave some values out.
    """

    name: Literal["natural"] = "natural"
    column: str = Field(description="Column that says which client a row belongs to.")
    clients: int | None = Field(
        None,
        ge=1,
        description="Use only the N values with most rows; without it all values are clients.",
    )
    drop_small: bool = Field(
        False,
        description="Leave out values with less than min_size rows instead of refusing them.",
    )

    def assign(self, examples: Examples, info: DataInfo, seed: int) -> tuple[Rows, int]:
        """See PartitionParams.assign."""
        values = column_of(examples, self.column)
        distinct, index, counts = np.unique(values, return_inverse=True, return_counts=True)
        used = np.arange(len(distinct))
        if self.drop_small:
            used = used[counts >= self.min_size]
        small = used[counts[used] < self.min_size]
        if self.clients is not None:
            if self.clients > len(used):
                raise UserError(
                    f"partition.clients: {self.clients} clients and column {self.column!r} has "
                    f"{len(used)} usable values in the training rows; use at most {len(used)}"
                )
            used = np.sort(used[np.argsort(-counts[used], kind="stable")][: self.clients])
            small = used[counts[used] < self.min_size]
        if len(small) or not len(used):
            named = ", ".join(f"{distinct[v]!s} ({counts[v]})" for v in small[:5])
            raise UserError(
                f"partition.min_size: {len(small) or len(distinct)} values of column "
                f"{self.column!r} have less than {self.min_size} training rows"
                + (f": {named}" if named else "")
                + "; set drop_small: true, or a smaller min_size or clients"
            )
        client_of_value = np.full(len(distinct), -1, dtype=np.int64)
        client_of_value[used] = np.arange(len(used))
        return client_of_value[index.reshape(-1)], len(used)


class Given(PartitionParams):
    """The data set's own clients: its column "client" where it has one, else a client per row.

    For generators (gaussian_clients, bayesian_linear, bayesian_logistic), whose rows belong to
    clients from the start. Every row is used once.
    """

    name: Literal["given"] = "given"
    clients: int | None = Field(
        None, ge=1, description="Number of clients, checked against the data where it is written."
    )

    def assign(self, examples: Examples, info: DataInfo, seed: int) -> tuple[Rows, int]:
        """See PartitionParams.assign."""
        owner = np.arange(len(examples), dtype=np.int64)
        if "client" in examples.columns:
            owner = np.unique(examples.columns["client"], return_inverse=True)[1]
        owner = owner.reshape(-1).astype(np.int64)
        found = int(owner.max()) + 1 if len(owner) else 0
        if self.clients not in (None, found):
            raise UserError(
                f"partition.clients: {self.clients} clients and {info.name!r} comes with {found}; "
                "leave it out, or change the data's own number of clients"
            )
        return owner, found
