"""What can go wrong, and with which exit status: 2 for wrong input, 1 for a run that fails."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

MAX_SHOWN = 80


class Params(BaseModel):
    """Base of every component's parameters: frozen, unknown keys refused, no silent conversions.

    An int is taken where a float belongs; a string where a number belongs is not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FedsimError(Exception):
    """A failure that fedsim explains in one sentence; the command exits with `exit_status`."""

    exit_status = 1


class UserError(FedsimError):
    """The input is wrong: found before the start, nothing written."""

    exit_status = 2


class RunFailed(FedsimError):  # noqa: N818
    """A run that had started could not go on; its last good checkpoint remains."""


@dataclass(frozen=True)
class Problem:
    """One mistake in the input: what, where, and what would be right."""

    field: str
    message: str
    value: object = None
    line: int | None = None
    hint: str = ""
    file: str = ""

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line) if part)
        shown = "" if self.value is None else f" (got {shorten(self.value)})"
        hint = f". {self.hint}" if self.hint else ""
        return ": ".join(p for p in (where, self.field, self.message + shown + hint) if p)


class ScenarioError(UserError):
    """Every mistake found in a scenario, one a line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def shorten(value: object, limit: int = MAX_SHOWN) -> str:
    """Returns the value's repr, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
