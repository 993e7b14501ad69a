"""Checks on arrays that users hand in: what is wrong is said before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import Any

import numpy as np

from fedsim.data.examples import DataInfo, Examples, FederatedData
from fedsim.data.partition import Partition
from fedsim.errors import RunFailed, UserError


def check_examples(examples: Examples, where: str, info: DataInfo | None = None) -> Examples:
    """Returns the examples with integer targets as int64; raises UserError for what is wrong.

    `where` is the file or import path that the message names.
    """
    x, y = examples.x, examples.y
    _need_arrays(where, x=x, y=y)
    if x.ndim < 2 or x.dtype.kind != "f":
        raise UserError(
            f"{where}: x has shape {x.shape} and dtype {x.dtype}; it must be (n, …features) of "
            "float32 or float64"
        )
    if x.dtype not in (np.float32, np.float64):
        raise UserError(f"{where}: x is {x.dtype}; make it float32 or float64")
    if len(x) == 0:
        raise UserError(f"{where}: there are no rows")
    if y.dtype.kind not in "iuf" or y.ndim not in (1, 2) or (y.dtype.kind != "f" and y.ndim != 1):
        raise UserError(
            f"{where}: y has shape {y.shape} and dtype {y.dtype}; it must be (n,) integers "
            "(classes) or (n,) or (n, k) floats"
        )
    for name, values in [("y", y), ("weight", examples.weight), *examples.columns.items()]:
        if values is None:
            continue
        _need_arrays(where, **{name: values})
        if len(values) != len(x) or (name != "y" and values.ndim != 1):
            raise UserError(
                f"{where}: {name} has shape {values.shape} and x has {len(x)} rows; one value is "
                "needed for each row"
            )
    _need_finite(where, examples)
    if y.dtype.kind in "iu":
        examples = replace(examples, y=y.astype(np.int64))
        if y.min() < 0:
            raise UserError(f"{where}: class indices in y go down to {y.min()}; they start at 0")
    if info is not None:
        _need_agreement(where, examples, info)
    return examples


def infer_info(name: str, examples: Examples, num_classes: int | None = None) -> DataInfo:
    """Returns what the arrays tell: integer y means classes 0..max(y), at least two."""
    shape = tuple(examples.x.shape[1:])
    if examples.y.dtype.kind == "f":
        if num_classes is not None:
            raise UserError("data.num_classes: y holds floats; class indices are integers")
        return DataInfo(name, shape, None, "real")
    found = max(int(examples.y.max()) + 1, 2)
    if num_classes is not None and found > num_classes:
        raise UserError(f"data.num_classes: {num_classes} and y holds the class {found - 1}")
    classes = num_classes or found
    return DataInfo(name, shape, classes, "class", None, tuple(map(str, range(classes))))


def check_federated(data: FederatedData, where: str) -> FederatedData:
    """Returns the data; raises UserError if its parts do not fit together."""
    parts = [("train", data.train), ("validation", data.validation), ("test", data.test)]
    checked: dict[str, Any] = {
        name: check_examples(part, f"{where}: {name}", data.info)
        for name, part in parts
        if part is not None
    }
    if not data.shards:
        raise UserError(f"{where}: shards is empty; it holds one array of rows for each client")
    if data.make is not None:
        return _check_made(replace(data, **checked), where)
    if data.holdouts is not None and len(data.holdouts) != len(data.shards):
        raise UserError(
            f"{where}: {len(data.holdouts)} holdouts and {len(data.shards)} shards; there is one "
            "of each for every client"
        )
    groups = {"shards": data.shards}
    if data.holdouts is not None:
        groups["holdouts"] = data.holdouts
    for name, group in groups.items():
        checked[name] = _check_rows(group, f"{where}: {name}", len(data.train))
    if not data.shards.sizes.all():
        empty = int(np.flatnonzero(data.shards.sizes == 0)[0])
        raise UserError(f"{where}: client {empty} has no rows to train on")
    everything = np.concatenate([checked[name].rows for name in groups])
    if np.bincount(everything).max() > 1:
        raise UserError(f"{where}: some row of train is in more than one shard or holdout")
    return replace(data, **checked)


def _check_made(data: FederatedData, where: str) -> FederatedData:
    """Returns data whose rows are made, each client's checked when it is; makes two of them."""
    assert data.make is not None
    if data.shards.rows is not None or data.holdouts is not None:
        raise UserError(
            f"{where}: with make, shards says only how many rows a client has,"
            " Partition.sized(sizes), and nothing is held out (holdouts=None)"
        )
    offsets = data.shards.offsets
    if offsets[0] != 0 or (np.diff(offsets) < 1).any():
        raise UserError(f"{where}: shards must give every client at least one row")
    make = checked_make(data.make, data.shards, data.info, where)
    for client in sorted({0, data.clients - 1}):
        try:
            make(client)
        except RunFailed as error:
            raise UserError(str(error)) from error
    return replace(data, make=make)


def checked_make(
    make: Callable[[int], Examples], shards: Partition, info: DataInfo, where: str
) -> Callable[[int], Examples]:
    """Returns `make`, raising RunFailed where it raises or its rows are not as declared."""

    sizes = shards.sizes

    def checked(client: int) -> Examples:
        what = f"{where}: client {client}"
        try:
            made = make(client)
        except Exception as error:  # the user's function may raise anything
            raise RunFailed(f"{what}: make raised {type(error).__name__}: {error}") from error
        if not isinstance(made, Examples):
            raise RunFailed(f"{what}: make returned {type(made).__name__}, not Examples")
        if _surely_right(made, info) and len(made.x) == sizes[client]:
            return made
        try:
            made = check_examples(made, what, info)
        except UserError as error:
            raise RunFailed(str(error)) from error
        if len(made) != sizes[client]:
            raise RunFailed(
                f"{what}: make returned {len(made)} rows and shards says {sizes[client]}"
            )
        return made

    return checked


def _surely_right(made: Examples, info: DataInfo) -> bool:
    """Says that check_examples would find nothing, by the fewest operations on usual rows.

    Thousands of clients' rows are made in a round. False means only that it has to look.
    """
    x, y = made.x, made.y
    if not (type(x) is type(y) is np.ndarray and x.shape[1:] == info.input_shape and len(x)):
        return False
    if made.weight is not None or made.columns or y.shape != x.shape[:1]:
        return False
    if (
        x.dtype.kind != "f"
        or x.dtype.itemsize not in (4, 8)
        or not isfinite(np.add.reduce(x, axis=None))
    ):
        return False
    if info.target != "class":
        return y.dtype.kind == "f" and isfinite(np.add.reduce(y))
    if y.dtype != np.int64 or info.num_classes is None:
        return False
    return bool(np.maximum.reduce(y.view(np.uint64)) < info.num_classes)  # negative ones are large


def _check_rows(partition: Partition, where: str, n: int) -> Partition:
    """Returns the partition with each client's rows sorted, all of them in 0..n-1."""
    rows, offsets = partition.rows, partition.offsets
    if rows is None:
        raise UserError(f"{where} has offsets and no rows; without rows, make(client) is needed")
    if offsets[0] != 0 or offsets[-1] != len(rows) or (np.diff(offsets) < 0).any():
        raise UserError(f"{where}: offsets must go from 0 up to the {len(rows)} rows")
    owners = partition.owners()
    outside = np.flatnonzero((rows < 0) | (rows >= n))
    if len(outside):
        raise UserError(
            f"{where}[{owners[outside[0]]}] must hold rows of train, 0..{n - 1}, and holds"
            f" {rows[outside[0]]}"
        )
    if ((np.diff(rows) < 0) & (np.diff(owners) == 0)).any():
        rows = rows[np.lexsort((rows, owners))]
    return Partition(rows, offsets)


def _need_arrays(where: str, **arrays: Any) -> None:
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise UserError(f"{where}: {name} is {type(array).__name__}; make it a NumPy array")


def _need_finite(where: str, examples: Examples) -> None:
    for name, values in (("x", examples.x), ("y", examples.y), ("weight", examples.weight)):
        if values is None:
            continue
        if values.dtype.kind not in "iuf":
            raise UserError(f"{where}: {name} has dtype {values.dtype}; it must hold numbers")
        bad = ~np.isfinite(values)
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise UserError(f"{where}: {name} is not finite in row {row}; no NaN or infinity")
    if examples.weight is not None and (examples.weight < 0).any():
        row = int(np.flatnonzero(examples.weight < 0)[0])
        raise UserError(f"{where}: weight is negative in row {row}; a weight is at least 0")


def _need_agreement(where: str, examples: Examples, info: DataInfo) -> None:
    if tuple(examples.x.shape[1:]) != tuple(info.input_shape):
        raise UserError(
            f"{where}: x has features of shape {examples.x.shape[1:]} and the data declares "
            f"{info.input_shape}"
        )
    if info.target == "class":
        if examples.y.dtype.kind != "i" or info.num_classes is None:
            raise UserError(
                f"{where}: the target is declared as classes; y must hold integers (it is "
                f"{examples.y.dtype}) and num_classes must be given ({info.num_classes})"
            )
        if examples.y.max() >= info.num_classes:
            raise UserError(
                f"{where}: y holds the class {examples.y.max()} and the data declares "
                f"{info.num_classes} classes, 0..{info.num_classes - 1}"
            )
    elif examples.y.dtype.kind == "i":
        raise UserError(f"{where}: the target is declared {info.target!r}; y must hold floats")
