"""Runs scenarios: prepares, loops, writes what the run leaves behind, and resumes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fedsim._flower import quiet as silence_flower
from fedsim.artifacts import write_artifacts
from fedsim.errors import RunFailed, UserError
from fedsim.runs import Run, RunStore, RunWriter, environment
from fedsim.runs.progress import Progress
from fedsim.scenario import RunSpec, Scenario
from fedsim.scenario.move import differences, moved
from fedsim.scenario.sections import EngineParams
from fedsim.server.evaluation import Evaluator
from fedsim.server.loop import RoundLoop
from fedsim.server.restore import restore_strategy
from fedsim.setup import Setup, connect, forget_data, prepare
from fedsim.strategies.flower import resumable, unwrapped
from fedsim.unfinished import Choice, choose

if TYPE_CHECKING:
    from rich.console import Console

Started = Callable[[Path], None]
Ready = Callable[[Run], None]
Failed = Callable[[RunFailed], None]
Loaded = tuple[int, dict[str, torch.Tensor], Any] | None
"""Round, tensors and state of a checkpoint; None: from the start."""

MAX_NAMED = 3
"""Runs that a message names before it only counts them."""


def run(
    scenario: Scenario,
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    resume: Literal["auto"] | None = None,
) -> Run:
    """Runs a scenario that is one run (one seed, nothing to compare) and returns it.

    out: the folder of runs, by default $FEDSIM_RUNS or ./runs. quiet: no progress on standard
    error. resume: "auto" continues the newest unfinished run of it, if the folder has one. Raises
    UserError for wrong input, RunFailed for a run that fails.
    """
    specs = scenario.expand()
    if len(specs) != 1:
        raise UserError(
            f"scenario {scenario.name!r} is {len(specs)} runs; run_all(scenario) returns them all"
        )
    return run_all(scenario, out=out, quiet=quiet, resume=resume)[0]


def run_all(
    scenario: Scenario,
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    console: Console | None = None,
    on_run: Ready | None = None,
    resume: Literal["auto"] | None = None,
) -> list[Run]:
    """Runs everything that a scenario expands to, in order; checks all of it before the first.

    on_run: called with each finished run. resume: as in `run_specs`.
    """
    return run_specs(
        scenario.expand(), out=out, quiet=quiet, console=console, on_run=on_run, resume=resume
    )


def run_specs(
    specs: Sequence[RunSpec],
    *,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    console: Console | None = None,
    on_start: Started | None = None,
    on_run: Ready | None = None,
    on_failure: Failed | None = None,
    resume: Literal["auto"] | None = None,
) -> list[Run]:
    """Runs `specs`, of one scenario or of several, in order; checks all of them before the first.

    on_start: called with the folder of each run that starts. on_run: with each finished run.
    on_failure: with the error of a run that fails, after which the next one starts, and the failed
    run is among those returned; without it, the error ends everything. resume: "auto" continues
    what an earlier call left unfinished (fedsim.unfinished) and says so on the console.
    """
    check_specs(specs)
    store = RunStore(Path(out) if out is not None else None)
    console = _console(console, quiet)
    choices = choose(specs, store) if resume == "auto" else [Choice(None, "")] * len(specs)
    check_clusters([s for s, c in zip(specs, choices, strict=True) if not c.kept])
    runs: list[Run] = []
    for number, (spec, choice) in enumerate(zip(specs, choices, strict=True), 1):
        if choice.why:
            _say(console, f"{spec.label} {choice.why}")
        if choice.run is not None and choice.kept:
            if on_start is not None:
                on_start(choice.run.path)
            if on_run is not None:
                on_run(choice.run)
            runs.append(choice.run)
            continue
        with ExitStack() as stack:
            sitting = _begin(stack, store, spec, choice, console)
            writer = sitting.writer
            if on_start is not None:
                on_start(writer.path)
            try:
                finished = _go(store, sitting, console, number, len(specs))
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
    _check(specs, prepare)


def check_clusters(specs: Sequence[RunSpec]) -> None:
    """Connects to the cluster of every run, the first one's last: it is the one that is used next.

    Raises UserError with every reason why one does not take a run, and the runs that it concerns.
    """
    engines: dict[EngineParams, list[RunSpec]] = {}  # each is connected to once
    for spec in specs:
        engines.setdefault(spec.scenario.engine, []).append(spec)
    _check([spec for same in reversed(engines.values()) for spec in same], connect)


def _check(specs: Sequence[RunSpec], check: Callable[[Scenario], object]) -> None:
    """Raises UserError with every reason that `check` raises, and the runs that it concerns."""
    found: dict[str, list[str]] = {}
    for spec in specs:
        try:
            check(spec.scenario)
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
    overrides: Iterable[str] = (),
    out: str | os.PathLike[str] | None = None,
    quiet: bool = True,
    console: Console | None = None,
    on_start: Started | None = None,
) -> Run:
    """Continues an interrupted, failed or died run from its last checkpoint, to the same bits.

    overrides: `engine.threads=4` and the like, of the engine's fields that change no number; the
    run keeps them. Raises UserError if there is nothing to continue, or it cannot be.
    """
    store = RunStore(Path(out) if out is not None else None)
    found = store.open(run_id)
    stored = found.scenario
    if "app" in stored:
        from fedsim.apps.plan import again

        raise UserError(
            f"run {found.id} is of a Flower app, which cannot be resumed: it has a loop and a state"
            " of its own; start it again with"
            f" {again(stored, found.record.settings, found.record.seed)}"
        )
    scenario, _ = moved(stored, overrides)
    forget_data()
    console = _console(console, quiet)
    with _resumed(store, found, scenario, console) as sitting:
        if on_start is not None:
            on_start(sitting.writer.path)
        return _go(store, sitting, console)


@dataclass(frozen=True)
class Sitting:
    """A run that is about to be computed, from its start or from a checkpoint."""

    writer: RunWriter
    setup: Setup
    label: str
    loaded: Loaded = None


def _begin(
    stack: ExitStack, store: RunStore, spec: RunSpec, choice: Choice, console: Console
) -> Sitting:
    """Takes up the run that was chosen for a spec; starts a new one if there is none to take up."""
    if choice.run is not None:
        try:
            return stack.enter_context(_resumed(store, choice.run, spec.scenario, console))
        except UserError as error:
            _say(console, f"{spec.label} starts anew; run {choice.run.id} does not go on: {error}")
    setup = prepare(spec.scenario)
    setup.connect()
    return Sitting(stack.enter_context(store.create(spec)), setup, spec.label)


@contextmanager
def _resumed(store: RunStore, run: Run, scenario: Scenario, console: Console) -> Iterator[Sitting]:
    """Takes a run up where its newest checkpoint is, to go on with `scenario`.

    Raises UserError if that cannot be, and leaves the run as it was.
    """
    changes = differences(Scenario.from_dict(run.scenario), scenario)
    setup = prepare(scenario)
    setup.connect()
    if memory := run.engine.get("memory"):  # so that its blocks, and its last bits, stay
        setup = replace(setup, execution=replace(setup.execution, memory=memory))
    label = run.record.label
    with store.resume(run.id) as writer:
        loaded = writer.load_checkpoint()
        if loaded:
            restore_strategy(loaded[1], loaded[2], setup.strategy, setup.arrays)
        writer.truncate_after(loaded[0] if loaded else -1)
        if changes:
            writer.replace_scenario(scenario.resolved(), changes)
        where = f"after round {loaded[0]}" if loaded else "from its start: it has no checkpoint"
        words = [f"{field} is now {now}" for field, (_, now) in changes.items()]
        _say(
            console,
            "; ".join([f"{label} continues {run.id} {where}", *words, *_doubts(run, setup)]),
        )
        yield Sitting(writer, setup, label, loaded)


def _doubts(run: Run, setup: Setup) -> list[str]:
    """Says what has changed around a run that is resumed, and that its last bits may for it."""
    changed = list(environment.differences(run.environment, environment.describe()))
    if run.engine.get("device") not in (None, setup.execution.device):
        changed.append("device")
    if not changed:
        return []
    return [f"its last bits may differ, because of another {' and '.join(changed)}"]


def _go(
    store: RunStore, sitting: Sitting, console: Console, number: int = 1, count: int = 1
) -> Run:
    """Loops to the end and writes what the run leaves behind."""
    writer, setup, loaded = sitting.writer, sitting.setup, sitting.loaded
    silence_flower()
    writer.record_engine(setup.plan())  # before anything that may fail
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
        if setup.scenario.engine.name != "inline":  # who computes is known now
            begun = grid.record()
            writer.record_engine({**setup.plan(), **begun})
            if url := begun.get("dashboard"):
                _say(console, f"{sitting.label}: Ray's dashboard is at {url}")
        with Progress(
            setup.scenario.rounds,
            sitting.label,
            console=console,
            run=number,
            runs=count,
            start=loaded[0] if loaded else 0,
            steady=not _ends_by_itself(setup),
        ) as progress:
            loop = RoundLoop(
                setup.strategy,
                setup.with_faults(grid, writer),
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


def _ends_by_itself(setup: Setup) -> bool:
    """Says whether the strategy ends a run before its last round, as bandits do, whose rounds
    differ in length, too."""
    params = getattr(type(setup.strategy), "Params", None)
    return getattr(params, "default_rounds", None) is not None


def _warn_of_lost_state(setup: Setup, writer: RunWriter, console: Console) -> None:
    """Says of a strategy that nobody knows how to save that its run cannot be resumed."""
    unknown = [type(s).__name__ for s in unwrapped(setup.strategy) if not resumable(s)]
    if unknown:
        writer.event("not_resumable", strategies=unknown)
        _say(
            console,
            f"this run cannot be resumed: strategy {', '.join(unknown)} has no state_dict()"
            " and load_state_dict()",
        )


def _console(console: Console | None, quiet: bool) -> Console:
    from rich.console import Console

    return console or Console(stderr=True, quiet=quiet)


def _say(console: Console, sentence: str) -> None:
    console.print(f"fedsim: {sentence}", markup=False, highlight=False, soft_wrap=True)
