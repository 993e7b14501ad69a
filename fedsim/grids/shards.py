"""The clients' data as one table of tensors and, for each partition, its rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedsim.data import Examples, FederatedData


RESIDENT_BYTES = 2**28
"""Of gathered shards that are kept between rounds, beside the table itself."""

B = TypeVar("B", bound=tuple[Tensor, ...])


def _bytes(kept: Iterable[tuple[Tensor, ...]]) -> int:
    return sum(t.numel() * t.element_size() for batch in kept for t in batch)


def to_tensor(values: np.ndarray[Any, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns values as a tensor; floating values get `dtype`, whole numbers stay int64."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.to(device, dtype if tensor.is_floating_point() else torch.int64)


class Table:
    """Examples on a device: x (n, *shape), y (n, ...), weight (n,)."""

    def __init__(self, examples: Examples, dtype: torch.dtype, device: torch.device) -> None:
        self.x = to_tensor(examples.x, dtype, device)
        self.y = to_tensor(examples.y, dtype, device)
        weight = np.ones(len(examples)) if examples.weight is None else examples.weight
        self.weight = to_tensor(weight, dtype, device)

    def __len__(self) -> int:
        return len(self.x)


class Shards:
    """Who holds which rows; resident on the device from one round to the next."""

    def __init__(
        self, data: FederatedData, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self.table = Table(data.train, dtype, self.device)
        self._rows = [np.asarray(rows, np.int64) for rows in data.shards]
        self._padded: dict[int, np.ndarray[Any, Any]] = {}
        holdouts = data.holdouts or ()
        self._holdouts = [np.asarray(rows, np.int64) for rows in holdouts]

        self._resident: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def resident(self, partitions: tuple[int, ...], gather: Callable[[], B]) -> B:
        """Returns what gather() returns, a NamedTuple of tensors, kept for the next round.

        The oldest are dropped beyond RESIDENT_BYTES in all.
        """
        with self._lock:
            found = self._resident.get(partitions)
        if found is None:
            found = gather()
            with self._lock:
                self._resident[partitions] = found
                while _bytes(self._resident.values()) > RESIDENT_BYTES and len(self._resident) > 1:
                    self._resident.pop(next(iter(self._resident)))
        return cast(B, found)

    def rows(self, partition: int) -> np.ndarray[Any, Any]:
        """Returns the rows that the partition trains on."""
        return self._rows[partition]

    def padded_rows(self, partition: int) -> np.ndarray[Any, Any]:
        """Returns `rows` with −1 at the end, so that position −1 is no row."""
        if partition not in self._padded:
            self._padded[partition] = np.append(self._rows[partition], -1)
        return self._padded[partition]

    def evaluation_rows(self, partition: int) -> np.ndarray[Any, Any]:
        """Returns the partition's held-out rows, or its training rows if it holds none out."""
        return self._holdouts[partition] if self._holdouts else self._rows[partition]

    def n_examples(self, partition: int) -> int:
        """Returns how many rows the partition trains on."""
        return len(self._rows[partition])
