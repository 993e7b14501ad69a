"""The commands about runs that exist: runs, show, report, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli import options

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.runs import Run

MAX_METRICS = 4
METRICS = ("accuracy", "nll", "brier", "ece", "mse")


def runs(
    out: options.Out = None,
    as_json: options.Json = False,
    last: Annotated[
        int | None,
        typer.Option("--last", min=1, metavar="N", help="Only the newest N.", show_default=False),
    ] = None,
) -> None:
    """List the runs of a folder, oldest first, with their newest metrics."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fedsim.cli.output import console, print_json
    from fedsim.runs import RunStore

    store = RunStore(out)
    found = store.list()
    if last is not None:
        found = found.tail(last)
    if as_json:
        rows = found.assign(started=found["started"].astype(str)).astype(object)
        rows = rows.where(rows.notna(), None)
        print_json(rows.to_dict("records"))
        return
    to = console()
    if not len(found):
        to.print(f"There are no runs in {store.root}; fedsim demo makes some.", markup=False)
        return
    metrics = headline(found)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("run", no_wrap=True)
    table.add_column("label", overflow="fold", min_width=20)
    for name in ("seed", "status", "round", "seconds", *metrics):
        table.add_column(name, justify="left" if name == "status" else "right")
    for row in found.to_dict("records"):
        table.add_row(*_row(row, metrics))
    to.print(table)


def show(run_id: options.RunId, out: options.Out = None, as_json: options.Json = False) -> None:
    """Show one run: how it stands, what it found, what it left behind."""
    from rich.table import Table

    from fedsim.cli.output import console, print_json, run_document
    from fedsim.report import sense
    from fedsim.runs import RunStore

    run = RunStore(out).open(run_id)
    document = run_document(run)
    document["artifacts"] = run.artifacts()
    if as_json:
        print_json(document)
        return
    table = Table.grid(padding=(0, 2))
    facts: dict[str, str] = {
        "run": run.id,
        "scenario": f"{document['scenario']}, {document['label']}, seed {document['seed']}",
        "status": str(document["status"]),
        "error": str(document["error"] or ""),
        "notes": "; ".join(document["notes"]),
        "rounds": f"{_last_round(run, document['round'])} of {document['rounds']}",
        "time": "" if document["seconds"] is None else sense.duration(document["seconds"]),
        "engine": engine_words(run.engine),
        "folder": str(run.path),
        "artifacts": ", ".join(document["artifacts"]),
    }
    for name, value in facts.items():
        if value:
            table.add_row(f"[bold]{name}[/]", _text(value))
    for name, value in document["metrics"].items():
        if not name.startswith("system."):
            table.add_row(f"[bold]{name}[/]", sense.number(value))
    for name, value in _flags(document["posterior"] or {}):
        table.add_row(f"[bold]{name}[/]", _text(value))
    console().print(table)


def engine_words(plan: Mapping[str, Any]) -> str:
    """Returns how a run was computed, from its recorded plan; "" if it says nothing."""
    if "path" not in plan:
        return ""
    blocks = "; ".join(
        f"{message} in blocks of {', '.join(map(str, sorted(set(sizes), reverse=True)))} clients"
        for message, sizes in plan.get("blocks", {}).items()
    )
    why = f" ({plan['why']})" if "why" in plan else ""  # a Flower app has nothing to choose
    counts = [f"{plan[name]} {name}" for name in ("nodes", "threads") if name in plan]
    kinds = [str(plan[name]) for name in ("device", "dtype") if name in plan]
    graphs, traced = plan.get("graphs"), ""
    if graphs:
        traced = f"{graphs} graph{'s' * (graphs != 1)} traced in {plan['trace_seconds']:.1f} s"
    return ", ".join(filter(None, [f"{plan['path']}{why}", *counts, blocks, traced, *kinds]))


def report(
    run_ids: options.RunIds,
    out: options.Out = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", metavar="DIR", help="Folder for the page and plots.", show_default=False
        ),
    ] = None,
) -> None:
    """Write the report of stored runs anew: report.html, and plots as PNG and SVG."""
    from fedsim.cli.output import command, console, written_to
    from fedsim.report.write import report_folder, write

    found = open_runs(run_ids, out)
    ids = [run.id for run in found]
    folder = to or report_folder(found)
    with written_to("--to", folder) if to else nullcontext():
        page = write(found, folder, command=command("report", *ids, out=out))
    console().print(str(page), markup=False, soft_wrap=True)


def export(
    run_id: options.RunId,
    out: options.Out = None,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="csv|parquet|json", help="Format of the tables."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="PATH",
            help="A folder, or a .csv, .parquet or .json file for the metrics alone; a folder"
            " named after the run if left out.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Export a run for other tools: metrics, events, parameters, artifacts."""
    from fedsim.cli.output import console, written_to
    from fedsim.errors import UserError
    from fedsim.runs import RunStore
    from fedsim.runs.export import FORMATS
    from fedsim.runs.export import export as export_run

    chosen = next((each for each in FORMATS if each == format), None)
    if format is not None and chosen is None:
        raise UserError(f"there is no export format {format!r}; there are {', '.join(FORMATS)}")
    run = RunStore(out).open(run_id)
    target = to or Path(f"{run.id}-export")
    with written_to("--to", target):
        written = export_run(run, target, chosen)
    for path in written:
        console().print(str(path), markup=False, soft_wrap=True)


def open_runs(run_ids: Sequence[str], out: Path | None) -> list[Run]:
    """Returns the runs, each once; raises UserError with every id that is none."""
    from fedsim.errors import UserError
    from fedsim.runs import RunStore

    store = RunStore(out)
    found: dict[str, Run] = {}
    mistakes = []
    for run_id in run_ids:
        try:
            run = store.open(run_id)
            found[run.id] = run
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    return list(found.values())


def headline(found: pd.DataFrame) -> list[str]:
    """Returns the metric columns worth a place in the list of runs."""
    splits = ("test", "validation", "client")
    wanted = [f"{split}.{name}" for split in splits for name in METRICS]
    present = [name for name in wanted if name in found and found[name].notna().any()]
    return present[:MAX_METRICS]


def _row(row: Mapping[Any, Any], metrics: Sequence[str]) -> list[Any]:
    from fedsim.report import sense

    seconds = row["seconds"]
    return [
        _text(row["id"]),
        _text(row["label"]),
        str(row["seed"]),
        _text(row["status"]),
        f"{max(int(row['last_round']), 0)}/{row['rounds']}",
        "" if seconds is None or seconds != seconds else f"{seconds:.1f}",
        *("" if row[name] != row[name] else sense.number(row[name]) for name in metrics),
    ]


def _flags(posterior: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for kind in ("parameters", "predictive logits"):
        lines += [(kind, flag) for flag in (posterior.get(kind) or {}).get("flags", [])]
    for name, value in (posterior.get("reference") or {}).items():
        lines.append((f"reference {name}", str(value)))
    return lines


def _last_round(run: Run, known: int | None) -> int:
    """Returns the last round that a run has logged, which a summary knows when there is one."""
    rounds = run.metrics["round"]
    return known if known is not None else int(rounds.max()) if len(rounds) else 0


def _text(value: object) -> Any:
    from rich.text import Text

    return Text(str(value), overflow="fold")
