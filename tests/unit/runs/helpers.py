"""A small scenario and run specification, as the store sees them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.runs import database


@dataclass(frozen=True)
class Scenario:
    name: str = "Two moons"
    rounds: int = 10

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        assert mode == "json"
        return {"name": self.name, "rounds": self.rounds, "strategy": {"step_size": 1e-05}}


@dataclass(frozen=True)
class Spec:
    label: str = "fedavg"
    group: str = "fedavg"
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    scenario: Scenario = Scenario()


def query(root: Path, sql: str) -> list[tuple[Any, ...]]:
    """Asks the index, as a user would with the sqlite3 shell."""
    connection = sqlite3.connect(root / database.NAME)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def indexed_metrics(root: Path, run_id: str) -> set[tuple[Any, ...]]:
    """Returns (round, split, name, value) of a run as the index has them, NaN as None."""
    sql = (
        "SELECT round, split, name, value FROM metrics JOIN runs ON run = key "
        f"WHERE id = '{run_id}'"
    )
    return set(query(root, sql))
