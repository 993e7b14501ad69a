"""Runs as tables and reports see them: named by what is compared, their numbers read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.runs import Run


@dataclass(frozen=True)
class Named:
    """A run's name in a comparison, which replicates share, and its seed."""

    label: str
    seed: int


class View:
    """A stored run under a label; what it has logged is read when it is first asked for."""

    def __init__(self, run: Run, label: str) -> None:
        self.run = run
        self.record = Named(label, run.record.seed)

    @property
    def id(self) -> str:
        """The run's id."""
        return self.run.id

    @cached_property
    def status(self) -> str:
        """ "finished", "failed", …"""
        return self.run.status

    @property
    def scenario(self) -> dict[str, Any]:
        """The resolved scenario."""
        return self.run.scenario

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, processor, git state."""
        return self.run.environment

    @cached_property
    def engine(self) -> dict[str, Any]:
        """The recorded execution plan."""
        return self.run.engine

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Columns round, split, name, value."""
        return self.run.metrics

    @cached_property
    def events(self) -> pd.DataFrame:
        """Columns time, kind, round and the events' own fields."""
        return self.run.events


def views(runs: Sequence[Run]) -> list[View]:
    """Returns the runs, replicates under one label.

    The label is the group; with the scenario's name before it where several scenarios have the
    group, and the run's id after it where a group has a seed twice.
    """
    scenarios: dict[str, set[str]] = {}
    for run in runs:
        scenarios.setdefault(run.record.group, set()).add(run.record.name)
    named = [
        group if len(scenarios[group]) == 1 or group == name else f"{name}: {group}"
        for name, group in ((run.record.name, run.record.group) for run in runs)
    ]
    seeds = Counter((label, run.record.seed) for label, run in zip(named, runs, strict=True))
    twice = {label for (label, _), count in seeds.items() if count > 1}
    return [
        View(run, f"{label} ({run.id})" if label in twice else label)
        for run, label in zip(runs, named, strict=True)
    ]
