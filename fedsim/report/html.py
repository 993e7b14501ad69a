"""`report.html`: everything a run showed, on one page that needs neither network nor scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedsim
from fedsim.report import sense
from fedsim.report.compare import BEST, Cell, Comparison, compare
from fedsim.report.content import ReportInput
from fedsim.report.figures import Shown, figures
from fedsim.report.markup import Html, Text, bullets, details, element, image, join, pairs, table
from fedsim.report.page import page
from fedsim.report.posterior_section import posterior_section
from fedsim.report.runlike import RunLike, labels
from fedsim.report.series import XAxis
from fedsim.runs.files import write_bytes

MAX_EVENTS = 50
COST_AXES: tuple[XAxis, ...] = ("rounds", "gradients", "bytes", "seconds")


def write_report(report: ReportInput, path: Path, shown: list[Shown] | None = None) -> Path:
    """Writes the page atomically and returns its path.

    shown: figures that have been drawn already (`fedsim.report.figures.figures`).
    Raises RunFailed if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, render(report, shown).encode())
    return path


def render(report: ReportInput, shown: list[Shown] | None = None) -> str:
    """Returns the page. The same input gives the same bytes."""
    drawn = figures(report) if shown is None else shown
    images: dict[str, list[Html]] = {}
    for each in drawn:
        images.setdefault(each.section, []).append(image(each.png, each.caption))

    def pictures(section: str) -> Html:
        return join(images.get(section, []))

    comparison = compare(report.runs, report.columns)
    sections = {
        "results": ("Results", join([_headline(comparison), pictures("results")])),
        "curves": ("Over rounds, gradients and bytes", pictures("curves")),
        "bandit": ("Regret and cells", pictures("bandit")),
        "calibration": ("Calibration and unknown inputs", pictures("calibration")),
        "posterior": ("Posterior", posterior_section(report, comparison, pictures("posterior"))),
        "partition": ("Who holds what", pictures("partition")),
        "events": ("Events", _events(report.runs)),
        "setup": ("What ran", _setup(report.runs)),
        "reproduce": ("Reproduce it", _reproduce(report)),
    }
    footer = f"Written by fedsim {fedsim.__version__}."
    return page(report.title, _lead(report), sections, footer)


def _lead(report: ReportInput) -> Html:
    seeds = sorted({run.record.seed for run in report.runs})
    names = labels(list(report.runs))
    count, many = len(report.runs), "s" * (len(report.runs) != 1)
    numbers = f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
    words = f"{count} run{many}: {', '.join(names)}; {numbers}."
    parts = [element("p", report.description)] if report.description else []
    parts.append(element("p", words, class_="muted"))
    broken = [f"{run.record.label}, seed {run.record.seed}: {run.status}" for run in report.runs
              if run.status != "finished"]  # fmt: skip
    warnings = [*report.notes]
    if broken:
        warnings.append("Not every run finished: " + "; ".join(broken) + ".")
    if warnings:
        parts.append(element("div", bullets(warnings), class_="warn"))
    return join(parts)


def _headline(comparison: Comparison) -> Html:
    splits = {column.split("/", 1)[0] for column in comparison.columns} - {"ood"}
    head = ["", "seeds", *(sense.heading(c, len(splits) > 1) for c in comparison.columns)]
    rows: list[list[Text]] = [
        [row.label, str(len(row.seeds)), *(_marked(row.cells[c]) for c in comparison.columns)]
        for row in comparison.rows
    ]
    where = f"on the {' and '.join(sorted(splits))} split" if splits else ""
    words = f"Last values {where}, mean ± sample standard deviation over seeds. {BEST}"
    return join([table(head, rows, words), _costs(comparison)])


def _costs(comparison: Comparison) -> Html:
    axes = [axis for axis in COST_AXES if any(axis in row.costs for row in comparison.rows)]
    rows = [
        [row.label, *(_cost(axis, row.costs[axis]) if axis in row.costs else "–" for axis in axes)]
        for row in comparison.rows
    ]
    words = (
        "What one run had cost, mean over seeds, burn-in included. Gradients are per-example "
        "gradients over all clients, of one chain where there are several; bytes are of all chains."
    )
    return table(["", *axes], rows, words) if axes else Html("")


def _marked(cell: Cell) -> Text:
    return element("strong", str(cell)) if cell.best else str(cell)


def _cost(axis: XAxis, value: float) -> str:
    if axis == "rounds":
        return f"{value:.0f}"
    if axis == "seconds":
        return sense.duration(value)
    return sense.quantity(value, "B" if axis == "bytes" else "")


def _events(runs: Sequence[RunLike]) -> Html:
    counts: dict[str, dict[str, int]] = {}
    lines: list[list[str]] = []
    for run in runs:
        for event in run.events.to_dict("records"):
            kind = str(event["kind"])
            of_kind = counts.setdefault(kind, {})
            of_kind[run.record.label] = of_kind.get(run.record.label, 0) + 1
            lines.append([kind, run.record.label, str(run.record.seed), *_event(event)])
    if not counts:
        return element("p", "No events: every reply was usable, no run was interrupted.")
    names = labels(list(runs))
    summary = table(
        ["event", *names],
        ([kind, *(str(of.get(name, 0)) for name in names)] for kind, of in sorted(counts.items())),
        "How often each event happened, over all seeds.",
    )
    first = f"The first {MAX_EVENTS} of {len(lines)}" if len(lines) > MAX_EVENTS else "All of them"
    head = ["event", "label", "seed", "round", "details"]
    return join([summary, details(first, table(head, lines[:MAX_EVENTS]))])


def _event(event: dict[Any, Any]) -> tuple[str, str]:
    number = event.get("round")
    known = {k: v for k, v in event.items() if k not in ("time", "kind", "round") and v == v}
    words = ", ".join(f"{key}: {value}" for key, value in known.items() if value is not None)
    return (str(int(number)) if number is not None and number == number else "", words)


def _setup(runs: Sequence[RunLike]) -> Html:
    if not runs:
        return Html("")
    first = runs[0]
    environment = first.environment
    packages = environment.get("packages", {})
    git = environment.get("git") or {}
    changed = ", with uncommitted changes" if git.get("dirty") else ""
    facts: list[tuple[Text, Text]] = [
        ("fedsim", str(environment.get("fedsim", "unknown"))),
        ("Python", str(environment.get("python", "unknown"))),
        ("Packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("Processor", str(environment.get("cpu", "unknown"))),
        ("Commit", f"{git['commit']}{changed}" if git.get("commit") else "no repository"),
    ]
    engines = {", ".join(f"{k} {v}" for k, v in run.engine.items()): None for run in runs}
    facts += [("Engine plan", plan) for plan in engines if plan]
    ids = [[r.id, r.record.label, str(r.record.seed), r.status] for r in runs]
    return join([pairs(facts), table(["run", "label", "seed", "status"], ids)])


def _reproduce(report: ReportInput) -> Html:
    return join(
        [
            element("pre", report.command),
            element(
                "p",
                "The same seed gives the same numbers to the bit on the same type of processor "
                "with the same versions.",
            ),
            element("h3", "Scenario"),
            element("pre", report.scenario_yaml),
        ]
    )
