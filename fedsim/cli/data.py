"""The command `fedsim data`: who holds what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli import options

app = typer.Typer(help="Look at a scenario's data.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # With a callback, typer keeps `show` a command of its own although it is the only one.
    pass


@app.command()
def show(
    scenario: options.ScenarioFile,
    overrides: options.Overrides = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="The seed, the scenario's first if left out."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where to draw it, as PNG and SVG; beside the scenario's name if left out.",
            show_default=False,
        ),
    ] = None,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Clients in the table.")] = 50,
) -> None:
    """Show which client holds how much of what: a table, and a plot."""
    from fedsim.cli.output import console, results_alone, written_to
    from fedsim.cli.run import load_specs
    from fedsim.data import build_data
    from fedsim.data.show import plot_partition, show_table
    from fedsim.runs.files import disk_errors

    given = options.overrides_of(overrides, None if seed is None else str(seed))
    spec = load_specs([scenario], given)[0]
    with results_alone():
        data = build_data(spec.scenario.data, spec.scenario.partition, spec.seed)
    to = console()
    to.print(show_table(data, clients))
    target = out or Path(f"{Path(scenario).stem}-data.png")
    with written_to("--out", target, folder=False), disk_errors(target):
        written = plot_partition(data, target)
    for path in written:
        to.print(str(path), markup=False, soft_wrap=True)
