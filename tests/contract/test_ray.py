"""The contract suite on the engine ray: a strategy that streams, one that does not, a sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.clients.base import Client, DirectClient
from fedsim.data import FederatedData
from fedsim.grids.cohort import Cohorts
from fedsim.grids.execution import Execution
from fedsim.grids.inline import InlineGrid
from fedsim.grids.ray_cohorts import RayCohorts
from fedsim.grids.shards import Shards
from fedsim.models import FunctionalModel
from fedsim.scenario.sections import ClientResources
from fedsim.testing import Engine, StrategyContract
from tests.contract.test_strategies import build, client_for
from tests.engines.test_ray import cluster
from tests.engines.warm import warm

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.usefixtures("warm"),
]
__all__ = ["cluster", "warm"]  # the fixtures, for this module

CHUNK = 2
"""Clients of a block, so that there is something to divide."""


def execution(dtype: str) -> Execution:
    return Execution("mapped", CHUNK, 1, dtype, "cpu", False)


def inline(
    client: Client | DirectClient, data: FederatedData, dtype: str, workers: int
) -> InlineGrid:
    shards = Shards(data, getattr(torch, dtype))
    return InlineGrid(Cohorts(client, shards, execution(dtype), 0), len(data.shards))


def on_ray(
    client: Client | DirectClient, data: FederatedData, dtype: str, workers: int
) -> InlineGrid:
    shards = Shards(data, getattr(torch, dtype))
    made = execution(dtype)
    cohorts = RayCohorts(client, data, shards, made, 0, 2**20, workers, ClientResources())
    return InlineGrid(cohorts, len(data.shards))


class TestOnRay(StrategyContract):
    """All of it; to the bits of engine inline."""

    engines = {  # noqa: RUF012 - as the base class has it
        "inline": Engine(inline),
        "ray": Engine(on_ray, same_bits_as="inline"),
    }
    name: str

    @pytest.fixture(autouse=True, params=["fedavg", "FedAdam", "fa-hmc"])
    def named(self, request: pytest.FixtureRequest) -> None:
        self.name = request.param
        self.identity = self.name != "FedAdam"

    def make(self) -> Any:
        return build(self.name)

    def make_client(self, strategy: Any, model: FunctionalModel) -> Client:
        return client_for(strategy, model)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "engine" in metafunc.fixturenames:
            metafunc.parametrize("engine", ["ray"])
