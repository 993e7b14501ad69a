"""Which runs of a folder `fedsim run --resume auto` continues, and which it starts anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from fedsim.errors import UserError
from fedsim.runs import Run, RunStore
from fedsim.runs.environment import describe
from fedsim.runs.environment import differences as changed
from fedsim.scenario import RunSpec, Scenario
from fedsim.scenario.move import differences, movable


@dataclass(frozen=True)
class Choice:
    """What becomes of a spec: `run` is continued, or kept if it is finished; None starts a new one.

    why: what is said of it after its label; "" where that is said later, or nothing is.
    """

    run: Run | None
    why: str

    @property
    def kept(self) -> bool:
        """Whether the run is taken as it is."""
        return self.run is not None and self.run.record.status == "finished"


def choose(specs: Sequence[RunSpec], store: RunStore) -> list[Choice]:
    """Returns what becomes of each spec.

    The newest run that did not finish of exactly this scenario, group and seed is continued; the
    engine may differ in what changes no number. Where some of several specs have no finished run
    yet, those that have one keep it: that is a batch that was cut off. Raises UserError if another
    process is computing one of them.
    """
    runs = _runs(store)
    choices = [_choose(spec, [run for run in runs if _is_of(run, spec)], store) for spec in specs]
    if all(choice.kept for choice in choices):
        return [
            Choice(None, f"starts anew; {c.run.id} of the same scenario is finished")
            for c in choices
            if c.run is not None
        ]
    return choices


def _choose(spec: RunSpec, candidates: Sequence[Run], store: RunStore) -> Choice:
    """`candidates`: of the same label and seed, newest first."""
    finished: Run | None = None
    for run in candidates:
        scenario = _scenario(run)
        if scenario is None or not all(map(movable, differences(scenario, spec.scenario))):
            continue
        if run.status == "running":
            raise UserError(
                f"{spec.label}: run {run.id} of it is being computed by process {run.record.pid} on"
                f" {run.record.host}; let it end first, or leave out --resume"
            )
        if run.record.status != "finished":
            return Choice(run, "")
        if finished is None and not changed(run.environment, describe()):
            finished = run
    if finished is not None:
        return Choice(finished, f"is finished as {finished.id}")
    return Choice(
        None, f"starts anew; {store.root} has no unfinished run of this scenario and seed"
    )


def _runs(store: RunStore) -> list[Run]:
    """Returns the runs of the folder that can be read, newest first."""
    found = []
    for run_id in store.ids():
        try:
            found.append(Run(store.root / run_id))
        except UserError:  # damaged, or of another version: nothing to continue
            continue
    return sorted(found, key=lambda run: (run.record.created, run.id), reverse=True)


def _is_of(run: Run, spec: RunSpec) -> bool:
    record = run.record
    return (record.group, record.seed) == (spec.group, spec.seed) and (
        record.rounds == spec.scenario.rounds and record.name == spec.scenario.name
    )


def _scenario(run: Run) -> Scenario | None:
    """Returns the run's scenario as this fedsim reads it; None if it does not, or of an app."""
    try:
        return Scenario.from_dict(run.scenario)
    except (UserError, OSError, yaml.YAMLError):
        return None
