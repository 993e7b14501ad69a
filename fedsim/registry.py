"""Finds components by name: ours and third parties', through entry points.

A strategy or client is one line in a distribution's entry points and nothing else:

    [project.entry-points."fedsim.strategies"]
    my-method = "my_package.my_method:MyStrategy"
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fedsim.errors import Params, UserError


@cache
def _entries(kind: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in sorted(entry_points(group=f"fedsim.{kind}"))}


def names(kind: str) -> list[str]:
    """Returns the names registered for `kind` ("strategies" or "clients"), sorted."""
    return sorted(_entries(kind))


@cache
def load(kind: str, name: str) -> Any:
    """Returns the class registered under `name`; raises UserError if there is none."""
    if name not in _entries(kind):
        raise UserError(f"no {kind} named {name!r}; there are {', '.join(names(kind))}")
    return _entries(kind)[name].load()


@cache
def params_of(kind: str) -> dict[str, type[Params]]:
    """Returns the parameter model of every registered component of `kind`, by name."""
    return {name: load(kind, name).Params for name in names(kind)}


def import_path(path: str) -> Any:
    """Returns the object at "package.module:attribute"; raises UserError with the reason."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise UserError(f"{path!r} is not an import path; write package.module:attribute")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise UserError(f"cannot import {module!r}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"module {module!r} has no attribute {attribute!r}")
        found = getattr(found, part)
    return found
