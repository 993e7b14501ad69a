"""Changes the engine of a stored run, in what changes none of its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedsim.errors import Problem, ScenarioError
from fedsim.scenario.components import installed
from fedsim.scenario.edit import plain
from fedsim.scenario.loader import Document
from fedsim.scenario.model import Scenario
from fedsim.scenario.parse import from_document
from fedsim.scenario.problems import Sources
from fedsim.scenario.sections import MOVABLE, OF_CLUSTER

Changes = dict[str, list[Any]]
"""Dotted field → [then, now]."""


def moved(stored: Mapping[str, Any], overrides: Iterable[str]) -> tuple[Scenario, Changes]:
    """Returns a stored run's scenario with `overrides`, and what they change of it.

    Raises ScenarioError for a mistake in them, and if they change anything but MOVABLE fields of
    the engine.
    """
    before, overrides = Scenario.from_dict(stored), list(overrides)
    document = plain(stored)
    if before.engine.name == "ray" and any(o.startswith("engine.name=") for o in overrides):
        for field in OF_CLUSTER:  # another engine has no cluster
            document["engine"].pop(field, None)
    after = from_document(Document(document, Sources()), overrides, installed())
    changes = differences(before, after)
    fixed = [field for field in changes if not movable(field)]
    if fixed:
        may = ", ".join(f"engine.{name}" for name in sorted(MOVABLE))
        message = "cannot change while a run goes on: it would end in other numbers"
        hint = f"What may change is {may}; for anything else start a new run"
        raise ScenarioError(
            Problem(field, message, changes[field][1], hint=hint) for field in fixed
        )
    return after, changes


def differences(a: Scenario, b: Scenario) -> Changes:
    """Returns in what two scenarios differ: by section, and in the engine by field."""
    left, right = a.resolved(), b.resolved()
    engines = left.pop("engine"), right.pop("engine")
    found = {name: [left[name], right[name]] for name in left if left[name] != right[name]}
    for name, value in engines[0].items():
        if value != engines[1][name]:
            found[f"engine.{name}"] = [value, engines[1][name]]
    return found


def movable(field: str) -> bool:
    """Says whether a dotted field may change while a run goes on."""
    section, _, name = field.partition(".")
    return section == "engine" and name in MOVABLE
