"""The same seed gives the same bits: again, with other threads, after a kill at any time."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedsim import Run, RunStore
from fedsim.cli.guard import execute
from fedsim.runs import RunWriter
from tests.e2e.conftest import Command
from tests.e2e.scenarios import THREE, by_group, same_bits, write

pytestmark = pytest.mark.xdist_group("reproducible")  # one run that others are compared with

ROOT = Path(__file__).parents[2]
Runs = dict[str, Run]


def stored(folder: str | Path) -> list[Run]:
    """Returns all runs of a folder."""
    store = RunStore(folder)
    return [store.open(run_id) for run_id in store.ids()]


def compute(fedsim: Command, folder: str, *arguments: object) -> Runs:
    """Runs the three methods into a folder and returns the runs by group."""
    write(THREE)
    result = fedsim("run", "scenario.yaml", "-q", "--no-report", "--out", folder, *arguments)
    assert result.status == 0, result.err
    return by_group(stored(folder))


def agree(a: Runs, b: Runs) -> None:
    assert set(a) == set(b) == {"averaging", "adaptive", "sampling"}
    for group, run in a.items():
        same_bits(run, b[group])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The runs that others are compared with; one thread."""
    folder = tmp_path_factory.mktemp("first")
    path = write(THREE, folder / "scenario.yaml")
    arguments = ["run", path, "-q", "--no-report", "--out", folder, "--set", "engine.threads=1"]
    assert execute([str(argument) for argument in arguments]) == 0
    return by_group(stored(folder))


def test_again_with_other_threads(fedsim: Command, first: Runs) -> None:
    agree(first, compute(fedsim, "again", "--set", "engine.threads=2"))


def test_other_seeds_give_other_numbers(fedsim: Command, first: Runs) -> None:
    other = compute(fedsim, "other", "--seeds", "1")
    for group, run in first.items():
        with pytest.raises(AssertionError):
            same_bits(run, other[group])


def test_order_of_keys_and_of_hashes_changes_nothing(fedsim: Command, first: Runs) -> None:
    turned = yaml.safe_dump(yaml.safe_load(THREE), sort_keys=True)
    write(turned, Path("turned.yaml"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.command", "run", "turned.yaml", "-q", "--no-report",
         "--out", "turned"],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    agree(first, by_group(stored("turned")))


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_time_and_resumed(
    fedsim: Command, monkeypatch: pytest.MonkeyPatch, first: Runs, seed: int
) -> None:
    """A copy of the folder in the middle of the run is what a kill would have left."""
    at = random.Random(seed)
    kill_after = {group: at.randrange(7) for group in ("averaging", "adaptive", "sampling")}
    end_round = RunWriter.end_round

    def copy_then_end(self: RunWriter, round: int) -> None:
        copy = Path("killed") / self.id
        if round == kill_after[Run(self.path).record.group] and not copy.exists():
            if at.random() < 0.5:
                self.flush()
            shutil.copytree(self.path, copy)
        end_round(self, round)

    with monkeypatch.context() as patched:
        patched.setattr(RunWriter, "end_round", copy_then_end)
        agree(first, compute(fedsim, "whole"))
    assert len(stored("killed")) == 3
    for run in stored("killed"):
        assert run.status == "died (resumable)"
        result = fedsim("resume", run.id, "-q", "--no-report", "--out", "killed")
        assert result.status == 0, result.err
    agree(first, by_group(stored("killed")))
