"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

import fedsim
from fedsim.cli import cluster, data, describe, run, stored, tune

app = typer.Typer(
    name="fedsim",
    help="Federated learning on Flower's API: simulate, compare and inspect.",
    epilog="Start with: fedsim demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RUNNING, RESULTS, LOOKING_UP = "Run", "Results", "Look up"

app.command(rich_help_panel=RUNNING)(run.demo)
app.command(rich_help_panel=RUNNING)(run.run)
app.command(rich_help_panel=RUNNING)(run.compare)
app.command(rich_help_panel=RUNNING)(run.resume)
app.command(rich_help_panel=RUNNING)(tune.tune)
app.add_typer(cluster.app, name="cluster", rich_help_panel=RUNNING)
app.command(rich_help_panel=RESULTS)(stored.runs)
app.command(rich_help_panel=RESULTS)(stored.show)
app.command(rich_help_panel=RESULTS)(stored.report)
app.command(rich_help_panel=RESULTS)(stored.export)
app.command(rich_help_panel=LOOKING_UP)(describe.check)
app.command("list", rich_help_panel=LOOKING_UP)(describe.list_components)
app.command(rich_help_panel=LOOKING_UP)(describe.schema)
app.add_typer(data.app, name="data", rich_help_panel=LOOKING_UP)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedsim {fedsim.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="FEDSIM_DEBUG", help="Show tracebacks of errors."),
    ] = False,
) -> None:
    # `debug` is read by the guard, which sees what no command can: errors before and after them.
    pass
