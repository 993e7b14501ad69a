"""The engine against federated averaging written by hand: nn.Module, autograd and torch.optim.

The hand-written program is told which rows make each minibatch, and nothing else.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.clients.base import Batching
from fedsim.data import FederatedData
from fedsim.grids.lanes import Stream
from tests.engines.toys import distance, drawn, federation, functional, network, run, sgd

EPOCHS, BATCH, ROUNDS, LR = 2, 4, 3, 0.2


def minibatches(data: FederatedData, client: int, server_round: int) -> list[np.ndarray]:
    """Returns the rows of each of the client's minibatches in a round."""
    rows = data.shards[client]
    count = EPOCHS * math.ceil(len(rows) / BATCH)
    stream = Stream(0, server_round, "train")
    order = drawn(stream, Batching("epochs", BATCH), len(rows), count, client)
    return [rows[batch[batch >= 0]] for batch in order]


def train_by_hand(
    model: nn.Module, data: FederatedData, client: int, server_round: int, make: Any, clip: float,
    decay: float, mu: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Returns the parameters after one client's local epochs."""
    local = copy.deepcopy(model)
    optimizer = make(local.parameters(), lr=LR * decay ** (server_round - 1))
    anchor = [p.detach().clone() for p in model.parameters()]
    for rows in minibatches(data, client, server_round):
        losses = cross_entropy(
            local(torch.from_numpy(data.train.x[rows])),
            torch.from_numpy(data.train.y[rows]),
            reduction="none",
        )
        weight = torch.from_numpy(data.train.weights()[rows])
        loss = (losses * weight).sum() / weight.sum()
        pull = sum(((p - a) ** 2).sum() for p, a in zip(local.parameters(), anchor, strict=True))
        optimizer.zero_grad()
        (loss + 0.5 * mu * pull).backward()
        nn.utils.clip_grad_norm_(local.parameters(), clip)
        optimizer.step()
    return {name: p.detach() for name, p in local.named_parameters()}


def fedavg_by_hand(
    model: nn.Module, data: FederatedData, make: Any, clip: float, decay: float, mu: float
) -> dict[str, Tensor]:
    """Returns the global parameters after ROUNDS rounds."""
    total = sum(len(rows) for rows in data.shards)
    for server_round in range(1, ROUNDS + 1):
        mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for client, rows in enumerate(data.shards):
            own = train_by_hand(model, data, client, server_round, make, clip, decay, mu)
            for name, value in own.items():
                mean[name] += value * (len(rows) / total)
        model.load_state_dict(mean)
    return mean


OPTIMIZERS: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": ({"name": "sgd"}, torch.optim.SGD),
    "nesterov": (
        {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "adamw": (
        {"name": "adamw", "weight_decay": 0.05},
        lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.05),
    ),
}


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "clip, schedule, prox, weights"])
def test_the_engine_is_the_plain_program(name: str, path: str, extras: bool) -> None:
    data = federation(weighted=extras)
    section, make = OPTIMIZERS[name]
    clip, decay, mu = (0.3, 0.5, 0.7) if extras else (1e12, 1.0, 0.0)
    expected = fedavg_by_hand(network(), data, make, clip, decay, mu)
    more: dict[str, Any] = {}
    strategy = None
    if extras:
        from fedsim.strategies.flower import build_flower, flower_params

        more["clip_norm"] = clip
        more["schedule"] = {"name": "ExponentialLR", "params": {"gamma": decay}}
        strategy = build_flower(flower_params()["FedProx"](name="FedProx", proximal_mu=mu))
    client = sgd(functional(), lr=LR, epochs=EPOCHS, batch_size=BATCH, optimizer=section, **more)
    state = run(client, data, ROUNDS, strategy=strategy, path=path)
    # clip_grad_norm_ and the engine clip the gradient with the proximal term in it
    assert distance(state.arrays, expected) <= 1e-10


def test_the_program_moves_the_parameters() -> None:
    """The comparison above would hold for two programs that do nothing."""
    moved = fedavg_by_hand(network(), federation(), torch.optim.SGD, 1e12, 1.0, 0.0)
    assert distance(moved, dict(network().state_dict())) > 0.1
