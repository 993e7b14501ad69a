"""Exports are read back with other tools and hold exactly the run."""

import csv
import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

from fedsim.errors import UserError
from fedsim.runs.export import export
from tests.unit.runs.helpers import Spec

VALUES = [0.1 + 0.2, 1e-300, math.nan, math.inf, 1 / 3]


@pytest.fixture
def run(store):
    with store.create(Spec()) as writer:
        for round, value in enumerate(VALUES):
            writer.log_metrics(round, "test", {"nll": value})
            writer.log_client_metrics(round, "client", [3], {"nll": [value]})
        writer.event("dropped", 1, partitions=[1, 2], reason="NaN")
        writer.event("note", None, reason=3.5)
        writer.save_parameters({"w": torch.tensor([1.5, 2.5])})
        writer.artifact_path("plots/a.svg").write_text("<svg/>")
        writer.record_engine({"path": "mapped"})
        writer.finish()
    return store.open(writer.id)


def test_a_folder_has_everything(run, tmp_path):
    written = export(run, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in written}
    assert names == {
        "metrics.csv",
        "client_metrics.csv",
        "events.csv",
        "scenario.yaml",
        "summary.json",
        "environment.json",
        "engine.json",
        "parameters.safetensors",
        "artifacts/plots/a.svg",
    }
    assert all(path.is_file() for path in written)
    np.testing.assert_array_equal(
        load_file(tmp_path / "out" / "parameters.safetensors")["w"], [1.5, 2.5]
    )
    assert export(run, tmp_path / "out") == written


def test_csv_reads_back_exactly_without_pandas(run, tmp_path):
    (path,) = export(run, tmp_path / "deep" / "m.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2", "3", "4"]
    found = [float(row["value"] or "nan") for row in rows]
    np.testing.assert_array_equal(found, VALUES)


def test_json_is_strict_and_exact(run, tmp_path):
    (path,) = export(run, tmp_path / "m.json")
    rows = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [row["value"] for row in rows] == [VALUES[0], 1e-300, None, None, 1 / 3]
    assert rows[0] == {"round": 0, "split": "test", "name": "nll", "value": VALUES[0]}
    export(run, tmp_path / "out", "json")
    events = json.loads((tmp_path / "out" / "events.json").read_text())
    dropped = next(event for event in events if event["kind"] == "dropped")
    assert (dropped["partitions"], dropped["reason"], dropped["round"]) == ([1, 2], "NaN", 1)


def test_parquet_reads_back_the_same(run, tmp_path):
    pytest.importorskip("pyarrow")
    export(run, tmp_path / "out", "parquet")
    found = pd.read_parquet(tmp_path / "out" / "metrics.parquet")
    pd.testing.assert_frame_equal(found, run.metrics, check_dtype=False)
    np.testing.assert_array_equal(found["value"], VALUES)
    events = pd.read_parquet(tmp_path / "out" / "events.parquet").set_index("kind")
    assert json.loads(events.loc["dropped", "partitions"]) == [1, 2]
    assert json.loads(events.loc["note", "reason"]) == 3.5


def test_parquet_without_pyarrow_is_explained(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'fedsim-fl\[data\]'"):
        export(run, tmp_path / "m.parquet")
    assert list(tmp_path.glob("m.*")) == []


def test_an_unknown_format_is_refused_and_nothing_written(run, tmp_path):
    with pytest.raises(UserError, match="no export format 'xlsx'; there are csv, parquet, json"):
        export(run, tmp_path / "out", "xlsx")
    assert not (tmp_path / "out").exists()
