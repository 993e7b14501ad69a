"""What a run of a Flower app is: the app, its run config, its nodes and a seed, checked."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from pydantic import Field

from fedsim.apps.load import imported
from fedsim.apps.project import Project, override, read
from fedsim.errors import Params, Problem, ScenarioError
from fedsim.random import integer, seeded_globals
from fedsim.scenario.model import MAX_SEED

ROUNDS_KEYS = ("num-server-rounds", "num-rounds", "num_server_rounds", "num_rounds")
"""Where apps keep their number of rounds; only shown until Strategy.start says it."""


class AppSection(Params):
    """Which app it is."""

    path: str = Field(description="The app's folder.")
    name: str = Field(description="The project's name.")
    version: str = Field(description="The project's version.")
    serverapp: str = Field(description='The ServerApp, "package.module:object".')
    clientapp: str = Field(description='The ClientApp, "package.module:object".')


class AppScenario(Params):
    """The resolved scenario of a Flower app's run; what `scenario.yaml` of its folder holds."""

    name: str = Field(description="The project's name.")
    app: AppSection
    run_config: dict[str, bool | int | float | str] = Field(description="With the overrides.")
    nodes: int = Field(ge=1, description="How many nodes, each with one partition.")
    rounds: int = Field(ge=0, description="Rounds that the run config names; 0 if it does not.")
    seeds: tuple[int, ...] = Field(description="The one seed.")
    engine: Literal["inline"] = "inline"


@dataclass(frozen=True)
class AppSpec:
    """One run of a Flower app. label, group, seed, settings: as of a scenario's run."""

    label: str
    group: str
    seed: int
    settings: dict[str, Any]
    scenario: AppScenario
    project: Project


def prepare(
    path: Path,
    overrides: Sequence[str] = (),
    nodes: int | None = None,
    seeds: Sequence[int] = (0,),
) -> list[AppSpec]:
    """Returns a run for each seed, with the app imported once to see that it can be.

    overrides: "key=value" of the run config. nodes: instead of those that the app asks for. Raises
    ScenarioError with all that is wrong; nothing is written.
    """
    project = read(path)
    problems: list[Problem] = []
    given: dict[str, Any] = {}
    try:
        given = override(project.config, overrides)
    except ScenarioError as error:
        problems += error.problems
    if nodes is not None and nodes < 1:
        problems.append(Problem("--nodes", "must be a whole number ≥ 1", nodes))
    problems += [
        Problem("--seeds", f"must be whole numbers from 0 to {MAX_SEED}", seed)
        for seed in seeds
        if not 0 <= seed <= MAX_SEED
    ]
    try:
        with components(project, 0):
            pass
    except ScenarioError as error:
        problems += error.problems
    if problems:
        raise ScenarioError(problems)
    config = {**project.config, **given}
    nodes = nodes or project.nodes
    # Runs of one group are averaged over seeds: whatever else differs is in its name.
    changed = given if nodes == project.nodes else {**given, "nodes": nodes}
    group = " ".join([project.name, *(f"{key}={_text(value)}" for key, value in changed.items())])
    specs = []
    for seed in dict.fromkeys(seeds):
        scenario = AppScenario(
            name=project.name,
            app=AppSection(
                path=str(project.folder),
                name=project.name,
                version=project.version,
                serverapp=project.serverapp,
                clientapp=project.clientapp,
            ),
            run_config=config,
            nodes=nodes,
            rounds=_rounds(config),
            seeds=(seed,),
        )
        label = group if len(seeds) == 1 else f"{group} seed={seed}"
        specs.append(AppSpec(label, group, seed, given, scenario, project))
    return specs


@contextmanager
def components(project: Project, seed: int) -> Iterator[tuple[ServerApp, ClientApp]]:
    """Imports the app; inside the block, what it draws at random belongs to the seed.

    What it prints goes to standard error: standard output is for results. If it goes into another
    folder, it is left there only for the block.
    """
    with (
        _same_folder(),
        redirect_stdout(sys.stderr),
        seeded_globals(seed, "server-app"),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(integer(seed, "server-app-torch"))
        with imported(project) as both:
            yield both


@contextmanager
def _same_folder() -> Iterator[None]:
    before = Path.cwd()
    try:
        yield
    finally:
        os.chdir(before)


def again(stored: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> str:
    """Returns the command that runs the app of a stored run anew. stored: its `scenario.yaml`."""
    words = ["fedsim", "run", "--app", str(stored["app"]["path"]), "--nodes", str(stored["nodes"])]
    for key, value in settings.items():
        words += ["--set", f"{key}={_text(value)}"]
    return shlex.join([*words, "--seeds", str(seed)])


def _text(value: object) -> str:
    """Returns a value of the run config as TOML has it, but texts without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rounds(config: Mapping[str, Any]) -> int:
    found = [config[key] for key in ROUNDS_KEYS if type(config.get(key)) is int]
    return max(found[0], 0) if found else 0
