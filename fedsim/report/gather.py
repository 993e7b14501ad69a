"""Gathers from the folders of runs everything that their report shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.artifacts import (
    LOGITS,
    PARTITION,
    PREDICTIONS,
    REFERENCE,
    read_class_counts,
)
from fedsim.bandits.cells import CELLS_FILE
from fedsim.errors import UserError
from fedsim.metrics import classification
from fedsim.metrics.posterior import diagnostics
from fedsim.random import generator
from fedsim.reference import flat_draws
from fedsim.report.content import CellPicture, PosteriorResult, ReferenceResult, ReportInput
from fedsim.report.views import View, views

if TYPE_CHECKING:
    from fedsim.runs import Run

Floats = NDArray[np.float64]

REFERENCE_DRAWS = 4000
"""Exact draws that stand for a reference known in closed form."""


def gather(runs: Sequence[Run], *, command: str, scenario_yaml: str = "") -> ReportInput:
    """Returns the content of a report on `runs`.

    command: what reproduces them. scenario_yaml: the scenario as written; without it, the resolved
    scenarios of the runs. What belongs to one run (predictions, draws) is that of the first
    finished run of each label.
    """
    seen = views(runs)
    first = {v.record.label: v for v in reversed(seen) if v.status == "finished"}
    first = {label: first[label] for label in dict.fromkeys(v.record.label for v in seen)
             if label in first}  # fmt: skip
    posteriors: dict[str, PosteriorResult] = {}
    notes = []
    for label, view in first.items():
        try:
            posteriors |= dict(_posteriors(label, view.run))
        except UserError as error:  # ArviZ is an extra
            notes.append(str(error))
    names_of_scenarios = list(dict.fromkeys(run.record.name for run in runs))
    return ReportInput(
        title=", ".join(names_of_scenarios[:3]) + (" …" if len(names_of_scenarios) > 3 else ""),
        runs=seen,
        command=command,
        scenario_yaml=scenario_yaml or _scenarios(runs),
        description=_description(runs),
        reliability=_of_each(first, _reliability),
        ood=_of_each(first, _uncertainty),
        posteriors=posteriors,
        reference=_reference(first),
        cells=_of_each(first, _cells),
        **_partition(runs),
        notes=[*dict.fromkeys(notes), *_failures(runs)],
    )


def _of_each(first: Mapping[str, View], read: Any) -> dict[str, Any]:
    found = {label: read(view.run) for label, view in first.items()}
    return {label: each for label, each in found.items() if each is not None}


def load_arrays(run: Run, name: str) -> dict[str, Any] | None:
    """Returns the arrays of an .npz artifact by name, or None if the run has none of that name."""
    if name not in run.artifacts():
        return None
    with np.load(run.artifact(name), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _reliability(run: Run) -> classification.Reliability | None:
    for split in ("test", "validation"):
        found = load_arrays(run, PREDICTIONS.format(split=split))
        if found is not None:
            return classification.reliability(found["p"], found["y"])
    return None


def _uncertainty(run: Run) -> tuple[Floats, Floats] | None:
    known = load_arrays(run, PREDICTIONS.format(split="test"))
    unknown = load_arrays(run, PREDICTIONS.format(split="ood"))
    if known is None or unknown is None:
        return None
    entropy = classification.predictive_entropy
    return entropy(known["p"]), entropy(unknown["p"])


def _cells(run: Run) -> CellPicture | None:
    found = load_arrays(run, CELLS_FILE)
    return None if found is None else CellPicture(found)


def _posteriors(label: str, run: Run) -> Iterator[tuple[str, PosteriorResult]]:
    """Yields the predictive logits under the run's own label where there are any, and the weights:
    those of a network are not identified, and what it predicts is."""
    draws = run.draws()
    if not draws or "posterior" not in run.summary:
        return
    diagnose = partial(diagnostics, rhat_good=run.scenario["posterior"]["r_hat_threshold"])
    stored = load_arrays(run, LOGITS)
    if stored is None:
        yield label, PosteriorResult(diagnose(draws), draws)
        return
    logits = {"logits": stored["logits"]}
    examples = stored["logits"].shape[2]
    of = f"predictive logits of {examples} examples"
    yield label, PosteriorResult(diagnose(logits), logits, of)
    yield f"{label}, parameters", PosteriorResult(diagnose(draws), draws)


def _reference(first: Mapping[str, View]) -> ReferenceResult | None:
    """Returns the reference of the first run that has one, with the draws of all that share it."""
    chosen: tuple[str, Floats, list[str]] | None = None
    compared: dict[str, Floats] = {}
    for label, view in first.items():
        stored = load_arrays(view.run, REFERENCE)
        draws = view.run.draws() if stored is not None else {}
        if stored is None or not draws:
            continue
        name, exact = _exact(stored)
        if chosen is None:
            chosen = name, exact, [str(each) for each in stored["names"]]
        if _same_law(exact, chosen[1]):
            compared[label] = flat_draws(draws)[0].astype(np.float64)
    return None if chosen is None else ReferenceResult(chosen[0], chosen[1], compared, chosen[2])


def _same_law(a: Floats, b: Floats) -> bool:
    """Says whether two sets of exact draws (m, d) are of one posterior, as far as one can see."""
    if a.shape[1] != b.shape[1]:
        return False
    near = np.abs(a.mean(0) - b.mean(0)) <= 0.2 * b.std(0)
    return bool((near & (np.abs(a.std(0) / b.std(0) - 1) <= 0.2)).all())


def _exact(stored: Mapping[str, Any]) -> tuple[str, Floats]:
    if "draws" in stored:
        draws = stored["draws"]
        return "NUTS on the pooled data", draws.reshape(-1, draws.shape[-1]).astype(np.float64)
    rng = generator(0, "report.reference")
    cov = np.atleast_2d(stored["cov"])
    return "closed form", rng.multivariate_normal(
        np.atleast_1d(stored["mean"]), cov, REFERENCE_DRAWS
    )


def _partition(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns who holds what as fields of ReportInput, where all runs share one partition."""
    tables = {
        run.artifact(PARTITION).read_bytes(): run for run in runs if PARTITION in run.artifacts()
    }
    of_first_seed = {run for run in tables.values() if run.record.seed == runs[0].record.seed}
    if len(of_first_seed) != 1:
        return {}
    run = of_first_seed.pop()
    found = read_class_counts(run)
    if found is None:
        return {}
    clients = run.summary.get("data", {}).get("clients", 0)
    return {"partition": found[0], "class_names": found[1], "clients": clients}


def _description(runs: Sequence[Run]) -> str:
    return " ".join(dict.fromkeys(str(run.scenario.get("description", "")) for run in runs)).strip()


def _scenarios(runs: Sequence[Run]) -> str:
    texts = {Path(run.path / "scenario.yaml").read_text(encoding="utf-8"): run for run in runs}
    return "\n".join(f"# run {run.id}\n{text}" for text, run in texts.items())


def _failures(runs: Sequence[Run]) -> list[str]:
    return [
        f"{run.id}: {reason}" for run in runs if (reason := run.summary.get("error")) is not None
    ]
