"""What clients keep between messages: for touched clients only, and on disk beyond a budget.

A client's tensors are one record of bytes. Records of one size are the rows of one array, so a
cohort is read and written by indexing, with no object for each client. Beyond the budget the least
recently used records go to a file, many at a time and each at a place of its own: one seek and one
read bring a client back, a place that becomes free is used again, and nothing is ever rewritten to
make room. The file has no name (where the system allows it), so that nothing remains of it
whichever way the process ends; it is no checkpoint, `state_dict` is.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.errors import RunFailed
from fedsim.messages import Arrays

BUDGET = 2**30
"""Bytes of clients' states in memory, unless the scenario says otherwise."""

FIRST_SLOTS = 64
SPILLED_AT_ONCE = 8  # an eighth of what is in memory: few large writes instead of many small ones

Ids = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Form = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
"""Names, shapes and dtypes of one client's tensors, sorted by name."""


def keep_some(
    keep: Callable[[Sequence[int], Arrays], None],
    partitions: Sequence[int],
    stacked: Arrays,
    wanted: Sequence[bool],
) -> None:
    """Calls `keep` with those partitions that are wanted, and their part of the stacked states."""
    at = [i for i, is_wanted in enumerate(wanted) if is_wanted]
    if not at:
        return
    if len(at) < len(partitions):
        stacked = {name: value[torch.tensor(at)] for name, value in stacked.items()}
    keep([partitions[i] for i in at], stacked)


class ClientStates(Mapping[int, Arrays]):
    """The states of the partitions that have one, by partition; safe to use from many threads.

    budget: bytes in memory; what is beyond it is in a temporary file. folder: where that file is,
    by default the system's folder for temporary files ($TMPDIR). Raises RunFailed when the file
    cannot be written or read.
    """

    def __init__(self, budget: int = BUDGET, folder: str | os.PathLike[str] | None = None) -> None:
        self.budget, self.folder = budget, folder
        self._forms: list[Form] = []
        self._numbers: dict[Form, int] = {}
        self._pools: dict[int, _Pool] = {}  # by size of the record
        # by partition: which of _forms (-1: no state), and where in the form's pool
        self._form: Ids = np.full(0, -1, np.int64)
        self._place: Ids = np.zeros(0, np.int64)
        self._lock = threading.RLock()

    def gather(self, partitions: Sequence[int] | Ids, initial: Arrays) -> Arrays:
        """Returns the states of C partitions as tensors of (C, *shape), on initial's device.

        initial: the state (*shape) of those that have none yet. Raises RunFailed where a state has
        other names or shapes than `initial`.
        """
        ids = np.asarray(partitions, np.int64)
        with self._lock:
            self._know(ids)
            forms = self._form[ids]
            found: list[tuple[Tensor, Arrays]] = []
            for number in np.unique(forms[forms >= 0]):
                at = np.flatnonzero(forms == number)
                _check_form(self._forms[number], initial, int(ids[at[0]]))
                found.append((torch.from_numpy(at), self._read(number, ids[at])))
        stacked: Arrays = {}
        for name, start in initial.items():
            if len(found) == 1 and len(found[0][0]) == len(ids):
                stacked[name] = found[0][1][name].to(start.device)
                continue
            dtype = start.dtype
            for _, own in found:
                dtype = torch.promote_types(dtype, own[name].dtype)
            stacked[name] = start.detach().to(dtype).repeat(len(ids), *(1,) * start.dim())
            for rows, own in found:
                stacked[name][rows.to(start.device)] = own[name].to(start.device, dtype)
        return stacked

    def scatter(self, partitions: Sequence[int] | Ids, stacked: Arrays) -> None:
        """Keeps the states of C partitions, given as tensors of (C, *shape); copies them."""
        ids = np.asarray(partitions, np.int64)
        form, content = _encode(stacked, len(ids))
        last = len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]
        if len(last) < len(ids):  # a partition named twice keeps what stands last
            ids, content = ids[last], content[last]
        with self._lock:
            self._know(ids)
            number, pool = self._number(form)
            for old in np.unique(self._form[ids]):
                if old >= 0 and self._pool(old) is not pool:
                    moved = ids[self._form[ids] == old]
                    self._pool(old).free(self._place[moved])
                    self._form[moved] = -1
            for start in range(0, len(ids), pool.most):  # no more at once than fit into memory
                cut = ids[start : start + pool.most]
                known = self._form[cut] >= 0
                pool.write(cut, content[start : start + pool.most], known, self._place)
                self._form[cut] = number

    def __getitem__(self, partition: int) -> Arrays:
        with self._lock:
            if partition not in self:
                raise KeyError(partition)
            ids = np.array([partition])
            decoded = self._read(int(self._form[partition]), ids)
        return {name: tensor[0] for name, tensor in decoded.items()}

    def __setitem__(self, partition: int, state: Arrays) -> None:
        self.scatter([partition], {name: tensor[None] for name, tensor in state.items()})

    def __contains__(self, partition: object) -> bool:
        forms = self._form
        if not isinstance(partition, int | np.integer) or not 0 <= partition < len(forms):
            return False
        return bool(forms[partition] >= 0)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._form >= 0))

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self._form >= 0).tolist())

    @property
    def memory(self) -> int:
        """The bytes in memory."""
        return sum(pool.memory.nbytes for pool in self._pools.values())

    @property
    def spilled(self) -> int:
        """How many partitions' states are on disk."""
        with self._lock:
            return int(np.count_nonzero(self._place[self._form >= 0] < 0))

    def select(self, partitions: Sequence[int] | Ids) -> list[tuple[Ids, Arrays]]:
        """Returns the states of those that have one, stacked, with their partitions, by form."""
        ids = np.unique(np.asarray(partitions, np.int64))
        with self._lock:
            self._know(ids)
            forms = self._form[ids]
            return [
                (ids[forms == number], self._read(number, ids[forms == number]))
                for number in np.unique(forms[forms >= 0])
            ]

    def state_dict(self) -> Arrays:
        """Returns all states as CPU tensors named partition/name; all of them in memory."""
        tensors: Arrays = {}
        with self._lock:
            for number in range(len(self._forms)):
                ids = np.flatnonzero(self._form == number)
                for name, stacked in self._read(number, ids).items():
                    rows = zip(ids.tolist(), stacked.unbind(), strict=True)
                    tensors.update({f"{i}/{name}": row.clone() for i, row in rows})
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Adds the states that `state_dict` returned."""
        states: dict[int, Arrays] = {}
        for key, tensor in tensors.items():
            of, _, name = key.partition("/")
            states.setdefault(int(of), {})[name] = tensor
        alike: dict[Form, list[int]] = {}
        for partition, state in states.items():
            alike.setdefault(_form_of(state), []).append(partition)
        for form, ids in alike.items():
            names = [name for name, _, _ in form]
            stacked = {name: torch.stack([states[i][name] for i in ids]) for name in names}
            self.scatter(ids, stacked)

    def close(self) -> None:
        """Forgets all states and removes what is on disk."""
        with self._lock:
            for pool in self._pools.values():
                pool.close()
            self._forms, self._numbers, self._pools = [], {}, {}
            self._form = np.full(0, -1, np.int64)
            self._place = np.zeros(0, np.int64)

    def _know(self, ids: Ids) -> None:
        """Makes room for these partitions in the index."""
        needed = int(ids.max(initial=-1)) + 1
        if int(ids.min(initial=0)) < 0:
            raise ValueError(f"partitions are numbered from 0, not {ids.min()}")
        if needed > len(self._form):
            more = max(needed, 2 * len(self._form)) - len(self._form)
            self._form = np.concatenate([self._form, np.full(more, -1, np.int64)])
            self._place = np.concatenate([self._place, np.zeros(more, np.int64)])

    def _number(self, form: Form) -> tuple[int, _Pool]:
        """Returns the form's number and its pool; each pool has an equal part of the budget."""
        if form not in self._numbers:
            self._numbers[form] = len(self._forms)
            self._forms.append(form)
            size = _padded(_size(form))
            if size not in self._pools:
                self._pools[size] = _Pool(size, self.folder)
                for pool in self._pools.values():
                    pool.limit(self.budget // len(self._pools), self._place)
        number = self._numbers[form]
        return number, self._pool(number)

    def _pool(self, number: int) -> _Pool:
        return self._pools[_padded(_size(self._forms[number]))]

    def _read(self, number: int, ids: Ids) -> Arrays:
        """Returns the stacked states of partitions that have this form."""
        return _decode(self._forms[number], self._pool(number).read(self._place[ids]))


class _Pool:
    """Records of `size` bytes each, in memory up to a limit, else in a file.

    A place ≥ 0 is a row of `memory`, a place < 0 is record -1 - place of the file. `places` is
    the index by partition, in which records that move are noted.
    """

    def __init__(self, size: int, folder: str | os.PathLike[str] | None) -> None:
        self.size, self.folder = size, folder
        self.most = 1
        self.memory: Bytes = np.zeros((0, size), np.uint8)
        self.owner: Ids = np.zeros(0, np.int64)  # -1: a free row
        self.used: Ids = np.zeros(0, np.int64)  # when the row was last read or written
        self.now = 0
        self.file: IO[bytes] | None = None
        self.records = 0  # of the file
        self.unused: Ids = np.zeros(0, np.int64)  # records of the file that are free

    def limit(self, budget: int, places: Ids) -> None:
        """Sets how many bytes may be in memory; at least one record is."""
        self.most = max(1, budget // max(self.size, 1))
        if len(self.owner) > self.most:
            excess = int(np.count_nonzero(self.owner >= 0)) - self.most
            if excess > 0:
                self._spill(excess, np.zeros(len(self.owner), bool), places)
            kept = np.flatnonzero(self.owner >= 0)
            self.memory, self.owner = self.memory[kept], self.owner[kept]
            self.used = self.used[kept]
            places[self.owner] = np.arange(len(kept))

    def read(self, places: Ids) -> Bytes:
        """Returns the records at these places, (n, size)."""
        self.now += 1
        inside = places >= 0
        if inside.all():
            self.used[places] = self.now
            return self.memory[places]
        self.used[places[inside]] = self.now
        content = np.empty((len(places), self.size), np.uint8)
        content[inside] = self.memory[places[inside]]
        content[~inside] = self._read_file(-1 - places[~inside])
        return content

    def write(self, ids: Ids, content: Bytes, known: NDArray[np.bool_], places: Ids) -> None:
        """Writes at most `most` records, one a partition, into memory.

        known: (n,) says which partitions have a place in this pool already.
        """
        self.now += 1
        at = np.where(known, places[ids], -1)
        inside = at >= 0
        self.used[at[inside]] = self.now
        new = np.flatnonzero(~inside)
        if len(new):
            self.free(at[known & ~inside])
            at[new] = self._free_rows(len(new), places)
            self.owner[at[new]], self.used[at[new]] = ids[new], self.now
            places[ids[new]] = at[new]
        self.memory[at] = content

    def free(self, places: Ids) -> None:
        """Frees these places."""
        self.owner[places[places >= 0]] = -1
        self.unused = np.concatenate([self.unused, -1 - places[places < 0]])

    def close(self) -> None:
        """Removes the file."""
        if self.file is not None:
            with suppress(OSError):  # on a full disk, where what was left to write does not matter
                self.file.close()
            self.file = None

    def _free_rows(self, count: int, places: Ids) -> Ids:
        rows = np.flatnonzero(self.owner < 0)
        if len(rows) < count and len(self.owner) < self.most:
            missing = count - len(rows)
            more = max(missing, len(self.owner), FIRST_SLOTS)
            more = min(more, self.most - len(self.owner))
            self.memory = np.concatenate([self.memory, np.zeros((more, self.size), np.uint8)])
            self.owner = np.concatenate([self.owner, np.full(more, -1, np.int64)])
            self.used = np.concatenate([self.used, np.zeros(more, np.int64)])
            rows = np.flatnonzero(self.owner < 0)
        if len(rows) < count:
            fresh = self.used == self.now
            self._spill(count - len(rows), fresh, places)
            rows = np.flatnonzero(self.owner < 0)
        return rows[:count]

    def _spill(self, count: int, fresh: NDArray[np.bool_], places: Ids) -> None:
        """Moves `count` or more of the least recently used records to the file, no fresh one."""
        rows = np.flatnonzero((self.owner >= 0) & ~fresh)
        count = min(max(count, len(rows) // SPILLED_AT_ONCE), len(rows))
        rows = np.sort(rows[np.argsort(self.used[rows], kind="stable")[:count]])
        reused = np.sort(self.unused)[:count]
        records = np.concatenate([reused, self.records + np.arange(count - len(reused))])
        self._write_file(records, self.memory[rows])
        self.unused = np.sort(self.unused)[len(reused) :]
        self.records += count - len(reused)
        places[self.owner[rows]] = -1 - records
        self.owner[rows] = -1

    def _read_file(self, records: Ids) -> Bytes:
        content = np.empty((len(records), self.size), np.uint8)
        order = np.argsort(records)
        try:
            for run in _runs(records[order]):
                self._open().seek(int(records[order[run[0]]]) * self.size)
                block = self._open().read(len(run) * self.size)
                if len(block) != len(run) * self.size:
                    raise OSError("the file is shorter than what was written")
                content[order[run]] = np.frombuffer(block, np.uint8).reshape(len(run), self.size)
        except OSError as error:
            raise RunFailed(f"cannot read clients' states back from disk: {error}") from error
        return content

    def _write_file(self, records: Ids, content: Bytes) -> None:
        try:
            file = self._open()
            for run in _runs(records):
                file.seek(int(records[run[0]]) * self.size)
                file.write(content[run].tobytes())
            file.flush()
        except OSError as error:
            folder = self.folder or tempfile.gettempdir()
            raise RunFailed(
                f"cannot put clients' states beyond engine.state_budget_mb into {folder}: {error};"
                " make room there, set TMPDIR to another folder, or raise the budget"
            ) from error

    def _open(self) -> IO[bytes]:
        if self.file is None:
            self.file = tempfile.TemporaryFile(prefix="fedsim-", dir=self.folder)  # noqa: SIM115
        return self.file


def _runs(records: Ids) -> list[Ids]:
    """Returns the places of `records` (sorted), divided where two do not follow one another."""
    return np.split(np.arange(len(records)), np.flatnonzero(np.diff(records) != 1) + 1)


def _form_of(state: Arrays) -> Form:
    return tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(state.items()))


def _size(form: Form) -> int:
    return sum(_bytes(shape, dtype) for _, shape, dtype in form)


def _padded(size: int) -> int:
    """Returns the size rounded up by an eighth at most, so that there are few different ones."""
    step = max(1, 2 ** (size.bit_length() - 1) // 8) if size else 1
    return -(-size // step) * step


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _encode(stacked: Arrays, n: int) -> tuple[Form, Bytes]:
    """Returns the form of each of n states, and their bytes (n, padded size)."""
    form = tuple((name, tuple(t.shape[1:]), t.dtype) for name, t in sorted(stacked.items()))
    parts = []
    for name, shape, dtype in form:
        size = _bytes(shape, dtype)
        if n and size:  # torch cannot view what is empty
            flat = stacked[name].detach().cpu().contiguous().reshape(-1)
            parts.append(flat.view(torch.uint8).reshape(n, size).numpy())
    size = _size(form)
    parts.append(np.zeros((n, _padded(size) - size), np.uint8))
    return form, np.concatenate(parts, axis=1)


def _decode(form: Form, content: Bytes) -> Arrays:
    """Returns the tensors (n, *shape) that the bytes (n, size) stand for."""
    states: Arrays = {}
    start = 0
    for name, shape, dtype in form:
        end = start + _bytes(shape, dtype)
        own = content[:, start:end].copy()
        flat = (
            torch.from_numpy(own.reshape(-1)).view(dtype)
            if own.size
            else torch.empty(0, dtype=dtype)
        )
        states[name] = flat.reshape(len(content), *shape)
        start = end
    return states


def _check_form(form: Form, initial: Arrays, partition: int) -> None:
    kept = {name: shape for name, shape, _ in form}
    start = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    if kept != start:
        raise RunFailed(
            f"client {partition} keeps a state of {_told(kept)} and a new client's is"
            f" {_told(start)}; names and shapes must stay the same"
        )


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "nothing"
