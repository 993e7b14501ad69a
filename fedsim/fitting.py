"""Whether data, task, model and early stopping fit together: found before a run, by trying."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim.data import FederatedData
from fedsim.errors import Problem, ScenarioError
from fedsim.grids.shards import Table
from fedsim.models import FunctionalModel, Task
from fedsim.scenario import Scenario
from fedsim.server.evaluation import metric_names

if TYPE_CHECKING:
    from fedsim.setup import Setup


def check_target(scenario: Scenario, data: FederatedData, task: Task) -> None:
    target = {"class": "class", "real": "real", "none": "any"}[data.info.target]
    if task.target == "any" or task.target == target:
        return
    fits = {"class": "classification", "real": "regression", "any": "potential"}[target]
    raise ScenarioError(
        [
            Problem(
                "task",
                f"{task.name} does not fit the data {data.info.name}",
                hint=f"Its targets ask for task: {fits}",
            )
        ]
    )


def check_stopping(setup: Setup) -> None:
    """Raises ScenarioError if early stopping watches what the server will never measure."""
    stopping = setup.loop_config().stopping
    if stopping is None or stopping.split not in ("validation", "test", "ood"):
        return
    data = setup.data
    field, metric = "early_stopping.metric", f"{stopping.split}/{stopping.name}"
    if {"validation": data.validation, "test": data.test, "ood": data.ood}[stopping.split] is None:
        hint = f"Set data.{stopping.split}_fraction" if stopping.split != "ood" else "Set data.ood"
        what = f"is never measured: the data has no {stopping.split} split"
        raise ScenarioError([Problem(field, what, metric, hint=hint)])
    known = metric_names(setup.task, stopping.split, bool(setup.chains))
    if stopping.name not in known:
        what = f"is never measured: {stopping.split} has {', '.join(sorted(known))}"
        raise ScenarioError([Problem(field, what, metric)])


def check_task(model: FunctionalModel, task: Task, data: FederatedData) -> None:
    """Raises ScenarioError if the loss and metrics do not return one value per example."""
    if len(data.train) == 0:
        return
    rows = data.train.take(np.arange(min(2, len(data.train))))
    dtype = next(iter(model.initial().values())).dtype
    table = Table(rows, dtype, torch.device("cpu"))
    params = {k: v.requires_grad_(k in model.shapes) for k, v in model.initial().items()}
    for name, function in {"loss": task.loss, **task.metrics}.items():
        try:
            outputs = model.apply(params, table.x)
            _check_width(outputs.detach(), task, data)
            values = function(outputs, table.y)
            shape = tuple(values.shape)
        except ScenarioError:
            raise
        except Exception as error:  # the user's functions may raise anything
            raise ScenarioError(
                [
                    Problem(
                        "task",
                        f"{name} does not take the model's outputs for {data.info.name}:"
                        f" {type(error).__name__}: {error}",
                    )
                ]
            ) from error
        problem = None
        if shape != (len(rows),):
            problem = Problem(
                "task",
                f"{name} returns shape {shape} for {len(rows)} examples",
                hint="It must return one value per example (no mean, no sum)",
            )
        elif name == "loss" and not values.requires_grad:
            problem = Problem("model", "the loss does not depend on the parameters")
        if problem is not None:
            raise ScenarioError([problem])


def _check_width(outputs: Tensor, task: Task, data: FederatedData) -> None:
    """Raises ScenarioError if the model has not one output for each class."""
    if task.probabilities is None:
        return
    width = task.probabilities(outputs).shape[-1]
    if width != data.info.num_classes:
        what = f"has outputs for {width} classes; {data.info.name} has {data.info.num_classes}"
        raise ScenarioError([Problem("model", what)])
