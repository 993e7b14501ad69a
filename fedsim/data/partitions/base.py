"""What every partition has in common: parameters, checks, and turning owners into shards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pydantic import Field

from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.data.partition import Partition, Rows, offsets_of
from fedsim.errors import Params, UserError
from fedsim.random import generator

HOPELESS = 1000
"""Clients too small in one draw, from which on no other draw is tried: it would have as many."""


class PartitionParams(Params):
    """Base of every partition's parameters."""

    name: str
    seed: int | None = Field(
        None,
        description="Seed of the partition; without it the run's seed. Set it to keep who holds "
        "what fixed while the run's seed varies.",
    )
    holdout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of each client's rows that it keeps for evaluation and never trains "
        "on, in [0, 1); rounded to whole rows, and one row always remains for training.",
    )
    min_size: int = Field(
        1,
        ge=1,
        description="Fewest rows that a client may hold, its holdout included; rows, at least 1.",
    )

    def assign(self, examples: Examples, info: DataInfo, seed: int) -> tuple[Rows, int]:
        """Returns (n,) int64 owners of the rows, -1 for nobody, and the number of clients.

        Raises UserError where no such partition exists.
        """
        raise NotImplementedError


class SizedPartitionParams(PartitionParams):
    """Base of partitions that are told how many clients there are."""

    clients: int = Field(ge=1, description="Number of clients N, at least 1.")

    def check_enough_rows(self, n: int) -> None:
        """Raises UserError if n rows cannot give every client min_size rows."""
        if self.clients > n:
            raise UserError(
                f"partition.clients: {self.clients} clients cannot share {n} training rows; "
                f"every client needs at least one, so use at most {n} clients"
            )
        if self.clients * self.min_size > n:
            raise UserError(
                f"partition.min_size: {self.clients} clients with at least {self.min_size} rows "
                f"need {self.clients * self.min_size} training rows and there are {n}; use at most "
                f"{n // self.min_size} clients or min_size {n // self.clients}"
            )


class LabelPartitionParams(SizedPartitionParams):
    """Base of partitions that skew who holds which label."""

    column: str | None = Field(
        None,
        description="Column whose values are the labels to skew; without it the target's classes.",
    )

    def labels(self, examples: Examples, info: DataInfo) -> tuple[Rows, Array]:
        """Returns the rows' labels as (n,) int64 indices into the (C,) distinct values."""
        if self.column is not None:
            values = column_of(examples, self.column)
        elif info.target == "class":
            values = examples.y
        else:
            raise UserError(
                f"partition: {self.name!r} needs classes and the target of {info.name!r} is "
                f"{info.target!r}; name a column to skew ({known_columns(examples)}), or use iid "
                "or quantity_skew"
            )
        distinct, index = np.unique(values, return_inverse=True)
        return index.reshape(-1).astype(np.int64), distinct


def column_of(examples: Examples, column: str) -> Array:
    """Returns the values of a column; raises UserError naming those that exist."""
    if column not in examples.columns:
        raise UserError(
            f"partition.column: the data has no column {column!r}; it has {known_columns(examples)}"
        )
    return examples.columns[column]


def known_columns(examples: Examples) -> str:
    """Returns the names of the columns for a message."""
    return ", ".join(repr(name) for name in sorted(examples.columns)) or "no columns"


def redraw_until_large_enough(
    draw: Callable[[np.random.Generator], Rows],
    params: SizedPartitionParams,
    max_tries: int,
    seed: int,
    help_with: str,
) -> Rows:
    """Returns the first drawn (n,) owners that give every client `min_size` rows.

    Try t draws from its own stream, so the result does not depend on what was drawn before.
    Raises UserError after `max_tries`, or after a draw that is HOPELESS, saying how far the best
    draw came and what would help.
    """
    best, tries = -1, 0
    for attempt in range(max_tries):
        owner = draw(generator(seed, f"data.partition.{params.name}", attempt))
        sizes = np.bincount(owner, minlength=params.clients)
        if sizes.min() >= params.min_size:
            return owner
        best, tries = max(best, int(sizes.min())), attempt + 1
        if np.count_nonzero(sizes < params.min_size) >= HOPELESS:
            break
    raise UserError(
        f"partition.min_size: none of {tries} draws of {params.name!r} gave each of "
        f"{params.clients} clients at least {params.min_size} rows; in the best one the smallest "
        f"client has {best}. {help_with}, use fewer clients, a smaller min_size or more max_tries"
    )


def rows_by_owner(owner: Rows, clients: int) -> Partition:
    """Returns for each client the sorted rows that it owns; those of owner -1 are nobody's."""
    order = np.argsort(owner, kind="stable").astype(np.int64, copy=False)
    offsets = offsets_of(np.bincount(owner[owner >= 0], minlength=clients))
    return Partition(order[len(order) - offsets[-1] :], offsets)


def hold_out(shards: Partition, fraction: float, seed: int) -> tuple[Partition, Partition | None]:
    """Returns (shards, holdouts): a random share of each client's rows moves to its holdout."""
    if fraction == 0.0 or shards.rows is None:
        return shards, None
    sizes, owners = shards.sizes, shards.owners()
    counts = np.minimum(np.rint(fraction * sizes), np.maximum(sizes - 1, 0)).astype(np.int64)
    # Each client's places in random order: those of all clients are shuffled, then sorted back.
    shuffled = generator(seed, "data.holdout").permutation(shards.total)
    shuffled = shuffled[np.argsort(owners[shuffled], kind="stable")]
    within = np.arange(shards.total) - np.repeat(shards.offsets[:-1], sizes)
    held = np.zeros(shards.total, dtype=bool)
    held[shuffled[within < np.repeat(counts, sizes)]] = True
    kept = Partition(shards.rows[~held], offsets_of(sizes - counts))
    return kept, Partition(shards.rows[held], offsets_of(counts))
