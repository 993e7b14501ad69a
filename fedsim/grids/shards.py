"""The clients' data as tensors: one table that stays on the device, or rows made when asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.partition import Partition

if TYPE_CHECKING:
    from fedsim.data import Examples, FederatedData


RESIDENT_BYTES = 2**28
"""Of gathered shards, or of rows made when asked for, that are kept between rounds."""

Integers = NDArray[np.int64]
B = TypeVar("B", bound=tuple[Tensor, ...])


def to_tensor(array: np.ndarray[Any, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the array as a tensor; floating-point values get `dtype`."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


class Table:
    """Examples as tensors: x (n, *shape), y (n, ...), weight (n,)."""

    def __init__(self, examples: Examples, dtype: torch.dtype, device: torch.device) -> None:
        self.x = to_tensor(examples.x, dtype, device)
        self.y = to_tensor(examples.y, dtype, device)
        weight = np.ones(len(examples)) if examples.weight is None else examples.weight
        self.weight = to_tensor(weight, dtype, device)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def bytes(self) -> int:
        """What the tensors take."""
        return _bytes((self.x, self.y, self.weight))


@dataclass(frozen=True)
class Held:
    """Where some clients' rows are in a table.

    rows: (total,) int64 rows of the table, None for 0, 1, 2, …; client c holds
    rows[starts[c] : starts[c] + sizes[c]]. partitions, starts, sizes: (clients,) int64.
    """

    table: Table
    rows: Integers | None
    partitions: Integers
    starts: Integers
    sizes: Integers

    def index(self, positions: Integers) -> Integers:
        """Returns the table's rows at positions (clients, …) of each shard; −1 stays −1."""
        starts = self.starts.reshape(-1, *(1,) * (positions.ndim - 1))
        flat = starts + positions
        rows = flat if self.rows is None else self.rows[np.maximum(flat, 0)]
        if positions.size and int(positions.min()) < 0:
            rows = np.where(positions < 0, -1, rows)
        return rows

    def whole(self, width: int | None = None) -> Integers:
        """Returns every row of each client as (clients, width); −1 pads.

        width: by default the largest size.
        """
        position = np.arange(int(self.sizes.max(initial=0)) if width is None else width)
        return self.index(np.where(position < self.sizes[:, None], position, -1))

    def flat(self) -> tuple[Integers, Integers]:
        """Returns all rows, client after client, and for each the client it belongs to."""
        owner = np.repeat(np.arange(len(self.sizes)), self.sizes)
        ends = np.cumsum(self.sizes)
        at = np.arange(len(owner)) - np.repeat(ends - self.sizes, self.sizes) + self.starts[owner]
        return (at if self.rows is None else self.rows[at]), owner


class Shards:
    """Who holds which rows; resident on the device from one round to the next."""

    def __init__(
        self, data: FederatedData, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self.sample = Table(data.train, dtype, self.device)
        """The whole table, or some rows where the clients' are made when asked for."""
        self._make = data.make
        self._training = Partition.of(data.shards)
        self.sizes = self._training.sizes
        """Rows that each partition trains on, (partitions,) int64."""
        self.ragged = bool((self.sizes != self.sizes[:1]).any())
        self._evaluation = self._training
        if data.holdouts is not None:
            self._evaluation = Partition.of(data.holdouts)
        self._made: OrderedDict[int, Examples] = OrderedDict()
        self._made_bytes = 0
        self._resident: OrderedDict[tuple[int, ...], tuple[Tensor, ...]] = OrderedDict()
        self._resident_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._training)

    def training(self, partitions: Sequence[int] | Integers) -> Held:
        """Returns the rows that the partitions train on."""
        return self._held(self._training, partitions)

    def evaluation(self, partitions: Sequence[int] | Integers) -> Held:
        """Returns the partitions' held-out rows, or their training rows if none are held out."""
        return self._held(self._evaluation, partitions)

    def evaluation_sizes(self, partitions: Sequence[int] | Integers) -> Integers:
        """Returns the number of rows of `evaluation`, (clients,) int64, without making them."""
        return self._evaluation.sizes[np.asarray(partitions, np.int64)]

    def _held(self, whose: Partition, partitions: Sequence[int] | Integers) -> Held:
        ids = np.asarray(partitions, np.int64)
        sizes = whose.offsets[ids + 1] - whose.offsets[ids]
        if self._make is None:
            return Held(self.sample, whose.rows, ids, whose.offsets[ids], sizes)
        made = [self._examples(int(p), int(n)) for p, n in zip(ids, sizes, strict=True)]
        table = Table(_concatenated(made), self.dtype, self.device)
        return Held(table, None, ids, np.cumsum(sizes) - sizes, sizes)

    def _examples(self, partition: int, size: int) -> Examples:
        """Returns the examples made for a partition; those last used are kept."""
        with self._lock:
            if partition in self._made:
                self._made.move_to_end(partition)
                return self._made[partition]
        assert self._make is not None
        found = self._make(partition)
        if len(found) != size:
            raise ValueError(
                f"the data made for client {partition} has {len(found)} rows, not the {size} that"
                " were announced"
            )
        with self._lock:
            if partition not in self._made:
                self._made[partition] = found
                self._made_bytes += found.x.nbytes + found.y.nbytes
            while self._made_bytes > RESIDENT_BYTES and len(self._made) > 1:
                _, old = self._made.popitem(last=False)
                self._made_bytes -= old.x.nbytes + old.y.nbytes
        return found

    def resident(self, partitions: tuple[int, ...], gather: Callable[[], B]) -> B:
        """Returns what gather() returns, a NamedTuple of tensors, kept for the next round.

        Those used longest ago are dropped beyond RESIDENT_BYTES in all.
        """
        with self._lock:
            found = self._resident.get(partitions)
            if found is not None:
                self._resident.move_to_end(partitions)
                return cast(B, found)
        made = gather()
        with self._lock:
            if partitions not in self._resident:
                self._resident[partitions] = made
                self._resident_bytes += _bytes(made)
            while self._resident_bytes > RESIDENT_BYTES and len(self._resident) > 1:
                _, old = self._resident.popitem(last=False)
                self._resident_bytes -= _bytes(old)
        return made


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _concatenated(parts: Sequence[Examples]) -> Examples:
    from fedsim.data.examples import Examples

    weighted = any(part.weight is not None for part in parts)
    return Examples(
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.y for part in parts]),
        np.concatenate([part.weights() for part in parts]) if weighted else None,
    )
