"""SIGKILL of workers and driver at random moments of a run on engine ray: the same final bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fedsim import RunStore, Scenario, run
from tests.e2e.ray_steps import family, workers

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

ROOT = Path(__file__).parents[2]
ROUNDS = 40
KILLS = {"driver": 10, "worker": 40}
PATIENCE = 240.0
"""Seconds without a new round, or a worker to kill, after which the test gives up."""

TEXT = f"""\
name: kills
rounds: {ROUNDS}
data: {{name: digits, rows: 400, test_fraction: 0.2}}
partition: {{name: dirichlet, clients: 12, alpha: 0.5, min_size: 5}}
model: {{name: mlp, hidden: [8]}}
task: classification
strategy: fedavg
client: {{name: "tests.e2e.models_for_tests:Slow", params: {{lr: 0.1, batch_size: 8}}}}
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


def saved(folder: Path) -> int:
    """Returns the newest checkpoint's round, −1 before there is one."""
    rounds = [int(path.name[-6:]) for path in (folder / "runs").glob("*/checkpoints/round-*")]
    return max(rounds, default=-1)


def has_saved(folder: Path, server_round: int) -> bool:
    return saved(folder) >= server_round


def until(found: Callable[[], Any], process: subprocess.Popen[bytes], folder: Path) -> Any:
    """Returns what is found once it is true; fails if the run ends, or nothing happens."""
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert process.poll() is None, f"it ended: {(folder / 'stderr').read_text()}"
        assert time.monotonic() < end, f"nothing happens: {(folder / 'stderr').read_text()}"
        time.sleep(0.02)
    return value


def test_random_kills_change_no_bit(tmp_path: Path) -> None:
    (tmp_path / "kills.yaml").write_text(TEXT)
    expected = run(Scenario.load(tmp_path / "kills.yaml"), out=tmp_path / "undisturbed")
    rng = np.random.default_rng(7)
    victims = rng.permutation([victim for victim, count in KILLS.items() for _ in range(count)])
    process, left, kills = start(tmp_path), [], Counter[str]()
    for number, victim in enumerate(victims):
        # six blocks take longer than a kill, so the kills keep up with the rounds
        due = 1 + number * (ROUNDS - 3) // len(victims)
        until(partial(has_saved, tmp_path, due), process, tmp_path)
        time.sleep(rng.uniform(0, 0.3))
        if victim == "worker":
            there = until(partial(workers, process.pid), process, tmp_path)
            there[rng.integers(len(there))].send_signal(signal.SIGKILL)
        else:
            relatives = family(process.pid)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            left += psutil.wait_procs(relatives, timeout=30)[1]
            process = start(tmp_path)
        kills[str(victim)] += 1
    assert process.wait(PATIENCE) == 0, (tmp_path / "stderr").read_text()
    # a busy machine takes its time over it, but none stays
    assert psutil.wait_procs(left, timeout=60)[1] == [], "processes outlived their driver"
    assert kills == KILLS
    (run_id,) = RunStore(tmp_path / "runs").ids()
    found = RunStore(tmp_path / "runs").open(run_id)
    name = "parameters.safetensors"
    assert (found.path / name).read_bytes() == (expected.path / name).read_bytes()
    split = "split != 'system'"
    assert found.metrics.query(split).equals(expected.metrics.query(split))
    assert found.client_metrics.equals(expected.client_metrics)
