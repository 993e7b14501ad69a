"""Reads what a Flower app says of itself in its pyproject.toml: components and run config."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim._flower import DEFAULT_NODES
from fedsim.errors import Problem, ScenarioError

Value = bool | int | float | str
"""What a run config may hold."""

FILE = "pyproject.toml"
APP = "tool.flwr.app"

LARGEST = 2**63 - 1
"""Whole numbers beyond it are none to TOML, nor to Flower's messages."""

_KINDS = {
    bool: "true or false",
    int: "a whole number such as 3",
    float: "a number such as 0.1",
    str: "a text",
}


@dataclass(frozen=True)
class Project:
    """A Flower app as its pyproject.toml describes it.

    folder: where it lies, absolute. name, version: of the project. publisher: "" if there is none.
    serverapp, clientapp: "package.module:object". config: the run config's defaults, nested tables
    flattened to dotted keys. nodes: how many the app asks for, or Flower's default.
    """

    folder: Path
    name: str
    version: str
    publisher: str
    serverapp: str
    clientapp: str
    config: Mapping[str, Value]
    nodes: int


def read(path: Path) -> Project:
    """Returns the app in a folder (or of a pyproject.toml itself).

    Raises ScenarioError with every mistake in the file.
    """
    folder = path.expanduser().resolve()
    folder = folder.parent if folder.name == FILE and not folder.is_dir() else folder
    file = folder / FILE
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"there is no {FILE} in it" if folder.is_dir() else "there is no such folder"
        hint = "--app takes the folder of a Flower app"
        if folder.is_file():
            reason = "is a file"
            if folder.suffix.lower() in (".yaml", ".yml"):
                hint += f"; a scenario is run by: fedsim run {path}"
        elif not isinstance(error, FileNotFoundError):
            reason = f"{error.strerror}"
        raise ScenarioError([Problem(f"--app {path}", reason, hint=hint)]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError([Problem("", f"is not TOML: {error}", file=str(file))]) from error
    problems: list[Problem] = []

    def wrong(field: str, message: str, value: object = None, hint: str = "") -> None:
        problems.append(Problem(field, message, value, hint=hint, file=str(file)))

    app = _table(content, APP)
    components = _table(content, f"{APP}.components")
    found: dict[str, str] = {}
    if not app:
        wrong(f"[{APP}]", "is missing", hint="A Flower app names its components there")
    elif "agentapp" in components:
        wrong(f"{APP}.components.agentapp", "agent apps do not run here: there is no federation")
    else:
        for kind in ("serverapp", "clientapp"):
            reference = components.get(kind)
            module, _, attribute = str(reference or "").partition(":")
            if not (isinstance(reference, str) and module and attribute):
                wrong(
                    f"{APP}.components.{kind}",
                    "must name an object",
                    reference,
                    f'Write {kind} = "package.module:app"',
                )
            found[kind] = str(reference)
    config: dict[str, Value] = {}
    for key, value in _flat(app.get("config", {})):
        if isinstance(value, Value) and _storable(value):
            config[key] = value
        else:
            wrong(f"{APP}.config.{key}", "must be a number, a text, or true or false", value)
    nodes = _nodes(_table(content, "tool.flwr.federations"))
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        wrong("tool.flwr.federations: options.num-supernodes", "must be a whole number ≥ 1", nodes)
    if problems:
        raise ScenarioError(problems)
    project = _table(content, "project")
    return Project(
        folder,
        str(project.get("name") or folder.name),
        str(project.get("version", "")),
        str(app.get("publisher", "")),
        found["serverapp"],
        found["clientapp"],
        config,
        int(nodes),
    )


def override(config: Mapping[str, Value], overrides: Sequence[str]) -> dict[str, Value]:
    """Returns what "key=value" texts say, each value of its default's type.

    Values are TOML, as for Flower's --run-config; a text needs no quotes. Raises ScenarioError with
    every mistake.
    """
    given: dict[str, Value] = {}
    problems = []
    for text in overrides:
        key, equals, written = (part.strip() for part in text.partition("="))
        if not equals or not key:
            problems.append(Problem(f"--set {text}", "must have the form key=value"))
        elif key not in config:
            close = difflib.get_close_matches(key, config, n=1)
            meant = f"Did you mean {close[0]}? " if close else ""
            there = ", ".join(config) or "no keys at all"
            problems.append(
                Problem(
                    f"--set {key}",
                    "the app's run config has no such key",
                    hint=f"{meant}There are: {there}",
                )
            )
        else:
            kind = type(config[key])
            value = _parse(written, kind)
            if value is None:
                problems.append(Problem(f"--set {key}", f"must be {_KINDS[kind]}", written))
            else:
                given[key] = value
    if problems:
        raise ScenarioError(problems)
    return given


def _parse(text: str, kind: type[Value]) -> Value | None:
    """Returns the text as a value of that type, None if it is none."""
    if kind is bool and text in ("True", "False"):  # Python's, beside TOML's true and false
        return text == "True"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if kind is str:
        return value if isinstance(value, str) else text
    if kind is float and type(value) is int:
        value = float(value) if abs(value) <= LARGEST else value
    return value if type(value) is kind and _storable(value) else None


def _storable(value: Value) -> bool:
    """Says whether a run's record can hold the value: neither infinities and NaN nor huge."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) or abs(value) <= LARGEST


def _flat(table: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values of nested tables."""
    if not isinstance(table, dict):
        yield prefix.rstrip("."), table
        return
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a table by its dotted name, empty if there is none."""
    found: Any = content
    for part in name.split("."):
        found = found.get(part, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) else {}


def _nodes(federations: Mapping[str, Any]) -> Any:
    """Returns num-supernodes of the default federation, else of the first that has it."""
    tables = {name: table for name, table in federations.items() if isinstance(table, dict)}
    first = tables.get(str(federations.get("default")))
    for table in ([first] if first else []) + list(tables.values()):
        options = table.get("options", {})
        if isinstance(options, dict) and "num-supernodes" in options:
            return options["num-supernodes"]
    return DEFAULT_NODES
