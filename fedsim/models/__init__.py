"""Models and tasks: torch modules as pure functions, losses with one value per example."""

from fedsim.models.absent import NoModel, no_task
from fedsim.models.functional import FunctionalModel
from fedsim.models.tasks import TASKS, Task, build_task
from fedsim.models.zoo import MODELS, build_model

__all__ = [
    "MODELS",
    "TASKS",
    "FunctionalModel",
    "NoModel",
    "Task",
    "build_model",
    "build_task",
    "no_task",
]
