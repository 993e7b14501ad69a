"""The JSON Schema of a scenario file, for editors.

Put this line at the top of a scenario and an editor with the YAML language server completes and
checks it, once `fedsim schema > scenario.schema.json` has been run beside it:

    # yaml-language-server: $schema=scenario.schema.json
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fedsim.scenario.components import (
    COMPONENTS,
    IMPORTABLE,
    SECTIONS,
    Components,
    Imported,
    installed,
)
from fedsim.scenario.model import Scenario

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def json_schema(components: Components | None = None) -> Schema:
    """Returns the schema; each component section is a union told apart by `name`."""
    known = components or installed()
    models: list[type[BaseModel]] = [Scenario, Imported, *SECTIONS.values()]
    for section in COMPONENTS:
        models += [*known.of(section).values()]
    unique = list(dict.fromkeys(models))
    # One call for all, so that classes of equal names in different modules stay apart.
    references, definitions = models_json_schema(
        [(model, "validation") for model in unique], ref_template="#/$defs/{model}"
    )
    refs: dict[Any, str] = {model: schema["$ref"] for (model, _), schema in references.items()}
    defs: Mapping[str, Schema] = definitions["$defs"]
    root = dict(defs[_key(refs[Scenario])])
    properties = dict(root["properties"])
    for section in COMPONENTS:
        described = {"description": properties[section]["description"]}
        field = Scenario.model_fields[section]
        optional = not field.is_required() or type(None) in get_args(field.annotation)
        properties[section] = {**_union(section, known, refs, defs, optional), **described}
    properties["seed"] = {"type": "integer", "minimum": 0, "description": "Short for seeds: [seed]"}
    properties["compare"] = _compare(properties)
    properties["grid"]["propertyNames"] = {"pattern": r"^[a-z_]+(\.[A-Za-z0-9_-]+)*$"}
    # Some methods bring a number of rounds and need no model; which ones, a schema cannot say.
    required = [name for name in root["required"] if name not in ("rounds", "model", "task")]
    return {
        **root,
        "required": required,
        "$schema": DRAFT,
        "title": "fedsim scenario",
        "properties": properties,
        "not": {"required": ["seed", "seeds"]},
        "$defs": {
            name: schema
            for name, schema in defs.items()
            if name not in (_key(refs[Scenario]), "Params")
        },
    }


def _union(
    section: str,
    known: Components,
    refs: Mapping[Any, str],
    defs: Mapping[str, Schema],
    optional: bool,
) -> Schema:
    """Returns the union of a section's components, their bare names and an import path."""
    members: list[Schema] = []
    bare = []
    for name, model in known.of(section).items():
        schema = defs[_key(refs[model])]
        # In a file the name is what chooses the model, even where the model has it as a default.
        schema["required"] = sorted({*schema.get("required", []), "name"})
        members.append({"$ref": refs[model]})
        if schema["required"] == ["name"]:
            bare.append(name)
    if section in IMPORTABLE:
        members.append({"$ref": refs[Imported]})
        bare_import = {"type": "string", "pattern": ":", "description": "Import path."}
        members.append(bare_import)
    if bare:
        members.append({"enum": bare})
    if optional:
        members.append({"type": "null"})
    return {"oneOf": members}


def _compare(properties: Mapping[str, Schema]) -> Schema:
    """Returns the schema of `compare`: parts of a scenario, so only their sections are checked."""
    partial: Schema = {}
    for name, schema in properties.items():
        if name in COMPONENTS:
            partial[name] = {"type": ["object", "string", "null"]}
        elif name in SECTIONS:
            partial[name] = {"type": ["object", "null"]}
        elif name not in ("name", "seed", "seeds", "compare", "grid"):
            partial[name] = schema
    entry = {"type": "object", "properties": partial, "additionalProperties": False}
    described = {"description": properties["compare"]["description"]}
    return {"type": "object", "additionalProperties": entry, **described}


def _key(reference: str) -> str:
    return reference.rpartition("/")[2]
