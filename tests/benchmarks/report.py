"""The comparison as Markdown, with what it was measured on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.harness import Timing
from tests.benchmarks.session import Task
from tests.benchmarks.sides import Side

HEAD = """\
# Benchmarks

<!-- Written by `make bench`; edit tests/benchmarks/report.py instead. -->

fedsim's in-process engine beside its peers and beside what one would write by hand, all on the same
machine in one run. The sides of a table take turns, in the opposite order every other time, so that
whatever else the machine does slows all of them; start-up and the first rounds are not timed. A
ratio is the median over these turns of a side's time over fedsim's: 10 means that fedsim is ten
times as fast. Read a ratio below 1.5 in either direction as a tie, and no time as a result by
itself.

Every side trains the same model on the same data with the same settings. After the first rounds,
before anything is timed, their results (the loss, or the posterior's moments) must agree, otherwise
the comparison ends without a table.

- **Flower's own simulation** is flwr's Ray backend with one CPU a client; its ServerApp runs
  FedAvg. **pfl** is Apple's pfl-research, alone and under torchrun with two processes; the faster
  one is what fedsim is held to. They run in an environment of their own.
- The **sequential loop** resets one model for each client. The **vmap** and **bmm** loops compute
  all clients together, by `torch.func` or by hand-written matrix products; **2 threads** share the
  clients, each with a channels-last model. The **bare loop** adds up the replies and does nothing
  else.

`make bench` repeats all of this and rewrites this page (about 40 minutes on two cores; the machine
should do nothing else). `make bench ARGS="W1 --repetitions 5"` times one workload and only prints;
`ARGS="W1 --sides fedsim,pfl"` leaves sides out."""


@dataclass(frozen=True)
class Verdict:
    """What was asked of fedsim and what was found.

    asked, found: bounds and values as shown. reached: None where it could not be measured.
    """

    where: str
    what: str
    asked: str
    found: str
    reached: bool | None

    @property
    def word(self) -> str:
        """yes, no, or not measured."""
        return "not measured" if self.reached is None else "yes" if self.reached else "**no**"


def machine(peers: Mapping[str, str]) -> str:
    """Returns one sentence: date, processor, cores, load, versions; `peers` in their own
    environment.
    """
    packages = ", ".join(f"{name} {version(name)}" for name in ("fedsim-fl", "torch", "flwr"))
    theirs = ", ".join(f"{name} {found}" for name, found in peers.items())
    return (
        f"{datetime.date.today().isoformat()}, {_processor()}, {os.cpu_count()} cores (load"
        f" {os.getloadavg()[0]:.1f} before the start), {platform.system()}, Python"
        f" {platform.python_version()}, {packages}."
        + (f" The peers' environment: {theirs}." if theirs else "")
    )


def table(
    task: Task, timings: Sequence[Timing], sides: Sequence[Side], absent: Sequence[str] = ()
) -> tuple[str, list[Verdict]]:
    """Returns a Markdown table and what it says of the asked ratios, which are to fedsim's time.

    absent: who does not take part, and why; one line each.
    """
    measured = [timing for timing in timings if not timing.failure]
    by_key = {timing.key: timing for timing in measured}
    fedsim = by_key.get("fedsim")
    verdicts = {verdict.what: verdict for verdict in _verdicts(task, by_key, sides)}
    count = len(measured[0].seconds) if measured else 0
    lines = [
        f"### {task.name}: {task.title}",
        "",
        f"| side | ms a round, median of {count} | fastest–slowest | × fedsim | asked | reached"
        " | result |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for timing in measured:
        fastest, slowest = 1e3 * min(timing.seconds), 1e3 * max(timing.seconds)
        ratio = f"{timing.ratio(fedsim):.2f}" if fedsim else "–"
        verdict = verdicts.get(timing.name)
        asked, word = (verdict.asked, verdict.word) if verdict else ("", "")
        lines.append(
            f"| {timing.name} | {1e3 * timing.median:.2f} | {fastest:.2f}–{slowest:.2f} | {ratio}"
            f" | {asked} | {word} | {timing.result[0]:.4f} |"
        )
    missing = [*absent, *(f"{t.name}: it failed." for t in timings if t.failure)]
    if missing:
        lines += ["", "Not compared: " + " ".join(missing)]
    return "\n".join(lines), list(verdicts.values())


def _verdicts(task: Task, timings: Mapping[str, Timing], sides: Sequence[Side]) -> list[Verdict]:
    """Returns one for each group of sides with an asked ratio: for its fastest that has run."""
    fedsim = timings.get("fedsim")
    groups: dict[str, list[Side]] = {}
    for side in sides:
        if task.name in side.asked:
            groups.setdefault(side.group or side.key, []).append(side)
    found = []
    for members in groups.values():
        bound = members[0].asked[task.name]
        ran = [timings[side.key] for side in members if side.key in timings]
        asked = f"≥ {bound:g}×"
        if fedsim is None or not ran:
            found.append(Verdict(task.name, members[0].name, asked, "–", None))
            continue
        fastest = min(ran, key=lambda timing: timing.median)
        ratio = fastest.ratio(fedsim)
        found.append(Verdict(task.name, fastest.name, asked, f"{ratio:.2f}×", ratio >= bound))
    return found


def summary(verdicts: Sequence[Verdict]) -> str:
    """Returns what was asked and whether it is reached, as a table."""
    lines = ["## Asked and found", "", "| where | against | asked | found | reached |"]
    lines.append("|---|---|---:|---:|---|")
    lines += [f"| {v.where} | {v.what} | {v.asked} | {v.found} | {v.word} |" for v in verdicts]
    return "\n".join(lines)


def grid(title: str, corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Returns a Markdown table with a name for each row and right-aligned cells."""
    lines = [f"### {title}", "", f"| {corner} | {' | '.join(columns)} |"]
    lines.append("|---|" + "---:|" * len(columns))
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
