"""SIGKILL at every named step of a round on engine ray: the driver, a worker, or all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from fedsim import Run, RunStore, Scenario, run
from tests.e2e.ray_steps import STEPS, Schedule, family, some_workers
from tests.e2e.scenarios import same_bits

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

ROOT = Path(__file__).parents[2]

# Two exchanges a round, draws, clients' states and evaluations; a cohort is two blocks.
TEXT = f"""\
name: stepped
rounds: {len(STEPS) + 2}
data: {{name: digits, rows: 200, test_fraction: 0.2}}
partition: {{name: dirichlet, clients: 4, alpha: 1.0, min_size: 5, holdout: 0.2}}
model: softmax
task: classification
checkpoint: {{every_rounds: 1}}
posterior: {{probes: 4}}
evaluate: {{server_every: 1, clients_every: 1}}
engine: {{chunk: 2, trace: false, path: mapped}}
strategy:
  {{name: fa-hmc, step_size: 0.02, leapfrog_steps: 2, chains: 2, burn_in: 1, control_variate: true}}
"""
ON_RAY = ("engine.name=ray", "engine.workers=2", "engine.object_store_mb=100")


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """Ends the Ray that a run has started, which stays for the process's next run."""
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What engine inline gives, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "stepped.yaml").write_text(TEXT)
    return run(Scenario.load(folder / "stepped.yaml"), out=folder)


@pytest.mark.parametrize("victims", ["one", "all"])
def test_workers_die_at_every_step(
    victims: str,
    whole: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "stepped.yaml").write_text(TEXT)
    rng = np.random.default_rng(3)
    killed = 0

    def kill() -> None:
        nonlocal killed
        there = some_workers(os.getpid())
        if victims == "one":
            there = [there[rng.integers(len(there))]]
        for each in there:
            each.send_signal(signal.SIGKILL)
        psutil.wait_procs(there, timeout=60)  # none is killed twice
        killed += len(there)

    schedule = Schedule([*STEPS], kill)
    schedule.arm(monkeypatch)
    found = run(Scenario.load(tmp_path / "stepped.yaml", ON_RAY), out=tmp_path / "runs")
    assert schedule.left == []
    same_bits(found, whole)
    # who dies when there is nothing left to compute is not missed
    assert killed - 4 <= found.engine["workers_lost"] <= killed
    assert set(found.events["kind"]) == set(whole.events["kind"])
    assert capfd.readouterr().out == ""  # where results are printed


def test_the_driver_dies_at_every_step(whole: Run, tmp_path: Path) -> None:
    (tmp_path / "stepped.yaml").write_text(TEXT)
    settings = [word for each in ON_RAY for word in ("--set", each)]
    words = ["run", "stepped.yaml", *settings, "--resume", "auto", "--no-report", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", *command, *words],
            cwd=tmp_path,
            env=environment,
            stderr=(tmp_path / "stderr").open("ab"),
            stdout=subprocess.DEVNULL,
        )

    relatives: set[psutil.Process] = set()
    for step in STEPS:
        process = start("tests.e2e.ray_steps", step)
        while process.poll() is None:
            relatives |= family(process.pid)
            time.sleep(0.1)
        assert process.returncode == -signal.SIGKILL, (step, (tmp_path / "stderr").read_text())
    assert start("tests.e2e.command").wait() == 0, (tmp_path / "stderr").read_text()
    (run_id,) = RunStore(tmp_path / "runs").ids()
    found = RunStore(tmp_path / "runs").open(run_id)
    same_bits(found, whole)
    assert list(found.events["kind"]).count("resumed") >= len(STEPS) - 3
    # Ray's agents notice after a while that their raylet is gone
    _, left = psutil.wait_procs(relatives, timeout=180)
    assert left == [], "processes outlived their driver"
