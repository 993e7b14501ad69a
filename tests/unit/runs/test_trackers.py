"""Runs sent to MLflow are found there with MLflow's own client."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from fedsim.errors import UserError
from fedsim.runs.trackers import MLflowTracker, Tracker, flatten


def test_flatten():
    nested = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None, "f": {}}
    assert flatten(nested) == {"a.b": 1, "a.c.d": [1, 2], "e": None}


def test_without_mlflow_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"pip install 'fedsim-fl\[mlflow\]'"):
        MLflowTracker()


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="MLflow is not installed")
@pytest.mark.parametrize(
    ("status", "ending"),
    [("finished", "FINISHED"), ("interrupted", "KILLED"), ("failed", "FAILED")],
)
def test_mlflow_has_the_scenario_the_curves_and_the_ending(tmp_path, monkeypatch, status, ending):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = tmp_path.as_uri()
    tracker: Tracker = MLflowTracker(uri, "study")
    scenario = {"strategy": {"name": "fa-hmc", "note": "x" * 2000}}
    tracker.start(SimpleNamespace(id="run-1", scenario=scenario))
    tracker.log(1, {"test.accuracy": 0.25})
    tracker.log(2, {"test.accuracy": 0.5})
    tracker.finish({"status": status})
    client = mlflow.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    assert run.info.run_name == "run-1"
    assert run.info.status == ending
    assert run.data.params["strategy.name"] == "fa-hmc"
    history = client.get_metric_history(run.info.run_id, "test.accuracy")
    assert [(each.step, each.value) for each in history] == [(1, 0.25), (2, 0.5)]
