"""A scenario on a cluster of two nodes against the same scenario in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fedsim import RunStore, Scenario, run
from tests.cluster.nodes import SECONDS, Nodes, environment

ROOT = Path(__file__).parents[2]

TEXT = """\
name: across
rounds: 3
data: {name: digits, rows: 300, test_fraction: 0.2}
partition: {name: dirichlet, clients: 12, alpha: 0.5, min_size: 5}
model: softmax
task: classification
strategy: {name: fa-hmc, step_size: 0.01, leapfrog_steps: 2, chains: 2}
engine: {chunk: 2}
"""


def assert_the_same_on(nodes: Nodes, folder: Path) -> None:
    """Runs the scenario on both nodes, and compares files and metrics with engine inline's."""
    path = folder / "across.yaml"
    path.write_text(TEXT)
    here = run(Scenario.load(path), out=folder / "here")
    engine = ["--engine", "ray", "--address", nodes.address, "--set", "engine.workers=2"]
    words = ["run", str(path), *engine, "--out", str(folder / "there"), "--no-report", "-q"]
    done = subprocess.run(
        [*nodes.prefix, sys.executable, "-m", "tests.e2e.command", *words],
        cwd=ROOT,
        env=environment(nodes.environment),
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
    )
    assert done.returncode == 0, done.stderr
    there = RunStore(folder / "there").open(done.stdout.strip())
    name = "parameters.safetensors"
    assert (there.path / name).read_bytes() == (here.path / name).read_bytes()
    split = "split != 'system'"
    assert there.metrics.query(split).equals(here.metrics.query(split))
    facts = json.loads((there.path / "engine.json").read_text())
    (seen,) = facts["workers"]
    assert len({worker["node"] for worker in seen["workers"]}) == 2
    assert facts["workers_lost"] == 0
