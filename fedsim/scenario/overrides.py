"""Applies `--set field.path=value` to a scenario as written, before it is validated.

The value is read as YAML: a scalar, `[a, b]` or `{key: value}`. An override that names a component
(`strategy=fedavg`, `strategy.name=fedavg`) is applied first, wherever it stands, and if the name
changes it drops the parameters that the file gave the old component; those given by other overrides
stay. Overrides change the base: an entry of `compare` that sets the same field still wins, and is
overridden as `compare.LABEL.field`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedsim.errors import Problem, ScenarioError
from fedsim.scenario.edit import assign, is_name, split_path
from fedsim.scenario.loader import parse_value
from fedsim.scenario.problems import FieldPath, Origin, Sources, dotted


def apply(overrides: Iterable[str], data: dict[str, Any], sources: Sources) -> list[Problem]:
    """Applies overrides to `data` in place and returns what is wrong with them."""
    problems: list[Problem] = []
    parsed: list[tuple[FieldPath, Any, Origin]] = []
    for text in overrides:
        option = f"--set {text}"
        field, equals, value = text.partition("=")
        path = split_path(field.strip())
        if not equals or "" in path:
            problems.append(Problem("", "must have the form field.path=value", file=option))
            continue
        try:
            parsed.append((path, parse_value(value), Origin(path, None, option)))
        except ScenarioError as error:
            problems += [
                Problem(field, p.message, hint=p.hint, file=option) for p in error.problems
            ]
    for path, item, origin in sorted(parsed, key=lambda entry: not is_name(dotted(entry[0]))):
        if path == ("seed",):  # short for a list of one
            data["seeds"] = [item]
            sources.forget(("seeds",))
            sources.origins[("seeds",)] = sources.origins[("seeds", 0)] = origin
            continue
        mistake = assign(data, path, item, sources, origin)
        if mistake:
            problems.append(Problem(field=dotted(path), message=mistake.message, file=origin.file))
    return problems
