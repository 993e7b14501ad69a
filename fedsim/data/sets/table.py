"""Turns named columns, wherever they come from, into examples: shared by CSV and Parquet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import Source, TableParams
from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.errors import Problem, ScenarioError, UserError

MAX_PROBLEMS = 10
SPLITS = ("train", "validation", "test")


class ColumnParams(TableParams):
    """Which columns of a table are what. Column names are those of the file's header."""

    path: str = Field(description="The file; a relative path is relative to the current directory.")
    target: str = Field(description="Column to predict.")
    target_kind: Literal["class", "real"] = Field(
        "class",
        description="class: each distinct value of the target is a class, numbered in sorted "
        "order. real: the target is a number.",
    )
    features: list[str] | None = Field(
        None,
        description="Feature columns, in order; without it every column that is not named as "
        "something else here.",
    )
    one_hot: list[str] = Field(
        default_factory=list,
        description="Feature columns of text, each of which becomes one 0/1 feature per distinct "
        "value.",
    )
    client: str | None = Field(
        None,
        description="Column that says whose row it is; use partition: {name: natural, column: …} "
        "with it, or name: given.",
    )
    weight: str | None = Field(None, description="Column of importance weights ≥ 0.")
    split: str | None = Field(
        None, description="Column that says 'train', 'validation' or 'test' for each row."
    )
    columns: list[str] = Field(
        default_factory=list,
        description="Further columns that partitions may use and that are no features.",
    )
    classes: list[str | int] | None = Field(
        None,
        description="All values that the target may have, in the order of their indices; without "
        "it those that occur, sorted.",
    )
    missing: Literal["refuse", "drop"] = Field(
        "refuse",
        description="What to do with rows that have empty values: refuse them or drop them.",
    )


@dataclass(frozen=True)
class Table:
    """Columns of text or numbers, all of one length; `lines` are the rows' line or row numbers."""

    file: str
    columns: Mapping[str, Array]
    lines: Array

    def take(self, rows: Array) -> Table:
        """Returns the table of the given rows."""
        taken = {name: values[rows] for name, values in self.columns.items()}
        return Table(self.file, taken, self.lines[rows])


def source_of(table: Table, params: ColumnParams) -> Source:
    """Returns the table's examples; raises ScenarioError listing what is wrong, with lines."""
    features = _feature_columns(table, params)
    table = _without_missing(table, params, features)
    x, names = _features(table, params, features)
    y, class_names = _target(table, params)
    weight = None
    if params.weight is not None:
        weight = numbers(table, params.weight, "data.weight")
        _refuse(table, params.weight, weight < 0, "a weight is at least 0", "data.weight")
    natural = {name: table.columns[name] for name in params.columns}
    if params.client is not None:
        natural |= {"client": table.columns[params.client]}
        natural |= {params.client: table.columns[params.client]}
    info = DataInfo(
        params.name,
        (x.shape[1],),
        len(class_names) if class_names is not None else None,
        params.target_kind,
        names,
        class_names,
    )
    target = y if params.target_kind == "class" else y.astype(params.dtype)
    examples = Examples(x.astype(params.dtype), target, weight, natural)
    return _split(examples, info, table, params)


def numbers(table: Table, column: str, field: str) -> Array:
    """Returns a column as (n,) float64; raises ScenarioError naming the lines that are none."""
    values = table.columns[column]
    if values.dtype.kind in "iufb":
        parsed = values.astype(np.float64)
    else:
        try:
            parsed = values.astype(np.float64)
        except ValueError:
            bad = np.array([not _is_number(str(value)) for value in values])
            hint = f"list {column!r} in data.one_hot, or leave it out of data.features"
            if field != "data.features":
                hint = "it must hold numbers only"
            _refuse(table, column, bad, "not a number", field, hint)
    _refuse(table, column, ~np.isfinite(parsed), "not a finite number", field)
    return parsed


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _feature_columns(table: Table, params: ColumnParams) -> list[str]:
    roles = [params.target, params.client, params.weight, params.split, *params.columns]
    named = [name for name in roles if name is not None]
    known = list(table.columns)
    problems = []
    for name in dict.fromkeys([*named, *params.one_hot, *(params.features or [])]):
        if name not in table.columns:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known[:20])}"
            problems.append(Problem("data", f"no column {name!r}", file=table.file, hint=hint))
    if problems:
        raise ScenarioError(problems)
    features = params.features
    if features is None:
        features = [name for name in known if name not in named]
    if params.target in features:
        raise UserError(f"data.features: the target {params.target!r} cannot be a feature")
    if stray := [name for name in params.one_hot if name not in features]:
        raise UserError(f"data.one_hot: {stray} are not among the feature columns")
    if not features:
        raise UserError(f"{table.file}: data.features: no feature columns are left")
    return features


def _without_missing(table: Table, params: ColumnParams, features: list[str]) -> Table:
    roles = [params.target, params.client, params.weight, params.split, *params.columns]
    used = [*features, *(name for name in roles if name is not None)]
    missing = {name: _is_missing(table.columns[name]) for name in used}
    if params.missing == "drop":
        kept = table.take(np.flatnonzero(~np.any(list(missing.values()), axis=0)))
        if not len(kept.lines):
            raise UserError(f"{table.file}: data.missing: every row has an empty value")
        return kept
    problems = [
        Problem("data", f"column {name!r} is empty", None, int(table.lines[row]),
                "fill it in, or set data.missing: drop", table.file)
        for name, mask in missing.items()
        for row in np.flatnonzero(mask)[:MAX_PROBLEMS]
    ]  # fmt: skip
    if problems:
        raise ScenarioError(sorted(problems, key=lambda p: p.line or 0)[:MAX_PROBLEMS])
    return table


def _is_missing(values: Array) -> Array:
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype.kind in "OUT":
        words = np.char.lower(np.char.strip(values.astype(str)))
        return np.isin(words, ["", "na", "nan", "null", "none", "?"])
    return np.zeros(len(values), dtype=bool)


def _features(
    table: Table, params: ColumnParams, features: list[str]
) -> tuple[Array, tuple[str, ...]]:
    parts: list[Array] = []
    names: list[str] = []
    problems: list[Problem] = []
    for name in features:
        if name in params.one_hot:
            distinct, index = np.unique(table.columns[name].astype(str), return_inverse=True)
            parts.extend(np.eye(len(distinct))[index.reshape(-1)].T)
            names.extend(f"{name}={value}" for value in distinct)
            continue
        try:
            parts.append(numbers(table, name, "data.features"))
            names.append(name)
        except ScenarioError as error:
            problems.extend(error.problems[:2])
    if problems:
        raise ScenarioError(problems[:MAX_PROBLEMS])
    return np.stack(parts, axis=1), tuple(names)


def _target(table: Table, params: ColumnParams) -> tuple[Array, tuple[str, ...] | None]:
    if params.target_kind == "real":
        return numbers(table, params.target, "data.target"), None
    values = _labels(table, params)
    if params.classes is None:
        distinct, index = np.unique(values, return_inverse=True)
        return index.reshape(-1).astype(np.int64), tuple(str(value) for value in distinct)
    place = {str(name): i for i, name in enumerate(params.classes)}
    if len(place) != len(params.classes):
        raise UserError("data.classes: a class is named twice")
    index = np.array([place.get(str(value), -1) for value in values], dtype=np.int64)
    hint = f"data.classes has {', '.join(list(place)[:20])}"
    _refuse(table, params.target, index < 0, "not one of data.classes", "data.target", hint)
    return index, tuple(place)


def _labels(table: Table, params: ColumnParams) -> Array:
    """Returns the labels as int64 where all are whole numbers (2 sorts before 10), else as text."""
    values = table.columns[params.target]
    if not all(_is_number(str(value)) for value in values):
        return values.astype(str)
    parsed = values.astype(np.float64)
    fractional = np.array([not math.isfinite(v) or v != round(v) for v in parsed.tolist()])
    hint = "a number to predict needs data.target_kind: real"
    _refuse(table, params.target, fractional, "not a class", "data.target", hint)
    return parsed.astype(np.int64)


def _split(examples: Examples, info: DataInfo, table: Table, params: ColumnParams) -> Source:
    if params.split is None:
        return Source(info, examples)
    words = np.char.lower(np.char.strip(table.columns[params.split].astype(str)))
    message = "not 'train', 'validation' or 'test'"
    _refuse(table, params.split, ~np.isin(words, SPLITS), message, "data.split")
    parts = {word: examples.take(words == word) for word in SPLITS}
    if not len(parts["train"]):
        raise UserError(f"{table.file}: data.split: no row of column {params.split!r} says 'train'")
    return Source(
        info,
        parts["train"],
        validation=parts["validation"] if len(parts["validation"]) else None,
        test=parts["test"] if len(parts["test"]) else None,
    )


def _refuse(
    table: Table, column: str, bad: Array, message: str, field: str, hint: str = ""
) -> None:
    """Raises ScenarioError for the first bad rows, if there are any."""
    rows: Iterable[int] = np.flatnonzero(bad)[:MAX_PROBLEMS]
    problems = [
        Problem(
            field,
            f"column {column!r}: {message}",
            table.columns[column][row].item()
            if isinstance(table.columns[column][row], np.generic)
            else table.columns[column][row],
            int(table.lines[row]),
            hint,
            table.file,
        )
        for row in rows
    ]
    if problems:
        raise ScenarioError(problems)
