"""What the commands print, write and return when all is well."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

import fedsim as package
from fedsim import RunStore
from tests.e2e.conftest import Command
from tests.e2e.scenarios import SMALL, THREE, write

SECTIONS = ("strategies", "clients", "datasets", "partitions", "models", "tasks", "engines")


def test_run_shows_results_places_and_what_to_do_next(fedsim: Command) -> None:
    write(SMALL)
    result = fedsim("run", "scenario.yaml", "--seeds", "0,1")
    assert result.status == 0, result.err
    runs = [RunStore().open(run_id) for run_id in RunStore().ids()]
    assert [run.record.seed for run in runs] == [0, 1]
    assert "Accuracy" in result.out
    assert "±" in result.out
    assert "round 6/6" in result.err
    for run in runs:
        assert str(run.path) in result.out
    assert f"fedsim compare {runs[0].id} {runs[1].id}" in result.out
    (page,) = Path("runs/reports").glob("*/report.html")
    assert str(page) in result.out
    text = page.read_text()
    assert "fedsim run scenario.yaml --set &#x27;seeds=[0, 1]&#x27;" in text
    assert SMALL.splitlines()[2] in text
    assert not re.search(r"""(src|href)=["']?https?:""", text)
    assert {path.suffix for path in (page.parent / "plots").iterdir()} == {".png", ".svg"}


def test_report_of_a_single_run_is_in_its_folder(fedsim: Command) -> None:
    write(SMALL)
    assert fedsim("run", "scenario.yaml", "--set", "rounds=2", "--no-report").status == 0
    run = RunStore().open("latest")
    assert not (run.path / "report.html").exists()
    assert fedsim("report", "latest").out.strip() == str(run.path / "report.html")
    assert (run.path / "report.html").is_file()
    assert list((run.path / "plots").glob("*.svg"))
    assert not Path("runs/reports").exists()


def test_json_is_one_document_and_progress_is_elsewhere(fedsim: Command) -> None:
    write(SMALL)
    result = fedsim("run", "scenario.yaml", "--json", "--no-report")
    document = json.loads(result.out)
    (run,) = document["runs"]
    stored = RunStore().open(run["id"])
    assert run["metrics"] == stored.summary["metrics"]
    assert (run["status"], run["round"], document["report"]) == ("finished", 6, None)
    assert "round 6/6" in result.err
    (listed,) = json.loads(fedsim("runs", "--json").out)
    assert (listed["id"], listed["seed"]) == (run["id"], 0)
    assert listed["test.accuracy"] == run["metrics"]["test.accuracy"]
    assert json.loads(fedsim("show", "latest", "--json").out)["id"] == run["id"]


def test_quiet_prints_only_ids(fedsim: Command) -> None:
    write(SMALL)
    result = fedsim("run", "scenario.yaml", "-q", "--seeds", "3", "--no-report", "--out", "there")
    assert result.out.split() == RunStore("there").ids()
    assert result.err == ""
    assert not Path("runs").exists()


def test_three_methods_are_compared_and_stored_runs_again(fedsim: Command) -> None:
    write(THREE)
    result = fedsim("compare", "scenario.yaml", "--no-report")
    assert result.status == 0, result.err
    for label in ("averaging", "adaptive", "sampling"):
        assert label in result.out
    assert "R-hat" in result.out
    ids = RunStore().list()["id"].tolist()
    again = fedsim("compare", *ids)
    assert again.status == 0
    table = result.out.partition("Cost of one run")[0]
    assert again.out.startswith(table)
    sampling = next(run_id for run_id in ids if "sampling" in run_id)
    shown = fedsim("show", sampling).out
    assert "posterior.nc" in shown
    assert "test.accuracy" in shown
    (page,) = (path.read_text() for path in Path("runs/reports").glob("*/report.html"))
    assert "predictive logits of 4 examples" in page
    mixed = fedsim("compare", "scenario.yaml", ids[0])
    assert mixed.status == 2
    assert "scenario.yaml is a scenario and the rest are runs" in mixed.err


def test_several_files_with_equal_labels_stay_apart(fedsim: Command) -> None:
    for name in ("one", "two"):
        text = SMALL.replace("name: small", f"name: {name}").replace("rounds: 6", "rounds: 2")
        write(text + "compare: {same: {}}\n", Path(f"{name}.yaml"))
    result = fedsim("run", "one.yaml", "two.yaml", "--no-report")
    assert result.status == 0
    assert "one: same" in result.out
    assert "two: same" in result.out
    assert "±" not in result.out.partition("Cost of one run")[0].partition("\n")[2]


def test_export_gives_the_metrics(fedsim: Command) -> None:
    write(SMALL)
    fedsim("run", "scenario.yaml", "-q", "--no-report")
    run = RunStore().open("latest")
    result = fedsim("export", "latest", "--to", "here", "--format", "json")
    assert "here/metrics.json" in result.out
    assert len(json.loads(Path("here/metrics.json").read_text())) == len(run.metrics)
    fedsim("export", "latest", "--to", "metrics.csv")
    pd.testing.assert_frame_equal(pd.read_csv("metrics.csv"), run.metrics)
    assert fedsim("export", "latest", "--format", "xls").status == 2


def test_check_says_what_would_run_and_writes_nothing(fedsim: Command) -> None:
    write(THREE)
    result = fedsim("check", "scenario.yaml", "--set", "partition.clients=5", "--seeds", "0,1")
    assert result.status == 0
    assert "6 runs, nothing wrong" in result.out
    assert "62" in result.out
    plans = json.loads(fedsim("check", "scenario.yaml", "--json").out)["runs"]
    assert [plan["chains"] for plan in plans] == [0, 0, 2]
    assert {plan["clients"] for plan in plans} == {4}
    assert not Path("runs").exists()


def test_list_names_what_scenarios_can_name(fedsim: Command) -> None:
    found = json.loads(fedsim("list", "--json").out)
    assert tuple(found) == SECTIONS
    assert {"fedavg", "fa-hmc", "FedAdam"} <= set(found["strategies"])
    assert {"digits", "csv"} <= set(found["datasets"])
    assert "One process" in fedsim("list", "engines").out
    assert fedsim("list", "nonsense").status == 2


def test_schema_accepts_what_the_command_accepts(fedsim: Command) -> None:
    import jsonschema
    import yaml

    schema = json.loads(fedsim("schema").out)
    jsonschema.validate(yaml.safe_load(THREE), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(SMALL + "rond: 3"), schema)
    assert fedsim("schema", "--out", "deep/schema.json").out == ""
    assert json.loads(Path("deep/schema.json").read_text()) == schema


def test_data_show_prints_and_plots(fedsim: Command) -> None:
    write(SMALL)
    result = fedsim("data", "show", "scenario.yaml", "--set", "partition.clients=3")
    assert result.status == 0
    assert "240 training rows" in result.out
    assert Path("scenario-data.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("scenario-data.svg").read_text()
    assert not Path("runs").exists()


def test_runs_of_an_empty_folder(fedsim: Command) -> None:
    result = fedsim("runs")
    assert (result.status, "fedsim demo" in result.out) == (0, True)
    assert json.loads(fedsim("runs", "--json").out) == []


def test_version(fedsim: Command) -> None:
    assert fedsim("--version").out == f"fedsim {package.__version__}\n"


def test_demo_is_a_good_scenario(fedsim: Command) -> None:
    demo = Path(package.__file__).with_name("demo.yaml")
    result = fedsim("check", demo)
    assert result.status == 0
    assert "2 runs, nothing wrong" in result.out


@pytest.mark.slow
def test_demo_ends_with_what_to_try_next(fedsim: Command) -> None:
    import time

    began = time.monotonic()
    result = fedsim("demo")
    assert time.monotonic() - began < 60
    assert result.status == 0
    for words in ("FA-HMC", "FedAvg", "report.html", "fedsim compare", "fedsim run mine.yaml"):
        assert words in result.out
