"""The scenario: everything that one experiment is, validated.

scenario = Scenario.load("scenarios/fahmc_noniid.yaml", ["strategy.step_size=0.05"])
for spec in scenario.expand():
    ...
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from fedsim.errors import Params, Problem
from fedsim.scenario.components import Components
from fedsim.scenario.problems import Sources
from fedsim.scenario.sections import (
    CheckpointParams,
    ClockParams,
    EarlyStopping,
    EngineParams,
    EvaluateParams,
    FaultsParams,
    PosteriorParams,
)

if TYPE_CHECKING:
    from fedsim.scenario.expand import RunSpec

MAX_ROUNDS = 1_000_000
MAX_SEED = 2**63 - 1

Component = SerializeAsAny[Params]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Seeds = Annotated[tuple[Seed, ...], Field(strict=False)]


class Scenario(Params):
    """One experiment: data, model, method, engine, and how it is measured and repeated."""

    name: str = Field(
        default="scenario",
        min_length=1,
        max_length=80,
        pattern=r"^[^\x00-\x1f/\\]+$",
        description="Short name without slashes, part of every run's id; the file's if left out.",
    )
    description: str = Field(default="", description="What the experiment shows.")
    seeds: Seeds = Field(
        default=(0,),
        min_length=1,
        description="One run for each; `seed: 3` is short for `seeds: [3]`.",
    )
    rounds: int = Field(ge=1, le=MAX_ROUNDS, description="Communication rounds.")
    data: Component = Field(description="The examples.")
    partition: Component = Field(description="How the examples are spread over the clients.")
    model: Component | None = Field(description="The model that is trained.")
    task: Component | None = Field(description="The loss and the metrics.")
    strategy: Component = Field(description="The server's side of the method.")
    client: Component | None = Field(
        default=None, description="The clients' side of the method; empty: the strategy's own."
    )
    engine: EngineParams = Field(
        default_factory=EngineParams, description="Where the clients compute."
    )
    clock: ClockParams | None = Field(
        default=None,
        description="How long clients take on a simulated clock; empty: no time is simulated.",
    )
    evaluate: EvaluateParams = Field(
        default_factory=EvaluateParams, description="When and what to evaluate."
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="When to end before the last round; empty: never."
    )
    on_bad_reply: Literal["drop", "fail"] = Field(
        default="drop",
        description="What a client's unusable reply (NaN, wrong shape, no weight) does: `drop` "
        "counts it and goes on without it, `fail` ends the run.",
    )
    quorum: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Fraction of a round's cohort that must reply usably; fewer fail the run.",
    )
    over_sampling: float = Field(
        default=1.0,
        ge=1,
        le=1000,
        description="Clients that are asked to train for each one whose reply a synchronous round "
        "needs, ≥ 1; of ⌈1.3·K⌉, at 1.3, the first K good replies are used, and the others are "
        "late. Needs a clock, or the engine ray.",
    )
    deadline: float | None = Field(
        default=None,
        gt=0,
        description="Seconds of real time that a client may take for one message, first tracing "
        "included; one that takes longer counts as failed. Empty: as long as it takes. Needs "
        "engine: ray, since nothing in one's own process can be ended; what is late depends on the "
        "machine. The simulated clock has a deadline of its own, clock.deadline.",
    )
    checkpoint: CheckpointParams = Field(
        default_factory=CheckpointParams, description="When to save the state."
    )
    posterior: PosteriorParams = Field(
        default_factory=PosteriorParams, description="What is kept and checked of posterior draws."
    )
    faults: FaultsParams | None = Field(
        default=None, description="What goes wrong on purpose; empty: nothing."
    )
    compare: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="By label, the part of a scenario that differs; one experiment for each.",
    )
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="By dotted field, the values it takes; one experiment for each combination.",
    )

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Scenario:
        """Reads a scenario file, applies `field.path=value` overrides and validates everything.

        Raises ScenarioError with every mistake, each with its file and line.
        """
        from fedsim.scenario.parse import load

        return load(path, overrides)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], components: Components | None = None) -> Scenario:
        """Validates plain data; raises ScenarioError with every mistake.

        `components` is what may be named, everything installed if left out.
        """
        from fedsim.scenario.parse import from_plain

        return from_plain(data, components)

    def resolved(self) -> dict[str, Any]:
        """Returns every field, defaults included, as JSON-able data that from_dict takes."""
        return self.model_dump(mode="json")

    def check(self) -> list[Problem]:
        """Returns the mistakes that show only between sections; a loaded scenario has none."""
        from fedsim.scenario.checks import mistakes

        sources = Sources()
        return [sources.problem(mistake) for mistake in mistakes(self)]

    def expand(self, components: Components | None = None) -> list[RunSpec]:
        """Returns the runs: compare × grid × seeds, each fully resolved."""
        from fedsim.scenario.expand import expand

        return expand(self, components)

    @classmethod
    def json_schema(cls, components: Components | None = None) -> dict[str, Any]:
        """Returns the JSON Schema (draft 2020-12) of a scenario file, for editors."""
        from fedsim.scenario.schema import json_schema

        return json_schema(components)

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("must differ from each other")
        return seeds
