"""What one client does written with nn.Module, autograd and torch.optim, on unpadded minibatches.

The program is told the rows and the dropout masks of each step, and nothing else: a client that
watches itself tells them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.clients.base import Inputs, State
from fedsim.clients.sgd import SGD
from fedsim.data import FederatedData
from fedsim.messages import Arrays
from tests.engines.toys import run


class Step(NamedTuple):
    """One minibatch without its padding; masks: uniform numbers by dropout layer."""

    x: Tensor
    y: Tensor
    weight: Tensor
    masks: Arrays


class Watched(SGD):
    """Remembers the steps of each partition's lanes: round after round, in it chain after chain."""

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> State:
        """Begins a lane."""
        self.lanes: dict[int, list[list[Step]]] = getattr(self, "lanes", {})
        self.lanes.setdefault(int(inputs.scalars["partition-id"]), []).append([])
        return super().init(records, client_state, inputs)

    def step(self, state: State, inputs: Inputs) -> State:
        """Notes the rows that are there."""
        (batch,) = inputs.batches
        there = batch.weight != 0
        masks = {name: u[0][there] for name, u in inputs.noise.get("dropout", {}).items()}
        step = Step(batch.x[there], batch.y[there], batch.weight[there], masks)
        self.lanes[int(inputs.scalars["partition-id"])][-1].append(step)
        return super().step(state, inputs)


def watch(client: SGD, data: FederatedData, rounds: int, **more: Any) -> dict[int, Any]:
    """Returns the steps of a run: of each partition, of each lane."""
    watched = Watched(client.params, client.model, client.task)
    run(watched, data, rounds, path="one_by_one", trace=False, **more)
    return watched.lanes


class Masked(nn.Module):
    """Dropout with the mask that it is given."""

    uniform: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drops where the mask says so."""
        return x * (self.uniform >= self.p) / (1 - self.p) if self.training else x


def counting_in_floats(module: nn.Module) -> nn.Module:
    """Returns a copy whose batch norm layers take an average number of batches."""
    made = copy.deepcopy(module)
    for layer in made.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is None:
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked = layer.num_batches_tracked.double()
    return made


def train(module: nn.Module, arrays: Arrays, steps: Sequence[Step], optimizer: Any) -> Arrays:
    """Returns the same arrays after these steps from them."""
    local = counting_in_floats(module).train()
    local.load_state_dict(arrays, strict=False)
    optimiser = optimizer(local.parameters())
    for step in steps:
        for name, mask in step.masks.items():
            local.get_submodule(name).uniform = mask
        losses = cross_entropy(local(step.x), step.y, reduction="none")
        optimiser.zero_grad()
        ((losses * step.weight).sum() / step.weight.sum()).backward()
        optimiser.step()
    return {name: local.state_dict()[name].detach().clone() for name in arrays}


def fedavg(
    module: nn.Module,
    start: Arrays,
    lanes: Mapping[int, Any],
    sizes: Sequence[int],
    optimizer: Any,
    chain: tuple[int, int] = (0, 1),
    local: frozenset[str] = frozenset(),
) -> tuple[Arrays, list[Arrays]]:
    """Returns the averages after all rounds, and what each client has kept of its own.

    chain: which of how many. local: the names that stay with the clients.
    """
    own = [{k: v for k, v in start.items() if k in local} for _ in sizes]
    shared = {k: v for k, v in start.items() if k not in local}
    which, chains = chain
    for lane in range(which, len(lanes[0]), chains):
        mean = {name: torch.zeros_like(value) for name, value in shared.items()}
        for client, size in enumerate(sizes):
            done = train(module, {**shared, **own[client]}, lanes[client][lane], optimizer)
            own[client] = {k: done[k] for k in own[client]}
            for name in mean:
                mean[name] += done[name] * (size / sum(sizes))
        shared = mean
    return shared, own
