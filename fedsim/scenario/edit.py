"""Changes plain scenario data at a path, keeping track of where every value was written.

One rule for `--set`, `compare` and `grid`: mappings are merged key by key, anything else is
replaced. A mapping whose `name` changes is replaced as a whole: the parameters of the old component
mean nothing to the new one, or, worse, something else (a step size of FA-HMC is no learning rate).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from fedsim.errors import Params
from fedsim.scenario.components import COMPONENTS
from fedsim.scenario.problems import FieldPath, Mistake, Origin, Sources, dotted

# What may be left empty in the file and then takes its default.
_DEFAULTED = ("engine", "evaluate", "checkpoint", "posterior", "compare", "grid", "description")


def split_path(text: str) -> FieldPath:
    """Splits `strategy.betas.0`; the rest of a path below `grid` is one key, a path itself."""
    first, dot, rest = text.partition(".")
    if first == "grid" and rest:
        return (first, rest)
    return (first, *split_plain(rest)) if dot else (first,)


def split_plain(text: str) -> FieldPath:
    """Splits at the dots and reads whole numbers as list indices."""
    parts = text.split(".")
    return tuple(int(p) if p.isascii() and p.isdecimal() and len(p) < 10 else p for p in parts)


def is_name(field: str) -> bool:
    """Tells whether a dotted field chooses a component: `strategy` or `strategy.name`."""
    return field in COMPONENTS or field.endswith(".name")


def plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a deep copy of JSON-able data, as JSON would give it back (tuples become lists).

    Raises TypeError or ValueError where the data is not JSON-able.
    """
    copied: dict[str, Any] = json.loads(json.dumps(data, default=_params))
    return copied


def _params(value: object) -> object:
    if isinstance(value, Params):
        return value.model_dump(mode="json", serialize_as_any=True)
    raise TypeError(f"{type(value).__name__} is not plain data")


def normalise(data: dict[str, Any], sources: Sources, at: FieldPath = ()) -> list[Mistake]:
    """Writes shorthands out, in place: `partition: iid`, `seed: 3`, and empty optional sections.

    `at` is the path of `data` in the file: () or (compare, label).
    """
    mistakes = []
    for section in COMPONENTS:
        if isinstance(data.get(section), str):
            data[section] = {"name": data[section]}
            sources.origins[(*at, section, "name")] = sources.origin((*at, section))
    for section in _DEFAULTED:
        if section in data and data[section] is None:
            del data[section]
    if "seed" in data:
        origin, seed = sources.origin((*at, "seed")), data.pop("seed")
        if "seeds" in data:
            message = f"stands beside seeds in line {sources.origin((*at, 'seeds')).line}"
            mistakes.append(Mistake((*at, "seed"), message, hint="Give one of the two"))
        else:
            data["seeds"] = [seed]
            sources.origins[(*at, "seeds")] = sources.origins[(*at, "seeds", 0)] = origin
    return mistakes


def assign(
    data: dict[str, Any], path: FieldPath, value: Any, sources: Sources, origin: Origin
) -> Mistake | None:
    """Merges `value` into `data` at `path`, in place; returns a mistake if the path leads nowhere.

    Mappings on the way are created, lists are not extended.
    """
    target: Any = data
    at: FieldPath = ()
    for position, part in enumerate(path):
        if isinstance(target, list):
            if not isinstance(part, int) or part >= len(target):
                what = f"there is no such item: {dotted(at)} is a list of {len(target)}"
                return Mistake((*at, part), what)
            key: str | int = part
        elif isinstance(target, dict):
            key = str(part)
        else:
            return Mistake(path, f"cannot be set: {dotted(at)} has no fields below it")
        at = (*at, key)
        if position == len(path) - 1:
            _merge(target, key, value, at, sources, origin)
        else:
            _open(target, key, at, sources, origin)
            target = target[key]
    return None


def _open(target: Any, key: str | int, at: FieldPath, sources: Sources, origin: Origin) -> None:
    """Makes a missing or empty value on the way a mapping."""
    if _get(target, key) is None:
        target[key] = {}
        shown = ("grid", *at) if origin.path[0] == "grid" else at
        sources.origins[at] = Origin(shown, origin.line, origin.file)


def _merge(
    target: Any, key: str | int, value: Any, at: FieldPath, sources: Sources, origin: Origin
) -> None:
    old = _get(target, key)
    if len(at) == 1 and at[0] in COMPONENTS and isinstance(value, str):
        value = {"name": value}  # `--set strategy=fedavg`, `grid: {strategy: [fedavg, fa-hmc]}`
    if isinstance(value, Mapping) and isinstance(old, dict) and not _renamed(old, value):
        for name, item in value.items():
            inner = sources.below(origin, name)
            _merge(old, str(name), item, (*at, str(name)), sources, inner)
        return
    if at[-1] == "name" and len(at) > 1 and old is not None and old != value:
        target.clear()
        sources.forget(at[:-1])
        sources.origins[at[:-1]] = Origin(origin.path[:-1] or origin.path, origin.line, origin.file)
    sources.forget(at)
    target[key] = copy.deepcopy(value)
    sources.adopt(at, value, origin)


def _get(target: Any, key: str | int) -> Any:
    """Returns an item of a list, or of a mapping, None where the mapping lacks it."""
    return target.get(key) if isinstance(target, dict) else target[key]


def _renamed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" in old and "name" in new and old["name"] != new["name"]
