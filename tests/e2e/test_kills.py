"""SIGKILL at every named step of a run, and at random moments: the result is the undisturbed one's.

tests/unit/runs/test_kill.py does the same to the run folder alone, system call by system call.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedsim import Run, RunStore
from tests.e2e.scenarios import THREE, numbers, same_bits

pytestmark = pytest.mark.xdist_group("kills")  # one zygote, and one undisturbed run

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL

# All that a checkpoint has to hold: draws and their averages, two exchanges, clients' states and
# evaluations, an early stop that does not come.
STEPPED = """\
name: stepped
rounds: 6
data: {name: breast_cancer, rows: 200, test_fraction: 0.2, validation_fraction: 0.2}
partition: {name: dirichlet, clients: 4, alpha: 1.0, min_size: 5, holdout: 0.2}
model: softmax
task: classification
checkpoint: {every_rounds: 2, keep: 1, keep_every: 4}
posterior: {probes: 4}
evaluate: {server_every: 1, clients_every: 2}
early_stopping: {patience: 50}
engine: {threads: 1, chunk: 2, trace: false}
strategy:
  {name: fa-hmc, step_size: 0.02, leapfrog_steps: 3, chains: 2, burn_in: 1, control_variate: true,
   fraction_train: 0.75}
"""
STEPS = [
    "before configure", "after configure", "as messages are sent", "while clients compute",
    "as a client's state is kept", "as replies have come", "while replies are checked",
    "mid-aggregate", "as a draw is absorbed", "while clients evaluate", "mid-evaluation",
    "at a round's end", "while metrics are flushed", "while events are flushed",
    "while the index is written", "while draws are written", "before a checkpoint",
    "while its arrays are written", "between its two files", "before it is renamed",
    "after it is renamed, before pruning", "while an old one is pruned", "after a checkpoint",
    "as the result is written", "before the run is marked finished",
    "after the run is marked finished",
]  # fmt: skip
QUICK = {
    "as messages are sent", "mid-aggregate", "mid-evaluation", "while metrics are flushed",
    "before a checkpoint", "between its two files", "after it is renamed, before pruning",
    "after a checkpoint",
}  # fmt: skip
"""The steps of the fast tests."""
ONCE = {STEPS[i] for i in (-1, -2, -3)} | {"while an old one is pruned", "while events are flushed"}
"""What a run comes to once."""


class Zygote:
    """Starts the command in processes that have imported everything already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.dying"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str, step: str | None = None, count: int = 1) -> int:
        """Runs the command, which dies at a step; returns its exit status, or minus the signal."""
        self._order(arguments, step, count, wait=True)
        return self._answer()

    def learn(self, *arguments: str) -> int:
        """Runs the command, and imports what it has imported for all that come after it."""
        self._order(arguments, None, 0, wait=True, learn=str(self.folder / "modules"))
        return self._answer()

    def start(self, *arguments: str, slow: float = 0.0) -> int:
        """Starts the command and returns its process id; `wait` comes next."""
        self._order(arguments, None, 0, slow, wait=False)
        return self._answer()

    def wait(self) -> int:
        """Returns how the command that was started ended."""
        return self._answer()

    def errors(self) -> str:
        """Returns what the commands have said on standard error."""
        path = self.folder / "errors"
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(120) == 0

    def _order(
        self,
        arguments: Any,
        step: str | None,
        count: int,
        slow: float = 0.0,
        *,
        wait: bool,
        learn: str | None = None,
    ) -> None:
        order = {"arguments": list(arguments), "step": step, "count": count, "slow": slow,
                 "wait": wait, "learn": learn, "errors": str(self.folder / "errors")}  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if not Path("/proc/self/fd").exists():
        pytest.skip("names the files that are written by /proc")
    made = Zygote(tmp_path_factory.mktemp("killed"))
    yield made
    made.close()


def run_of(folder: Path) -> Run:
    (run_id,) = RunStore(folder).ids()
    return Run(folder / run_id)


def consistent(run: Run, whole: Run) -> None:
    """Fails unless a run that was killed equals the whole one, and its folder and index agree."""
    assert run.status == "finished"
    same_bits(run, whole)
    assert noted(run) == noted(whole)
    assert run.summary["metrics"] == pytest.approx(whole.summary["metrics"], rel=0, abs=0)
    left = [path.name for path in run.path.rglob("*") if path.name.startswith(".tmp-")]
    assert not left
    names = {path.name for path in (run.path / "checkpoints").iterdir()}
    assert names == {path.name for path in (whole.path / "checkpoints").iterdir()}
    index = sqlite3.connect(run.path.parent / "fedsim.sqlite")
    try:
        assert index.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert index.execute("SELECT id, status FROM runs").fetchall() == [(run.id, "finished")]
        found = index.execute("SELECT round, split, name, value FROM metrics").fetchall()
        events = index.execute("SELECT count(*) FROM events").fetchone()
    finally:
        index.close()
    columns = ["round", "split", "name", "value"]
    order = ["round", "split", "name"]
    indexed = pd.DataFrame(found, columns=columns).sort_values(order, ignore_index=True)
    logged = run.metrics.sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(indexed, logged, check_exact=True, check_dtype=False)
    assert events == (len(run.events),)


def noted(run: Run) -> list[Any]:
    """Returns the events that belong to a round."""
    events = run.events.dropna(subset="round")
    return list(zip(events["kind"], events["round"], strict=True))


# At every named step


@pytest.fixture(scope="module")
def whole(zygote: Zygote) -> Run:
    (zygote.folder / "stepped.yaml").write_text(STEPPED)
    assert zygote.learn("run", "stepped.yaml", "--no-report", "--out", "whole") == 0, (
        zygote.errors()
    )
    found = run_of(zygote.folder / "whole")
    assert len(found.draw_rounds) == 5
    assert len(numbers(found)) > 100
    return found


@pytest.mark.parametrize(
    "step", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in STEPS]
)
def test_killed_at_a_step(zygote: Zygote, whole: Run, step: str) -> None:
    folder = zygote.folder / step.replace(" ", "-").replace("'", "")
    count = 1 if step in ONCE else 3
    arguments = ("stepped.yaml", "--no-report", "--out", str(folder))
    assert zygote("run", *arguments, step=step, count=count) == KILLED, zygote.errors()
    left = run_of(folder)
    if step != STEPS[-1]:
        assert left.status == "died (resumable)"
        # and once more where it is resumed
        again = zygote("resume", left.id, "--no-report", "--out", str(folder), step=step)
        assert again in (KILLED, 0)
        if again == KILLED and run_of(folder).status != "finished":
            done = zygote("run", *arguments, "--resume", "auto")
            assert done == 0, zygote.errors()
    consistent(run_of(folder), whole)


# At random moments


def processes_of(group: int) -> list[int]:
    """Returns the living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


def killed_at_random(zygote: Zygote, text: str, folder: Path, kills: int, seed: int) -> Run:
    """Returns a run that was killed so often while it lasted."""
    at = random.Random(seed)
    path = zygote.folder / f"{folder.name}.yaml"
    path.write_text(text)
    command = ["run", path.name, "--no-report", "--out", str(folder), "--resume", "auto"]
    for number in range(kills):
        plans = {p: p.stat().st_mtime_ns for p in folder.glob("*/engine.json")}
        child = zygote.start(*command, slow=PAUSE)
        if at.random() < 0.8:  # the others are killed while they set up, or take the run up
            wait_for_rounds(folder, plans, child)
        time.sleep(at.uniform(0.0, 1.5 * PAUSE))
        os.kill(child, signal.SIGKILL)
        assert zygote.wait() == KILLED, f"it ended before kill {number}: {zygote.errors()}"
        assert processes_of(child) == []
        assert len(RunStore(folder).ids()) <= 1, "a run was lost, and begun anew"
    assert zygote(*command) == 0, zygote.errors()
    return run_of(folder)


PAUSE = 0.2
"""Seconds that each round is made to take, at least."""


def wait_for_rounds(folder: Path, plans: dict[Path, int], child: int) -> None:
    """Returns when the command has begun to compute rounds."""
    end = time.monotonic() + 240
    while {p: p.stat().st_mtime_ns for p in folder.glob("*/engine.json")} == plans:
        assert processes_of(child), "ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.005)


def one_of_three(group: str, rounds: int) -> str:
    """Returns the scenario of one of the three methods, with a checkpoint every round."""
    import yaml

    scenario = yaml.safe_load(THREE)
    scenario |= {"rounds": rounds, "checkpoint": {"every_rounds": 1}}
    scenario["compare"] = {group: scenario["compare"][group]}
    return str(yaml.safe_dump(scenario))


def undisturbed(zygote: Zygote, text: str, name: str) -> Run:
    (zygote.folder / f"{name}.yaml").write_text(text)
    assert zygote.learn("run", f"{name}.yaml", "--no-report", "--out", name) == 0, zygote.errors()
    return run_of(zygote.folder / name)


def test_killed_at_random_moments(zygote: Zygote) -> None:
    text = one_of_three("averaging", 12)
    expected = undisturbed(zygote, text, "undisturbed")
    found = killed_at_random(zygote, text, zygote.folder / "random", kills=6, seed=1)
    consistent(found, expected)
    assert list(found.events["kind"]).count("resumed") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("group", ["averaging", "adaptive", "sampling"])
def test_fifty_kills_over_forty_rounds(zygote: Zygote, group: str) -> None:
    text = one_of_three(group, 40)
    expected = undisturbed(zygote, text, f"undisturbed-{group}")
    found = killed_at_random(zygote, text, zygote.folder / f"fifty-{group}", kills=50, seed=50)
    consistent(found, expected)
    assert list(found.events["kind"]).count("resumed") >= 25
