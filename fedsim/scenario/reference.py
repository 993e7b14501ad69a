"""The scenario reference as Markdown, generated from the models.

`python -m fedsim.scenario.reference` prints it.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedsim.errors import Params
from fedsim.scenario.components import (
    COMPONENTS,
    IMPORTABLE,
    SECTIONS,
    Components,
    Imported,
    installed,
)
from fedsim.scenario.model import Scenario
from fedsim.scenario.sentences import limits

_WORDS: dict[object, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "empty",
    Any: "anything",
}

_INTRODUCTION = """\
# Scenario reference

Generated from the models by `make docs`; do not edit.

A scenario is a YAML file: a mapping of the sections below. A component (data, partition, model,
task, strategy, client) is a mapping whose `name` chooses it, beside its parameters; one that needs
no parameters may be written as its bare name, `partition: iid`. A strategy or client of your own is
named by its import path, `name: my_package.module:MyStrategy`, with its parameters under `params`;
the other components have a `custom` one where that makes sense.

`--set field.path=value` replaces a value for one call; `fedsim schema` prints the JSON Schema for
editors; `fedsim check` shows every mistake at once.

`compare` holds parts of a scenario by label: each is merged over the base, key by key, and a
component whose `name` differs from the base's replaces it as a whole. `grid` holds the values of
fields by their path and makes every combination. Both are multiplied with `seeds`, to at most
10,000 runs. Where an entry of `compare` and `grid` set the same field, `grid` wins. The base itself
is run only where `compare` is empty or has an entry for it, `label: {}`.
"""


def scenario_reference(components: Components | None = None) -> str:
    """Returns the reference as Markdown: every field's type, default, range and meaning."""
    known = components or installed()
    parts = [_INTRODUCTION, "## Top level\n", _table(Scenario)]
    for section, params in SECTIONS.items():
        parts += [f"## {section}\n", *_described(params, 3, section)]
    for section in COMPONENTS:
        parts += [f"## {section}\n", f"{Scenario.model_fields[section].description}\n"]
        for name, params in known.of(section).items():
            parts += [f"### {section}: {name}\n", *_described(params, 4, name)]
        if section in IMPORTABLE:
            parts += [f"### {section}: by import path\n", *_described(Imported, 4, section)]
    return "\n".join(parts).rstrip() + "\n"


def _described(params: type[BaseModel], level: int, title: str) -> Iterator[str]:
    """Yields a model's text and table, then those of the models in its fields."""
    text = inspect.cleandoc(params.__doc__ or "") if "__doc__" in vars(params) else ""
    if text:
        yield f"{text}\n"
    rows = _table(params)
    if rows:
        yield rows
    for name, field in params.model_fields.items():
        for inner in _models(field.annotation):
            heading = f"{title}, `{name}`: {_chosen(inner) or inner.__name__}"
            yield f"{'#' * level} {heading}\n"
            yield from _described(inner, min(level + 1, 6), heading)


def _table(params: type[BaseModel]) -> str:
    rows = [
        f"| `{name}` | {_cell(type_words(field.annotation))} | {_default(field)} |"
        f" {_cell(limits(field))} | {_cell(field.description or '')} |"
        for name, field in params.model_fields.items()
        if not _is_tag(name, field)
    ]
    if not rows:
        return ""
    head = "| field | type | default | range | meaning |\n|---|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def type_words(annotation: Any) -> str:
    """Returns a type in words: `int | None` is "whole number or empty"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Annotated:
        return type_words(inner[0])
    if origin is Literal:
        return " or ".join(f"`{word}`" for word in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(part) for part in inner))
    if origin is tuple and Ellipsis not in inner:
        return f"list of {len(inner)}: {', '.join(type_words(part) for part in inner)}"
    if origin in (list, tuple, set, frozenset):
        return f"list of {_items(inner[0])}"
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return f"mapping of text to {type_words(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        chosen = _chosen(annotation)
        return f"mapping, `name: {chosen}`" if chosen else "mapping"
    return str(getattr(annotation, "__name__", annotation)).lower()


def _items(annotation: Any) -> str:
    words = type_words(annotation)
    return words + "s" if words.endswith("number") else words


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return (
            _cell(f"`{json.dumps(value.model_dump(mode='json'))}`") if _tag(value) else "see below"
        )
    if value is None:
        return "empty"
    if isinstance(value, str | bool | int | float | list | tuple | dict):
        return _cell(f"`{json.dumps(value, ensure_ascii=False)}`")
    return _cell(f"`{value}`")


def _tag(value: BaseModel) -> bool:
    return _chosen(type(value)) is not None and type(value) not in SECTIONS.values()


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation is Params else [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _chosen(model: type[BaseModel]) -> str | None:
    """Returns the constants that a model takes as its `name`, None if it has no such field."""
    field = model.model_fields.get("name")
    return " or ".join(get_args(field.annotation)) if field and _is_tag("name", field) else None


def _is_tag(name: str, field: FieldInfo) -> bool:
    return name == "name" and get_origin(field.annotation) is Literal


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(scenario_reference())
