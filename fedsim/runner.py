"""Runs scenarios: prepares, loops, writes what the run leaves behind, and resumes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from fedsim._flower import quiet as silence_flower
from fedsim.artifacts import write_artifacts
from fedsim.errors import RunFailed, UserError
from fedsim.runs import Run, RunStore, RunWriter
from fedsim.runs.progress import Progress
from fedsim.scenario import RunSpec, Scenario
from fedsim.server.evaluation import Evaluator
from fedsim.server.loop import RoundLoop
from fedsim.setup import Setup, forget_data, prepare
from fedsim.strategies.flower import resumable, unwrapped

if TYPE_CHECKING:
    from rich.console import Console

Started = Callable[[Path], None]
Ready = Callable[[Run], None]
Failed = Callable[[RunFailed], None]

MAX_NAMED = 3
"""Runs that a message names before it only counts them."""


def run(
    scenario: Scenario,
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
) -> Run:
    """Runs a scenario that is one run (one seed, nothing to compare) and returns it.

    out: the folder of runs, by default $FEDSIM_RUNS or ./runs. quiet: no progress on standard
    error. Raises UserError for wrong input, RunFailed for a run that fails.
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
    return run_specs(scenario.expand(), out=out, quiet=quiet, console=console, on_run=on_run)


def run_specs(
    specs: Sequence[RunSpec],
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    console: Console | None = None,
    on_start: Started | None = None,
    on_run: Ready | None = None,
    on_failure: Failed | None = None,
) -> list[Run]:
    """Runs `specs`, of one scenario or of several, in order; checks all of them before the first.

    on_start: called with the folder of each run that starts. on_run: with each finished run.
    on_failure: with the error of a run that fails, after which the next one starts, and the failed
    run is among those returned; without it, the error ends everything.
    """
    check_specs(specs)
    store = RunStore(Path(out) if out is not None else None)
    runs: list[Run] = []
    for number, spec in enumerate(specs, 1):
        setup = prepare(spec.scenario)
        setup.connect()
        with store.create(spec) as writer:
            if on_start is not None:
                on_start(writer.path)
            try:
                finished = _go(store, writer, setup, spec.label, quiet, console, number, len(specs))
            except RunFailed as error:
                if on_failure is None:
                    raise
                with suppress(RunFailed):  # on a full disk; the first error is the one to show
                    writer.finish("failed", {"error": str(error)})
                writer.close()
                on_failure(error)
                runs.append(Run(writer.path))
                continue
        runs.append(finished)
        if on_run is not None:
            on_run(finished)
    return runs


def check_specs(specs: Sequence[RunSpec]) -> None:
    """Builds data, model, strategy and client of every run, and computes and writes nothing.

    Raises UserError with every reason that is found, and the runs that it concerns.
    """
    forget_data()
    found: dict[str, list[str]] = {}
    for spec in specs:
        try:
            prepare(spec.scenario)
        except UserError as error:
            found.setdefault(str(error), []).append(spec.label)
    if found and len(specs) == 1:
        raise UserError(*found)
    if found:
        raise UserError(
            "\n".join(f"{_enumerated(labels)}: {reason}" for reason, labels in found.items())
        )


def _enumerated(labels: Sequence[str]) -> str:
    more = len(labels) - MAX_NAMED
    return ", ".join(labels[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def resume(
    run_id: str,
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    console: Console | None = None,
    on_start: Started | None = None,
) -> Run:
    """Continues an interrupted, failed or died run from its last checkpoint, to the same bits."""
    store = RunStore(Path(out) if out is not None else None)
    found = store.find(run_id)
    folder = store.root / found
    with open(folder / "scenario.yaml", encoding="utf-8") as file:
        stored = yaml.safe_load(file)
    if "app" in stored:
        from fedsim.apps.plan import again

        record = store.open(found).record
        raise UserError(
            f"run {found} is of a Flower app, which cannot be resumed: it has a loop and a state of"
            f" its own; start it again with {again(stored, record.settings, record.seed)}"
        )
    scenario = Scenario.from_dict(stored)
    forget_data()
    setup = prepare(scenario)
    setup.connect()
    with store.resume(found) as writer:
        if on_start is not None:
            on_start(writer.path)
        loaded = writer.load_checkpoint()
        writer.truncate_after(loaded[0] if loaded else -1)
        return _go(store, writer, setup, Run(folder).record.label, quiet, console, loaded=loaded)


def _go(
    store: RunStore,
    writer: RunWriter,
    setup: Setup,
    label: str,
    quiet: bool,
    console: Console | None,
    number: int = 1,
    count: int = 1,
    loaded: tuple[int, dict[str, torch.Tensor], Any] | None = None,
) -> Run:
    """Loops to the end and writes what the run leaves behind."""
    from rich.console import Console

    silence_flower()
    console = console or Console(stderr=True, quiet=quiet)
    writer.record_engine(setup.plan())
    _warn_of_lost_state(setup, writer, console)
    evaluate = setup.scenario.evaluate
    evaluator = Evaluator(
        setup.model,
        setup.task,
        setup.data,
        getattr(torch, setup.execution.dtype),
        evaluate.splits if setup.scenario.model is not None else (),
        evaluate.batch_size,
    )
    threads = torch.get_num_threads()
    grid = setup.grid()
    try:
        with Progress(
            setup.scenario.rounds,
            label,
            console=console,
            run=number,
            runs=count,
            start=loaded[0] if loaded else 0,
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
            if loaded:
                loop.load(loaded[1], loaded[2])
            started = time.monotonic()
            state = loop.run()
        writer.record_engine({**setup.plan(), **grid.record()})
        writer.save_parameters(state.arrays)
        writer.flush()
        summary = write_artifacts(setup, writer, state, evaluator, grid)
        summary["loop_seconds"] = time.monotonic() - started
        writer.finish("finished", summary)
    except RunFailed as error:
        raise RunFailed(f"{error}\nrun {writer.id} in {writer.path}") from error
    finally:
        grid.close()
        torch.set_num_threads(threads)
    return store.open(writer.id)


def _warn_of_lost_state(setup: Setup, writer: RunWriter, console: Console) -> None:
    """Says of a strategy that nobody knows how to save that its run cannot be resumed."""
    unknown = [type(s).__name__ for s in unwrapped(setup.strategy) if not resumable(s)]
    if unknown:
        writer.event("not_resumable", strategies=unknown)
        console.print(
            f"fedsim: this run cannot be resumed: strategy {', '.join(unknown)} has no state_dict()"
            " and load_state_dict()",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
