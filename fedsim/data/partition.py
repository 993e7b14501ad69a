"""Who holds which rows, as two arrays: a million clients cost no object each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import UserError

Rows = NDArray[np.int64]


class Partition(Sequence[Rows]):
    """The rows of each client, as views into one flat array.

    rows: (total,) int64, client after client; None where clients' rows are made when asked for, so
        that only their number is known. offsets: (clients + 1,) int64 from 0 to total; client i
        holds rows[offsets[i] : offsets[i + 1]].
    """

    def __init__(self, rows: Rows | None, offsets: Rows) -> None:
        self.rows, self.offsets = rows, offsets

    @classmethod
    def of(cls, shards: Iterable[ArrayLike], name: str = "shards") -> Partition:
        """Returns the partition of arrays or lists of rows, one a client; a Partition as it is.

        Raises UserError, which calls them `name`, where they are no rows.
        """
        if isinstance(shards, Partition):
            return shards
        owned = [np.asarray(rows) for rows in shards]
        for client, rows in enumerate(owned):
            if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
                raise UserError(f"{name}[{client}] must be a 1-d integer array of rows")
        flat = np.concatenate(owned, dtype=np.int64, casting="unsafe") if owned else _none()
        return cls(flat, offsets_of([len(rows) for rows in owned]))

    @classmethod
    def sized(cls, sizes: ArrayLike) -> Partition:
        """Returns the partition of clients of whom only the number of rows is known, (clients,)."""
        return cls(None, offsets_of(sizes))

    @property
    def sizes(self) -> Rows:
        """The number of rows of each client, (clients,) int64."""
        return np.diff(self.offsets)

    @property
    def total(self) -> int:
        """The number of rows of all clients together."""
        return int(self.offsets[-1])

    def owners(self) -> Rows:
        """Returns (total,) int64: the client that holds the row at each place of `rows`."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def take(self, clients: NDArray[Any]) -> Partition:
        """Returns the partition of these clients alone, (c,) integers, in this order."""
        offsets = offsets_of(self.sizes[clients])
        if self.rows is None:
            return Partition(None, offsets)
        shift = np.repeat(self.offsets[:-1][clients] - offsets[:-1], np.diff(offsets))
        return Partition(self.rows[np.arange(offsets[-1]) + shift], offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[Rows]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Rows: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rows]: ...
    def __getitem__(self, index: int | slice) -> Rows | list[Rows]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self.rows is None:
            raise TypeError("these clients' rows are made when asked for; no table holds them")
        index = range(len(self))[index]
        return self.rows[self.offsets[index] : self.offsets[index + 1]]


def offsets_of(sizes: ArrayLike) -> Rows:
    """Returns (clients + 1,) int64 offsets from 0 of clients with these numbers of rows."""
    counts = np.asarray(sizes, np.int64)
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _none() -> Rows:
    return np.zeros(0, np.int64)
