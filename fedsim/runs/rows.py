"""The lines of a run's `*.jsonl` files, the truth that SQLite indexes.

metrics.jsonl         {"round": 3, "split": "test", "metrics": {"accuracy": 0.91}}
client_metrics.jsonl  {"round": 3, "split": "client", "partitions": [0, 4], "metrics": …}
events.jsonl          {"time": "…", "kind": "reply_dropped", "round": 3, …}

Metrics are JSON numbers; NaN and infinities, which JSON lacks, are "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.runs.lines import read_lines

METRICS = "metrics.jsonl"
CLIENT_METRICS = "client_metrics.jsonl"
EVENTS = "events.jsonl"
HEADLINE_SPLITS = ("test", "validation", "client", "ood")

Metric = tuple[int, str, str, float]  # round, split, name, value
ClientMetric = tuple[int, str, int, str, float]  # round, split, partition, name, value


def metrics_line(round: int, split: str, metrics: Mapping[str, float]) -> str:
    """Returns a line of metrics.jsonl."""
    values = {name: number(value) for name, value in metrics.items()}
    return json.dumps({"round": round, "split": split, "metrics": values})


def client_line(
    round: int, split: str, partitions: Sequence[int], metrics: Mapping[str, Sequence[float]]
) -> str:
    """Returns a line of client_metrics.jsonl."""
    values = {name: [number(value) for value in many] for name, many in metrics.items()}
    row = {"round": round, "split": split, "partitions": list(partitions), "metrics": values}
    return json.dumps(row)


def read_metrics(folder: Path) -> list[Metric]:
    """Returns the metrics of a run in the order logged; of a value logged twice, the last."""
    found: dict[tuple[int, str, str], float] = {}
    for row in read_lines(folder / METRICS):
        for name, value in row["metrics"].items():
            found[row["round"], row["split"], name] = float(value)
    return [(*place, value) for place, value in found.items()]


def read_client_metrics(folder: Path) -> list[ClientMetric]:
    """Returns the per-client metrics of a run in the order logged; of duplicates, the last."""
    found: dict[tuple[int, str, int, str], float] = {}
    for row in read_lines(folder / CLIENT_METRICS):
        for name, values in row["metrics"].items():
            for partition, value in zip(row["partitions"], values, strict=True):
                found[row["round"], row["split"], partition, name] = float(value)
    return [(*place, value) for place, value in found.items()]


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a run: time (ISO 8601, UTC), kind, round or None, and more."""
    return read_lines(folder / EVENTS)


class Latest:
    """The newest value of every metric and the newest round, kept as metrics arrive."""

    def __init__(self, metrics: Sequence[Metric] = ()) -> None:
        self.round = -1
        self.values: dict[str, float] = {}
        for round, split, name, value in metrics:
            self.add(round, split, {name: value})

    def add(self, round: int, split: str, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one split in one round, no earlier than those before."""
        self.round = max(self.round, round)
        if split in HEADLINE_SPLITS:
            for name, value in metrics.items():
                self.values[f"{split}.{name}"] = value


def number(value: float) -> float | str:
    """Returns a float as JSON holds it: NaN and infinities as "nan", "inf", "-inf"."""
    exact = float(value)
    return exact if math.isfinite(exact) else str(exact)
