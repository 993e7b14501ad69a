"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Scenarios = Annotated[
    list[str], typer.Argument(metavar="SCENARIO.yaml…", help="Scenario files.", show_default=False)
]
NoScenarios = Annotated[
    list[str] | None,
    typer.Argument(metavar="SCENARIO.yaml…", help="Scenario files.", show_default=False),
]
App = Annotated[
    Path | None,
    typer.Option(
        "--app",
        metavar="DIR",
        help="Run a Flower app (a folder with a pyproject.toml) instead of scenarios; --set then"
        " replaces values of its run config.",
        show_default=False,
    ),
]
Nodes = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        metavar="N",
        help="With --app: how many nodes; as many as the app asks for if left out.",
        show_default=False,
    ),
]
ScenarioFile = Annotated[
    str, typer.Argument(metavar="SCENARIO.yaml", help="Scenario file.", show_default=False)
]
RunId = Annotated[
    str,
    typer.Argument(
        metavar="RUN_ID", help="A run's id, the beginning of one, or latest.", show_default=False
    ),
]
RunIds = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN_ID…", help="Ids of runs, beginnings of ids, or latest.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD.PATH=VALUE",
        help="Replace a value of the scenario; may be given several times.",
        show_default=False,
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds", metavar="0,1,2", help="One run for each seed instead of the scenario's."
    ),
]
Engine = Annotated[
    str | None,
    typer.Option("--engine", metavar="NAME", help="Engine to run on instead of the scenario's."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT|auto",
        help="With --engine ray: the cluster to run on; Ray is started for the run if left out.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Folder of runs; $FEDSIM_RUNS if left out, else runs.",
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document; progress goes to standard error.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="No progress and no tables: only the ids of the runs, one a line."
    ),
]
NoReport = Annotated[bool, typer.Option("--no-report", help="Write neither report.html nor plots.")]


def overrides_of(
    overrides: list[str] | None,
    seeds: str | None = None,
    engine: str | None = None,
    address: str | None = None,
) -> list[str]:
    """Returns all overrides in the form that Scenario.load takes."""
    found = list(overrides or ())
    if seeds is not None:
        found.append(f"seeds={seeds_of(seeds)}")
    if engine is not None:
        found.append(f"engine.name={engine}")
    if address is not None:
        found.append(f"engine.address={address}")
    return found


def seeds_of(seeds: str) -> list[int]:
    """Returns the numbers of a --seeds option."""
    numbers = [part.strip() for part in seeds.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise typer.BadParameter(
            f"{seeds!r} is not a list of whole numbers such as 0,1,2", param_hint="--seeds"
        )
    return [int(number) for number in numbers]
