"""Who holds which rows, as two arrays: a million clients cost no object each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


class Partition(Sequence[Rows]):
    """The rows of each client, as views into one flat array.

    rows: (total,) int64, client after client; None where clients' rows are made when asked for, so
        that only their number is known. offsets: (clients + 1,) int64; client i holds
        rows[offsets[i] : offsets[i + 1]].
    """

    def __init__(self, rows: Rows | None, offsets: Rows) -> None:
        self.rows, self.offsets = rows, offsets

    @classmethod
    def of(cls, shards: Iterable[NDArray[Any]]) -> Partition:
        """Returns the partition of arrays of rows, one a client."""
        if isinstance(shards, Partition):
            return shards
        owned = [np.asarray(rows, np.int64) for rows in shards]
        offsets = np.zeros(len(owned) + 1, np.int64)
        np.cumsum([len(rows) for rows in owned], out=offsets[1:])
        return cls(np.concatenate(owned) if owned else np.zeros(0, np.int64), offsets)

    @property
    def sizes(self) -> Rows:
        """The number of rows of each client, (clients,) int64."""
        return np.diff(self.offsets)

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
