"""Models and tasks: torch modules as pure functions, losses with one value per example."""

from fedsim.models.functional import FunctionalModel
from fedsim.models.tasks import TASKS, Task, build_task
from fedsim.models.zoo import MODELS, build_model

__all__ = ["MODELS", "TASKS", "FunctionalModel", "Task", "build_model", "build_task"]
