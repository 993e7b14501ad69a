"""Append-only JSON-lines files that survive a kill at any byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsim.runs import exact
from fedsim.runs.files import disk_errors, sync_folder, write_bytes, write_some


class LinesFile:
    """A JSON-lines file of one writer; lines wait in memory until `flush`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._descriptor = -1

    def append(self, line: str) -> None:
        """Takes one line of JSON, without its newline."""
        self._waiting.append(line)

    def flush(self) -> None:
        """Appends the waiting lines; on RunFailed the file is as before and the lines wait on."""
        if not self._waiting:
            return
        data = memoryview(("\n".join(self._waiting) + "\n").encode())
        with disk_errors(self.path):
            descriptor = self._open()
            before = os.fstat(descriptor).st_size
            try:
                while data:
                    data = data[write_some(descriptor, data) :]
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        self._waiting.clear()

    def sync(self) -> None:
        """Flushes, and waits until all lines are on the disk."""
        self.flush()
        if self._descriptor >= 0:
            with disk_errors(self.path):
                os.fsync(self._descriptor)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the file with the complete lines that `wanted` accepts; drops waiting ones."""
        self._waiting.clear()
        kept = [line for line, row in _complete(self.path) if wanted(row)]
        self.close()
        if self.path.exists():
            write_bytes(self.path, b"".join(kept))

    def close(self) -> None:
        """Closes the file; `append` and `flush` open it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        if self._descriptor < 0:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o644)
            sync_folder(self.path.parent)
        return self._descriptor


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSON-lines file up to the first torn one; nothing if it is absent."""
    for _, row in _complete(path):
        yield row


def _complete(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                row = exact.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                return
            yield line, row
