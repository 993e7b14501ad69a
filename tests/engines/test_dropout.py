"""Dropout in the engine, against plain torch with the same masks on unpadded batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedsim.grids.execute import at
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from tests.engines import by_hand
from tests.engines.toys import CLASSES, FEATURES, distance, federation, functional, run, sgd, start

SIZES = (7, 1, 11, 3)
LR, ROUNDS = 0.2, 2


def build(dropout: Callable[[float], nn.Module], channels: Callable[[float], nn.Module]) -> Any:
    """Returns a network with one dropout layer of units and one of channels."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(FEATURES, 6), nn.Tanh(), dropout(0.4), nn.Unflatten(1, (2, 1, 3)),
        nn.Conv2d(2, 4, (1, 2)), channels(0.3), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES),
    ).double()  # fmt: skip


def ours() -> nn.Module:
    return build(nn.Dropout, nn.Dropout2d)  # type: ignore[no-any-return]


def descent(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize("chains", [0, 2])
@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_the_engine_is_plain_torch_with_its_masks(
    path: str, chains: int, batch_size: int | None
) -> None:
    compare(path, False, chains, batch_size)


@pytest.mark.parametrize("chains", [0, 2])
@pytest.mark.parametrize("path", [pytest.param("mapped", marks=pytest.mark.slow), "one_by_one"])
def test_a_trace_does_not_keep_its_masks(path: str, chains: int) -> None:
    compare(path, True, chains, 4)


def compare(path: str, trace: bool, chains: int, batch_size: int | None) -> None:
    """Asserts that a run ends where the plain program does."""
    client = sgd(functional(ours()), lr=LR, epochs=2, batch_size=batch_size)
    data, strategy = federation(SIZES, weighted=True), FedAvg(FedAvgParams(chains=chains))
    lanes = by_hand.watch(client, data, ROUNDS, strategy=strategy)
    masks = [s.masks for own in lanes.values() for lane in own for s in lane]
    assert {tuple(m.shape[1:]) for one in masks for m in one.values()} == {(6,), (4, 1, 1)}
    flat = torch.cat([m.flatten() for one in masks for m in one.values()])
    assert len(flat.unique()) == len(flat)  # no number is used twice
    begin = start(client.model, strategy)
    arrays = run(client, data, ROUNDS, strategy=strategy, path=path, trace=trace).arrays
    module = build(by_hand.Masked, by_hand.Masked)
    for q in range(max(chains, 1)):
        one, end = (at(begin, q), at(arrays, q)) if chains else (begin, arrays)
        want, _ = by_hand.fedavg(module, one, lanes, SIZES, descent, (q, max(chains, 1)))
        assert distance(end, want) <= 1e-10
        assert distance(end, one) > 1e-2
