"""All runs of a folder: creating, finding, listing, resuming them."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import socket
import sqlite3
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from fedsim.errors import UserError
from fedsim.runs import database, environment, exact, record
from fedsim.runs.files import disk_errors, remove_temporaries, write_bytes
from fedsim.runs.lock import RunLock
from fedsim.runs.reader import Run, status_of
from fedsim.runs.writer import RunWriter, utc_now

if TYPE_CHECKING:
    import pandas as pd

LATEST = "latest"
_SLUG = 40  # characters of a scenario's name that go into an id


class ScenarioLike(Protocol):
    """What the store needs of a resolved scenario."""

    @property
    def name(self) -> str: ...
    @property
    def rounds(self) -> int: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class RunSpecLike(Protocol):
    """What the store needs of one run of a scenario's expansion."""

    @property
    def label(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def scenario(self) -> ScenarioLike: ...


class RunStore:
    """The runs of one folder and their index `fedsim.sqlite`.

    Attributes:
      root: the folder; by default $FEDSIM_RUNS, else ./runs.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root or os.environ.get("FEDSIM_RUNS") or "runs")

    def create(self, spec: RunSpecLike) -> RunWriter:
        """Starts a new run: its folder, its record, its lock.

        Raises:
          UserError: the folder cannot be written, or its index is of another fedsim.
          RunFailed: the disk is full; nothing remains of the run.
        """
        self._make_root()
        index = database.connect(self.root)
        path: Path | None = None
        lock: RunLock | None = None
        writer: RunWriter | None = None
        try:
            with disk_errors(self.root):
                path = self._new_folder(spec)
                lock = RunLock(path)
            scenario = spec.scenario.model_dump(mode="json")
            text = yaml.safe_dump(scenario, sort_keys=False, allow_unicode=True)
            write_bytes(path / "scenario.yaml", text.encode())
            described = exact.dumps(environment.describe(), indent=2)
            write_bytes(path / "environment.json", described.encode())
            entry = _record(path.name, spec)
            entry.save(path)
            writer = RunWriter(path, entry, lock, index)
            writer.event("started")
            writer.flush()
        except BaseException:
            index.close()
            if lock is not None:
                lock.release()
            if writer is not None:
                writer.close()  # its files, too
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
            raise
        return writer

    def resume(self, run_id: str) -> RunWriter:
        """Takes up a run that did not finish; `load_checkpoint` and `truncate_after` come next.

        Until `truncate_after` nothing is lost: a UserError leaves the run as it was.

        Raises:
          UserError: there is no such run, it is finished, or another process writes it.
        """
        path = self.root / self.find(run_id)
        lock = RunLock(path)
        index = None
        try:
            before, entry = record.Record.load(path), record.Record.load(path)
            if entry.status == "finished":
                raise UserError(f"run {entry.id} is finished: there is nothing to resume")
            index = database.connect(self.root)
            remove_temporaries(path)
            entry.status = "running"
            entry.started, entry.pid, entry.host = utc_now(), os.getpid(), socket.gethostname()
            entry.save(path)
            writer = RunWriter(path, entry, lock, index, before)
            writer.mend()
            changed = environment.differences(Run(path).environment, environment.describe())
            writer.event("resumed", None, changed=changed)
        except BaseException:
            if index is not None:
                index.close()
            lock.release()
            raise
        return writer

    def open(self, run_id: str) -> Run:
        """Returns the run with this id, unique prefix of an id, or "latest"."""
        return Run(self.root / self.find(run_id))

    def find(self, run_id: str) -> str:
        """Returns the full id for an id, a unique prefix or "latest".

        Raises UserError with what is close if there is none or more than one.
        """
        ids = self.ids()
        if not ids:
            raise UserError(f"there are no runs in {self.root}; `fedsim demo` makes some")
        if run_id == LATEST:
            return max(ids, key=lambda each: (_created(self.root / each), each))
        if run_id in ids:
            return run_id
        found = [each for each in ids if run_id and each.startswith(run_id)]
        if len(found) == 1:
            return found[0]
        if found:
            shown = ", ".join(found[:5]) + (" …" if len(found) > 5 else "")
            raise UserError(f"{run_id!r} is the beginning of {len(found)} runs: {shown}")
        close = [each for each in ids if run_id and run_id in each][:3]
        close = close or difflib.get_close_matches(run_id, ids, n=3, cutoff=0.4)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise UserError(f"there is no run {run_id!r} in {self.root}{hint}")

    def ids(self) -> list[str]:
        """Returns the ids of all runs, sorted; raises UserError if the folder is a file."""
        if self.root.is_file():
            raise UserError(f"{self.root} is a file, not a folder of runs")
        return sorted(path.parent.name for path in self.root.glob(f"*/{record.NAME}"))

    def list(self) -> pd.DataFrame:
        """Returns one row per run, oldest first.

        Columns: id, scenario, label, group, seed, status, last_round (with metrics; -1 if
        none), rounds (planned), started (UTC), seconds, and the newest value of each metric of the
        splits test, validation, client and ood, as "split.name".
        """
        import pandas as pd

        columns = "id scenario label run_group seed status last_round rounds created seconds"
        names = [*columns.split(), "headline"]
        found = []
        if self.ids():
            index = self._index()
            try:
                query = f"SELECT {', '.join(names)} FROM runs ORDER BY created, id"
                found = index.execute(query).fetchall()
            finally:
                index.close()
        shown = []
        for values in found:
            row = dict(zip(names, values, strict=True))
            row["status"] = status_of(self.root / row["id"], row["status"])
            newest = json.loads(row.pop("headline"))
            shown.append(row | {name: float(value) for name, value in newest.items()})
        frame = pd.DataFrame(shown, columns=None if shown else names[:-1])
        frame = frame.rename(columns={"run_group": "group", "created": "started"})
        frame["started"] = pd.to_datetime(frame["started"], utc=True, format="ISO8601")
        return frame.astype({"seconds": "float64"})

    def rebuild(self) -> int:
        """Builds the index anew from the run folders; returns how many runs it has."""
        if not self.ids():
            return 0
        index = database.connect(self.root)
        try:
            with database.database_errors(self.root / database.NAME), database.transaction(index):
                for (run_id,) in index.execute("SELECT id FROM runs").fetchall():
                    database.forget(index, run_id)
                _add(index, self.root, self.ids())
        finally:
            index.close()
        return len(self.ids())

    def _index(self) -> sqlite3.Connection:
        """Returns the index, brought up to date with the folders.

        Runs may have been copied or deleted, or killed between their last file and its commit.
        """
        if os.access(self.root, os.W_OK):
            index = database.connect(self.root)
        else:
            index = database.in_memory()
        ids = set(self.ids())
        known = dict(index.execute("SELECT id, status FROM runs").fetchall())
        gone = set(known) - ids
        stale = {
            run_id
            for run_id in ids
            if run_id not in known or (known[run_id] == "running" and not self._is_running(run_id))
        }
        if gone or stale:
            with database.database_errors(self.root / database.NAME), database.transaction(index):
                for run_id in gone:
                    database.forget(index, run_id)
                _add(index, self.root, sorted(stale))
        return index

    def _is_running(self, run_id: str) -> bool:
        """Returns whether the record says so; it is asked only of runs that the index shows so."""
        try:
            return record.Record.load(self.root / run_id).status == "running"
        except UserError:
            return False

    def _make_root(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error.strerror) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise self._unwritable("permission denied")

    def _unwritable(self, reason: str | None) -> UserError:
        return UserError(
            f"runs cannot be written to {self.root.absolute()} ({reason}): choose another folder "
            "with --out or FEDSIM_RUNS"
        )

    def _new_folder(self, spec: RunSpecLike) -> Path:
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{_slug(spec)}-s{spec.seed}"
        number = 1
        while True:
            path = self.root / (stem if number == 1 else f"{stem}-{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1


def _add(index: sqlite3.Connection, root: Path, ids: list[str]) -> None:
    for run_id in ids:
        try:
            database.index_folder(index, root / run_id)
        except (UserError, OverflowError) as error:  # one damaged run must not hide the others
            warnings.warn(f"run {run_id}: {error}", RuntimeWarning, stacklevel=4)


def _created(folder: Path) -> str:
    """Returns when a run was created, or "" if its record cannot be read."""
    try:
        return record.Record.load(folder).created
    except UserError:
        return ""


def _record(run_id: str, spec: RunSpecLike) -> record.Record:
    now = utc_now()
    return record.Record(
        id=run_id,
        name=spec.scenario.name,
        label=spec.label,
        group=spec.group,
        seed=spec.seed,
        settings=dict(spec.settings),
        rounds=spec.scenario.rounds,
        created=now,
        started=now,
        pid=os.getpid(),
        host=socket.gethostname(),
    )


def _slug(spec: RunSpecLike) -> str:
    name, group = (_words(text) for text in (spec.scenario.name, spec.group))
    longer = max(name, group, key=len)
    stem = longer if name in group or group in name else f"{name}-{group}"
    return stem[:_SLUG].strip("-") or "run"


def _words(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
