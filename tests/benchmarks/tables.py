"""The tables of the report: who is measured for each, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from tests.benchmarks.commands import BOUNDS, shown, time_commands
from tests.benchmarks.harness import Timing, measure
from tests.benchmarks.report import Verdict, grid, table
from tests.benchmarks.sampling import Posterior
from tests.benchmarks.sides import BLAZEFL, SAMPLERS, SIDES, Side
from tests.benchmarks.workloads import COHORTS, POPULATIONS, WORKLOADS, Workload

FRAMEWORK_MS = 1.0
"""What a round of 100 clients that do nothing may cost."""

MEMORY_MB = {"W3-1M": 600.0}
"""What fedsim may need at its peak."""

FLAT = 1.2
"""How much longer a round may take with a million clients than with a thousand."""

RAY_MS = 10.0
"""What a round of 100 clients that do nothing may cost more on two workers of engine ray."""

RAY_SLOWER = 1.15
"""How much longer a round of convolutions may take there, on as many CPUs."""

RAY_FASTER = {"W3-1k": 20.0, "W3-1M": 10.0}
"""How many times engine ray's time Flower's own simulation must take, which runs on Ray, too."""

NOBODY = "None of the chosen sides takes part in this."


@dataclass
class Report:
    """What is to be measured, and everything found so far.

    keys: of the sides that take part; empty for all. peaks: memory in MB by side and workload.
    """

    repetitions: int
    keys: Sequence[str] = ()
    verdicts: list[Verdict] = field(default_factory=list)
    peaks: dict[tuple[str, str], float] = field(default_factory=dict)

    def sides(self, sides: Sequence[Side], workload: str) -> tuple[list[Side], list[str]]:
        """Returns who takes part in a workload, and why others that were asked for do not."""
        wanted = [
            side
            for side in sides
            if workload in side.workloads and (not self.keys or side.key in self.keys)
        ]
        absent = [f"{side.name}: {why}." for side in wanted if (why := side.missing())]
        return [side for side in wanted if not side.missing()], absent

    def remember(self, timings: Sequence[Timing]) -> None:
        """Keeps the memory of sides in processes of their own."""
        for timing in timings:
            if timing.peak_mb is not None:
                self.peaks[timing.key, timing.task] = timing.peak_mb


def rounds(report: Report, workload: Workload) -> str:
    """Times all sides of a workload."""
    sides, absent = report.sides(SIDES, workload.name)
    timings = measure([side.entry(workload) for side in sides], report.repetitions)
    report.remember(timings)
    if not report.keys:
        absent.append(BLAZEFL)
    text, verdicts = table(workload, timings, SIDES, absent)
    report.verdicts += verdicts
    for timing in timings:
        if timing.key == "fedsim" and workload.name == "W3-1k" and timing.seconds:
            report.verdicts.append(
                _bound(workload.name, "ms a round, 100 clients", 1e3 * timing.median, FRAMEWORK_MS)
            )
    report.verdicts += _of_ray(workload.name, {t.key: t for t in timings if t.seconds})
    return text


def _of_ray(workload: str, timings: Mapping[str, Timing]) -> list[Verdict]:
    """Returns what was asked of engine ray."""
    ray, inline, flower = (timings.get(key) for key in ("ray", "fedsim", "flower"))
    found = []
    if ray and inline and workload == "W3-1k":
        more = 1e3 * (ray.median - inline.median)
        found.append(_bound(workload, "engine ray, ms a round above inline", more, RAY_MS))
    if ray and inline and workload == "W2":
        what = "engine ray with 2 workers over inline"
        found.append(_bound(workload, what, ray.ratio(inline), RAY_SLOWER, "×"))
    if ray and flower and (asked := RAY_FASTER.get(workload)):
        ratio = flower.ratio(ray)
        what = "Flower's own simulation over engine ray"
        found.append(Verdict(workload, what, f"≥ {asked:g}×", f"{ratio:.2f}×", ratio >= asked))
    return found


def cohort(report: Report) -> str:
    """Times W1 with more and more clients a round."""
    rows: dict[str, list[str]] = {}
    names: list[str] = []
    for workload in COHORTS:
        sides, _ = report.sides(SIDES, workload.name)
        if not sides:
            return f"### cohort\n\n{NOBODY}"
        timings = measure([side.entry(workload) for side in sides], report.repetitions)
        names = [timing.name for timing in timings]
        rows[f"{workload.cohort:,}"] = [_beside(timing, timings[0]) for timing in timings]
    title = "cohort: W1 with 10, 100 and 1,000 of 1,000 clients; ms a round (× the first column)"
    return grid(title, "clients a round", names, rows)


def population(report: Report) -> str:
    """Times rounds of 100 clients out of more and more, every side in a process of its own."""
    entries = []
    missing: list[str] = []
    for workload in POPULATIONS:
        sides, absent = report.sides(SIDES, workload.name)
        entries += [side.entry(workload, apart=True) for side in sides]
        missing += [why for why in absent if why not in missing]
    timings = {(t.task, t.key): t for t in measure(entries, report.repetitions)}
    names = {timing.key: timing.name for timing in timings.values()}
    rows = {
        f"{workload.clients:,}": [_cell(timings.get((workload.name, key))) for key in names]
        for workload in POPULATIONS
    }
    few, many = (timings.get((f"population-{n}", "fedsim")) for n in (1_000, 1_000_000))
    if few and many and few.seconds and many.seconds:
        what = "a round of 1,000,000 clients over one of 1,000"
        report.verdicts.append(_bound("population", what, many.ratio(few), FLAT, "×"))
    title = "population: 100 clients a round out of so many; ms a round, peak memory in MB"
    text = grid(title, "clients", list(names.values()), rows)
    text += (
        "\n\nFlower's strategies list every node in every round; fedsim's draw from their number."
    )
    return text + (f"\n\nNot compared: {' '.join(missing)}" if missing else "")


def sampling(report: Report) -> str:
    """Times FA-HMC: gradients and effective draws a second."""
    posterior = Posterior()
    sides, _ = report.sides(SAMPLERS, posterior.name)
    if not sides:
        return f"### {posterior.name}\n\n{NOBODY}"
    timings = measure([side.entry(posterior) for side in sides], report.repetitions)
    first = timings[0]
    rows = {
        timing.name: [
            f"{1e3 * timing.median:.2f}",
            f"{timing.ratio(first):.2f}",
            f"{posterior.gradients / timing.median:,.0f}",
            f"{timing.measures['ess a round'] / timing.median:,.1f}",
        ]
        for timing in timings
    }
    columns = ["ms a round", "× fedsim", "gradients a second", "ESS a second"]
    text = grid(f"{posterior.name}: {posterior.title}", "side", columns, rows)
    return text + (
        "\n\nGradients are those of one client's potential over all of its rows, for one chain. ESS"
        " is the bulk effective sample size (ArviZ) of the worst parameter; it differs between"
        " sides with the same method by chance alone. Flower and pfl have no such method."
    )


def start(report: Report) -> str:
    """Times the command line, each command a process of its own."""
    if report.keys and "fedsim" not in report.keys:
        return f"### start\n\n{NOBODY}"
    timings = time_commands(report.repetitions)
    for name, seconds in timings.items():
        report.verdicts.append(_bound("start", f"{name}, s", median(seconds), BOUNDS[name]))
    rows = {name: shown(seconds) for name, seconds in timings.items()}
    title = "start: seconds from a command's start to its end"
    return grid(title, "command", ["median", "fastest–slowest"], rows)


def memory(report: Report) -> str:
    """Measures the peak memory of every side alone; peers' peaks are those of their timing."""
    names: dict[str, str] = {}
    for name in ("W1", "W3-1M"):
        workload = WORKLOADS[name]
        for side in report.sides(SIDES, name)[0]:
            names[side.key] = side.name
            if (side.key, name) not in report.peaks:
                report.remember(measure([side.entry(workload, apart=True)], 1))
    for name, bound in MEMORY_MB.items():
        if (peak := report.peaks.get(("fedsim", name))) is not None:
            report.verdicts.append(_bound(name, "peak memory, MB", peak, bound))
    rows = {
        shown: [
            f"{peak:,.0f}" if (peak := report.peaks.get((key, name))) is not None else "–"
            for name in ("W1", "W3-1M")
        ]
        for key, shown in names.items()
    }
    text = grid("memory: peak resident memory in MB", "side", ["W1", "W3-1M"], rows)
    return text + (
        "\n\nEvery side is a process of its own. Of sides with several processes it is the sum of"
        " their peaks, in which memory that they share counts more than once."
    )


def _cell(timing: Timing | None) -> str:
    if timing is None:
        return "–"
    if timing.failure:
        return "failed"
    peak = "" if timing.peak_mb is None else f", {timing.peak_mb:,.0f} MB"
    return f"{1e3 * timing.median:.2f}{peak}"


def _beside(timing: Timing, first: Timing) -> str:
    if timing.failure:
        return "failed"
    text = f"{1e3 * timing.median:.2f}"
    return text if timing is first or first.failure else f"{text} ({timing.ratio(first):.2f}×)"


def _bound(where: str, what: str, found: float, bound: float, unit: str = "") -> Verdict:
    return Verdict(where, what, f"≤ {bound:g}{unit}", f"{found:.2f}{unit}", found <= bound)


TABLES: dict[str, Callable[[Report], str]] = {
    **{
        name: lambda report, name=name: rounds(report, WORKLOADS[name])  # type: ignore[misc]
        for name in ("W1", "W2", "W3-1k", "W3-1M")
    },
    "cohort": cohort,
    "population": population,
    "fa-hmc": sampling,
    "start": start,
    "memory": memory,
}
