"""Means of metrics, shapes, sampling of nodes."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord

from fedsim._flower import set_identity
from fedsim.grids.inline import InlineGrid
from fedsim.messages import Replies, to_record
from fedsim.strategies.base import mean_metrics, shapes_of
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from tests.engines.toys import cohorts, federation, functional, sgd


def test_mean_of_metrics_is_weighted_and_leaves_lists_out() -> None:
    replies = Replies((2, 3), {}, {
        "num-examples": torch.tensor([1.0, 3.0]).double(),
        "loss": torch.tensor([4.0, 8.0]).double(),
        "bins": torch.ones(2, 5).double(),
    })  # fmt: skip
    assert dict(mean_metrics(replies) or {}) == {"loss": 7.0}
    replies.metrics["num-examples"] = torch.zeros(2).double()
    assert dict(mean_metrics(replies) or {}) == {"loss": 6.0}
    assert mean_metrics(Replies((), {}, {})) is None


def test_shapes_of_a_record() -> None:
    record = to_record({"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.float64)})
    assert shapes_of(record) == {"a": ((2, 3), torch.float32), "b": ((), torch.float64)}


@pytest.fixture
def grid() -> InlineGrid:
    data = federation([2] * 20)
    set_identity(1)
    return InlineGrid(cohorts(sgd(functional()), data), 20)


def sampled(grid: InlineGrid, fraction: float, seed: int, server_round: int) -> list[int]:
    strategy = FedAvg(FedAvgParams(fraction_train=fraction))
    config = ConfigRecord({"seed": seed, "server-round": server_round})
    return strategy.sample(config, grid, fraction)


def test_samples_are_keyed_sorted_and_without_replacement(grid: InlineGrid) -> None:
    nodes = sampled(grid, 0.3, 0, 1)
    assert len(set(nodes)) == 6
    assert nodes == sorted(nodes) == sampled(grid, 0.3, 0, 1)
    assert set(nodes) <= set(grid.get_node_ids())
    others = [sampled(grid, 0.3, 0, 2), sampled(grid, 0.3, 1, 1)]
    assert all(other != nodes for other in others)


def test_a_sample_has_at_least_one_node_and_at_most_all(grid: InlineGrid) -> None:
    assert len(sampled(grid, 1e-9, 0, 1)) == 1
    assert sampled(grid, 1.0, 0, 1) == list(grid.get_node_ids())


def test_every_node_is_sampled_as_often(grid: InlineGrid) -> None:
    rounds, share = 400, 0.25
    counts = dict.fromkeys(grid.get_node_ids(), 0)
    for server_round in range(1, rounds + 1):
        for node in sampled(grid, share, 0, server_round):
            counts[node] += 1
    sd = (rounds * share * (1 - share)) ** 0.5
    assert all(abs(count - rounds * share) < 4.5 * sd for count in counts.values())
