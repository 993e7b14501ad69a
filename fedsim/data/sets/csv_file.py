"""Data set `csv`: a text table with a header line, by path."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import Source
from fedsim.data.sets.table import MAX_PROBLEMS, ColumnParams, Table, source_of
from fedsim.errors import Problem, ScenarioError, UserError


class CSV(ColumnParams):
    """A CSV file (RFC 4180, UTF-8) whose first line names the columns."""

    name: Literal["csv"] = "csv"
    separator: str = Field(
        ",", min_length=1, max_length=1, description="Character between values, such as ',' or ';'."
    )

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        return source_of(read_csv(self.path, self.separator), self)


def existing_file(path: str) -> Path:
    """Returns the path of a file; raises UserError if there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise UserError(
            f"data.path: {path} {what}; a relative path is relative to the current directory, "
            f"{Path.cwd()}"
        )
    return file


def read_csv(path: str, separator: str = ",") -> Table:
    """Returns the file's columns as text; raises ScenarioError naming the lines that are wrong."""
    file = existing_file(path)
    problems: list[Problem] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=separator, strict=True)
            header = _header(next(reader, []), path, separator)
            start = reader.line_num + 1
            for row in reader:
                line, start = start, reader.line_num + 1
                if not row:  # a blank line
                    continue
                if len(row) != len(header):
                    problems.append(_ragged(path, line, row, header))
                    if len(problems) == MAX_PROBLEMS:
                        break
                    continue
                rows.append(row)
                lines.append(line)
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {path} is not UTF-8 text: {error}") from error
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    except OSError as error:
        raise UserError(f"data.path: {path} cannot be read: {error}") from error
    if problems:
        raise ScenarioError(problems)
    if not rows:
        raise UserError(f"{path}: there are no rows below the header")
    columns = zip(*rows, strict=True)
    named = {name: np.array(values) for name, values in zip(header, columns, strict=True)}
    return Table(path, named, np.array(lines))


def _header(names: list[str], path: str, separator: str) -> list[str]:
    header = [name.strip() for name in names]
    if not header:
        raise UserError(f"{path}: the file is empty; its first line must name the columns")
    if "" in header:
        raise UserError(f"{path}:1: column {header.index('') + 1} of the header has no name")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise UserError(f"{path}:1: the header names {', '.join(map(repr, twice))} twice")
    if len(header) == 1:
        other = next((c for c in ";\t|," if c != separator and c in header[0]), None)
        if other is not None:
            raise UserError(
                f"{path}:1: only one column with the separator {separator!r}; set data.separator: "
                f"{other!r}?"
            )
    return header


def _ragged(path: str, line: int, row: list[str], header: list[str]) -> Problem:
    return Problem(
        "data.path",
        f"{len(row)} values and the header has {len(header)} columns",
        line=line,
        hint="give every line one value per column; quote values that hold the separator",
        file=path,
    )
