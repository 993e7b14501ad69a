"""The posterior part of a report: what converged, at what cost, and what is not known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.metrics.distances import wasserstein1_marginal
from fedsim.report import sense
from fedsim.report.compare import Comparison
from fedsim.report.content import PosteriorResult, ReferenceResult, ReportInput
from fedsim.report.markup import Html, Text, bullets, details, element, join, table

BLIND = "R-hat and ESS cannot see the federation bias"
WORST = 10


def posterior_section(report: ReportInput, comparison: Comparison, pictures: Html) -> Html:
    """Returns tables, flags, the reference and the figures; empty where nothing was sampled."""
    if not report.posteriors and report.reference is None:
        return Html("")
    costs: dict[str, dict[str, float]] = {r.label: dict(r.costs.items()) for r in comparison.rows}
    parts = [_reference(report.reference)]
    if report.posteriors:
        parts += [_diagnostics(report, costs), _flags(report)]
    parts.append(pictures)
    parts += [_worst(label, found) for label, found in report.posteriors.items()]
    return join(parts)


def _reference(found: ReferenceResult | None) -> Html:
    if found is None:
        return element(
            "div",
            element("p", element("strong", f"{BLIND}; reference: none was run."), " They compare "
                    "chains that share it. How far these draws are from the exact posterior is "
                    "not known."),
            class_="warn",
        )  # fmt: skip
    rows: list[Sequence[Text]] = []
    for label, draws in found.draws.items():
        w1 = wasserstein1_marginal(draws, found.reference)
        worst = int(np.argmax(w1))
        rows.append([label, f"{w1.mean():.3f}", f"{np.median(w1):.3f}",
                     f"{w1[worst]:.3f} ({found.names[worst]})"])  # fmt: skip
    head = ["", "mean W1 / sd ↓", "median ↓", "largest ↓"]
    caption = (
        f"Marginal 1-Wasserstein distance to the reference over {len(found.names)} scalars, "
        "in standard deviations of the reference. Two halves of the reference itself "
        f"differ by {_noise(found):.3f}."
    )
    words = element("strong", f"{BLIND}; reference: {found.name}.")
    return join([element("p", words), table(head, rows, caption)])


def _noise(found: ReferenceResult) -> float:
    """W1 / sd between two halves of the reference, the scale below which nothing is visible."""
    return float(wasserstein1_marginal(found.reference[::2], found.reference[1::2]).mean())


def _diagnostics(report: ReportInput, costs: dict[str, dict[str, float]]) -> Html:
    head = ["", "chains × draws", "largest R-hat ↓", "bulk ESS, least / median ↑",
            "tail ESS, least ↑", "largest MCSE / sd ↓", "ESS per 10⁶ gradients ↑",
            "ESS per MB ↑"]  # fmt: skip
    rows: list[Sequence[Text]] = []
    for label, found in report.posteriors.items():
        d, s = found.diagnostics, found.diagnostics.summary()
        spent = costs.get(label, {})
        rhat, median = sense.number(s["rhat_max"]), s["ess_bulk_median"]
        rows.append(
            [
                element("span", label, element("span", f", {found.of}", class_="muted")),
                f"{d.chains} × {d.draws}",
                rhat if d.converged else element("span", rhat, class_="bad"),
                f"{sense.quantity(s['ess_bulk_min'])} / {sense.quantity(median)}",
                sense.quantity(s["ess_tail_min"]),
                f"{s['mcse_mean_max_sd']:.3f}",
                _rate(median, spent.get("gradients", 0.0) * d.chains, 1e6),
                _rate(median, spent.get("bytes", 0.0), 1e6),
            ]
        )
    caption = (
        "Rank-normalised split R-hat, effective sample size and Monte Carlo standard error "
        "(Vehtari et al. 2021), of the first seed. The rates divide the median bulk ESS by "
        "everything that all chains had spent, burn-in included."
    )
    return table(head, rows, caption)


def _rate(ess: float, spent: float, unit: float) -> str:
    return "–" if not spent else f"{ess / spent * unit:.3g}"


def _flags(report: ReportInput) -> Html:
    bad: list[Text] = []
    notes: list[Text] = []
    for label, found in report.posteriors.items():
        d = found.diagnostics
        bad += [element("span", element("strong", label), f": {flag}") for flag in d.flags()]
        if len(d.names) < d.candidates:
            notes.append(
                f"{label}: {len(d.names)} of {d.candidates} scalars were diagnosed, those with "
                "the largest split R-hat of all and evenly spaced ones; the largest split R-hat of "
                f"all is {sense.number(d.split_rhat_max)}."
            )
    shown = [element("p", note, class_="muted") for note in notes]
    if not bad:
        return join([element("p", "Every diagnosed scalar has converged."), *shown])
    heading = element("p", element("strong", "What has not converged"))
    return join([element("div", heading, bullets(bad), class_="warn"), *shown])


def _worst(label: str, found: PosteriorResult) -> Html:
    if not found.diagnostics.names:
        return Html("")
    frame = found.diagnostics.worst(WORST)
    rows = [
        [
            str(name),
            f"{row['rhat']:.4f}",
            sense.quantity(row["ess_bulk"]),
            sense.quantity(row["ess_tail"]),
            sense.number(row["mean"], None),
            sense.number(row["sd"], None),
            f"{row['mcse_mean']:.2g}",
            f"{row['mcse_sd']:.2g}",
        ]
        for name, row in frame.iterrows()
    ]
    head = ["", "R-hat", "bulk ESS", "tail ESS", "mean", "sd", "MCSE mean", "MCSE sd"]
    return details(f"{label}: the {len(rows)} scalars with the largest R-hat", table(head, rows))
