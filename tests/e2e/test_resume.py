"""Runs that go on: `fedsim run --resume auto`, another engine, and what is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedsim import Run, RunStore, Scenario, UserError, run
from fedsim.runs import RunWriter
from tests.e2e.conftest import Command
from tests.e2e.scenarios import SMALL, by_group, same_bits, write

GROUPS = ("averaging", "adaptive", "half")
BATCH = (
    SMALL + "compare: {averaging: {}, adaptive: {strategy: FedAdam}, half: {strategy:"
    " {fraction_train: 0.5}}}\n"
)
QUIET = ("--no-report",)


@contextmanager
def interrupted(group: str, at: int = 5) -> Iterator[None]:
    """Interrupts the run of a group at the end of a round."""
    end_round = RunWriter.end_round

    def interrupt(self: RunWriter, round: int) -> None:
        end_round(self, round)
        if round == at and Run(self.path).record.group == group:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunWriter, "end_round", interrupt)
        yield


def stored(folder: str | Path = "runs") -> list[Run]:
    store = RunStore(folder)
    return [store.open(run_id) for run_id in store.ids()]


def tree(folder: Path) -> dict[str, bytes]:
    """Returns all files of a run but its lock, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


# --resume auto


def test_a_batch_that_was_cut_off_goes_on_where_it_was(fedsim: Command) -> None:
    write(BATCH)
    assert fedsim("run", "scenario.yaml", *QUIET, "--out", "whole").status == 0
    with interrupted("adaptive"):
        assert fedsim("run", "scenario.yaml", *QUIET).status == 130
    first, second = (by_group(stored())[group] for group in GROUPS[:2])
    assert (first.status, second.status) == ("finished", "interrupted")
    before = tree(first.path)
    again = fedsim("run", "scenario.yaml", *QUIET, "--resume", "auto", "--json")
    assert again.status == 0, again.err
    assert f"fedsim: averaging is finished as {first.id}\n" in again.err
    assert f"fedsim: adaptive continues {second.id} after round 4\n" in again.err
    assert "fedsim: half starts anew; runs has no unfinished run of this" in again.err
    found = by_group(stored())
    assert len(stored()) == 3
    for group, whole in by_group(stored("whole")).items():
        same_bits(found[group], whole)
    assert tree(first.path) == before
    assert "resumed" in set(found["adaptive"].events["kind"])
    shown = [each["id"] for each in json.loads(again.out)["runs"]]
    assert shown == [found[group].id for group in GROUPS], "the report has all of the batch"
    # the batch is complete now: the same call starts it anew
    third = fedsim("run", "scenario.yaml", *QUIET, "--resume", "auto")
    assert f"averaging starts anew; {first.id} of the same scenario is finished" in third.err
    assert len(stored()) == 6


@pytest.mark.parametrize(
    "changed", ["--set=rounds=7", "--seeds=1", "--set=strategy=FedAdam", "--set=engine.chunk=3"]
)
def test_only_exactly_the_same_is_continued(fedsim: Command, changed: str) -> None:
    write(SMALL)
    with interrupted("small"):
        fedsim("run", "scenario.yaml", *QUIET)
    (left,) = stored()
    result = fedsim("run", "scenario.yaml", *QUIET, "--resume", "auto", changed)
    assert result.status == 0, result.err
    assert "starts anew; runs has no unfinished run of this scenario and seed" in result.err
    assert len(stored()) == 2
    assert RunStore().open(left.id).status == "interrupted"


def test_threads_are_no_difference_and_the_newest_goes_on(fedsim: Command) -> None:
    write(SMALL)
    for at in (3, 5):
        with interrupted("small", at):
            fedsim("run", "scenario.yaml", *QUIET, "--set", "engine.threads=1")
    newest = RunStore().open("latest")
    finished = run(Scenario.load("scenario.yaml", ["engine.threads=2"]), resume="auto")
    assert finished.id == newest.id
    assert finished.scenario["engine"]["threads"] == 2
    changed = finished.events.set_index("kind").loc["engine_changed", "changed"]
    assert changed == {"engine.threads": [1, 2]}
    assert sorted(each.status for each in stored()) == ["finished", "interrupted"]


def test_a_run_that_another_process_computes_is_left_alone(fedsim: Command) -> None:
    write(SMALL)
    with interrupted("small"):
        fedsim("run", "scenario.yaml", *QUIET)
    held = RunStore().resume("latest")
    try:
        result = fedsim("run", "scenario.yaml", *QUIET, "--resume", "auto")
        assert result.status == 2
        assert f"run {held.id} of it is being computed by process" in result.err
        assert len(stored()) == 1
    finally:
        held.close()


def test_a_run_that_cannot_go_on_is_named_and_a_new_one_begins(fedsim: Command) -> None:
    write(SMALL)
    with interrupted("small"):
        fedsim("run", "scenario.yaml", *QUIET)
    (left,) = stored()
    for path in left.path.glob("checkpoints/*/state.json"):
        path.write_text(path.read_text().replace('{"format": 1,', '{"format": 9,'))
    before = tree(left.path)
    result = fedsim("run", "scenario.yaml", *QUIET, "--resume", "auto")
    assert result.status == 0, result.err
    assert f"small starts anew; run {left.id} does not go on: " in result.err
    assert "written by a newer fedsim (checkpoint format 9" in result.err
    assert tree(left.path) == before
    assert RunStore().open("latest").status == "finished"


def test_what_resume_takes(fedsim: Command) -> None:
    write(SMALL)
    result = fedsim("run", "scenario.yaml", "--resume", "latest")
    assert result.status == 2
    assert "--resume takes auto, not 'latest'" in result.err
    result = fedsim("run", "--app", ".", "--resume", "auto")
    assert result.status == 2
    assert "a Flower app's run cannot be resumed: leave out --resume" in result.err
    assert not Path("runs").exists()


# Another engine


def test_a_run_moves_to_other_threads_and_keeps_its_numbers(fedsim: Command) -> None:
    write(SMALL)
    fedsim("run", "scenario.yaml", *QUIET, "--out", "whole")
    with interrupted("small"):
        fedsim("run", "scenario.yaml", *QUIET)
    arguments = ("resume", "latest", *QUIET, "--engine", "inline", "--set", "engine.threads=2")
    with interrupted("small", 6):
        assert fedsim(*arguments).status == 130
    moved = fedsim("resume", "latest", *QUIET)  # it stays where it was moved to
    assert moved.status == 0, moved.err
    (found,) = stored()
    assert found.engine["threads"] == 2
    same_bits(found, RunStore("whole").open("latest"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--set", "engine.chunk=2"), "engine.chunk: cannot change while a run goes on"),
        (("--set", "rounds=9"), "rounds: cannot change while a run goes on"),
        (("--engine", "warp"), "--set engine.name=warp: engine.name: must be"),
    ],
)
def test_what_would_change_the_numbers_is_refused(
    fedsim: Command, arguments: tuple[str, ...], sentence: str
) -> None:
    write(SMALL)
    with interrupted("small"):
        fedsim("run", "scenario.yaml", *QUIET)
    (left,) = stored()
    before = tree(left.path)
    result = fedsim("resume", left.id, *arguments)
    assert result.status == 2
    assert sentence in result.err
    assert tree(left.path) == before


# A checkpoint that does not fit


def test_code_that_has_changed_since_is_refused_and_the_run_left_as_it_was(
    fedsim: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    source = """\
import torch

def factory(info, hidden=WIDTH):
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, hidden), torch.nn.Linear(hidden, 10)
    )
"""
    module = Path("model_that_changes.py")
    module.write_text(source.replace("WIDTH", "5"))
    custom = "{name: custom, factory: 'model_that_changes:factory'}"
    write(SMALL.replace("model: softmax", f"model: {custom}"))
    with interrupted("small"):
        fedsim("run", "scenario.yaml", *QUIET)
    (left,) = stored()
    before = tree(left.path)
    index = RunStore().list().to_dict("records")
    model = importlib.import_module("model_that_changes")
    with monkeypatch.context() as changed:
        changed.setattr(model.factory, "__defaults__", (7,))
        result = fedsim("resume", left.id)
    assert result.status == 2
    assert "'1.weight' is (5, 64) float32 there, and (7, 64) float32 in the model now" in result.err
    assert "go back to that code, or start the run anew" in result.err
    assert tree(left.path) == before
    assert RunStore().list().to_dict("records") == index
    assert fedsim("resume", left.id, *QUIET).status == 0


def test_a_refusal_from_python_is_a_user_error(fedsim: Command) -> None:
    from fedsim import resume

    write(SMALL)
    with interrupted("small"):
        fedsim("run", "scenario.yaml", *QUIET)
    with pytest.raises(UserError, match="cannot change while a run goes on"):
        resume("latest", overrides=["quorum=0.9"])
    assert resume("latest", overrides=["engine.threads=1"]).status == "finished"
