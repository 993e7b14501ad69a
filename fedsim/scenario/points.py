"""The points that `compare` and `grid` span: one experiment each, before seeds."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedsim.errors import Problem
from fedsim.scenario.edit import assign, is_name, normalise, split_path
from fedsim.scenario.problems import Mistake, Origin, Sources

MAX_RUNS = 10_000

# What belongs to the whole scenario and cannot differ between its points.
_COMMON = ("name", "seed", "seeds", "compare", "grid")


@dataclass(frozen=True)
class Point:
    """One combination: the compare label ("" if there is none), grid settings, plain data."""

    label: str
    settings: dict[str, Any]
    data: dict[str, Any]
    sources: Sources
    mistakes: tuple[Mistake, ...] = ()


def points(data: Mapping[str, Any], sources: Sources) -> Iterator[Point]:
    """Yields compare × grid in the order of the file; a grid setting wins over a compare entry."""
    compare: Mapping[str, Any] = data.get("compare") or {"": {}}
    grid: Mapping[str, list[Any]] = data.get("grid") or {}
    base = {key: value for key, value in data.items() if key not in ("compare", "grid")}
    for label, entry in compare.items():
        arm = _compared(base, sources, label, entry)
        for numbers in itertools.product(*(range(len(values)) for values in grid.values())):
            yield _gridded(arm, grid, numbers)


def count(data: Mapping[str, Any]) -> int:
    """Returns the number of runs that the scenario expands to."""
    values = (len(v) for v in (data.get("grid") or {}).values())
    return max(1, len(data.get("compare") or {})) * math.prod(values) * len(data.get("seeds", "0"))


def point_problems(
    data: Mapping[str, Any],
    sources: Sources,
    mistakes_in: Callable[[dict[str, Any]], list[Mistake]],
) -> list[Problem]:
    """Returns the problems of `compare`, `grid` and every point they span.

    A section of the wrong shape gives none: that is reported where the base is validated.
    """
    if not (data.get("compare") or data.get("grid")) or not _well_formed(data):
        return []
    problems = [sources.problem(mistake) for mistake in _own_mistakes(data)]
    if problems:
        return problems
    labels: dict[tuple[str, str, str], tuple[Problem, set[str]]] = {}
    for point in points(data, sources):
        for mistake in (*point.mistakes, *mistakes_in(point.data)):
            problem = point.sources.problem(mistake)
            key = (problem.field, problem.message, repr(problem.value))
            labels.setdefault(key, (problem, set()))[1].add(point.label)
    every = len(data.get("compare") or {"": {}})
    return [
        _of_labels(problem, found) if len(found) < every else problem
        for problem, found in labels.values()
    ]


def _compared(base: dict[str, Any], sources: Sources, label: str, entry: Any) -> Point:
    data, known = copy.deepcopy(base), sources.copy()
    change = copy.deepcopy(dict(entry))
    at = ("compare", label)
    mistakes = normalise(change, known, at)
    for section, value in change.items():
        origin = known.origin((*at, section))
        found = assign(data, (section,), value, known, replace(origin, path=(*at, section)))
        mistakes += [found] if found else []
    return Point(label, {}, data, known, tuple(mistakes))


def _gridded(arm: Point, grid: Mapping[str, list[Any]], numbers: tuple[int, ...]) -> Point:
    data, known = copy.deepcopy(arm.data), arm.sources.copy()
    mistakes = list(arm.mistakes)
    chosen = zip(grid.items(), numbers, strict=True)
    settings = {field: values[number] for (field, values), number in chosen}
    # Names first: changing one drops the other parameters of its component.
    ordered = sorted(zip(grid.items(), numbers, strict=True), key=lambda x: not is_name(x[0][0]))
    for (field, values), number in ordered:
        written = known.origin(("grid", field, number))
        origin = Origin(("grid", field), written.line, written.file)
        found = assign(data, split_path(field), values[number], known, origin)
        if found:
            mistakes.append(replace(found, path=("grid", field)))
    return replace(arm, settings=settings, data=data, sources=known, mistakes=tuple(mistakes))


def _well_formed(data: Mapping[str, Any]) -> bool:
    compare, grid = data.get("compare") or {}, data.get("grid") or {}
    return (
        isinstance(compare, Mapping)
        and isinstance(grid, Mapping)
        and all(isinstance(entry, Mapping) for entry in compare.values())
        and all(isinstance(values, list) and values for values in grid.values())
        and isinstance(data.get("seeds", []), list)
    )


def _own_mistakes(data: Mapping[str, Any]) -> Iterator[Mistake]:
    for label, entry in (data.get("compare") or {}).items():
        for key in _COMMON:
            if key in entry:
                message = f"cannot differ between the entries of compare; give {key} at the top"
                yield Mistake(("compare", label, key), message)
    for field, values in (data.get("grid") or {}).items():
        path = split_path(field)
        if "" in path:
            yield Mistake(("grid", field), "is no field; write section.field")
        elif path[0] in _COMMON:
            message = f"cannot be varied by grid; give {path[0]} at the top"
            yield Mistake(("grid", field), message)
        for number, value in enumerate(values):
            if any(value == v and type(value) is type(v) for v in values[:number]):
                yield Mistake(("grid", field, number), "is listed twice", value)
    runs = count(data)
    if runs > MAX_RUNS:
        section = "grid" if data.get("grid") else "compare"
        message = f"compare × grid × seeds makes {runs:,} runs; at most {MAX_RUNS:,} are allowed"
        yield Mistake((section,), message)


def _of_labels(problem: Problem, labels: set[str]) -> Problem:
    if problem.field.split(".")[0] != "grid":
        return problem
    entries = ", ".join(sorted(labels))
    return replace(problem, message=f"{problem.message} in compare entry {entries}")
