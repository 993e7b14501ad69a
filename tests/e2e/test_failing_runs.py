"""What goes wrong while a run goes on: exit status 1, a sentence, and a run that can be resumed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedsim import RunStore
from fedsim.runs import files, lines, writer
from tests.e2e.conftest import Command
from tests.e2e.scenarios import SMALL, same_bits, write

MODULE = "tests.e2e.models_for_tests"

# One step a round with rate 0.1: the clock stands at 0.2 when round 3 begins.
POISONED = f"""\
name: poisoned
rounds: 5
data: {{name: csv, path: table.csv, target: y, columns: [who], test_fraction: 0, scale: none}}
partition: {{name: natural, column: who}}
model: {{name: custom, factory: "{MODULE}:clock", params: {{limit: 0.15}}}}
task: {{name: custom, loss: "{MODULE}:clock_loss", target: class}}
strategy: fedavg
client: {{name: sgd, lr: 0.1, steps: 1, batch_size: null}}
evaluate: {{server_every: 0}}
checkpoint: {{every_rounds: 1}}
"""


@pytest.fixture
def poisoned(fedsim: Command) -> Command:
    """The command beside a scenario whose client 2 of four has a NaN loss from round 3 on."""
    rng = np.random.default_rng(0)
    rows = [
        f"{rng.normal():.3f},{1 if who == 2 else -1},{rng.integers(2)},{who}"
        for who in range(4)
        for _ in range(10)
    ]
    Path("table.csv").write_text("\n".join(["a,marked,y,who", *rows]) + "\n")
    write(POISONED)
    return fedsim


def test_nan_loss_is_dropped_and_counted(poisoned: Command) -> None:
    result = poisoned("run", "scenario.yaml", "--set", "quorum=0.75")
    assert result.status == 0, result.err
    run = RunStore().open("latest")
    dropped = run.metrics.query("split == 'system' and name == 'dropped'")
    assert dropped["value"].tolist() == [0, 0, 1, 1, 1]
    assert "3 dropped" in result.err
    (_, first), *_ = run.events.query("kind == 'bad_replies'").iterrows()
    assert (first["round"], first["count"]) == (3, 1)
    assert "NaN" in first["nodes"]["4"]
    assert all(np.isfinite(value).all() for value in run.parameters().values())


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("on_bad_reply=fail", "round 3, train: client 2 (node 4): NaN or Inf in"),
        ("quorum=0.8", "round 3, train: 3 of 4 replies were good, fewer than the quorum of 0.8"),
    ],
)
def test_nan_loss_fails_the_run(poisoned: Command, setting: str, sentence: str) -> None:
    result = poisoned("run", "scenario.yaml", "--set", setting)
    assert result.status == 1
    assert sentence in result.err
    assert "client 2 (node 4)" in result.err
    assert "last good checkpoint: round 2" in result.err
    run = RunStore().open("latest")
    assert run.status == "failed"
    assert run.id in result.err
    assert run.metrics["round"].max() == 2
    again = poisoned("resume", run.id)
    assert again.status == 1
    assert sentence in again.err


def test_of_several_runs_the_others_go_on(poisoned: Command) -> None:
    write(POISONED + "compare: {bad: {on_bad_reply: fail}, good: {on_bad_reply: drop}}\n")
    result = poisoned("run", "scenario.yaml")
    assert result.status == 1
    assert "1 of 2 runs failed" in result.err
    assert "bad (failed)" in result.out
    statuses = {
        RunStore().open(i).record.group: RunStore().open(i).status for i in RunStore().ids()
    }
    assert statuses == {"bad": "failed", "good": "finished"}
    (page,) = Path("runs/reports").glob("*/report.html")
    assert "Not every run finished" in page.read_text()


class Disk:
    """A disk with `room` bytes left."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, descriptor: int, data: memoryview | bytes) -> int:
        """Writes what there is room for."""
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(descriptor, bytes(data)[: self.room])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk that runs are written to, with room for everything so far."""
    found = Disk(2**40)
    monkeypatch.setattr(files, "write_some", found.write)
    monkeypatch.setattr(lines, "write_some", found.write)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    return found


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8, 0.99])
def test_full_disk_fails_the_run_and_it_goes_on_later(
    fedsim: Command, disk: Disk, fraction: float
) -> None:
    write(SMALL)
    assert fedsim("run", "scenario.yaml", "-q", "--no-report", "--out", "whole").status == 0
    disk.room = int(fraction * (2**40 - disk.room))
    full = fedsim("run", "scenario.yaml", "-q", "--no-report")
    assert full.status == 1
    assert "the disk is full: cannot write" in full.err
    assert "Traceback" not in full.err
    disk.room = 2**40
    (run_id,) = RunStore().ids()
    assert RunStore().open(run_id).status in ("failed", "died (resumable)")
    again = fedsim("resume", run_id, "-q", "--no-report")
    assert again.status == 0, again.err
    same_bits(RunStore().open(run_id), RunStore("whole").open("latest"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk_and_a_run_that_goes_on(
    fedsim: Command, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the space ends: in SQLite's files, a checkpoint, a log, the parameters."""
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.0)
    write(SMALL)
    assert fedsim("run", "scenario.yaml", "-q", "--no-report", "--out", "whole").status == 0
    whole = RunStore("whole").open("latest")
    ballast = small_disk / "ballast"
    resumed = 0
    for room in range(20_000, 3_000_000, 40_000):
        runs = small_disk / "runs"
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        ballast.write_bytes(b"x" * max(free - room, 0))
        result = fedsim("run", "scenario.yaml", "-q", "--no-report", "--out", runs)
        ballast.unlink()
        if result.status == 0:
            break
        assert result.status == 1
        assert "Traceback" not in result.err
        assert f"cannot write {runs}" in result.err
        if RunStore(runs).ids():
            again = fedsim("resume", "latest", "-q", "--no-report", "--out", runs)
            assert again.status == 0, again.err
            same_bits(RunStore(runs).open("latest"), whole)
            resumed += 1
        shutil.rmtree(runs)
    assert result.status == 0, result.err
    assert resumed >= 1


def test_full_disk_for_the_report_leaves_the_runs(fedsim: Command, disk: Disk) -> None:
    write(SMALL)
    assert fedsim("run", "scenario.yaml", "-q", "--no-report").status == 0
    disk.room = 5_000
    result = fedsim("report", "latest")
    assert result.status == 1
    assert "the disk is full" in result.err
    assert not (RunStore().open("latest").path / "report.html").exists()
    assert RunStore().open("latest").status == "finished"


def test_resuming_what_is_finished_is_refused(fedsim: Command) -> None:
    write(SMALL)
    fedsim("run", "scenario.yaml", "-q", "--no-report")
    result = fedsim("resume", "latest")
    assert result.status == 2
    assert "is finished: there is nothing to resume" in result.err


def test_a_run_that_cannot_be_resumed_says_so_at_its_start(fedsim: Command) -> None:
    for name, warned in (("Forgetful", True), ("Remembering", False)):
        text = SMALL.replace("fedavg", f"{{name: 'tests.e2e.models_for_tests:{name}'}}")
        write(text.replace("rounds: 6", "rounds: 1"))
        result = fedsim("run", "scenario.yaml", "--no-report")
        assert result.status == 0, result.err
        line = f"fedsim: this run cannot be resumed: strategy {name} has no state_dict()"
        assert (line in result.err) is warned
        assert not warned or result.err.index(line) < result.err.index("round 1/1")
        events = RunStore().open("latest").events
        assert ("not_resumable" in set(events["kind"])) is warned


def test_bug_is_one_line_and_a_traceback_on_demand(
    fedsim: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.runs import store

    def broken(self: object) -> None:
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr(store.RunStore, "list", broken)
    result = fedsim("runs")
    assert result.status == 1
    assert result.err.splitlines()[0] == "fedsim: ZeroDivisionError: oh no"
    assert "this is a bug" in result.err
    assert "Traceback" not in result.err
    assert "Traceback" in fedsim("--debug", "runs").err
    monkeypatch.setenv("FEDSIM_DEBUG", "1")
    assert "Traceback" in fedsim("runs").err


FAULTS = "faults: {drop: {rate: 0.2}, nan: {clients: [1]}, sign_flip: {fraction: 0.25}}\n"


def test_faults_on_purpose_are_shown_and_counted(fedsim: Command) -> None:
    write(SMALL + "quorum: 0.25\n" + FAULTS)
    result = fedsim("run", "scenario.yaml", "--no-report")
    assert result.status == 0, result.err
    run = RunStore().open("latest")
    system = run.metrics.query("split == 'system'").pivot(
        index="round", columns="name", values="value"
    )
    faults = system[["faults_dropped", "faults_nan", "faults_flipped"]]
    assert (faults.sum() > 0).all()
    assert f"{int(faults.sum().sum())} faults" in result.err
    noted = run.events.query("kind == 'faults'")["clients"]
    for kind, name in {"drop": "faults_dropped", "nan": "faults_nan"}.items():
        assert sum(len(each.get(kind, [])) for each in noted) == faults[name].sum()


def test_faults_are_the_same_on_either_path(fedsim: Command) -> None:
    write(SMALL + "quorum: 0.25\n" + FAULTS)
    noted = []
    for path in ("mapped", "one_by_one"):
        fedsim("run", "scenario.yaml", "-q", "--no-report", "--set", f"engine.path={path}")
        events = RunStore().open("latest").events.query("kind == 'faults'")
        noted.append(events[["round", "clients"]].to_dict("records"))
    assert noted[0] == noted[1] != []


def test_faults_that_strike_nobody_are_refused(fedsim: Command) -> None:
    write(SMALL + "faults: {nan: {clients: [4]}, drop: {rate: 0.1, fraction: 0.5}, lag: {}}\n")
    result = fedsim("check", "scenario.yaml")
    assert result.status == 2
    assert "faults.drop: takes exactly one of rate, fraction and clients" in result.err
    assert "faults.lag: " in result.err
    write(SMALL + "faults: {nan: {clients: [4]}}\n")
    result = fedsim("check", "scenario.yaml")
    assert result.status == 2
    assert "faults.nan.clients: there are 4 clients, numbered from 0 (got 4)" in result.err
