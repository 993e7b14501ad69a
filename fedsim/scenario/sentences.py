"""Says in plain English what pydantic found wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedsim.scenario.problems import FieldPath, Mistake, suggestion

_WRONG_TYPE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "none_required": "empty",
}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_RANGE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def mistakes_of(
    error: ValidationError, model: type[BaseModel], value: object, path: FieldPath = ()
) -> list[Mistake]:
    """Returns a mistake for every field that `model` refused in `value`, which stands at `path`.

    Where a field takes several types pydantic reports one error for each; they become one sentence.
    """
    by_field: dict[FieldPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_field.setdefault(_field_path(detail, value), []).append(detail)
    return [
        _mistake(at, details, _owner(model, at[: _field_position(at)], value), path)
        for at, details in by_field.items()
        if not _follows(at, details, by_field)
    ]


def limits(field: FieldInfo) -> str:
    """Returns a field's range in words, such as `> 0 and <= 1`, or "" if it has none."""
    return _bounds([*field.metadata, *_nested_metadata(field.annotation)])


def _field_path(detail: ErrorDetails, value: object) -> FieldPath:
    """Drops from pydantic's location the labels of union members, which stand in no file."""
    path: list[str | int] = []
    location = detail["loc"]
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if _holds(value, part):
            value = value[part]  # type: ignore[index]
            path.append(part)
        elif last and detail["type"] == "missing":
            path.append(part)
    return tuple(path)


def _field_position(at: FieldPath) -> int:
    """Returns where the last field's name is in a path that may go on to items of its list."""
    names = [position for position, part in enumerate(at) if isinstance(part, str)]
    return names[-1] if names else 0


def _follows(
    at: FieldPath, details: list[ErrorDetails], by_field: Mapping[FieldPath, list[ErrorDetails]]
) -> bool:
    """Tells whether a list is too short for pydantic only because its items were refused."""
    return all(detail["type"] == "too_short" for detail in details) and any(
        len(other) > len(at) and other[: len(at)] == at for other in by_field
    )


def _holds(value: object, part: str | int) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)


def _mistake(
    at: FieldPath, details: list[ErrorDetails], owner: type[BaseModel] | None, path: FieldPath
) -> Mistake:
    # A value of the right type and a wrong size is more than a value of the wrong type.
    exact = [d for d in details if d["type"] not in _WRONG_TYPE and d["type"] != "literal_error"]
    if len(details) > 1 and not exact:
        expected = dict.fromkeys(_expected(detail) for detail in details)
        words = [word for detail in details for word in _literals(detail)]
        got = details[0]["input"]
        return Mistake((*path, *at), "must be " + " or ".join(expected), got, _close(got, words))
    detail = (exact or details)[0]
    sentence, hint = _sentence(detail, owner, at)
    hides = detail["type"] in ("missing", "extra_forbidden")
    return Mistake((*path, *at), sentence, None if hides else detail["input"], hint)


def _sentence(
    detail: ErrorDetails, owner: type[BaseModel] | None, at: FieldPath
) -> tuple[str, str]:
    """Returns the sentence and the hint of one error."""
    kind, context = detail["type"], detail.get("ctx", {})
    field = owner.model_fields.get(str(at[_field_position(at)])) if owner and at else None
    if kind == "missing":
        return "is required", _described(field)
    if kind == "extra_forbidden":
        known = list(owner.model_fields) if owner else []
        return "unknown key", suggestion(at[-1], known, "keys")
    if kind in _RANGE:
        return f"must be {(limits(field) if field else '') or _bounds_of(context)}", ""
    if kind in _WRONG_TYPE or kind == "literal_error":
        empty = "; it is empty" if detail["input"] is None else ""
        return f"must be {_expected(detail)}{empty}", _type_hint(detail)
    if kind == "string_pattern_mismatch":
        return "has the wrong form", _described(field)
    if kind in _OTHERS:
        return _OTHERS[kind](context), ""
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", detail["msg"])), ""
    return _plain(detail["msg"]), ""


_OTHERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "too_short": lambda c: (
        f"must have at least {_items(c['min_length'])}, has {c['actual_length']}"
    ),
    "too_long": lambda c: f"must have at most {_items(c['max_length'])}, has {c['actual_length']}",
    "string_too_short": lambda c: f"must have at least {_items(c['min_length'], 'character')}",
    "string_too_long": lambda c: f"must have at most {_items(c['max_length'], 'character')}",
    "multiple_of": lambda c: f"must be a multiple of {c['multiple_of']}",
    "json_invalid": lambda c: "cannot be read",
    "union_tag_not_found": lambda c: f"must say its {str(c['discriminator']).strip(chr(39))}",
    "union_tag_invalid": lambda c: (
        f"{str(c['discriminator']).strip(chr(39))} must be one of "
        f"{str(c['expected_tags']).replace(chr(39), '')}"
    ),
}


def _described(field: FieldInfo | None) -> str:
    """Returns a field's description as a hint, which ends without a full stop."""
    text = (field.description or "") if field else ""
    return (text[:1].upper() + text[1:]).rstrip(".")


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        words = _literals(detail)
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    return _WRONG_TYPE.get(detail["type"], _plain(detail["msg"]))


def _type_hint(detail: ErrorDetails) -> str:
    kind, got = detail["type"], detail["input"]
    if kind == "literal_error":
        return _close(got, _literals(detail))
    if kind.startswith("bool") and str(got).lower() in ("yes", "on", "no", "off"):
        return "Write " + ("true" if str(got).lower() in ("yes", "on") else "false")
    if kind.startswith("int") and isinstance(got, float) and got.is_integer():
        return f"Write {int(got)}"
    if kind.startswith(("int", "float")) and isinstance(got, str):
        return "Remove the quotes" if _is_number(got) else "This is text"
    if kind == "string_type" and isinstance(got, int | float):
        return "Put it in quotes"
    return ""


def _literals(detail: ErrorDetails) -> list[str]:
    if detail["type"] != "literal_error":
        return []
    expected = str(detail.get("ctx", {}).get("expected", ""))
    return [word.strip("'") for word in re.split(r", | or ", expected)]


def _close(got: object, words: list[str]) -> str:
    hint = suggestion(got, words) if isinstance(got, str) and words else ""
    return hint if hint.startswith("Did") else ""


def _owner(model: type[BaseModel], path: FieldPath, value: object) -> type[BaseModel] | None:
    """Returns the model that the fields below `path` of `value` belong to, if there is just one."""
    owner: type[BaseModel] | None = model
    for part in path:
        value = value[part] if _holds(value, part) else None  # type: ignore[index]
        if isinstance(part, int):
            continue  # an item belongs to the model of its list's items
        field = owner.model_fields.get(part) if owner else None
        models = [kind for kind in _types(field.annotation) if _is_model(kind)] if field else []
        if len(models) > 1 and isinstance(value, Mapping):
            models = [kind for kind in models if value.get("name") in _names(kind)]
        owner = models[0] if len(models) == 1 else None
    return owner


def _names(model: type[BaseModel]) -> tuple[Any, ...]:
    """Returns the constants that a model takes as its `name`."""
    field = model.model_fields.get("name")
    return get_args(field.annotation) if field else ()


def _types(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [annotation] if not inner else [t for part in inner for t in _types(part)]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _nested_metadata(annotation: Any) -> list[Any]:
    """Returns the constraints inside a type, such as those of a list's items."""
    found: list[Any] = []
    for item in _types(annotation):
        found += item.metadata if isinstance(item, FieldInfo) else [item]
    return [item for item in found if isinstance(item, Ge | Gt | Le | Lt | Interval)]


def _bounds(metadata: list[Any]) -> str:
    pairs = [(name, getattr(item, name, None)) for item in metadata for name in _SIGNS]
    return _bounds_of({name: bound for name, bound in pairs if bound is not None})


def _bounds_of(context: Mapping[str, Any]) -> str:
    return " and ".join(
        f"{sign} {context[name]:g}"
        if isinstance(context[name], float)
        else f"{sign} {context[name]}"
        for name, sign in _SIGNS.items()
        if name in context
    )


def _items(count: int, what: str = "item") -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(message: str) -> str:
    message = message.replace("Input should be", "must be").replace("Value error, ", "")
    return message[:1].lower() + message[1:]
