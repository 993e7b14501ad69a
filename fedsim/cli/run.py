"""The commands that compute: run, compare, resume, demo."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
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
    scenarios: options.Scenarios,
    overrides: options.Overrides = None,
    seeds: options.Seeds = None,
    engine: options.Engine = None,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_report: options.NoReport = False,
) -> None:
    """Run scenarios, each with everything it compares and sweeps.

    All of it is checked before anything starts.
    """
    given = options.overrides_of(overrides, seeds, engine)
    specs = load_specs(scenarios, given)
    words = [*scenarios, *(word for text in given for word in ("--set", text))]
    _run_and_show(specs, _texts(scenarios), words, out, as_json, quiet, no_report)


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SCENARIO.yaml…|RUN_ID…", help="Scenario files, or ids of runs."),
    ],
    overrides: options.Overrides = None,
    seeds: options.Seeds = None,
    engine: options.Engine = None,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_report: options.NoReport = False,
) -> None:
    """Compare runs in one table and one report: run scenarios for it, or take stored runs."""
    from fedsim.errors import UserError

    named = [source for source in sources if _is_file(source)]
    if len(named) == len(sources):
        run(sources, overrides, seeds, engine, out, as_json, quiet, no_report)
        return
    if named:
        raise UserError(
            f"{named[0]} is a scenario and the rest are runs: compare files, or run them first and"
            " compare the ids"
        )
    if overrides or seeds is not None or engine is not None:
        raise UserError("--set, --seeds and --engine are for scenarios; these are stored runs")
    from fedsim.cli.stored import open_runs

    runs = open_runs(sources, out)
    show(runs, "", command_of(["compare", *sources], out), out, as_json, quiet, no_report)


def resume(
    run_id: options.RunId,
    out: options.Out = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_report: options.NoReport = False,
) -> None:
    """Continue a run that was interrupted, failed or died, to the same final bits."""
    from fedsim import runner
    from fedsim.cli.output import progress_console

    finished = runner.resume(
        run_id,
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
    with as_file(files("fedsim") / "demo.yaml") as path:
        text = path.read_text(encoding="utf-8")
        specs = load_specs([str(path)], [])
    _run_and_show(specs, text, ["demo"], out, as_json, quiet, no_report)
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
    from fedsim.errors import UserError
    from fedsim.scenario import Scenario

    specs: list[RunSpec] = []
    mistakes = []
    for path in dict.fromkeys(paths):
        try:
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
    specs: Sequence[RunSpec],
    text: str,
    words: Sequence[str],
    out: Path | None,
    as_json: bool,
    quiet: bool,
    no_report: bool,
) -> None:
    from fedsim.cli.output import progress_console
    from fedsim.errors import FedsimError
    from fedsim.runner import run_specs

    waiting = len(specs)
    failed: list[RunFailed] = []

    def start(folder: Path) -> None:
        nonlocal waiting
        waiting -= 1
        interrupt.note(folder, waiting, out)

    def end(finished: Run) -> None:
        interrupt.note(None, waiting, out)

    console = progress_console(quiet)

    def fail(error: RunFailed) -> None:
        interrupt.note(None, waiting, out)
        failed.append(error)
        console.print(f"fedsim: {error}", markup=False, highlight=False, soft_wrap=True)

    # One run that fails says so by itself; of several, the others go on.
    several = len(specs) > 1
    runs = run_specs(
        specs,
        out=out,
        console=console,
        on_start=start,
        on_run=end,
        on_failure=fail if several else None,
    )
    words = ["run", *words] if words[:1] != ["demo"] else words
    show(runs, text, command_of(words, out), out, as_json, quiet, no_report)
    if failed:
        count = f"{len(failed)} of {len(specs)} runs failed"
        raise FedsimError(f"{count}; the first: {failed[0]}")


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
