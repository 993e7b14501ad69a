"""One writer per run: an advisory lock that the kernel releases when its process is gone."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from fedsim.errors import UserError

NAME = "lock"
_TRIES = 10
_PAUSE = 0.02  # seconds; a reader that asks `is_held` holds the lock for microseconds


class RunLock:
    """Held from `RunLock(folder)` to `release()` or the end of the process, however it ends.

    Raises:
      UserError: another process, or another writer in this one, holds it.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _take(descriptor, folder.name)
            owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, owner.encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Lets go of the lock; harmless when it was released before."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_held(folder: Path) -> bool:
    """Returns whether a living process writes the run in `folder`."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _take(descriptor: int, run_id: str) -> None:
    for attempt in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt + 1 < _TRIES:
                time.sleep(_PAUSE)
        except OSError as error:
            raise UserError(
                f"the filesystem of run {run_id} has no file locks ({error.strerror}); "
                "keep runs on a local disk: set FEDSIM_RUNS"
            ) from error
    raise UserError(f"run {run_id} is being written by {_owner(descriptor)}; let it end first")


def _owner(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
