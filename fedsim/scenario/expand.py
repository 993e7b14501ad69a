"""The runs of a scenario: every compared entry × every grid point × every seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsim.scenario.components import Components, installed
from fedsim.scenario.model import Scenario
from fedsim.scenario.parse import parse_plain
from fedsim.scenario.points import Point, points
from fedsim.scenario.problems import Sources


@dataclass(frozen=True)
class RunSpec:
    """One run.

    label: what tells this run from the scenario's others, seed included where there are several.
    group: the same without the seed; runs of one group are replicates of one experiment.
    arm: the entry of `compare`, "" if there is none.
    settings: dotted field → value of this point of the grid.
    scenario: the resolved single run, with one seed and without compare and grid.
    """

    label: str
    group: str
    arm: str
    seed: int
    settings: dict[str, Any]
    scenario: Scenario


def expand(scenario: Scenario, components: Components | None = None) -> list[RunSpec]:
    """Returns the runs in the order of the file: compare entries, grid, then seeds."""
    known = components or installed()
    specs = []
    for point in points(scenario.resolved(), Sources()):
        single, mistakes = parse_plain(point.data, known)
        if single is None or point.mistakes:
            raise ValueError(f"the scenario was changed after validation: {mistakes}")
        group = group_of(scenario, point)
        for seed in scenario.seeds:
            label = group if len(scenario.seeds) == 1 else f"{group} seed={seed}"
            run = single.model_copy(update={"seeds": (seed,)})
            specs.append(RunSpec(label, group, point.label, seed, point.settings, run))
    return specs


def group_of(scenario: Scenario, point: Point) -> str:
    """Returns the point's name: its label (else the scenario's name) and its grid settings.

    A field is named by its last part, or in full where two fields end alike or in `name`.
    """
    leaves = [field.rpartition(".")[2] for field in point.settings]
    words = [
        f"{field if leaves.count(leaf) > 1 or leaf == 'name' else leaf}={_shown(value)}"
        for leaf, (field, value) in zip(leaves, point.settings.items(), strict=True)
    ]
    return " ".join([point.label or scenario.name, *words])


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    return f"{value:g}" if isinstance(value, float) else str(value)
