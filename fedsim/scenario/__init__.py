"""Scenarios: YAML files that say what an experiment is."""

from fedsim.scenario.components import Components, Imported, installed
from fedsim.scenario.expand import RunSpec
from fedsim.scenario.model import Scenario
from fedsim.scenario.sections import (
    CheckpointParams,
    EarlyStopping,
    EngineParams,
    EvaluateParams,
    PosteriorParams,
)

__all__ = [
    "CheckpointParams",
    "Components",
    "EarlyStopping",
    "EngineParams",
    "EvaluateParams",
    "Imported",
    "PosteriorParams",
    "RunSpec",
    "Scenario",
    "installed",
]
