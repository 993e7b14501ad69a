"""`fedsim tune`: what it prints and writes, and what it leaves alone."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from flwr.clientapp import ClientApp

from fedsim import Scenario, tune
from fedsim.setup import Setup
from fedsim.tune import Candidate, Measured, Result
from tests.e2e.conftest import Command
from tests.e2e.scenarios import SMALL, THREE, write
from tests.e2e.test_interrupts import LONG, start, stop

UNTRACED = "engine: {trace: false}  # as it is\n"
FASTER = Candidate("mapped", 3, 1)
APP = ClientApp()


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Candidate:
    """Makes one candidate win, in half of the time."""

    def measured(setup: Setup, seconds: float, told: object) -> Result:
        e = setup.execution
        automatic, written = Candidate(e.path, 0, 2), Candidate(e.path, e.chunk, e.threads)
        found = {c: Measured(c, [0.002] * 5) for c in (automatic, written)}
        alone = Measured(Candidate("one_by_one", 0, 2), [], "breaks\n(with a hint)")
        found |= {FASTER: Measured(FASTER, [0.001] * 5), alone.candidate: alone}
        return Result(automatic, written, FASTER, found, 4)

    monkeypatch.setattr(tune, "tune", measured)
    return FASTER


def test_real_rounds_are_measured_and_nothing_is_stored(fedsim: Command) -> None:
    path = write(SMALL + UNTRACED)
    result = fedsim("tune", path, "--seconds", "2", "--dry-run")
    assert result.status == 0, result.err
    assert "probing mapped" in result.err
    for words in ("one_by_one", "automatic", "× automatic", "1.00"):
        assert words in result.out
    assert path.read_text() == SMALL + UNTRACED
    assert [each.name for each in Path().iterdir()] == [path.name]


def test_the_winner_is_written_and_runs(fedsim: Command, faster: Candidate) -> None:
    path = write("# mine\n" + SMALL + UNTRACED)
    path.chmod(0o640)
    result = fedsim("tune", path)
    assert result.status == 0, result.err
    assert "chosen: mapped, chunk 3, 1 thread, instead of the automatic choice" in result.out
    assert "0.50" in result.out
    assert "breaks" in result.out
    assert "with a hint" not in result.out
    assert "last bits" in result.out
    *same, comment, engine = path.read_text().splitlines()
    assert same == ["# mine", *SMALL.splitlines()]
    assert comment.startswith("# chosen by fedsim tune on ")
    assert torch.__version__ in comment
    assert engine == "engine: {trace: false, path: mapped, chunk: 3, threads: 1}  # as it is"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in Path().iterdir()] == [path.name]
    (plan,) = json.loads(fedsim("check", path, "--json").out)["runs"]
    assert (plan["path"], plan["chunk"], plan["threads"]) == ("mapped", 3, 1)
    again = fedsim("tune", path)  # now the file says what wins
    assert "nothing is written" in again.out
    assert path.read_text().count("chosen by") == 1


def test_how_a_run_is_computed_can_be_seen_before_and_after(fedsim: Command) -> None:
    path = write(SMALL.replace("rounds: 6", "rounds: 1") + "engine: {chunk: 3, trace: false}\n")
    lines = [line.split() for line in fedsim("check", path).out.splitlines()]
    (header,) = (words for words in lines if "chunk" in words)
    (row,) = (words for words in lines if words[:1] == ["small"])
    assert row[header.index("chunk")] == "3"
    assert fedsim("run", path, "--no-report", "-q").status == 0
    shown = fedsim("show", "latest").out
    assert "mapped (a small model without convolutions)" in shown
    assert "train in blocks of 2 clients" in shown
    alone = fedsim("check", path, "--set", "engine.path=one_by_one").out
    assert "path: asked for by the scenario" in alone


def test_what_was_written_before_is_replaced_and_named(fedsim: Command, faster: Candidate) -> None:
    path = write(SMALL + "engine:\n  chunk: 2\n  threads: 4\n")
    result = fedsim("tune", path)
    assert "instead of what the file says (mapped, chunk 2, 4 threads)" in result.out
    assert yaml.safe_load(path.read_text())["engine"] == {
        "chunk": 3,
        "threads": 1,
        "path": "mapped",
    }


def test_a_dry_run_and_json_say_what_would_be_written(fedsim: Command, faster: Candidate) -> None:
    path = write(SMALL)
    result = fedsim("tune", path, "--dry-run")
    assert "would write into scenario.yaml: engine: {path: mapped, chunk: 3" in result.out
    document = json.loads(fedsim("tune", path, "--dry-run", "--json").out)
    assert path.read_text() == SMALL
    assert document["changes"] == [
        {"field": "engine", "values": {"path": "mapped", "chunk": 3, "threads": 1}}
    ]
    assert document["written"] is False
    (run,) = document["runs"]
    assert run["best"] == {"path": "mapped", "chunk": 3, "threads": 1}
    assert {c["ratio"] for c in run["candidates"]} == {1.0, 0.5, None}


def test_entries_of_compare_share_one_section_if_they_agree(
    fedsim: Command, faster: Candidate
) -> None:
    path = write(THREE)
    assert fedsim("tune", path).status == 0
    assert path.read_text().startswith(THREE)
    chosen = {spec.scenario.engine.chunk for spec in Scenario.load(path).expand()}
    assert chosen == {3}


def test_an_entry_with_an_engine_of_its_own_keeps_it(fedsim: Command, faster: Candidate) -> None:
    path = write(
        SMALL + "compare:\n  a: {engine: {chunk: 1}}\n  b: {client: {name: sgd, lr: 0.5}}\n"
    )
    result = fedsim("tune", path, "--set", "rounds=3")
    assert "(measured with --set" in result.out
    compare = yaml.safe_load(path.read_text())["compare"]
    assert compare["a"]["engine"] == {"chunk": 3, "path": "mapped", "threads": 1}
    assert compare["b"]["engine"] == {"path": "mapped", "chunk": 3, "threads": 1}


def test_entries_that_compute_alike_are_measured_once(fedsim: Command, faster: Candidate) -> None:
    write(SMALL + "compare: {short: {rounds: 2}, long: {rounds: 9}}\n")
    result = fedsim("tune", "scenario.yaml")
    assert result.out.count("× automatic") == 1
    assert "short, long" in result.out


BAD = {
    "no file": (None, [], "does not exist"),
    "a bad field": (SMALL.replace("rounds: 6", "rounds: no"), [], "rounds"),
    "what it chooses itself": (SMALL, ["--set", "engine.threads=1"], "what tune chooses"),
    "a grid of threads": (SMALL + "grid: {engine.threads: [1, 2]}\n", [], "grid"),
    "a client of Flower's": (
        SMALL + "client: {name: 'tests.e2e.test_tune:APP'}\n",
        [],
        "nothing to tune",
    ),
    "JSON": (json.dumps(yaml.safe_load(SMALL)), [], "--dry-run"),
    "no time": (SMALL, ["--seconds", "0"], "--seconds"),
    "no number": (SMALL, ["--seconds", "nan"], "--seconds: nan is no number of seconds"),
    "no end": (SMALL, ["--seconds", "inf"], "--seconds: inf is no number of seconds"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_explained_and_the_file_left_alone(fedsim: Command, name: str) -> None:
    text, options, words = BAD[name]
    if text is not None:
        write(text)
    result = fedsim("tune", "scenario.yaml", *options)
    assert result.status == 2, result.err
    assert words in result.err
    assert "bug" not in result.err
    assert text is None or Path("scenario.yaml").read_text() == text


def test_a_read_only_file_is_only_measured(fedsim: Command, faster: Candidate) -> None:
    path = write(SMALL)
    path.chmod(0o444)
    refused = fedsim("tune", path)
    assert (refused.status, refused.out) == (2, "")
    assert "scenario.yaml is read-only; --dry-run only prints" in refused.err
    assert "would write" in fedsim("tune", path, "--dry-run").out
    assert path.read_text() == SMALL


def test_an_interrupt_writes_nothing(fedsim: Command) -> None:
    path = write(LONG)
    process = start("tune", "scenario.yaml", "--seconds", "1000")
    assert process.stderr is not None
    assert "probing" in process.stderr.readline()
    status, _, err = stop(process, signal.SIGINT)
    assert status == 130, err
    assert "Traceback" not in err
    assert path.read_text() == LONG
    assert [each.name for each in Path().iterdir()] == [path.name]


def test_nothing_is_said_of_what_was_not_measured(
    fedsim: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hurried(setup: Setup, seconds: float, told: object) -> Result:
        e = setup.execution
        own = Candidate(e.path, e.chunk, e.threads)
        found = {own: Measured(own, [0.002]), FASTER: Measured(FASTER, [])}
        return Result(own, own, own, found, 4)

    monkeypatch.setattr(tune, "tune", hurried)
    result = fedsim("tune", write(SMALL))
    assert result.status == 0, result.err
    assert "no time for anything beside the automatic choice" in " ".join(result.out.split())
    assert "nothing beats" not in result.out
