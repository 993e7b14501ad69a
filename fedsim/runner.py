"""Runs scenarios: prepares, loops, writes what the run leaves behind, and resumes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fedsim._flower import quiet as silence_flower
from fedsim.artifacts import write_artifacts
from fedsim.errors import RunFailed, UserError
from fedsim.runs import Run, RunStore, RunWriter
from fedsim.runs.progress import Progress
from fedsim.scenario import RunSpec, Scenario
from fedsim.server.evaluation import Evaluator
from fedsim.server.loop import RoundLoop
from fedsim.setup import Setup, prepare

if TYPE_CHECKING:
    from rich.console import Console

Ready = Callable[[Run], None]


def run(
    scenario: Scenario,
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
) -> Run:
    """Runs a scenario that is one run (one seed, nothing to compare) and returns it.

    out: the folder of runs, by default $FEDSIM_RUNS or ./runs. Raises UserError for wrong input,
    RunFailed for a run that fails.
    """
    specs = scenario.expand()
    if len(specs) != 1:
        raise UserError(
            f"scenario {scenario.name!r} is {len(specs)} runs; run_all(scenario) returns them all"
        )
    return run_all(scenario, out=out, quiet=quiet)[0]


def run_all(
    scenario: Scenario,
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    console: Console | None = None,
    on_run: Ready | None = None,
) -> list[Run]:
    """Runs everything that a scenario expands to, in order; checks all of it before the first.

    on_run: called with each finished run.
    """
    store = RunStore(Path(out) if out is not None else None)
    specs = scenario.expand()
    for spec in specs:
        prepare(spec.scenario)
    runs = []
    for number, spec in enumerate(specs, 1):
        finished = _start(store, spec, quiet, console, number, len(specs))
        runs.append(finished)
        if on_run is not None:
            on_run(finished)
    return runs


def resume(
    run_id: str,
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    console: Console | None = None,
) -> Run:
    """Continues an interrupted, failed or died run from its last checkpoint, to the same bits."""
    store = RunStore(Path(out) if out is not None else None)
    found = store.find(run_id)
    folder = store.root / found
    with open(folder / "scenario.yaml", encoding="utf-8") as file:
        scenario = Scenario.from_dict(yaml.safe_load(file))
    setup = prepare(scenario)
    with store.resume(found) as writer:
        loaded = writer.load_checkpoint()
        writer.truncate_after(loaded[0] if loaded else -1)
        return _go(store, writer, setup, Run(folder).record.label, quiet, console, 1, 1, loaded)


def _start(
    store: RunStore, spec: RunSpec, quiet: bool, console: Console | None, number: int, count: int
) -> Run:
    setup = prepare(spec.scenario)
    with store.create(spec) as writer:
        return _go(store, writer, setup, spec.label, quiet, console, number, count, None)


def _go(
    store: RunStore,
    writer: RunWriter,
    setup: Setup,
    label: str,
    no_progress: bool,
    console: Console | None,
    number: int,
    count: int,
    loaded: object,
) -> Run:
    """Loops to the end and writes what the run leaves behind."""
    silence_flower()
    writer.record_engine(setup.plan())
    evaluate = setup.scenario.evaluate
    evaluator = Evaluator(
        setup.model,
        setup.task,
        setup.data,
        next(iter(setup.arrays.values())).dtype,
        evaluate.splits,
        evaluate.batch_size,
    )
    grid = setup.grid()
    try:
        with Progress(
            setup.scenario.rounds,
            label,
            console=console,
            plain=no_progress,
            run=number,
            runs=count,
            start=loaded[0] if isinstance(loaded, tuple) else 0,
        ) as progress:
            loop = RoundLoop(
                setup.strategy,
                grid,
                setup.arrays,
                setup.loop_config(),
                writer,
                evaluator,
                progress.update,
            )
            if isinstance(loaded, tuple):
                loop.load(loaded[1], loaded[2])
            started = time.monotonic()
            state = loop.run()
        writer.save_parameters(state.arrays)
        writer.flush()
        summary = write_artifacts(setup, writer, state, evaluator)
        summary["loop_seconds"] = time.monotonic() - started
        writer.finish("finished", summary)
    except RunFailed as error:
        raise RunFailed(f"{error}\nrun {writer.id} in {writer.path}") from error
    finally:
        grid.close()
    return store.open(writer.id)

