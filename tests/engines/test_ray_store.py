"""Ray's object store is full for real: what a run needs is larger than it.

Ray 2.52 and later put on the disk what the store has no room for, even where spilling is switched
off, so a small store is slow and nothing else; the run fails where the disk is full, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import nn

from fedsim.clients.base import Batch, Config, DirectClient, Reply
from fedsim.errors import Params, RunFailed
from fedsim.grids import connection
from fedsim.messages import Arrays
from fedsim.scenario import Scenario
from fedsim.setup import Setup, prepare
from tests.engines.test_ray import finish, on_ray
from tests.engines.toys import same_bits

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

STORE = 100 * 10**6
"""Bytes of the store; a cohort's replies are three times as large."""


@contextmanager
def cluster(**settings: Any) -> Iterator[None]:
    connection._started_here(
        num_cpus=2,
        object_store_memory=STORE,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config=settings,
    )
    try:
        yield
    finally:
        ray.shutdown()


class Added(DirectClient):
    """Sends back what it got, and something of its own."""

    Params = Params

    def train(
        self,
        message_type: str,
        records: dict[str, Arrays],
        config: Config,
        shard: Batch,
        client_state: Arrays,
        rng: np.random.Generator,
    ) -> tuple[Reply, Arrays]:
        own = float(rng.standard_normal())
        added = {name: value + own for name, value in records["arrays"].items()}
        return Reply({"arrays": added}, {"num-examples": 1.0}), {}


def large() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 250_000, bias=False), nn.Linear(250_000, 3))


def setup_of(engine: dict[str, Any]) -> Setup:
    plain = {
        "name": "large",
        "rounds": 2,
        "data": {"name": "custom", "factory": "tests.engines.test_ray:images"},
        "partition": "given",
        "model": {"name": "custom", "factory": f"{__name__}:large"},
        "task": "classification",
        "strategy": {"name": "FedMedian"},
        "client": {"name": f"{__name__}:Added"},
        "engine": engine,
        "evaluate": {"server_every": 0},
    }
    return prepare(Scenario.from_dict(plain).expand()[0].scenario)


@pytest.mark.parametrize("spills", [True, False])
def test_what_has_no_room_goes_to_the_disk(spills: bool) -> None:
    expected, _ = finish(setup_of({}))
    size = sum(t.numel() * t.element_size() for t in expected.arrays.values())
    assert 7 * size > 2 * STORE
    with cluster(automatic_object_spilling_enabled=spills):
        found, _ = finish(setup_of(on_ray(2)))
    assert same_bits(found.arrays, expected.arrays)


def test_a_full_disk_ends_the_run_with_what_to_do() -> None:
    what = r"object store is full, and so is the disk .* engine\.object_store_mb"
    # Ray looks at the share of the disk that is in use
    with cluster(local_fs_capacity_threshold=1e-6), pytest.raises(RunFailed, match=what):
        finish(setup_of(on_ray(2)))
