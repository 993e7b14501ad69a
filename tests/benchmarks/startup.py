"""How long the command takes to say something: whole processes, from their start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

TINY = """\
name: tiny
rounds: 1
data: {name: digits, rows: 200, test_fraction: 0.2}
partition: {name: iid, clients: 5}
model: softmax
task: classification
strategy: fedavg
client: {name: sgd, lr: 0.1}
"""

COMMAND = "import sys; from fedsim.cli import main; sys.argv[0] = 'fedsim'; main()"


def seconds(*arguments: str) -> float:
    """Returns the wall time of one call of the command in a new process, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny.yaml").write_text(TINY)
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - start
