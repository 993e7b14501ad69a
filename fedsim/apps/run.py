"""Runs Flower apps and leaves them in the run store."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim._flower import SUPERLINK_NODE_ID, logs_to
from fedsim._flower import Run as FlowerRun
from fedsim.apps.grid import AppGrid
from fedsim.apps.load import where_of
from fedsim.apps.plan import AppSpec, components
from fedsim.apps.record import Recorder
from fedsim.apps.watch import watched
from fedsim.errors import RunFailed
from fedsim.grids.apps import LOGGER
from fedsim.messages import to_tensors
from fedsim.random import integer
from fedsim.runs import Run, RunStore, RunWriter
from fedsim.runs.progress import Progress
from fedsim.runs.record import APP_LOG

if TYPE_CHECKING:
    from rich.console import Console


def run_apps(
    specs: Sequence[AppSpec],
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    console: Console | None = None,
    on_start: Callable[[Path], None] | None = None,
    on_run: Callable[[Run], None] | None = None,
    on_failure: Callable[[RunFailed], None] | None = None,
) -> list[Run]:
    """Runs `specs` (of `prepare`), one after the other; the callbacks are those of `run_specs`."""
    runs = []
    for number, spec in enumerate(specs, 1):
        try:
            runs.append(run_app(spec, out, quiet, console, on_start, number, len(specs)))
        except AppFailed as error:
            if on_failure is None:
                raise
            on_failure(error)
            runs.append(Run(error.path))
            continue
        if on_run is not None:
            on_run(runs[-1])
    return runs


class AppFailed(RunFailed):
    """An app's run that failed; `path` is its folder."""

    def __init__(self, reason: str, path: Path) -> None:
        self.reason, self.path = reason, path
        super().__init__(f"{reason}\nrun {path.name} in {path}")


def run_app(
    spec: AppSpec,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    console: Console | None = None,
    on_start: Callable[[Path], None] | None = None,
    number: int = 1,
    count: int = 1,
) -> Run:
    """Runs an app once and returns the run; raises RunFailed if its ServerApp fails.

    out: the folder of runs, by default $FEDSIM_RUNS or ./runs. number, count: of this run among
    several.
    """
    from rich.console import Console

    shown = RunStore(Path(out) if out is not None else None)
    store = RunStore(shown.root.absolute())  # an app may go into another folder
    threads = torch.get_num_threads()
    try:
        with components(spec.project, spec.seed) as (server, client), store.create(spec) as writer:
            if on_start is not None:
                on_start(shown.root / writer.id)
            with (
                logs_to(writer.path / APP_LOG, LOGGER),
                Progress(
                    max(spec.scenario.rounds, 1),
                    spec.label,
                    console=console or Console(stderr=True, quiet=quiet),
                    run=number,
                    runs=count,
                ) as progress,
            ):
                note = _go(spec, server, client, writer, progress)
        if note:  # also where progress is not wanted: what was computed is not what was meant
            Console(stderr=True).print(
                f"fedsim: {note}", markup=False, highlight=False, soft_wrap=True
            )
    except AppFailed as error:
        raise AppFailed(error.reason, shown.root / error.path.name) from error.__cause__
    finally:
        torch.set_num_threads(threads)
    return shown.open(writer.id)


def _go(
    spec: AppSpec, server: ServerApp, client: ClientApp, writer: RunWriter, progress: Progress
) -> str:
    """Runs the app to its end; returns what its user should know of it, or nothing."""
    scenario, project = spec.scenario, spec.project
    recorder = Recorder(writer, progress)
    run_id = integer(spec.seed, "flower-run")
    grid = AppGrid(
        client,
        scenario.nodes,
        seed=spec.seed,
        run_id=run_id,
        run_config=scenario.run_config,
        on_exchange=recorder.exchange,
    )
    flower_run = replace(
        FlowerRun.create_empty(run_id),
        fab_id=f"{project.publisher}/{project.name}",
        fab_version=project.version,
        override_config=dict(spec.settings),
    )
    grid.set_run(flower_run)
    context = Context(
        run_id=run_id,
        node_id=SUPERLINK_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(scenario.run_config),
    )
    writer.record_engine({"engine": "inline", "path": "Flower app", "nodes": scenario.nodes})
    started = time.monotonic()
    try:
        with watched(recorder):
            try:
                server(grid, context)
            except SystemExit as error:
                if error.code not in (None, 0):
                    raise
    except RunFailed as error:
        raise _failed(str(error), recorder, writer) from error
    except (Exception, SystemExit) as error:
        logging.getLogger(LOGGER).error("the ServerApp failed", exc_info=True)
        place = where_of(error, project.folder)
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        reason = f"the ServerApp failed: {words}{place}"
        raise _failed(reason, recorder, writer) from error
    recorder.close()
    if recorder.totals.messages and recorder.totals.dropped == recorder.totals.messages:
        raise _failed("no node has answered a message", recorder, writer)
    notes = [*_save_arrays(recorder, writer), *_not_finite(recorder)]
    for note in notes:
        writer.event("not_finite", None, what=note)
    seconds = time.monotonic() - started
    totals = vars(recorder.totals)
    writer.finish("finished", {"totals": totals, "loop_seconds": seconds, "notes": notes})
    errors = _errors(recorder)
    if errors:
        notes.append(f"{errors}; {APP_LOG} has the tracebacks")
    return f"run {writer.id}: {'; '.join(notes)}" if notes else ""


def _failed(reason: str, recorder: Recorder, writer: RunWriter) -> AppFailed:
    """Returns the error, after what the run has come to is logged."""
    with suppress(RunFailed):  # on a full disk; the first error is the one to show
        recorder.close()
    if errors := _errors(recorder):
        reason += f"; {errors}"
    return AppFailed(f"{reason}; {APP_LOG} has the traceback", writer.path)


def _errors(recorder: Recorder) -> str:
    """Returns how many messages were answered by an error, and the first; nothing without any."""
    totals = recorder.totals
    if not totals.dropped:
        return ""
    return (
        f"{totals.dropped:.0f} of {totals.messages:.0f} messages were answered by an error,"
        f" the first in {recorder.first_failure}"
    )


def _save_arrays(recorder: Recorder, writer: RunWriter) -> list[str]:
    """Writes the final parameters; returns a sentence if they are not all finite."""
    if recorder.arrays is None:
        return []
    try:
        arrays = to_tensors(recorder.arrays)
        writer.save_parameters(arrays)
    except TypeError as error:  # arrays that torch or safetensors has no type for
        writer.event("parameters_not_saved", None, reason=str(error))
        return []
    bad = [name for name, array in arrays.items() if not bool(array.isfinite().all())]
    if not bad:
        return []
    return [f"the final parameters have NaN or Inf, in {len(bad)} of {len(arrays)} arrays"]


def _not_finite(recorder: Recorder) -> list[str]:
    """Returns a sentence if a metric ends as NaN or Inf."""
    found = recorder.not_finite
    if not found:
        return []
    first, since = min(found.items(), key=lambda each: each[1])
    more = f", and {len(found) - 1} more metrics" if len(found) > 1 else ""
    return [f"{first} is NaN or Inf since round {since}{more}"]
