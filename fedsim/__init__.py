"""fedsim: federated learning on Flower's API.

    from fedsim import Scenario, run

    finished = run(Scenario.load("scenarios/fahmc_gaussian.yaml"))
    finished.metrics  # a pandas DataFrame

What is named here is the stable part (docs/stability.md). Each name is imported when it is first
used, so that `import fedsim` alone is quick.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.clients.base import Client, DirectClient
    from fedsim.data import DataInfo, Examples, FederatedData, Partition
    from fedsim.errors import FedsimError, Params, RunFailed, ScenarioError, UserError
    from fedsim.runner import resume, run, run_all
    from fedsim.runs import Run, RunStore
    from fedsim.scenario import Scenario
    from fedsim.strategies.base import Strategy

# Flower reads these when it is imported, from wherever that is: a simulation must not phone home.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

__version__ = "0.1.0"

__all__ = [
    "Client",
    "DataInfo",
    "DirectClient",
    "Examples",
    "FederatedData",
    "FedsimError",
    "Params",
    "Partition",
    "Run",
    "RunFailed",
    "RunStore",
    "Scenario",
    "ScenarioError",
    "Strategy",
    "UserError",
    "__version__",
    "resume",
    "run",
    "run_all",
]

_HOMES = {
    "fedsim.clients.base": ("Client", "DirectClient"),
    "fedsim.data": ("DataInfo", "Examples", "FederatedData", "Partition"),
    "fedsim.errors": ("FedsimError", "Params", "RunFailed", "ScenarioError", "UserError"),
    "fedsim.runner": ("resume", "run", "run_all"),
    "fedsim.runs": ("Run", "RunStore"),
    "fedsim.scenario": ("Scenario",),
    "fedsim.strategies.base": ("Strategy",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
