"""From a file or plain data to a validated scenario, with every mistake at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedsim.errors import Params, Problem, ScenarioError
from fedsim.scenario import checks
from fedsim.scenario.components import (
    COMPONENTS,
    SECTIONS,
    Components,
    declared,
    installed,
    parse_section,
)
from fedsim.scenario.edit import normalise, plain
from fedsim.scenario.loader import Document, read
from fedsim.scenario.model import Scenario
from fedsim.scenario.overrides import apply
from fedsim.scenario.points import point_problems
from fedsim.scenario.problems import Mistake, Sources, dotted
from fedsim.scenario.sentences import mistakes_of

MODEL = ("model", "task")  # which belong together, and which not every method has
MAX_PROBLEMS = 200  # that are shown: a file of another kind may hold one in every line


def load(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    components: Components | None = None,
) -> Scenario:
    """Reads and validates a scenario file; see Scenario.load."""
    document = read(path)
    document.data.setdefault("name", re.sub(r"[^\w.-]+", "-", Path(path).stem)[:80])
    return from_document(document, overrides, components or installed())


def from_document(document: Document, overrides: Iterable[str], components: Components) -> Scenario:
    """Applies overrides to a scenario as written and validates it."""
    data, sources = document.data, document.sources
    found = normalise(data, sources)
    broken = {mistake.path for mistake in document.mistakes}
    problems = [sources.problem(mistake) for mistake in (*document.mistakes, *found)]
    problems += apply(overrides, data, sources)
    scenario, more = validate(data, sources, components)
    # What the reader refused has no value, so validation would complain a second time.
    problems += [p for p in more if not any(_within(p.field, dotted(path)) for path in broken)]
    return _finish(scenario, problems)


def from_plain(data: Mapping[str, Any], components: Components | None = None) -> Scenario:
    """Validates plain data; see Scenario.from_dict."""
    try:
        copied = plain(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise ScenarioError([Problem("", f"is not plain data: {error}")]) from None
    if not isinstance(copied, dict):
        raise ScenarioError([Problem("", "must be a mapping of sections", data)])
    sources = Sources()
    problems = [sources.problem(mistake) for mistake in normalise(copied, sources)]
    scenario, more = validate(copied, sources, components or installed())
    return _finish(scenario, problems + more)


def validate(
    data: dict[str, Any], sources: Sources, components: Components
) -> tuple[Scenario | None, list[Problem]]:
    """Validates normalised data and every run that it expands to."""
    scenario, mistakes = parse_plain(data, components)
    problems = [sources.problem(mistake) for mistake in mistakes]
    base = scenario.resolved() if scenario else data
    problems += point_problems(base, sources, lambda point: parse_plain(point, components)[1])
    return scenario, problems


def parse_plain(
    data: Mapping[str, Any], components: Components
) -> tuple[Scenario | None, list[Mistake]]:
    """Returns the scenario, or None and every mistake; `compare` and `grid` are not expanded."""
    parsed, mistakes = parse_sections(data, components)
    _fill_in(parsed, data)
    failed = {mistake.path[0] for mistake in mistakes}
    try:
        scenario = Scenario.model_validate(parsed)
    except ValidationError as error:
        found = mistakes_of(error, Scenario, parsed)
        mistakes += [m for m in found if not m.path or m.path[0] not in failed]
        return None, mistakes
    mistakes += checks.mistakes(scenario)
    return (None if mistakes else scenario), mistakes


def parse_sections(
    data: Mapping[str, Any], components: Components
) -> tuple[dict[str, Any], list[Mistake]]:
    """Returns `data` with every good section as its Params and without the bad ones."""
    parsed = dict(data)
    mistakes: list[Mistake] = []
    for section in (*COMPONENTS, *SECTIONS):
        value = parsed.get(section)
        if section not in parsed or isinstance(value, Params):
            continue
        optional = section in MODEL or not Scenario.model_fields[section].is_required()
        if value is None and optional:
            continue
        params, found = parse_section(section, value, components)
        mistakes += found
        if params is None:
            del parsed[section]
        else:
            parsed[section] = params
    return parsed, mistakes


def _fill_in(parsed: dict[str, Any], data: Mapping[str, Any]) -> None:
    """Fills in what the strategy's class of parameters makes optional: see `StrategyParams`."""
    strategy = parsed.get("strategy")
    unknown = strategy is None and "strategy" in data  # then nothing more is asked for
    rounds = declared(strategy, "default_rounds", 1 if unknown else None)
    if parsed.get("rounds") is None and rounds is not None:
        parsed["rounds"] = rounds
    for section in MODEL:
        if not declared(strategy, "needs_model", not unknown):
            parsed.setdefault(section, None)
        elif section in parsed and parsed[section] is None:
            del parsed[section]


def _finish(scenario: Scenario | None, problems: list[Problem]) -> Scenario:
    unique = list({_identity(problem): problem for problem in reversed(problems)}.values())[::-1]
    if scenario is not None and not unique:
        return scenario
    ordered = sorted(unique, key=lambda p: (p.line is None, p.line or 0))
    if len(ordered) > MAX_PROBLEMS:
        rest = len(ordered) - MAX_PROBLEMS
        ordered = [*ordered[:MAX_PROBLEMS], Problem("", f"and {rest:,} more mistakes")]
    raise ScenarioError(ordered)


def _identity(problem: Problem) -> tuple[str, str, str, str]:
    return problem.file, problem.field, problem.message, repr(problem.value)


def _within(field: str, path: str) -> bool:
    return field == path or field.startswith(f"{path}.")
