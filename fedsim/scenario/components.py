"""The components a scenario can name, and how a section becomes a component's parameters.

A component section is a mapping with a `name` that chooses the class of its parameters. Dispatching
by hand, instead of one pydantic union, keeps a mistake about the one class that was meant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny, ValidationError, WithJsonSchema

from fedsim.errors import Params, UserError
from fedsim.registry import import_path, params_of
from fedsim.scenario.problems import FieldPath, Mistake, suggestion
from fedsim.scenario.sections import (
    CheckpointParams,
    ClockParams,
    EarlyStopping,
    EngineParams,
    EvaluateParams,
    FaultsParams,
    PosteriorParams,
)
from fedsim.scenario.sentences import mistakes_of

# The sections with one class of parameters each.
SECTIONS: dict[str, type[Params]] = {
    "engine": EngineParams,
    "clock": ClockParams,
    "evaluate": EvaluateParams,
    "early_stopping": EarlyStopping,
    "checkpoint": CheckpointParams,
    "posterior": PosteriorParams,
    "faults": FaultsParams,
}


class Imported(Params):
    """A component of the user's own, named by its import path instead of a registered name."""

    name: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$",
        description="Import path, package.module:attribute.",
    )
    params: Annotated[
        SerializeAsAny[Params] | dict[str, Any], WithJsonSchema({"type": "object"})
    ] = Field(
        default_factory=dict,
        description="Parameters; checked by the attribute's `Params` model if it has one, "
        "otherwise passed on as keyword arguments.",
    )

    def load(self) -> Any:
        """Returns the object at the import path; raises UserError if it cannot be imported."""
        return import_path(self.name)


def declared(section: object, name: str, default: Any) -> Any:
    """Returns what a section's parameter class says of itself (a class variable), or the default.

    section: the parameters, an `Imported` with its own in it, or whatever stands in their place.
    """
    return getattr(section.params if isinstance(section, Imported) else section, name, default)


# The sections whose component may be given by import path; the others have a `custom` component.
IMPORTABLE = ("strategy", "client")


@dataclass(frozen=True)
class Components:
    """The parameter models that may stand in each component section, by name."""

    data: Mapping[str, type[Params]]
    partition: Mapping[str, type[Params]]
    model: Mapping[str, type[Params]]
    task: Mapping[str, type[Params]]
    strategy: Mapping[str, type[Params]]
    client: Mapping[str, type[Params]]

    def of(self, section: str) -> Mapping[str, type[Params]]:
        """Returns the models of one section."""
        found: Mapping[str, type[Params]] = getattr(self, section)
        return found


COMPONENTS: tuple[str, ...] = tuple(item.name for item in fields(Components))


@cache
def installed() -> Components:
    """Returns every component that fedsim and the installed packages register."""
    from fedsim.data import DATASETS, PARTITIONS
    from fedsim.models import MODELS, TASKS
    from fedsim.strategies.flower import flower_params

    return Components(
        data=DATASETS,
        partition=PARTITIONS,
        model=MODELS,
        task=TASKS,
        strategy={**flower_params(), **params_of("strategies")},
        client=params_of("clients"),
    )


def parse_section(
    section: str, value: object, components: Components
) -> tuple[Params | None, list[Mistake]]:
    """Returns the parameters of a section, or None and every mistake in it."""
    if isinstance(value, Params):
        return value, []
    if section in SECTIONS:
        return _validated(SECTIONS[section], value, (section,))
    return _component(section, value, components.of(section))


def _component(
    section: str, value: object, known: Mapping[str, type[Params]]
) -> tuple[Params | None, list[Mistake]]:
    path: FieldPath = (section,)
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        hint = f"Write {section}: followed by name: and its parameters"
        return None, [Mistake(path, "must be a mapping with a name", value, hint)]
    name = value.get("name")
    if not isinstance(name, str):
        message = "is required" if name is None else "must be text"
        hint = suggestion("", known, f"values of {section}.name")
        return None, [Mistake((*path, "name"), message, name, hint)]
    if ":" in name and section in IMPORTABLE:
        return _imported(value, path)
    if name not in known:
        hint = suggestion(name, known, f"values of {section}.name")
        if ":" in name and "custom" in known:
            hint = "For one of your own write name: custom and its import path as a parameter"
        return None, [Mistake((*path, "name"), f"there is no {section} of this name", name, hint)]
    return _validated(known[name], value, path)


def _imported(value: Mapping[str, Any], path: FieldPath) -> tuple[Params | None, list[Mistake]]:
    outer, mistakes = _validated(Imported, value, path)
    if not isinstance(outer, Imported):
        return None, mistakes
    try:
        own = getattr(outer.load(), "Params", None)
    except UserError as error:
        return None, [Mistake((*path, "name"), str(error), outer.name)]
    if not (isinstance(own, type) and issubclass(own, Params)):
        return outer, []
    given = dict(value.get("params") or {})
    if "name" in own.model_fields and own.model_fields["name"].is_required():
        # A class that is registered elsewhere asks for the name it has there.
        given.setdefault("name", _registered_name(own))
    params, mistakes = _validated(own, given, (*path, "params"))
    return (None, mistakes) if params is None else (Imported(name=outer.name, params=params), [])


def _registered_name(params: type[Params]) -> object:
    constant: object = params.model_json_schema()["properties"]["name"].get("const")
    return constant


def _validated(
    params: type[Params], value: object, path: FieldPath
) -> tuple[Params | None, list[Mistake]]:
    """Validates as JSON, because a list of the file stands for a tuple of the model."""
    try:
        return params.model_validate_json(json.dumps(value)), []
    except ValidationError as error:
        return None, mistakes_of(error, params, value, path)
