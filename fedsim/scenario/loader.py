"""Reads YAML into plain data and remembers the line of every field.

The reader takes the part of YAML 1.2 that a scenario needs: mappings, lists and scalars. It works
on the parser's events, so nothing is constructed that a file asks for: tags are refused (they name
types to instantiate), and anchors and aliases too (nested, they expand to gigabytes from a few
lines, and a scenario has `compare` and `grid` for what they are used for).

Scalars follow the YAML 1.2 core schema, not PyYAML's 1.1: `1e-3` is a number, `010` is ten, and
`on`, `yes`, `1:30` and dates are text.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedsim.errors import Problem, ScenarioError
from fedsim.scenario.problems import FieldPath, Mistake, Origin, Sources

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_DIGITS = 400  # of a number; Python refuses to read whole numbers of more than 4300

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


@dataclass
class Document:
    """A scenario as written: plain data, where each field stands, and what is wrong already."""

    data: dict[str, Any]
    sources: Sources
    mistakes: list[Mistake] = field(default_factory=list)


def read(path: str | os.PathLike[str]) -> Document:
    """Reads a scenario file; raises ScenarioError if it is no readable YAML of at most 1 MiB."""
    file = Path(path)
    return parse(_text(file), str(file))


def parse(text: str, file: str = "") -> Document:
    """Parses YAML text; `file` is only named in messages.

    Raises ScenarioError where the text cannot be understood at all. Mistakes that leave the rest
    readable (a key given twice, a tag) are collected in the document.
    """
    return _built(text, file).document()


def parse_value(text: str) -> Any:
    """Returns the value that YAML text holds; raises ScenarioError on any mistake."""
    builder = _built(text, "")
    if builder.mistakes:
        raise ScenarioError(builder.sources.problem(mistake) for mistake in builder.mistakes)
    return builder.root


def _built(text: str, file: str) -> _Builder:
    builder = _Builder(file)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
    except yaml.reader.ReaderError as error:
        at = text.count("\n", 0, error.position) + 1
        raise _refused(file, "holds a character that YAML does not allow", at) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise _refused(file, _sentence(error), line) from None
    return builder


def scalar(text: str) -> str | int | float | bool | None:
    """Returns the value of an unquoted YAML 1.2 scalar."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text.lower() == "true"
    if len(text) > MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text) or _NAN.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


class _Builder:
    """Builds plain data from parser events, without recursion."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.sources = Sources(file)
        self.mistakes: list[Mistake] = []
        self.documents = 0
        self.root: Any = None
        # The open collections, outermost first, each with its path.
        self.open: list[tuple[dict[str, Any] | list[Any], FieldPath]] = []
        self.key: list[str | None] = []  # the key that waits for its value, a level

    def take(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise _refused(self.file, "holds more than one YAML document (---)", line)
        elif isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
            self._scalar(event, line)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._start(event, line)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self.open.pop()
            self.key.pop()

    def document(self) -> Document:
        if not self.documents:
            raise _refused(self.file, "is empty", None, "A scenario is a mapping of sections")
        if not isinstance(self.root, dict):
            message = "must be a mapping (section: value) at the top"
            raise _refused(self.file, message, self.sources.origin(()).line)
        return Document(self.root, self.sources, self.mistakes)

    def _scalar(self, event: yaml.ScalarEvent | yaml.AliasEvent, line: int) -> None:
        waits_for_key = self._waits_for_key()
        if isinstance(event, yaml.AliasEvent):
            if waits_for_key:
                raise _refused(self.file, "an alias (*) cannot be a key", line)
            path = self._place(None, line)
            self._not_allowed(path, f"alias *{event.anchor}", "aliases")
            return
        text = self._unicode(event.value, line)
        if waits_for_key:
            self._take_key(text, line)
            path = (*self.open[-1][1], text)
        else:
            plain = event.implicit[0] and event.style is None
            path = self._place(scalar(text) if plain else text, line)
        self._refuse_extras(event, path)

    def _unicode(self, text: str, line: int) -> str:
        """Joins the surrogate pairs of JSON's escapes, "\\ud83d\\ude00", into characters."""
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise _refused(self.file, "holds half of a surrogate pair", line) from None

    def _start(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, line: int) -> None:
        if self._waits_for_key():
            raise _refused(self.file, "a key must be plain text, not a list or a mapping", line)
        if len(self.open) >= MAX_DEPTH:
            raise _refused(self.file, f"is nested deeper than {MAX_DEPTH} levels", line)
        value: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        path = self._place(value, line)
        self._refuse_extras(event, path)
        self.open.append((value, path))
        self.key.append(None)

    def _waits_for_key(self) -> bool:
        return bool(self.open) and isinstance(self.open[-1][0], dict) and self.key[-1] is None

    def _take_key(self, key: str, line: int) -> None:
        mapping, path = self.open[-1]
        self.key[-1] = key
        if key in mapping:
            first = self.sources.origin((*path, key)).line
            self.mistakes.append(
                Mistake((*path, key), f"is given twice, in line {first} and in line {line}")
            )
        else:
            self.sources.origins[(*path, key)] = Origin((*path, key), line, self.file)

    def _place(self, value: Any, line: int) -> FieldPath:
        """Puts a value into the innermost open collection and returns its path."""
        if not self.open:
            self.root = value
            self.sources.origins[()] = Origin((), line, self.file)
            return ()
        collection, above = self.open[-1]
        if isinstance(collection, list):
            path: FieldPath = (*above, len(collection))
            collection.append(value)
            self.sources.origins[path] = Origin(path, line, self.file)
            return path
        key = self.key[-1]
        assert key is not None
        self.key[-1] = None
        if key in collection:  # a second value of the same key was reported with the key
            return (*above, f"{key} (again)")
        collection[key] = value
        return (*above, key)

    def _refuse_extras(self, event: yaml.NodeEvent, path: FieldPath) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.mistakes.append(
                Mistake(path, f"tag {tag!r} is not allowed", hint="Write the plain value")
            )
        if event.anchor is not None:
            self._not_allowed(path, f"anchor &{event.anchor}", "anchors")

    def _not_allowed(self, path: FieldPath, what: str, kind: str) -> None:
        hint = f"Scenarios take no {kind}: write the value out, or use compare or grid"
        self.mistakes.append(Mistake(path, f"{what} is not allowed", hint=hint))


def _text(file: Path) -> str:
    """Returns the file's text; nothing is read from a file that is too large or no file."""
    name = str(file)
    try:
        status = file.stat()
        if stat.S_ISDIR(status.st_mode):
            is_app = (file / "pyproject.toml").is_file()
            hint = f"A Flower app is run by: fedsim run --app {name}" if is_app else ""
            raise _refused(name, "is a folder, not a scenario file", hint=hint)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(name, "is not a regular file")
        if status.st_size > MAX_BYTES:
            size = f"{status.st_size / 2**20:.1f} MiB"
            raise _refused(name, f"is {size} large; a scenario has at most 1 MiB")
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _refused(name, "does not exist") from None
    except OSError as error:
        raise _refused(name, f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL byte in the path
        raise _refused(repr(name), f"is no path: {error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _refused(name, "is not UTF-8 text", line) from None


def _sentence(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be parsed"
    if "'\\t'" in problem:
        return "a tab where YAML allows only spaces; indent with spaces"
    context = f" {error.context}" if error.context else ""
    return f"is not valid YAML: {problem}{context}"


def _refused(file: str, message: str, line: int | None = None, hint: str = "") -> ScenarioError:
    return ScenarioError([Problem("", message, None, line, hint, file)])
