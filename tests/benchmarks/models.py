"""The workloads' models. Each function returns the same parameters at every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SEED = 7


def mlp() -> nn.Sequential:
    """64 features, 64 hidden units, 10 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Sequential:
    """1×28×28 images, two padded 3×3 convolutions with pooling, 128 hidden units, 10 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )


class Vector(nn.Module):
    """A parameter vector that nothing is computed with."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Returns zeros of shape (n,), connected to the parameters."""
        return x.flatten(1).sum(1) * 0 + self.theta[0] * 0
