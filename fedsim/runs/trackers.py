"""Sends a run to an experiment tracker while it goes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol

from fedsim.errors import UserError

MAX_PARAM = 500  # characters; MLflow's older servers refuse longer values


class TrackedRun(Protocol):
    """What a tracker needs to know of a run."""

    @property
    def id(self) -> str: ...
    @property
    def scenario(self) -> Mapping[str, Any]: ...


class Tracker(Protocol):
    """Follows one run from start to finish."""

    def start(self, run: TrackedRun) -> None:
        """Called once, before the first round."""

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Called after each round, with metrics by "split.name"."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Called once, with the summary; its "status" says how the run ended."""


class MLflowTracker:
    """Sends a run to MLflow, `pip install 'fedsim-fl[mlflow]'`; one MLflow run per run.

    Args:
      uri: the tracking server or folder; by default what MLflow's own settings say.
      experiment: the experiment's name.

    Raises:
      UserError: MLflow is not installed.
    """

    def __init__(self, uri: str | None = None, experiment: str = "fedsim") -> None:
        self._mlflow = _import_mlflow()
        self._client = self._mlflow.MlflowClient(tracking_uri=uri)
        self._experiment = experiment
        self._run = ""

    def start(self, run: TrackedRun) -> None:
        """Creates the MLflow run, named by the run's id, with the scenario as its parameters."""
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(self._experiment)
        )
        self._run = self._client.create_run(experiment, run_name=run.id).info.run_id
        for name, value in flatten(run.scenario).items():
            self._client.log_param(self._run, name, str(value)[:MAX_PARAM])

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics with the round as MLflow's step."""
        for name, value in metrics.items():
            self._client.log_metric(self._run, name, float(value), step=round)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ends the MLflow run as FINISHED, KILLED (interrupted) or FAILED."""
        endings = {"finished": "FINISHED", "interrupted": "KILLED"}
        self._client.set_terminated(self._run, endings.get(str(summary.get("status")), "FAILED"))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one with dotted names: {"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _import_mlflow() -> ModuleType:
    try:
        return importlib.import_module("mlflow")
    except ImportError:
        raise UserError("MLflow is not installed: pip install 'fedsim-fl[mlflow]'") from None
