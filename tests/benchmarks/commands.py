"""How long the command line takes until something is there: its help, and a run's first round."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

TINY = """\
name: tiny
rounds: 1
data: {name: digits, rows: 300, test_fraction: 0.2}
partition: {name: iid, clients: 5}
model: softmax
task: classification
strategy: fedavg
client: {name: sgd, lr: 0.1, batch_size: 20}
"""

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "fedsim --help": ("--help",),
    "fedsim run, one round of a tiny scenario": ("run", "tiny.yaml", "--no-report"),
}

BOUNDS = dict(zip(COMMANDS, (0.5, 5.0), strict=True))
"""Seconds that a command may take, with the interpreter's start and its end."""


def time_commands(repetitions: int) -> dict[str, list[float]]:
    """Returns each command's seconds; they take turns, after a first run that fills the caches."""
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with TemporaryDirectory() as folder:
        (Path(folder) / "tiny.yaml").write_text(TINY, encoding="utf-8")
        for _ in range(1 + repetitions):
            for name, words in COMMANDS.items():
                command = [str(Path(sys.executable).with_name("fedsim")), *words]
                began = time.perf_counter()
                subprocess.run(command, cwd=folder, capture_output=True, check=True)
                found[name].append(time.perf_counter() - began)
    return {name: seconds[1:] for name, seconds in found.items()}


def shown(seconds: list[float]) -> list[str]:
    """Returns the median and the range, as cells of a table."""
    return [f"{median(seconds):.2f}", f"{min(seconds):.2f}–{max(seconds):.2f}"]
