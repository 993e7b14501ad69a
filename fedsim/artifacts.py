"""What a run leaves behind besides metrics: who held what, predictions, and for a sampler
posterior.nc with its diagnostics and its distance to a reference."""

from __future__ import annotations

import csv
from functools import partial
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedsim import reference
from fedsim.data.describe import CLIENT_COLUMNS, columns_of, listed, statistics
from fedsim.errors import UserError
from fedsim.metrics.posterior import Diagnostics, diagnostics
from fedsim.runs import Run, RunWriter
from fedsim.runs.files import write_bytes
from fedsim.server.evaluation import Evaluator
from fedsim.server.state import LoopState
from fedsim.strategies.base import Strategy

if TYPE_CHECKING:
    from fedsim.setup import Setup

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]

PARTITION = "partition.csv"
PREDICTIONS = "predictions_{split}.npz"
LOGITS = "predictive_logits.npz"
DIAGNOSTICS = "diagnostics.csv"
POSTERIOR = "posterior.nc"
REFERENCE = "reference.npz"


def write_artifacts(
    setup: Setup, writer: RunWriter, state: LoopState, evaluator: Evaluator, grid: Grid
) -> dict[str, Any]:
    """Writes the artifacts of a finished loop; returns what goes into summary.json."""
    summary: dict[str, Any] = {
        "early_stop": state.best_round if state.stopped else None,
        "totals": vars(state.totals),
    }
    summary["data"] = statistics(setup.data)
    table = _csv(columns_of(setup.data, listed(setup.data)))
    write_bytes(writer.artifact_path(PARTITION), table.encode())
    for split, arrays in evaluator.predictions(state.arrays, bool(setup.chains)).items():
        _save_npz(writer, PREDICTIONS.format(split=split), arrays)
    strategy = setup.strategy
    if isinstance(strategy, Strategy):
        for name, arrays in strategy.artifacts(partial(_client_states, grid)).items():
            _save_npz(writer, name, arrays)
        if notes := strategy.notes():
            summary["notes"] = notes
    if isinstance(strategy, Strategy) and strategy.samples and state.totals.draws:
        writer.flush()
        summary["posterior"] = _posterior(setup, writer, evaluator)
    return summary


def _csv(columns: dict[str, NDArray[Any]]) -> str:
    """Returns a table as text; NaN is left empty.

    By the standard library: pandas takes half a second to be imported at the end of every run.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    writer.writerows(["" if x != x else x for x in row] for row in rows)
    return text.getvalue()


def _client_states(grid: Grid) -> dict[str, Any]:
    """Returns what the clients keep, as partition/name; nothing where the engine cannot see it."""
    found: dict[str, Any] = grid.state_dict()[0] if hasattr(grid, "state_dict") else {}
    return found


def read_class_counts(run: Run) -> tuple[NDArray[np.int64], list[str]] | None:
    """Returns the class counts (clients, classes) of the clients in the run's table, and the
    classes; None without classes."""
    import pandas as pd

    table = pd.read_csv(run.artifact(PARTITION))
    counts = table.drop(columns=list(CLIENT_COLUMNS))
    if not len(counts.columns) or "target_mean" in counts:
        return None
    return counts.to_numpy(np.int64), [str(name) for name in counts.columns]


def _save_npz(writer: RunWriter, name: str, arrays: dict[str, Any]) -> None:
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(writer.artifact_path(name), buffer.getvalue())


def _posterior(setup: Setup, writer: RunWriter, evaluator: Evaluator) -> dict[str, Any]:
    """Diagnoses parameters and predictive logits; writes posterior.nc and the reference."""
    from fedsim.metrics.inference_data import to_inference_data, write_inference_data

    run = Run(writer.path)
    draws = run.draws()
    if not draws:
        return {"note": "no draws were kept (posterior.save_draws: none)"}
    threshold = setup.scenario.posterior.r_hat_threshold
    summary: dict[str, Any] = {}
    stats: dict[str, Floats] = {}
    try:
        found = {"parameters": diagnostics(draws, rhat_good=threshold)}
        logits = _probe_logits(setup, evaluator, draws)
        if logits is not None:
            stats["logits"] = logits
            _save_npz(writer, LOGITS, stats)
            found["predictive logits"] = diagnostics({"logits": logits}, rhat_good=threshold)
        for kind, one in found.items():
            summary[kind] = {**one.summary(), "flags": one.flags()}
        _write_frames(writer, found)
        data = to_inference_data(
            draws,
            scenario=setup.scenario.name,
            seed=setup.seed,
            posterior_predictive=stats or None,
        )
        write_inference_data(data, writer.artifact_path(POSTERIOR))
    except UserError as error:  # ArviZ is an extra: a run without it keeps its draws
        writer.event("no_diagnostics", None, reason=str(error))
        summary["note"] = str(error)
    compared = reference.compare(setup, draws)
    if compared.arrays:
        _save_npz(writer, REFERENCE, compared.arrays)
    summary["reference"] = compared.figures
    return summary


def _write_frames(writer: RunWriter, found: dict[str, Diagnostics]) -> None:
    import pandas as pd

    frame = pd.concat({kind: one.frame() for kind, one in found.items()}, names=["kind"])
    write_bytes(writer.artifact_path(DIAGNOSTICS), frame.to_csv().encode())


def _probe_logits(setup: Setup, evaluator: Evaluator, draws: dict[str, Any]) -> Floats | None:
    """Returns the logits (chains, draws, probes, classes) at the first probe examples."""
    import torch

    probes = setup.scenario.posterior.probes
    split = next((s for s in ("validation", "test") if s in evaluator.tables), None)
    if not probes or split is None or setup.task.probabilities is None:
        return None
    count = len(next(iter(draws.values()))[0])
    dtype = next(iter(setup.arrays.values())).dtype
    rows = [
        evaluator.logits(
            {
                name: torch.from_numpy(values[:, i].copy()).to(dtype)
                for name, values in draws.items()
            },
            split,
            probes,
        )
        for i in range(count)
    ]
    return np.stack(rows, axis=1)
