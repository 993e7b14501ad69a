"""Runs that look like the real ones: shapes of curves, sizes and names as a scenario gives them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

CLASSES = 10
FINAL = {
    "FA-HMC-CV": (0.893, 0.371, 0.160, 0.016, 0.861, 20),
    "FA-HMC": (0.889, 0.385, 0.168, 0.022, 0.853, 20),
    "FA-LD": (0.884, 0.402, 0.174, 0.027, 0.842, 1),
    "FedAvg to convergence": (0.885, 0.431, 0.177, 0.049, 0.811, 10),
}


@dataclass
class FakeRecord:
    label: str
    seed: int


@dataclass
class FakeRun:
    id: str
    record: FakeRecord
    metrics: pd.DataFrame
    status: str = "finished"
    scenario: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    events: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["time", "kind"]))


def frame(rows: list[tuple[int, str, str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["round", "split", "name", "value"])


def fake_run(label: str, seed: int, rounds: int = 150, every: int = 2) -> FakeRun:
    rng = np.random.default_rng([seed, len(label)])
    accuracy, nll, brier, ece, auroc, gradients = FINAL[label]
    rows: list[tuple[int, str, str, float]] = []
    shift = rng.normal() * 0.003
    for r in range(1, rounds + 1):
        cost = {"bytes_up": 20 * 31_400, "bytes_down": 20 * 31_400, "seconds": 0.11,
                "gradients": gradients * 20 * 64}  # fmt: skip
        rows += [(r, "system", name, float(value)) for name, value in cost.items()]
        if r % every:
            continue
        far, noise = np.exp(-r / 14), rng.normal(size=5) * 0.0015
        values = {
            "accuracy": accuracy - 0.6 * far + shift + noise[0],
            "nll": nll + 1.7 * far - 2 * shift + noise[1],
            "brier": brier + 0.6 * far - shift + noise[2],
            "ece": ece + 0.09 * far + noise[3] + (0.01 * r / rounds if "Fed" in label else 0),
        }
        rows += [(r, "test", name, float(value)) for name, value in values.items()]
        rows.append((r, "ood", "auroc", float(auroc - 0.2 * far + noise[4] * 3)))
    events = pd.DataFrame(
        [
            {"time": "2026-01-02T15:30:11Z", "kind": "reply_dropped", "round": 17, "partition": 4,
             "reason": "NaN in parameters"},
            {"time": "2026-01-02T15:30:19Z", "kind": "reply_dropped", "round": 61, "partition": 4,
             "reason": "NaN in parameters"},
        ]
        if label == "FedAvg to convergence" and seed == 0 else [],
        columns=["time", "kind", "round", "partition", "reason"],
    )  # fmt: skip
    return FakeRun(
        id=f"20260102-153000-fahmc-noniid-s{seed}",
        record=FakeRecord(label, seed),
        metrics=frame(rows),
        events=events,
        scenario={"name": "fahmc_noniid", "rounds": rounds, "strategy": {"name": "fa-hmc"}},
        environment={
            "python": "3.11.7",
            "fedsim": "0.1.0",
            "packages": {"flwr": "1.41.0", "torch": "2.13.0", "numpy": "2.4.6"},
            "cpu": "AMD EPYC 7R13",
            "git": {"commit": "4c993fb2d1", "dirty": False},
        },
        engine={"name": "inline", "path": "mapped", "chunk": 20, "threads": 2, "dtype": "float32"},
    )


def fake_runs(seeds: tuple[int, ...] = (0, 1, 2)) -> list[FakeRun]:
    return [fake_run(label, seed) for label in FINAL for seed in seeds]


def predictions(sharp: float, n: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Predictions calibrated at sharp = 1, over-confident above, under-confident below."""
    rng = np.random.default_rng(seed)
    logits = 2.4 * rng.normal(size=(n, CLASSES))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = np.array([rng.choice(CLASSES, p=row) for row in p])
    q = p**sharp
    return q / q.sum(1, keepdims=True), y


def chains(k: int, rho: float = 0.9, draws: int = 400, seed: int = 0) -> np.ndarray:
    """AR(1) chains (4, draws, k); the last scalar's third chain is stuck elsewhere for a while."""
    rng = np.random.default_rng(seed)
    x = np.empty((4, draws, k))
    x[:, 0] = rng.normal(size=(4, k))
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * rng.normal(size=(4, k))
    x[2, : draws // 2, -1] += 2.5
    return x


def marginals(d: int = 8, n: int = 4000, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Skewed reference marginals, one method that matches them and one that drifted."""
    rng = np.random.default_rng(seed)
    centre, scale = rng.normal(size=d), rng.uniform(0.3, 1.2, d)

    def draw(shift: float, narrow: float) -> np.ndarray:
        base = rng.normal(size=(n, d))
        return centre + scale * (narrow * (base + 0.12 * (base**2 - 1)) + shift)

    return {"FA-HMC-CV": draw(0.02, 1.0), "FA-HMC": draw(0.25, 0.95)}, draw(0.0, 1.0)
