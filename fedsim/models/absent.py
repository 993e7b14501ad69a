"""What stands in the place of a model and a task where a method has none (a bandit)."""

from __future__ import annotations

import torch
from torch import nn

from fedsim.messages import Arrays
from fedsim.models.functional import FunctionalModel
from fedsim.models.tasks import Task


class NoModel(FunctionalModel):
    """A model without parameters, of which nobody asks outputs."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), torch.zeros(1, 1))
        self.shapes = {}

    def initial(self) -> Arrays:
        """Returns no arrays."""
        return {}


def no_task() -> Task:
    """Returns a task that goes with any data and measures nothing."""
    return Task("none", lambda outputs, targets: outputs, {}, "any")
