"""The commands that look up and check: check, list, schema."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsim.cli import options

if TYPE_CHECKING:
    from fedsim.scenario import RunSpec


class Kind(StrEnum):
    """What `fedsim list` can list."""

    strategies = "strategies"
    clients = "clients"
    datasets = "datasets"
    partitions = "partitions"
    models = "models"
    tasks = "tasks"
    engines = "engines"


SECTIONS = {
    Kind.strategies: "strategy",
    Kind.clients: "client",
    Kind.datasets: "data",
    Kind.partitions: "partition",
    Kind.models: "model",
    Kind.tasks: "task",
}


def check(
    scenarios: options.Scenarios,
    overrides: options.Overrides = None,
    seeds: options.Seeds = None,
    as_json: options.Json = False,
) -> None:
    """Check scenarios without running them: every field, and that data and model can be built."""
    from fedsim.cli.output import console, print_json, results_alone
    from fedsim.cli.run import load_specs
    from fedsim.runner import check_specs

    specs = load_specs(scenarios, options.overrides_of(overrides, seeds))
    with results_alone():
        check_specs(specs)
        plans = [{"label": spec.label, "seed": spec.seed, **_plan(spec)} for spec in specs]
    if as_json:
        print_json({"runs": plans})
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = ("label", "rounds", "clients", "parameters", "chains", "engine", "path", "chunk",
               "threads", "dtype", "device")  # fmt: skip
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in columns:
        left = name in ("label", "engine", "path")
        table.add_column(name, justify="left" if left else "right")
    for plan in plans[:MAX_SHOWN]:
        shown = plan | {"chunk": _chunk(plan)}
        table.add_row(*(str(shown[name]) for name in columns))
    to = console()
    to.print(table)
    if len(plans) > MAX_SHOWN:
        to.print(f"… and {len(plans) - MAX_SHOWN} more")
    for why in dict.fromkeys(str(plan["why"]) for plan in plans):
        to.print(f"path: {why}", markup=False)
    to.print(f"{len(plans)} run{'s' * (len(plans) != 1)}, nothing wrong")


MAX_SHOWN = 40


def _plan(spec: RunSpec) -> dict[str, object]:
    from fedsim.setup import prepare

    return {"rounds": spec.scenario.rounds, **prepare(spec.scenario).plan()}


def _chunk(plan: dict[str, object]) -> str:
    if plan["path"] == "one_by_one":
        return "–"
    return str(plan["chunk"] or "auto")


def list_components(
    kind: Annotated[
        Kind | None, typer.Argument(help="What to list; everything if left out.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List what a scenario can name: strategies, clients, datasets and so on."""
    from rich.table import Table

    from fedsim.cli.output import console, print_json

    kinds = list(Kind) if kind is None else [kind]
    found = {each.value: components(each) for each in kinds}
    if as_json:
        print_json(found)
        return
    to = console()
    for title, lines in found.items():
        if len(found) > 1:
            to.print(title, style="bold")
        table = Table.grid(padding=(0, 2))
        for name, words in lines.items():
            table.add_row(f"  {name}" if len(found) > 1 else name, words)
        to.print(table, markup=False)


def components(kind: Kind) -> dict[str, str]:
    """Returns the names that a scenario's section takes, each with what it is in one line."""
    from fedsim.scenario import installed
    from fedsim.scenario.sections import ENGINES

    if kind is Kind.engines:
        return ENGINES
    return {name: _first_line(model) for name, model in installed().of(SECTIONS[kind]).items()}


def schema(
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write it there.", show_default=False),
    ] = None,
) -> None:
    """Print the JSON Schema of scenario files, with which editors complete and check them."""
    from fedsim.cli.output import written_to
    from fedsim.runs.files import disk_errors, write_bytes
    from fedsim.scenario import Scenario

    text = json.dumps(Scenario.json_schema(), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        sys.stdout.write(text)
        return
    with written_to("--out", out, folder=False):
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, text.encode())


def _first_line(model: type) -> str:
    words = (vars(model).get("__doc__") or "").strip().split("\n\n")[0]
    return " ".join(words.split())
