"""Data set `sliced`: arrays on disk, larger than memory, of which a client's slice is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import DataParams, Dtype
from fedsim.data.check import check_examples, checked_make
from fedsim.data.examples import Array, DataInfo, Examples, FederatedData
from fedsim.data.partition import Partition
from fedsim.data.sets.npz import as_target
from fedsim.errors import Problem, ScenarioError, UserError

SCANNED = 2**20
SAMPLED = 64


class Sliced(DataParams):
    """Files of `np.save`: the rows of client after client, and where each client's begin.

    The files are mapped, not read: when a client is asked, its rows are. The clients are the
    file's own: use `partition: given`. A target of integers is a class index, one of floats real.
    """

    name: Literal["sliced"] = "sliced"
    x: str = Field(
        description="File (.npy) of (n, …) features, client after client; numbers of any type, "
        "which become `dtype`. A relative path is relative to the current directory."
    )
    y: str = Field(description="File (.npy) of (n,) or (n, k) targets.")
    offsets: str = Field(
        description="File (.npy) of (clients + 1,) integers from 0 to n: client i has the rows "
        "offsets[i] to offsets[i + 1] - 1, at least one."
    )
    weight: str | None = Field(None, description="File (.npy) of (n,) importance weights ≥ 0.")
    test_x: str | None = Field(None, description="File (.npy) of the test set's features.")
    test_y: str | None = Field(None, description="File (.npy) of the test set's targets.")
    num_classes: int | None = Field(
        None,
        ge=2,
        description="Number of classes C; without it the largest class index + 1, for which y is "
        "read through once.",
    )

    def build(self, seed: int) -> FederatedData:
        """Returns the federation; raises ScenarioError for everything wrong about the files."""
        files = self._opened()
        x, y, weight = files.x, files.y, files.weight
        offsets = np.array(files.offsets, np.int64)
        info = DataInfo(self.name, tuple(x.shape[1:]), None, "real")
        if y.dtype.kind in "iub":
            classes = self._classes(y)
            names = tuple(map(str, range(classes)))
            info = DataInfo(self.name, tuple(x.shape[1:]), classes, "class", None, names)

        def rows(start: int, end: int) -> Examples:
            weights = None if weight is None else np.array(weight[start:end], np.float64)
            return Examples(
                np.array(x[start:end], self.dtype), target(y[start:end], self.dtype), weights
            )

        shards = Partition(None, offsets)
        make = checked_make(
            lambda client: rows(offsets[client], offsets[client + 1]), shards, info, self.x
        )
        test = None
        if files.test_x is not None and files.test_y is not None:
            test = Examples(np.array(files.test_x, self.dtype), target(files.test_y, self.dtype))
            test = check_examples(test, f"{self.test_x}, {self.test_y}", info)
        sample = check_examples(rows(0, min(SAMPLED, len(x))), f"{self.x}, {self.y}", info)
        return FederatedData(info, sample, shards, test=test, make=make)

    def _classes(self, y: Array) -> int:
        """Returns the number of classes, reading y in parts; raises UserError if it cannot be."""
        if self.num_classes is not None:
            return self.num_classes
        parts = range(0, len(y), SCANNED)
        low = min(int(y[start : start + SCANNED].min()) for start in parts)
        high = max(int(y[start : start + SCANNED].max()) for start in parts)
        if low < 0:
            raise UserError(f"{self.y}: class indices go down to {low}; they start at 0")
        return max(high + 1, 2)

    def _opened(self) -> _Files:
        """Returns the mapped files, their shapes and dtypes checked."""
        problems: list[Problem] = []
        found: dict[str, Array | None] = {}
        for field in ("x", "y", "offsets", "weight", "test_x", "test_y"):
            path = getattr(self, field)
            try:
                found[field] = None if path is None else _mapped(path)
            except (OSError, ValueError, EOFError) as error:
                what = f"is not a file of one plain NumPy array (.npy): {error}"
                hint = "Write it with np.save"
                problems.append(Problem(f"data.{field}", what, path, hint=hint))
        if (self.test_x is None) != (self.test_y is None):
            problems.append(Problem("data", "test_x and test_y go together; write both or neither"))
        for field, array in found.items():
            if array is not None and (what := _wrong_kind(field, array)):
                problems.append(Problem(f"data.{field}", what, getattr(self, field)))
        x, offsets = found.get("x"), found.get("offsets")
        rows = len(x) if x is not None and x.ndim else None
        for field in ("y", "weight"):
            array = found.get(field)
            if rows is not None and array is not None and array.ndim and len(array) != rows:
                what = f"has {len(array)} rows and {self.x} has {rows}"
                problems.append(Problem(f"data.{field}", what, getattr(self, field)))
        if offsets is not None and (what := _wrong_offsets(offsets, rows)):
            problems.append(Problem("data.offsets", what, self.offsets))
        if problems:
            raise ScenarioError(problems)
        assert x is not None
        assert offsets is not None
        y = found["y"]
        assert y is not None
        return _Files(x, y, offsets, found["weight"], found["test_x"], found["test_y"])


@dataclass(frozen=True)
class _Files:
    x: Array
    y: Array
    offsets: Array
    weight: Array | None
    test_x: Array | None
    test_y: Array | None


def target(y: Array, dtype: Dtype) -> Array:
    """Returns a slice of targets in memory: integers as int64, floats in the given type."""
    return np.array(as_target(y, dtype))


def _mapped(path: str) -> Array:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}")
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays (.npz)")
    return array


def _wrong_kind(field: str, array: Array) -> str:
    """Returns what is wrong about the array's shape or type; nothing if it is right."""
    shape, kind = array.shape, array.dtype.kind
    of = f"has shape {shape} and dtype {array.dtype}"
    if field in ("x", "test_x") and (len(shape) < 2 or not shape[0] or kind not in "biuf"):
        return f"{of}; features are (n, …) numbers, n at least 1"
    if field in ("y", "test_y") and (
        len(shape) not in (1, 2) or kind not in "biuf" or (len(shape) == 2 and kind != "f")
    ):
        return f"{of}; targets are (n,) integers (classes), or (n,) or (n, k) floats"
    if field == "weight" and (len(shape) != 1 or kind not in "iuf"):
        return f"{of}; weights are (n,) numbers"
    if field == "offsets" and (len(shape) != 1 or len(array) < 2 or kind not in "iu"):
        return f"{of}; offsets are (clients + 1,) integers"
    return ""


def _wrong_offsets(offsets: Array, rows: int | None) -> str:
    if _wrong_kind("offsets", offsets):
        return ""  # that is said already
    steps = np.diff(np.asarray(offsets, np.int64))
    if int(offsets[0]) != 0 or (rows is not None and int(offsets[-1]) != rows):
        end = "" if rows is None else f" to the {rows} rows of x"
        return f"go from {offsets[0]} to {offsets[-1]}; they must go from 0{end}"
    if (steps < 1).any():
        client = int(np.flatnonzero(steps < 1)[0])
        return f"give client {client} {steps[client]} rows; each needs at least 1"
    return ""
