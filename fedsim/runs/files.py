"""Files that are either complete or absent, and one sentence when the disk says no."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsim.errors import RunFailed

TEMPORARY = ".tmp-"
_FULL = {errno.ENOSPC, errno.EDQUOT}


def disk_full(path: Path) -> RunFailed:
    """Returns the error of a run that found no room for `path`."""
    return RunFailed(
        f"the disk is full: cannot write {path}. Earlier checkpoints are intact; "
        "free some space, then resume the run"
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into RunFailed with a sentence that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(path) from error
        raise RunFailed(f"cannot write {path}: {error.strerror or error}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically and durably: temporary name, fsync, rename, fsync.

    Raises RunFailed, leaving the old content in place and no temporary file behind.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    with disk_errors(path):
        try:
            write_through(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_through(path: Path, data: bytes) -> None:
    """Writes `data` to a new file at `path` and waits until it is on the disk."""
    with open(path, "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[write_some(file.fileno(), rest) :]
        os.fsync(file.fileno())


def write_some(descriptor: int, data: memoryview | bytes) -> int:
    """Writes at least a part of `data` and returns how many bytes: all writing goes through here.

    A single function, so that tests can fill the disk at any byte.
    """
    return os.write(descriptor, data)


def remove_temporaries(folder: Path) -> None:
    """Removes what writers that were killed left below `folder`; no writer may be at work."""
    for left in list(folder.rglob(f"{TEMPORARY}*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
