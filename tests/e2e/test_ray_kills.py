"""SIGKILL of workers and driver at random moments of a run on engine ray: the same final bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from fedsim import RunStore, Scenario, run

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

ROOT = Path(__file__).parents[2]
ROUNDS = 40
KILLS = 50
PATIENCE = 240.0

TEXT = f"""\
name: kills
rounds: {ROUNDS}
data: {{name: digits, rows: 400, test_fraction: 0.2}}
partition: {{name: dirichlet, clients: 12, alpha: 0.5, min_size: 5}}
model: {{name: mlp, hidden: [8]}}
task: classification
strategy: fedavg
client: {{name: sgd, lr: 0.1, epochs: 3, batch_size: 8}}
engine: {{chunk: 2, trace: false}}
checkpoint: {{every_rounds: 1}}
evaluate: {{server_every: 5}}
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Starts the run, or goes on with it."""
    engine = ["--engine", "ray", "--set", "engine.workers=2", "--set", "engine.object_store_mb=100"]
    words = ["run", str(folder / "kills.yaml"), *engine, "--resume", "auto", "--no-report", "-q"]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.command", *words, "--out", str(folder / "runs")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=(folder / "stderr").open("ab"),
        stdout=subprocess.DEVNULL,
    )


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for each in family(process):
        try:
            if each.name().startswith("ray::Actor"):
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


def saved(folder: Path) -> int:
    """Returns the newest checkpoint's round, −1 before there is one."""
    rounds = [int(path.name[-6:]) for path in (folder / "runs").glob("*/checkpoints/round-*")]
    return max(rounds, default=-1)


def test_random_kills_change_no_bit(tmp_path: Path) -> None:
    (tmp_path / "kills.yaml").write_text(TEXT)
    expected = run(Scenario.load(tmp_path / "kills.yaml"), out=tmp_path / "undisturbed")
    rng = np.random.default_rng(7)
    process = start(tmp_path)
    kills = {"driver": 0, "worker": 0}
    seen, left = -1, []
    began = time.monotonic()
    while process.poll() is None:
        progress = saved(tmp_path)
        due = progress > seen and sum(kills.values()) < KILLS
        if time.monotonic() - began > PATIENCE:
            raise AssertionError(
                f"no new round for {PATIENCE:g} s: {(tmp_path / 'stderr').read_text()}"
            )
        if not due:
            time.sleep(0.02)
            continue
        seen, began = progress, time.monotonic()
        for _ in range(1 + (rng.random() < 0.5)):
            time.sleep(rng.uniform(0, 0.3))
            there = workers(process)
            if there and rng.random() < 0.7:
                there[rng.integers(len(there))].send_signal(signal.SIGKILL)
                kills["worker"] += 1
            elif process.poll() is None:
                relatives = family(process)
                process.kill()
                process.wait()
                kills["driver"] += 1
                _, alive = psutil.wait_procs(relatives, timeout=60)
                left += alive
                process = start(tmp_path)
                break
    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    assert left == [], "processes outlived their driver"
    assert sum(kills.values()) >= min(KILLS, ROUNDS) - 5, kills
    assert min(kills.values()) >= 5, kills
    (run_id,) = RunStore(tmp_path / "runs").ids()
    found = RunStore(tmp_path / "runs").open(run_id)
    name = "parameters.safetensors"
    assert (found.path / name).read_bytes() == (expected.path / name).read_bytes()
    split = "split != 'system'"
    assert found.metrics.query(split).equals(expected.metrics.query(split))
