"""What `fedsim cluster up` started, remembered for `status`, `down` and the engine.

One cluster at a time, in one JSON file of the user's: $XDG_STATE_HOME/fedsim/cluster/cluster.json.
The token lies beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fedsim.errors import UserError
from fedsim.runs.files import disk_errors, write_bytes

VERSION = 1


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one of the same number by when it began."""

    pid: int
    began: float
    """Seconds since the epoch, as psutil says."""
    name: str


@dataclass(frozen=True)
class Local:
    """A head on this machine."""

    address: str
    """HOST:PORT of Ray's control store."""
    loopback: bool
    session: int
    """The POSIX session that all its processes are in."""
    processes: tuple[Process, ...]
    """Those that ran when the start was over; workers come and go."""
    folder: Path
    """Whatever Ray writes lies in it, closed to other users."""
    token: Path
    object_store: int
    """Bytes."""
    ray: str
    """Version."""


@dataclass(frozen=True)
class Launched:
    """A cluster on other machines, started by Ray's launcher."""

    file: Path
    name: str
    ray: str


Cluster = Local | Launched


def folder() -> Path:
    """Returns $XDG_STATE_HOME/fedsim/cluster, else ~/.local/state/fedsim/cluster."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".local/state") / "fedsim/cluster"


def read() -> Cluster | None:
    """Returns the cluster that was started last and not ended; None if there is none.

    Raises UserError if the file is not one of this version's.
    """
    path = _file()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("version") != VERSION:
            raise ValueError("another version")
        return _launched(document) if document.pop("kind") == "launched" else _local(document)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not readable as what this fedsim writes ({error}); if no cluster of yours"
            " is running, remove it"
        ) from error


def write(cluster: Cluster) -> None:
    """Remembers a cluster instead of what was remembered."""
    kind = "local" if isinstance(cluster, Local) else "launched"
    document = {"version": VERSION, "kind": kind, **asdict(cluster)}
    write_bytes(_file(), json.dumps(document, default=str, indent=2).encode())


def forget() -> None:
    """Remembers nothing any more; harmless when there was nothing."""
    _file().unlink(missing_ok=True)


@contextmanager
def lock() -> Iterator[None]:
    """Keeps out other commands that start or end a cluster; raises UserError if one is at it."""
    place = folder()
    with disk_errors(place):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError("another `fedsim cluster` is starting or ending a cluster") from None
    finally:
        os.close(descriptor)


def _file() -> Path:
    return folder() / "cluster.json"


def _local(document: dict[str, object]) -> Local:
    found = dict(document)
    listed = found.pop("processes")
    if not isinstance(listed, list):
        raise ValueError("no list of processes")
    return Local(
        processes=tuple(Process(**each) for each in listed),
        folder=Path(str(found.pop("folder"))),
        token=Path(str(found.pop("token"))),
        **found,  # type: ignore[arg-type]
    )


def _launched(document: dict[str, object]) -> Launched:
    found = {name: str(value) for name, value in document.items()}
    return Launched(file=Path(found.pop("file")), **found)
