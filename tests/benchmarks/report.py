"""The comparison as Markdown, with what it was measured on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.harness import Timing
from tests.benchmarks.workloads import Workload


def machine() -> str:
    """Returns one sentence: date, processor, cores, load, versions."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("fedsim-fl", "torch", "flwr"))
    return (
        f"{datetime.date.today().isoformat()}, {_processor()}, {os.cpu_count()} cores (load"
        f" {os.getloadavg()[0]:.1f} before the start), {platform.system()}, Python"
        f" {platform.python_version()}, {packages}."
    )


def table(workload: Workload, timings: Sequence[Timing]) -> str:
    """Returns a Markdown table; ratios are medians over repetitions, against the first side."""
    first = timings[0]
    lines = [
        f"### {workload.name}: {workload.title}",
        "",
        f"| side | ms a round, median of {len(first.seconds)} | fastest–slowest | ratio"
        " | ms above | result |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for timing in timings:
        fastest, slowest = 1e3 * min(timing.seconds), 1e3 * max(timing.seconds)
        lines.append(
            f"| {timing.side} | {1e3 * timing.median:.2f} | {fastest:.2f}–{slowest:.2f}"
            f" | {timing.ratio(first):.2f} | {1e3 * (timing.median - first.median):+.2f}"
            f" | {timing.result:.4f} |"
        )
    return "\n".join(lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
