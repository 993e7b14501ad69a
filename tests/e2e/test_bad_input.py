"""Wrong input: exit status 2 before anything starts, a sentence that says so, nothing written."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fedsim import Scenario, run
from tests.e2e.conftest import Command
from tests.e2e.scenarios import SMALL, write

CSV = "data: {name: csv, path: table.csv, target: y, test_fraction: 0}"


def changed(old: str, new: str) -> str:
    """Returns the small scenario with a part replaced."""
    assert old in SMALL
    return SMALL.replace(old, new)


DATA = "data: {name: digits, rows: 300, test_fraction: 0.2}"
PARTITION = "partition: {name: dirichlet, clients: 4, alpha: 1.0, min_size: 5}"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)

BAD = {
    "unknown key": (
        changed("rounds: 6", "roundz: 3\nrounds: 6"),
        ["scenario.yaml:2: roundz: unknown key. Did you mean rounds?"],
    ),
    "unknown strategy": (
        changed("strategy: fedavg", "strategy: fedavgg"),
        ["scenario.yaml:8: strategy: there is no strategy of this name (got 'fedavgg')", "fedavg"],
    ),
    "unknown data": (
        changed("name: digits", "name: digitz"),
        ["scenario.yaml:3: data.name: there is no data of this name", "Did you mean digits?"],
    ),
    "text for a number": (
        changed("clients: 4", "clients: four"),
        ["scenario.yaml:4: partition.clients", "whole number", "(got 'four')"],
    ),
    "negative step size": (
        changed("strategy: fedavg", "strategy: {name: fa-hmc, step_size: -0.1}"),
        ["scenario.yaml:8: strategy.step_size: must be > 0 (got -0.1)"],
    ),
    "more clients than rows": (
        changed(PARTITION, "partition: {name: iid, clients: 2000}"),
        ["partition.clients: 2000 clients cannot share 240 training rows", "at most 240 clients"],
    ),
    "a class that no client has": (
        changed(DATA, CSV).replace(PARTITION, "partition: {name: iid, clients: 2, holdout: 0.5}"),
        ["no client has a training row of class 'rare'"],
    ),
    "a minimum that no draw reaches": (
        changed("alpha: 1.0, min_size: 5", "alpha: 0.01, min_size: 55, max_tries: 20"),
        ["partition.min_size: none of 20 draws of 'dirichlet'", "Raise alpha"],
    ),
    "a key given twice": (
        SMALL + "rounds: 7\n",
        ["rounds: is given twice, in line 2 and in line 9"],
    ),
    "a tab": (changed("name: small", "data:\n\tname: digits"), ["scenario.yaml:2: ", "tab"]),
    "an alias bomb": (BOMB + SMALL, ["scenario.yaml:1: a: anchor &a", "alias *a"]),
    "a tag": (
        changed("rounds: 6", "rounds: !!python/object/apply:os.system [true]"),
        ["scenario.yaml:2: rounds: tag", "is not allowed"],
    ),
    "a ragged table": (
        changed(DATA, CSV.replace("table.csv", "ragged.csv")),
        ["ragged.csv:3: ", "2 values and the header has 3 columns"],
    ),
    "a loss with one value for all examples": (
        changed("classification", "{name: custom, loss: 'tests.e2e.models_for_tests:mean_loss'}"),
        ["task: loss returns shape ()", "one value per example"],
    ),
    "a module that does not exist": (
        changed("model: softmax", "model: {name: custom, factory: 'no_such_module:net'}"),
        ["cannot import 'no_such_module'"],
    ),
    "a strategy without its client part": (
        changed("strategy: fedavg", "strategy: {name: QFedAvg, client_learning_rate: 0.1}"),
        ["strategy: ", "QFedAvg"],
    ),
}


def tables() -> None:
    """Writes a table whose class `rare` has one row, and one with a row that is too short."""
    rows = [f"{i},{i % 7},{'common' if i % 2 else 'usual'}" for i in range(40)]
    Path("table.csv").write_text("\n".join(["a,b,y", *rows, "1,2,rare"]) + "\n")
    Path("ragged.csv").write_text("a,b,y\n1,2,u\n3,4\n5,6,v\n")


@pytest.mark.parametrize("name", BAD)
def test_wrong_scenario_is_refused_before_anything_is_written(fedsim: Command, name: str) -> None:
    text, sentences = BAD[name]
    tables()
    if name == "a class that no client has":
        # Which half is held out is drawn: with these seeds the one rare row is.
        text += "seeds: [0, 1, 2, 3, 4, 5, 6, 7]\n"
    write(text)
    before = sorted(os.listdir())
    result = fedsim("run", "scenario.yaml")
    assert result.status == 2, result.err
    for sentence in sentences:
        assert sentence in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert sorted(os.listdir()) == before


def test_the_same_mistakes_are_found_by_check(fedsim: Command) -> None:
    text, sentences = BAD["a minimum that no draw reaches"]
    write(text)
    result = fedsim("check", "scenario.yaml")
    assert result.status == 2
    assert all(sentence in result.err for sentence in sentences)


def test_mistakes_in_all_files_are_shown_at_once(fedsim: Command) -> None:
    write(SMALL.replace("rounds: 6", "rounds: 0"), Path("a.yaml"))
    write(SMALL.replace("digits", "digitz").replace("softmax", "softmux"), Path("b.yaml"))
    result = fedsim("run", "a.yaml", "b.yaml", "missing.yaml")
    assert result.status == 2
    for place in ("a.yaml:2: rounds", "b.yaml:3: data", "b.yaml:5: model", "missing.yaml"):
        assert place in result.err
    assert not Path("runs").exists()


def test_what_only_some_runs_get_wrong_stops_all_of_them(fedsim: Command) -> None:
    write(SMALL + "grid: {partition.clients: [4, 500, 600]}\n")
    result = fedsim("run", "scenario.yaml")
    assert result.status == 2
    assert "clients=500: partition.clients: 500 clients" in result.err
    assert "clients=600: partition.clients: 600 clients" in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "rounds=-1"], "rounds"),
        (["--set", "strategy.nonsense=1"], "strategy.nonsense: unknown key"),
        (["--set", "rounds"], "must have the form field.path=value"),
        (["--seeds", "0,x"], "'0,x' is not a list of whole numbers"),
        (["--seeds", "1,1"], "seeds"),
        (["--engine", "warp"], "engine.name"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_options_are_refused(fedsim: Command, arguments: list[str], sentence: str) -> None:
    write(SMALL)
    result = fedsim("run", "scenario.yaml", *arguments)
    assert result.status == 2
    assert sentence in result.err
    assert not Path("runs").exists()


def test_a_file_of_200_megabytes_is_refused_at_once(fedsim: Command) -> None:
    write(SMALL)
    os.truncate("scenario.yaml", 200 * 2**20)
    began = time.process_time()
    result = fedsim("run", "scenario.yaml")
    assert result.status == 2
    assert "scenario.yaml" in result.err
    assert time.process_time() - began < 1
    assert not Path("runs").exists()


@pytest.mark.parametrize("source", ["nothing.yaml", ".", "/dev/null"])
def test_what_is_no_file_is_refused(fedsim: Command, source: str) -> None:
    result = fedsim("run", source)
    assert result.status == 2
    assert "Traceback" not in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "nothing"],
        ["resume", "nothing"],
        ["export", "nothing"],
        ["report", "nothing"],
        ["compare", "nothing"],
    ],
)
def test_a_run_that_does_not_exist_is_refused(fedsim: Command, arguments: list[str]) -> None:
    result = fedsim(*arguments)
    assert result.status == 2
    assert "there are no runs in runs" in result.err
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_written_is_refused(fedsim: Command) -> None:
    write(SMALL)
    Path("file").write_text("")
    result = fedsim("run", "scenario.yaml", "--out", "file/runs", "--quiet")
    assert result.status == 2
    assert "runs cannot be written to" in result.err


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run."""
    folder = tmp_path_factory.mktemp("stored")
    run(Scenario.load(write(SMALL, folder / "s.yaml"), ["rounds=1"]), out=folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("report latest --to file", "--to file: cannot be written: a file is in the way"),
        ("report latest --to file/x", "--to file/x: cannot be written: a file is in the way"),
        ("export latest --to file", "--to file: cannot be written: a file is in the way"),
        ("export latest --to file/x.csv", "--to file/x.csv: cannot be written: a file is in"),
        (f"export latest --to {'a' * 300}.csv", "cannot be written: File name too long"),
        ("export latest --format xml", "no export format 'xml'; there are csv, parquet, json"),
        ("schema --out file/x", "--out file/x: cannot be written: a file is in the way"),
        ("schema --out .", "--out .: is a folder; name a file"),
        ("data show scenario.yaml --out .", "--out .: is a folder; name a file"),
        ("data show scenario.yaml --out file/x", "--out file/x: cannot be written: a file"),
        ("data show scenario.yaml --seed -1", "'--seed': -1 is not in the range"),
        ("runs --out file", "file is a file, not a folder of runs"),
        ("runs --last 0", "'--last': 0 is not in the range"),
        ("show latest --out file", "file is a file, not a folder of runs"),
        ("resume latest", "is finished: there is nothing to resume"),
        ("resume latest --engine warp", "engine.name: must be one of inline, ray"),
        ("compare latest --seeds 1", "are for scenarios; these are stored runs"),
        ("demo --out file/x", "runs cannot be written to"),
        ("tune scenario.yaml --seconds nan", "nan is no number of seconds"),
        ("list nothing", "'nothing' is not one of"),
        ("cluster status --address nonsense", "is not the address of a Ray cluster"),
    ],
)
def test_wrong_words_to_any_command_are_exit_status_2(
    fedsim: Command, stored: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, sentence: str
) -> None:
    monkeypatch.setenv("FEDSIM_RUNS", str(stored))
    write(SMALL)
    Path("file").write_text("")
    before = sorted(os.listdir())
    result = fedsim(*arguments.split())
    assert result.status == 2, result.err
    said = " ".join(result.err.replace("│", " ").split())
    assert sentence in said
    assert "this is a bug" not in said
    assert sorted(os.listdir()) == before
