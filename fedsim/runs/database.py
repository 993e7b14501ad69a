"""`fedsim.sqlite`: an index over all runs of a folder, for queries across runs.

The truth is in the run folders; the file can be deleted and is built again from them.

    runs(key, id, scenario, label, run_group, seed, settings, status, host, pid, created, started,
         seconds, rounds, last_round, headline)     settings and headline are JSON objects
    metrics(run, split, name, round, value)                         value NULL means NaN
    client_metrics(run, split, name, round, partition, value)
    events(run, time, kind, round, fields)                          fields is a JSON object
    schema_version(version)

`run` is runs.key. A query: SELECT id, round, value FROM metrics JOIN runs ON run = key
WHERE split = 'test' AND name = 'accuracy'.
"""

from __future__ import annotations

import json
import sqlite3
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsim.errors import RunFailed, UserError
from fedsim.runs import exact, rows
from fedsim.runs.files import disk_full
from fedsim.runs.record import Record

NAME = "fedsim.sqlite"
VERSION = 1
BUSY_SECONDS = 30.0


class IndexLockedError(RunFailed):
    """Another process kept the index locked for `BUSY_SECONDS`."""


_TABLES = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
CREATE TABLE runs (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, scenario TEXT NOT NULL, label TEXT NOT NULL,
    run_group TEXT NOT NULL, seed INTEGER NOT NULL, settings TEXT NOT NULL, status TEXT NOT NULL,
    host TEXT NOT NULL, pid INTEGER NOT NULL, created TEXT NOT NULL, started TEXT NOT NULL,
    seconds REAL, rounds INTEGER NOT NULL, last_round INTEGER NOT NULL,
    headline TEXT NOT NULL);
CREATE TABLE metrics (
    run INTEGER NOT NULL, split TEXT NOT NULL, name TEXT NOT NULL, round INTEGER NOT NULL,
    value REAL, PRIMARY KEY (run, split, name, round)) WITHOUT ROWID;
CREATE TABLE client_metrics (
    run INTEGER NOT NULL, split TEXT NOT NULL, name TEXT NOT NULL, round INTEGER NOT NULL,
    partition INTEGER NOT NULL, value REAL,
    PRIMARY KEY (run, split, name, round, partition)) WITHOUT ROWID;
CREATE TABLE events (
    run INTEGER NOT NULL, time TEXT NOT NULL, kind TEXT NOT NULL, round INTEGER,
    fields TEXT NOT NULL);
CREATE INDEX events_of_run ON events (run, round);
"""


def connect(root: Path) -> sqlite3.Connection:
    """Opens the index in `root`, creating it if there is none.

    Raises:
      UserError: it is damaged, or of a schema version that this fedsim does not know.
      RunFailed: the disk is full.
    """
    path = root / NAME
    with database_errors(path):
        connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def in_memory() -> sqlite3.Connection:
    """Returns an empty index in memory, for folders that cannot be written."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    _create(connection)
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commits the block as one, or rolls it back."""
    # IMMEDIATE waits for other writers up front; a later upgrade could not wait (SQLITE_BUSY).
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turns SQLite's errors into ours: IndexLockedError, RunFailed or UserError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if _is_locked(str(error)):
            raise IndexLockedError(
                f"{path} has been locked by another process for {BUSY_SECONDS:.0f} s: end it, "
                "then try again"
            ) from error
        if "full" in str(error):
            raise disk_full(path) from error
        raise RunFailed(f"cannot write {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it, fedsim builds it again from the run folders"
        ) from error


def _is_locked(message: str) -> bool:
    return "locked" in message or "busy" in message


def put_run(connection: sqlite3.Connection, record: Record, latest: rows.Latest) -> int:
    """Inserts or updates the row of a run; returns its key."""
    values = (
        record.id, record.name, record.label, record.group, record.seed,
        exact.dumps(record.settings), record.status, record.host, record.pid, record.created,
        record.started, record.seconds, record.rounds, latest.round,
        json.dumps({name: rows.number(value) for name, value in latest.values.items()}),
    )  # fmt: skip
    found = connection.execute(
        "INSERT INTO runs (id, scenario, label, run_group, seed, settings, status, host, pid,"
        " created, started, seconds, rounds, last_round, headline)"
        " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET"
        " status=excluded.status, host=excluded.host, pid=excluded.pid, started=excluded.started,"
        " seconds=excluded.seconds, rounds=excluded.rounds, last_round=excluded.last_round,"
        " headline=excluded.headline RETURNING key",
        values,
    ).fetchone()
    return int(found[0])


def put_metrics(connection: sqlite3.Connection, run: int, found: Iterable[rows.Metric]) -> None:
    """Inserts metrics; a value that is there already is replaced."""
    connection.executemany(
        "INSERT OR REPLACE INTO metrics (run, round, split, name, value) VALUES (?,?,?,?,?)",
        ((run, *row) for row in found),
    )


def put_client_metrics(
    connection: sqlite3.Connection, run: int, found: Iterable[rows.ClientMetric]
) -> None:
    """Inserts per-client metrics; a value that is there already is replaced."""
    connection.executemany(
        "INSERT OR REPLACE INTO client_metrics (run, round, split, partition, name, value)"
        " VALUES (?,?,?,?,?,?)",
        ((run, *row) for row in found),
    )


def put_events(connection: sqlite3.Connection, run: int, events: Iterable[dict[str, Any]]) -> None:
    """Appends events."""
    fixed = ("time", "kind", "round")
    connection.executemany(
        "INSERT INTO events (run, time, kind, round, fields) VALUES (?,?,?,?,?)",
        (
            (run, *(event[name] for name in fixed),
             exact.dumps({key: event[key] for key in event if key not in fixed}))
            for event in events
        ),
    )  # fmt: skip


def forget(connection: sqlite3.Connection, run_id: str) -> None:
    """Removes a run's rows from all tables."""
    for table in ("metrics", "client_metrics", "events"):
        connection.execute(
            f"DELETE FROM {table} WHERE run = (SELECT key FROM runs WHERE id = ?)", (run_id,)
        )
    connection.execute("DELETE FROM runs WHERE id = ?", (run_id,))


def index_folder(connection: sqlite3.Connection, folder: Path) -> int:
    """Indexes a run anew from its folder, inside the caller's transaction; returns its key."""
    record = Record.load(folder)
    metrics = rows.read_metrics(folder)
    forget(connection, record.id)
    key = put_run(connection, record, rows.Latest(metrics))
    put_metrics(connection, key, metrics)
    put_client_metrics(connection, key, rows.read_client_metrics(folder))
    put_events(connection, key, rows.read_events(folder))
    return key


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    _use_wal(connection, path)
    connection.execute("PRAGMA synchronous=NORMAL")
    version = _version(connection)
    if version is None:
        with transaction(connection):
            version = _version(connection)  # another process may have created it meanwhile
            if version is None:
                _create(connection)
                version = VERSION
    if version != VERSION:
        age = "a newer" if version > VERSION else "an older"
        raise UserError(
            f"{path} was written by {age} fedsim (schema version {version}; this one knows "
            f"{VERSION}). Delete it, the index is built again from the run folders, or set "
            "FEDSIM_RUNS to another folder"
        )


def _version(connection: sqlite3.Connection) -> int | None:
    """Returns the schema version, None for an empty file, 0 for somebody else's tables."""
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    if not tables:
        return None
    if "schema_version" not in tables:
        return 0
    found = connection.execute("SELECT max(version) FROM schema_version").fetchone()
    return int(found[0] or 0)


def _create(connection: sqlite3.Connection) -> None:
    for statement in _TABLES.split(";"):
        if statement.strip():
            connection.execute(statement)
    connection.execute("INSERT INTO schema_version VALUES (?)", (VERSION,))


def _use_wal(connection: sqlite3.Connection, path: Path) -> None:
    try:
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise
        mode = str(error)
    if mode != "wal" and not _is_locked(mode):
        warnings.warn(
            f"{path} is on a filesystem without SQLite's write-ahead log ({mode}); several runs "
            "at once will wait for each other",
            RuntimeWarning,
            stacklevel=2,
        )
