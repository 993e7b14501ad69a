"""The commands that compute: run, compare, resume, demo."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli import interrupt, options

if TYPE_CHECKING:
    from fedsim.errors import RunFailed
    from fedsim.runs import Run
    from fedsim.scenario import RunSpec

SUFFIXES = (".yaml", ".yml")


def run(
    scenarios: options.NoScenarios = None,
    app: options.App = None,
    nodes: options.Nodes = None,
    overrides: options.Overrides = None,
    seeds: options.Seeds = None,
    engine: options.Engine = None,
    address: options.Address = None,
    resume: options.Resume = None,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_report: options.NoReport = False,
) -> None:
    """Run scenarios, each with everything it compares and sweeps; or a Flower app, as it is.

    All of it is checked before anything starts.
    """
    _refuse_mixtures(scenarios, app, nodes, engine, address, resume)
    show = _Output(out, as_json, quiet, no_report)
    if app is not None:
        _run_app(app, overrides or [], nodes, seeds, show)
    else:
        given = options.overrides_of(overrides, seeds, engine, address)
        _run_scenarios(scenarios or [], given, show, resume)


@dataclass(frozen=True)
class _Output:
    """The options that say where results go."""

    out: Path | None
    as_json: bool
    quiet: bool
    no_report: bool


def _refuse_mixtures(
    scenarios: list[str] | None,
    app: Path | None,
    nodes: int | None,
    engine: str | None,
    address: str | None,
    resume: str | None,
) -> None:
    from fedsim.errors import UserError

    if resume not in (None, "auto"):
        raise UserError(
            f"--resume takes auto, not {resume!r}; a run of your choice is continued by fedsim"
            " resume RUN_ID"
        )
    if app is None:
        if not scenarios:
            raise UserError("there is nothing to run: name a scenario file, or a folder with --app")
        if nodes is not None:
            raise UserError(
                "--nodes goes with --app; a scenario says partition.clients, and --set"
                f" partition.clients={nodes} replaces it"
            )
        return
    mistakes = []
    if scenarios:
        mistakes.append(
            f"--app runs a Flower app and {scenarios[0]} is a scenario: run them one by one"
        )
    if address is not None:
        mistakes.append("--address goes with --engine ray, and a Flower app runs on inline")
    if engine not in (None, "inline"):
        mistakes.append(f"a Flower app runs on the engine inline, not on {engine}")
    if resume is not None:
        mistakes.append("a Flower app's run cannot be resumed: leave out --resume")
    if mistakes:
        raise UserError("\n".join(mistakes))


def _run_scenarios(
    paths: list[str], given: list[str], show: _Output, resume: str | None = None
) -> None:
    from fedsim.runner import run_specs

    specs = load_specs(paths, given)
    words = [*paths, *(word for text in given for word in ("--set", text))]
    execute = partial(run_specs, specs, resume="auto" if resume else None)
    _run_and_show(execute, len(specs), _texts(paths), words, show)


def _run_app(
    path: Path, overrides: list[str], nodes: int | None, seeds: str | None, show: _Output
) -> None:
    from fedsim.apps import prepare, run_apps
    from fedsim.cli.output import results_alone

    with results_alone():
        specs = prepare(path, overrides, nodes, options.seeds_of("0" if seeds is None else seeds))
    words = ["--app", str(path)]
    words += [] if nodes is None else ["--nodes", str(nodes)]
    words += [word for text in overrides for word in ("--set", text)]
    words += [] if seeds is None else ["--seeds", seeds]
    text = (specs[0].project.folder / "pyproject.toml").read_text(encoding="utf-8")
    _run_and_show(partial(run_apps, specs), len(specs), text, words, show, resumable=False)


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SCENARIO.yaml…|RUN_ID…", help="Scenario files, or ids of runs."),
    ],
    overrides: options.Overrides = None,
    seeds: options.Seeds = None,
    engine: options.Engine = None,
    address: options.Address = None,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_report: options.NoReport = False,
) -> None:
    """Compare runs in one table and one report: run scenarios for it, or take stored runs."""
    from fedsim.errors import UserError

    named = [source for source in sources if _is_file(source)]
    if len(named) == len(sources):
        given = options.overrides_of(overrides, seeds, engine, address)
        _run_scenarios(sources, given, _Output(out, as_json, quiet, no_report))
        return
    if named:
        raise UserError(
            f"{named[0]} is a scenario and the rest are runs: compare files, or run them first and"
            " compare the ids"
        )
    if overrides or any(given is not None for given in (seeds, engine, address)):
        raise UserError(
            "--set, --seeds, --engine and --address are for scenarios; these are stored runs"
        )
    from fedsim.cli.stored import open_runs

    runs = open_runs(sources, out)
    show(runs, "", command_of(["compare", *sources], out), out, as_json, quiet, no_report)


def resume(
    run_id: options.RunId,
    overrides: options.EngineOverrides = None,
    engine: options.Engine = None,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_report: options.NoReport = False,
) -> None:
    """Continue a run that was interrupted, failed or died, to the same final bits.

    It may go on on another engine, or with other threads: with whatever changes no number.
    """
    from fedsim import runner
    from fedsim.cli.output import progress_console, results_alone

    with results_alone():
        finished = runner.resume(
            run_id,
            overrides=options.overrides_of(overrides, engine=engine),
            out=out,
            console=progress_console(quiet),
            on_start=lambda folder: interrupt.note(folder, out=out),
        )
    interrupt.note(None)
    origin = command_of(["run", str(finished.path / "scenario.yaml")], out)
    show([finished], "", origin, out, as_json, quiet, no_report)


def demo(
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_report: options.NoReport = False,
) -> None:
    """Run a small experiment, offline and in under a minute: FA-HMC against FedAvg on digits."""
    from fedsim.runner import run_specs

    with as_file(files("fedsim") / "demo.yaml") as path:
        text = path.read_text(encoding="utf-8")
        specs = load_specs([str(path)], [])
    to_show = _Output(out, as_json, quiet, no_report)
    _run_and_show(partial(run_specs, specs), len(specs), text, ["demo"], to_show)
    if not as_json and not quiet:
        from fedsim.cli.output import console

        to = console()
        to.print("Try", style="bold")
        to.print(
            f"  {'a change of your own':22}copy {path} to mine.yaml, edit it, and", soft_wrap=True
        )
        to.print(f"  {'':22}fedsim run mine.yaml --set partition.alpha=10 --seeds 0,1,2")
        to.print(f"  {'what there is':22}fedsim list")


def load_specs(paths: Sequence[str], overrides: Sequence[str]) -> list[RunSpec]:
    """Returns the runs of all scenarios; raises UserError with every mistake in any of them."""
    from fedsim.cli.output import results_alone
    from fedsim.errors import UserError
    from fedsim.scenario import Scenario

    specs: list[RunSpec] = []
    mistakes = []
    for path in dict.fromkeys(paths):
        try:
            with results_alone():
                specs += Scenario.load(path, overrides).expand()
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return specs


def command_of(words: Sequence[str], out: Path | None) -> str:
    """Returns the command line that does the same again."""
    where = [] if out is None else ["--out", str(out)]
    return shlex.join(["fedsim", *words, *where])


def _is_file(source: str) -> bool:
    return source.lower().endswith(SUFFIXES) or Path(source).is_file()


def _texts(paths: Sequence[str]) -> str:
    texts = {path: Path(path).read_text(encoding="utf-8") for path in paths}
    if len(texts) == 1:
        return texts.popitem()[1]
    return "\n".join(f"# {path}\n{text}" for path, text in texts.items())


def _run_and_show(
    execute: Callable[..., list[Run]],
    count: int,
    text: str,
    words: Sequence[str],
    to: _Output,
    resumable: bool = True,
) -> None:
    """Runs and prints. execute: run_specs or run_apps, with the runs given. count: of the runs."""
    from fedsim.cli.output import progress_console, results_alone
    from fedsim.errors import FedsimError

    waiting = count
    failed: list[RunFailed] = []

    def start(folder: Path) -> None:
        nonlocal waiting
        waiting -= 1
        interrupt.note(folder, waiting, to.out, resumable)

    def end(finished: Run) -> None:
        interrupt.note(None, waiting, to.out)

    console = progress_console(to.quiet)

    def fail(error: RunFailed) -> None:
        interrupt.note(None, waiting, to.out)
        failed.append(error)
        console.print(f"fedsim: {error}", markup=False, highlight=False, soft_wrap=True)

    # One run that fails says so by itself; of several, the others go on.
    with results_alone():
        runs = execute(
            out=to.out,
            console=console,
            on_start=start,
            on_run=end,
            on_failure=fail if count > 1 else None,
        )
    words = ["run", *words] if words[:1] != ["demo"] else words
    origin = command_of(words, to.out)
    show(runs, text, origin, to.out, to.as_json, to.quiet, to.no_report)
    if failed:
        raise FedsimError(f"{len(failed)} of {count} runs failed; the first: {failed[0]}")


def show(
    runs: Sequence[Run],
    text: str,
    origin: str,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    no_report: bool,
) -> None:
    """Prints the results of `runs` and writes their report.

    text: the scenario as written. origin: the command that reproduces the runs.
    """
    from fedsim.cli import output

    to = output.console()
    if not as_json and not quiet:
        output.print_tables(runs, to)
    report = None
    if not no_report:
        from fedsim.report.write import report_folder, write

        report = write(runs, report_folder(runs), command=origin, scenario_yaml=text)
    if as_json:
        documents = [output.run_document(each) for each in runs]
        output.print_json({"runs": documents, "report": report and str(report), "command": origin})
    elif quiet:
        for each in runs:
            to.print(each.id, markup=False)
    else:
        output.print_places(runs, report, out, to)
