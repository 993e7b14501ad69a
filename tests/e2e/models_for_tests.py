"""Models, losses and clients that scenarios of the tests name by import path."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from flwr.serverapp.strategy import FedAvg
from pydantic import Field
from torch import Tensor, nn

from fedsim.clients.base import Config, Plan
from fedsim.clients.sgd import SGD, SGDParams
from fedsim.data import DataInfo


class Forgetful(FedAvg):
    """A user's strategy of which nobody knows what it remembers."""


class Remembering(FedAvg):
    """A user's strategy that can be saved."""

    def state_dict(self) -> dict[str, int]:
        """Returns what it remembers."""
        return {"calls": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Has nothing to do."""


class Slow(SGD):
    """Makes every block take a while; with an engine that traces, the first one of its form."""

    def init(self, *arguments: Any) -> Any:
        """Waits, and starts as SGD does."""
        time.sleep(0.2)
        return super().init(*arguments)


class GatedParams(SGDParams):
    """folder: where the files are that open rounds. gates: the rounds that wait for theirs."""

    name: Literal["gated"] = "gated"  # type: ignore[assignment]
    folder: str = ""
    gates: Annotated[tuple[int, ...], Field(strict=False)] = ()


class Gated(Slow):
    """Begins some rounds only when there is a file that says so, go-ROUND."""

    Params = GatedParams
    params: GatedParams

    def plan(self, n_examples: int, config: Config) -> Plan:
        """Waits, and plans as SGD does."""
        server_round = int(config["server-round"])
        while server_round in self.params.gates and not self._open(server_round):
            time.sleep(0.1)
        return super().plan(n_examples, config)

    def _open(self, server_round: int) -> bool:
        return (Path(self.params.folder) / f"go-{server_round}").exists()


class Clock(nn.Module):
    """Logits of a linear map; their last column counts the steps taken, and spoils marked rows.

    Under `clock_loss` the clock gains one learning rate a step. Where it has passed `limit`, the
    logits of rows whose second feature is positive are NaN.
    """

    def __init__(self, features: int, classes: int, limit: float) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)
        self.clock = nn.Parameter(torch.zeros(1))
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """Returns (n, classes + 1)."""
        marked = (x[:, 1] > 0) & (self.clock > self.limit)
        logits = torch.where(marked[:, None], torch.nan, self.linear(x))
        return torch.cat([logits, self.clock.expand(len(x), 1)], dim=1)


def clock(info: DataInfo, limit: float) -> nn.Module:
    """Returns a Clock for the data."""
    return Clock(info.input_shape[0], info.num_classes or 1, limit)


def clock_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, minus the clock: its gradient is −1."""
    logits = outputs[:, :-1]
    return nn.functional.cross_entropy(logits, targets, reduction="none") - outputs[:, -1]


class Stuck(nn.Module):
    """Computes for minutes in one torch operation where it is given many rows.

    A file `stuck` says that it has begun.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (n, classes)."""
        if len(x) > 100:
            Path("stuck").touch()
            torch.linalg.svd(torch.ones(5000, 5000) + torch.eye(5000))
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def stuck(info: DataInfo) -> nn.Module:
    """Returns a Stuck for the data."""
    return Stuck(torch.Size(info.input_shape).numel(), info.num_classes or 1)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Wrong: one value for all examples."""
    return nn.functional.cross_entropy(outputs, targets)
