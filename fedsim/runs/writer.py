"""Writes one run: its folder, and its rows in the index.

What survives what. Metrics, events and draws wait in memory for at most `COMMIT_SECONDS` (draws:
until the next checkpoint); a kill loses them, and a resumed run computes them again, because
`save_checkpoint` first makes everything up to its round durable and `truncate_after` removes
everything later. So: log all of a round, then save its checkpoint.
"""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import yaml

from fedsim.errors import RunFailed, UserError
from fedsim.runs import checkpoint, database, exact, record, rows, tensors
from fedsim.runs.draws import DrawWriter
from fedsim.runs.files import disk_errors, write_bytes
from fedsim.runs.lines import LinesFile
from fedsim.runs.lock import RunLock

if TYPE_CHECKING:
    import torch

COMMIT_SECONDS = 0.5
LOCKED_PAUSE = 60.0  # seconds before an index that another process keeps locked is tried again
PARAMETERS = "parameters.safetensors"


class RunWriter:
    """The one writer of a run; made by `RunStore.create` and `RunStore.resume`.

    All methods raise RunFailed with the path when the disk is full or unwritable; nothing is half
    written then, earlier checkpoints are intact and the run can be resumed. One thread at a time.

    Attributes:
      id: the run's id, the name of its folder.
      path: the run's folder.
    """

    def __init__(
        self,
        path: Path,
        entry: record.Record,
        lock: RunLock,
        index: sqlite3.Connection,
        before: record.Record | None = None,
    ) -> None:
        """before: what was known of a run that is taken up, which comes back if it is refused."""
        self._before = before
        self.id = entry.id
        self.path = path
        self._record = entry
        self._lock = lock
        self._index = index
        self._index_path = path.parent / database.NAME
        self._metrics = LinesFile(path / rows.METRICS)
        self._client_metrics = LinesFile(path / rows.CLIENT_METRICS)
        self._events = LinesFile(path / rows.EVENTS)
        self._draws = DrawWriter(path)
        self._new_metrics: list[rows.Metric] = []
        self._new_client_metrics: list[rows.ClientMetric] = []
        self._new_events: list[dict[str, Any]] = []
        self._latest = rows.Latest()
        self._round = -1
        self._committed = time.monotonic()
        self._began = time.monotonic()
        self._seconds_before = 0.0
        self._index_behind = False
        self._index_retry = 0.0
        self._closed = False

    # Logging

    def log_metrics(self, round: int, split: str, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of one split ("train", "client", "validation", "test", "ood", "system").

        A value logged twice for the same round, split and name is replaced.
        """
        self._enter(round)
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics.append(rows.metrics_line(round, split, values))
        self._new_metrics.extend((round, split, name, value) for name, value in values.items())
        self._latest.add(round, split, values)

    def log_client_metrics(
        self,
        round: int,
        split: str,
        partitions: Sequence[int],
        metrics: Mapping[str, Sequence[float]],
    ) -> None:
        """Logs metrics of single clients: every list has one value per entry of `partitions`."""
        self._enter(round)
        clients = [int(partition) for partition in partitions]
        values = {name: [float(value) for value in many] for name, many in metrics.items()}
        for name, many in values.items():
            if len(many) != len(clients):
                raise ValueError(f"{name} has {len(many)} values for {len(clients)} partitions")
        self._client_metrics.append(rows.client_line(round, split, clients, values))
        self._new_client_metrics.extend(
            (round, split, client, name, value)
            for name, many in values.items()
            for client, value in zip(clients, many, strict=True)
        )

    def event(self, kind: str, round: int | None = None, **fields: object) -> None:
        """Logs something that happened, with JSON-able `fields`.

        An event with a round is removed when the run is resumed from before it; one without stays.
        """
        if round is not None:
            self._enter(round)
        if "time" in fields:
            raise ValueError("an event has its own time: call the field something else")
        row = {"time": utc_now(), "kind": kind, "round": round, **fields}
        self._events.append(exact.dumps(row))
        self._new_events.append(row)

    def end_round(self, round: int) -> None:
        """Marks the end of a round; commits if the last commit is `COMMIT_SECONDS` ago.

        A loop that does not call it has a round committed when it logs the next one.
        """
        self._round = round
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes all that waits to the folder, and to the index in one transaction."""
        for file in (self._metrics, self._client_metrics, self._events):
            file.flush()
        self._commit()

    # Draws, parameters, artifacts

    def save_draw(self, round: int, draw: Mapping[str, torch.Tensor]) -> None:
        """Takes a posterior draw, tensors (chains, *shape) by name; rounds must increase."""
        self._draws.add(round, draw)

    def save_parameters(self, parameters: Mapping[str, torch.Tensor]) -> Path:
        """Writes the final parameters, `parameters.safetensors`."""
        path = self.path / PARAMETERS
        write_bytes(path, tensors.to_bytes(parameters))
        return path

    def artifact_path(self, name: str) -> Path:
        """Returns where to write the artifact `name` (may contain "/"); its folder exists then.

        Raises ValueError if the path would leave the artifacts' folder.
        """
        folder = (self.path / "artifacts").resolve()
        path = (folder / name).resolve()
        if folder not in path.parents:
            raise ValueError(f"artifact {name!r} lies outside {folder}")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def plan_rounds(self, rounds: int) -> None:
        """Sets how many rounds are planned, for a run that learns it after its start."""
        self._record.rounds = rounds
        self._record.save(self.path)

    def record_engine(self, plan: Mapping[str, object]) -> None:
        """Writes the execution plan (path, chunk bounds, threads …), `engine.json`."""
        write_bytes(self.path / "engine.json", exact.dumps(dict(plan), indent=2).encode())

    # Checkpoints

    def save_checkpoint(
        self,
        round: int,
        tensors: Mapping[str, torch.Tensor],
        state: object,
        keep: int = 2,
        keep_every: int = 0,
    ) -> None:
        """Makes everything logged durable, then saves what the run continues from.

        Args:
          round: the last complete round, ≥ 0.
          tensors: by name, any dtype and shape; come back bit for bit, on the CPU.
          state: JSON-able; floats and integers come back exactly, tuples as lists.
          keep: how many checkpoints stay, ≥ 1; the second is for the day the first is damaged.
          keep_every: beside them, the first checkpoint of every so many rounds stays; 0: none.
        """
        for file in (self._metrics, self._client_metrics, self._events):
            file.sync()
        self._draws.flush()
        self._commit()
        checkpoint.save(
            self.path,
            round,
            tensors,
            state,
            seconds=self._seconds(),
            keep=keep,
            keep_every=keep_every,
        )

    def load_checkpoint(self) -> tuple[int, dict[str, torch.Tensor], Any] | None:
        """Returns (round, tensors, state) of the newest valid checkpoint, None if there is none.

        A torn or corrupt one is skipped, with an event and a warning. Raises UserError if all are,
        or if the newest is of a format that this fedsim does not read.
        """
        found = checkpoint.newest(self.path, self._skipped)
        if found is None:
            return None
        self._seconds_before = found.seconds
        return found.round, found.tensors, found.state

    def truncate_after(self, round: int) -> None:
        """Removes metrics, events, draws and checkpoints of later rounds; -1 removes all."""
        self._before = None
        self._keep(lambda row: row["round"] is None or row["round"] <= round)
        self._draws.truncate_after(round)
        checkpoint.remove_after(self.path, round)
        (self.path / "summary.json").unlink(missing_ok=True)
        self._round = round
        self.reindex()

    def mend(self) -> None:
        """Drops the torn line that a kill may have left, and brings the index up to date."""
        self._keep(lambda row: True)
        self.reindex()

    def replace_scenario(self, scenario: Mapping[str, Any], changed: Mapping[str, object]) -> None:
        """Writes the scenario that the run goes on with, and an event with what has changed."""
        text = yaml.safe_dump(dict(scenario), sort_keys=False, allow_unicode=True)
        write_bytes(self.path / "scenario.yaml", text.encode())
        self.event("engine_changed", None, changed=dict(changed))

    # Life

    def finish(
        self, status: record.Status = "finished", summary: Mapping[str, object] | None = None
    ) -> None:
        """Writes `summary.json`, marks the run and lets go of it; the writer is closed then."""
        if status not in record.STATUSES or status == "running":
            raise ValueError(f"a run does not end as {status!r}")
        try:
            self._draws.flush()
            self._record.status = status
            self._record.seconds = self._seconds()
            facts = {
                "status": status,
                "round": self._latest.round,
                "seconds": self._record.seconds,
                "metrics": self._latest.values,
            }
            text = exact.dumps({**facts, **(summary or {})}, indent=2)
            for file in (self._metrics, self._client_metrics, self._events):
                file.sync()
            write_bytes(self.path / "summary.json", text.encode())
            self._record.save(self.path)
            self._index_retry = 0.0
            self._commit()
            self._warn_if_behind()
        finally:
            self.close()

    def close(self) -> None:
        """Lets go of the run without marking it: unless finished, it counts as died."""
        if self._closed:
            return
        self._closed = True
        for file in (self._metrics, self._client_metrics, self._events):
            file.close()
        with suppress(sqlite3.Error):
            self._index.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Marks a run that an exception ends as interrupted or failed, and closes.

        A run that is refused when it is taken up (UserError) is left as it was.
        """
        if isinstance(error, UserError) and self._before is not None and not self._closed:
            self._before.save(self.path)
            self.reindex()
        elif error is not None and not self._closed:
            status: record.Status = "failed"
            if isinstance(error, KeyboardInterrupt):
                status = "interrupted"
            with suppress(RunFailed):  # the disk may be full: the first error is the one to show
                self.finish(status, {"error": str(error) or type(error).__name__})
        self.close()

    def reindex(self) -> None:
        """Builds the run's rows in the index anew from its folder."""
        self._new_metrics.clear()
        self._new_client_metrics.clear()
        self._new_events.clear()
        self._latest = rows.Latest(rows.read_metrics(self.path))
        with database.database_errors(self._index_path), database.transaction(self._index):
            database.index_folder(self._index, self.path)

    # Inside

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        for file in (self._metrics, self._client_metrics, self._events):
            file.flush()
            file.keep(wanted)

    def _enter(self, round: int) -> None:
        """Commits the rounds before, at the first word of a new one, if it is time."""
        if round != self._round:
            if self._new_metrics or self._new_client_metrics or self._new_events:
                self.end_round(self._round)
            self._round = round

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _skipped(self, round: int, reason: str) -> None:
        self.event("checkpoint_skipped", None, checkpoint=round, reason=reason)
        message = f"checkpoint of round {round} of run {self.id} is skipped: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _commit(self) -> None:
        """Writes the waiting rows to the index; if another process locks it, they wait on."""
        self._committed = time.monotonic()
        if self._committed < self._index_retry:
            return
        if self._record.status == "running":
            self._record.seconds = self._seconds()
        try:
            with database.database_errors(self._index_path), database.transaction(self._index):
                key = database.put_run(self._index, self._record, self._latest)
                database.put_metrics(self._index, key, self._new_metrics)
                database.put_client_metrics(self._index, key, self._new_client_metrics)
                database.put_events(self._index, key, self._new_events)
        except database.IndexLockedError:
            # The folder has it all; a locked index must not cost a run that took hours.
            self._index_behind = True
            self._index_retry = time.monotonic() + LOCKED_PAUSE
            return
        self._index_behind = False
        self._new_metrics.clear()
        self._new_client_metrics.clear()
        self._new_events.clear()

    def _warn_if_behind(self) -> None:
        if self._index_behind:
            warnings.warn(
                f"{self._index_path} is locked by another process: run {self.id} is complete in "
                "its folder, but the index lacks its last rounds; RunStore.rebuild() adds them",
                RuntimeWarning,
                stacklevel=3,
            )


def utc_now() -> str:
    """Returns the time as ISO 8601 in UTC with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
