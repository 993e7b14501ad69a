"""Turns mistakes, pydantic's included, into plain sentences that know their place in the file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedsim.errors import Problem

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """Something wrong at a field of the scenario; `value` None shows no value."""

    path: FieldPath
    message: str
    value: object = None
    hint: str = ""


@dataclass(frozen=True)
class Origin:
    """Where a field was written: the path there, the line, and the file or command-line option."""

    path: FieldPath
    line: int | None
    file: str


@dataclass
class Sources:
    """Where every field of a scenario comes from: its own line, a compare entry, an option."""

    file: str = ""
    origins: dict[FieldPath, Origin] = field(default_factory=dict)

    def origin(self, path: FieldPath) -> Origin:
        """Returns the origin of the nearest ancestor that was written somewhere."""
        for end in range(len(path), 0, -1):
            found = self.origins.get(path[:end])
            if found is not None:
                return Origin((*found.path, *path[end:]), found.line, found.file)
        root = self.origins.get((), Origin((), None, self.file))
        return Origin((*root.path, *path), root.line, root.file)

    def copy(self) -> Sources:
        """Returns an independent copy."""
        return Sources(self.file, dict(self.origins))

    def forget(self, path: FieldPath) -> None:
        """Removes what is known of `path` and everything below it."""
        size = len(path)
        self.origins = {at: o for at, o in self.origins.items() if at[:size] != path}

    def adopt(self, path: FieldPath, value: object, origin: Origin) -> None:
        """Records that `value`, now at `path`, was written at `origin`, and its items below it."""
        self.origins[path] = origin
        for key, item in children(value):
            self.adopt((*path, key), item, self.below(origin, key))

    def below(self, origin: Origin, key: str | int) -> Origin:
        """Returns the origin of an item of what was written at `origin`."""
        path = (*origin.path, key)
        # What comes from an option has no line, and must not take that of the field it replaced.
        written = self.origins.get(path) if origin.line is not None else None
        return written or Origin(path, origin.line, origin.file)

    def problem(self, mistake: Mistake) -> Problem:
        """Returns the mistake with its place."""
        origin = self.origin(mistake.path)
        return Problem(
            field=dotted(origin.path),
            message=mistake.message,
            value=mistake.value,
            line=origin.line,
            hint=mistake.hint,
            file=origin.file,
        )


def children(value: object) -> Iterable[tuple[str | int, object]]:
    """Returns the (key, item) pairs of a mapping or a list, and nothing for a scalar."""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    return []


def dotted(path: FieldPath) -> str:
    """Returns the path as it is written for --set, `strategy.betas.0`, fit for a terminal."""
    text = ".".join(str(part) for part in path)
    return text if text.isprintable() else repr(text)[1:-1]


def suggestion(word: object, known: Iterable[str], what: str = "") -> str:
    """Returns a hint: the close matches of `word` among `known`, or all of `known` if few."""
    known = sorted(known)
    close = difflib.get_close_matches(str(word), known, n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(close) + "?"
    if not known:
        return ""
    shown = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return f"Known {what}: {shown}" if what else f"Known: {shown}"
