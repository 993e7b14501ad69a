"""The figures of a report: each with a caption that can be read alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from matplotlib.figure import Figure

from fedsim.report import plots, sense
from fedsim.report.compare import compare, headline_columns
from fedsim.report.content import ReportInput
from fedsim.report.regret import regret_of
from fedsim.report.runlike import labels
from fedsim.report.series import XAxis, curves_of

MAX_MARGINALS = 12
AXES: dict[XAxis, str] = {
    "rounds": "communication rounds",
    "gradients": "per-example gradients of all clients, of one chain where there are several",
    "bytes": "bytes sent, up and down",
    "simulated_seconds": "the seconds of the simulated clock",
}


@dataclass
class Shown:
    """A figure, its file name without suffix, the section it belongs to, and its caption."""

    name: str
    section: str
    caption: str
    figure: Figure

    @cached_property
    def png(self) -> bytes:
        """The figure as PNG, drawn once for the page and the file."""
        return plots.to_png(self.figure)


def figures(report: ReportInput) -> list[Shown]:
    """Returns every figure that the report has the data for, in the order of its sections."""
    return [
        *_curves(report),
        *_bandits(report),
        *_predictions(report),
        *_posterior(report),
        *_partition(report),
    ]


def save_figures(shown: list[Shown], folder: Path) -> list[Path]:
    """Writes every figure as PNG and SVG into `folder` and returns the paths."""
    return [
        path for each in shown for path in plots.save(each.figure, folder / each.name, png=each.png)
    ]


def _curves(report: ReportInput) -> Iterator[Shown]:
    columns = tuple(report.columns or headline_columns(report.runs))
    if not columns:
        return
    comparison = compare(report.runs, columns)
    if len(comparison.rows) > 1 or any(len(row.seeds) > 1 for row in comparison.rows):
        caption = "Final values. A dot is a seed, the bar ± one sd, the tick the mean."
        yield Shown("comparison", "results", caption, plots.comparison_bars(comparison))
    for axis, words in AXES.items():
        panels = {c: curves_of(report.runs, c, axis) for c in columns}
        drawn = [curve for panel in panels.values() for curve in panel if len(curve.x) > 1]
        if not any(curve.x[-1] > 0 for curve in drawn):
            continue
        caption = (
            f"Metrics over {words}. The vertical axis fits what comes after the first "
            "fifth of each curve."
        )
        yield Shown(f"curves_{axis}", "curves", caption, plots.metric_curves(panels, axis))


def _bandits(report: ReportInput) -> Iterator[Shown]:
    panels = {
        title: curves
        for title, name in (("Cumulative regret", "regret"), ("Simple regret", "simple_regret"))
        if (curves := regret_of(report.runs, name))
    }
    if panels:
        caption = (
            "Regret of a client, mean over clients, over its pulls. Cumulative: the sum of what "
            "every pull fell short of the client's optimum; simple: what its recommendation does."
        )
        yield Shown("regret", "bandit", caption, plots.regret_plot(panels))
    for i, (label, picture) in enumerate(report.cells.items()):
        if not picture.drawable:
            continue
        caption = (
            f"{label}: cells that all clients pulled (grey) and that some client kept (blue), by "
            "depth; cells that single clients hold at the end (orange), and what they recommend."
        )
        yield Shown(f"cells_{i}", "bandit", caption, plots.cells_plot(picture))


def _predictions(report: ReportInput) -> Iterator[Shown]:
    if report.reliability:
        bins = len(next(iter(report.reliability.values())).count)
        caption = (
            f"Reliability in {bins} equal-width bins of the top-label confidence. On the "
            "diagonal, predictions are right as often as they claim; below it, over-confident."
        )
        figure = plots.reliability_diagram(report.reliability, labels(list(report.runs)))
        yield Shown("reliability", "calibration", caption, figure)
    if report.ood:
        caption = (
            f"{report.ood_score} on known and on unknown inputs: the less they overlap, the "
            "better the model knows what it does not know."
        )
        yield Shown(
            "ood", "calibration", caption, plots.ood_histogram(report.ood, report.ood_score)
        )


def _posterior(report: ReportInput) -> Iterator[Shown]:
    if report.reference is not None:
        found = report.reference
        d = min(len(found.names), MAX_MARGINALS)
        cut = {label: x[:, :d] for label, x in found.draws.items()}
        few = f" The first {d} of {len(found.names)}." if d < len(found.names) else ""
        caption = (
            f"Posterior marginals over {found.name}; the figures are W1 distances in "
            f"standard deviations of the reference.{few}"
        )
        figure = plots.posterior_marginals(
            cut,
            found.reference[:, :d],
            found.names[:d],
            reference_label=f"reference ({found.name})",
            order=labels(list(report.runs)),
        )
        yield Shown("marginals", "posterior", caption, figure)
    known = {k: p.diagnostics for k, p in report.posteriors.items() if p.diagnostics.names}
    known = {k: d for k, d in known.items() if d.chains > 1}
    if known:
        caption = "How R-hat and ESS are spread; the dashed lines are the usual limits."
        figure = plots.diagnostics_plot(known, labels(list(report.runs)))
        yield Shown("diagnostics", "posterior", caption, figure)
    for i, (label, posterior) in enumerate(report.posteriors.items()):
        picked = plots.worst_and_typical(posterior.draws, posterior.diagnostics)
        if picked:
            caption = (
                f"{label}: chains of the scalars with the largest R-hat and of a median one. "
                "Ranks of chains that agree are flat, inside the band."
            )
            yield Shown(f"trace_{i}", "posterior", caption, plots.trace_plot(picked))


def _partition(report: ReportInput) -> Iterator[Shown]:
    if report.partition is None:
        return
    clients = report.clients or len(report.partition)
    caption = f"Which of the {sense.quantity(clients)} clients holds how much of what."
    figure = plots.partition_plot(report.partition, report.class_names, clients)
    yield Shown("partition", "partition", caption, figure)
