"""Small scenarios for the tests, and how two runs are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsim.runs import Run

SMALL = """\
name: small
rounds: 6
data: {name: digits, rows: 300, test_fraction: 0.2}
partition: {name: dirichlet, clients: 4, alpha: 1.0, min_size: 5}
model: softmax
task: classification
checkpoint: {every_rounds: 2}
strategy: fedavg
"""

THREE = """\
name: three
rounds: 6
data: {name: breast_cancer, rows: 300, test_fraction: 0.2}
partition: {name: dirichlet, clients: 4, alpha: 1.0, min_size: 5, holdout: 0.2}
model: softmax
task: classification
checkpoint: {every_rounds: 2}
posterior: {probes: 4}
evaluate: {server_every: 1, clients_every: 2}
strategy: fedavg
compare:
  averaging:
    strategy: {name: fedavg, fraction_train: 0.5}
    client: {name: sgd, lr: 0.1, optimizer: {name: sgd, momentum: 0.9}}
  adaptive:
    strategy: {name: FedAdam, eta: 0.05, fraction_train: 0.5}
  sampling:
    strategy:
      {name: fa-hmc, step_size: 0.02, leapfrog_steps: 3, chains: 2, burn_in: 2,
       control_variate: true}
"""


def write(text: str, path: Path = Path("scenario.yaml")) -> Path:
    """Writes a scenario and returns its path."""
    path.write_text(text)
    return path


def numbers(run: Run) -> pd.DataFrame:
    """Returns all metrics but those that time and speed decide."""
    metrics = run.metrics
    timed = metrics["name"].isin({"seconds", "total_seconds", "clients_per_second"})
    return metrics[~((metrics["split"] == "system") & timed)].reset_index(drop=True)


def same_bits(a: Run, b: Run) -> None:
    """Fails unless metrics, per-client metrics, parameters and draws agree to the bit."""
    pd.testing.assert_frame_equal(numbers(a), numbers(b), check_exact=True)
    pd.testing.assert_frame_equal(a.client_metrics, b.client_metrics, check_exact=True)
    _same_arrays(a.parameters(), b.parameters())
    _same_arrays(a.draws(), b.draws())


def _same_arrays(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        np.testing.assert_array_equal(value.view(np.uint8), b[name].view(np.uint8))


def by_group(runs: list[Run]) -> dict[str, Run]:
    """Returns the runs by group."""
    return {run.record.group: run for run in runs}
