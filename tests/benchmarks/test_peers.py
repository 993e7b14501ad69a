"""The peers themselves, where their environment is: they do fedsim's work, and leave nothing."""

from __future__ import annotations

import pytest

from tests.benchmarks import processes
from tests.benchmarks.engine import Fedsim
from tests.benchmarks.harness import measure
from tests.benchmarks.remote import Remote
from tests.benchmarks.sides import SIDES, Side
from tests.benchmarks.workloads import WORKLOADS

PEERS = [side for side in SIDES if side.needs]


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["W1", "W3-1k"])
@pytest.mark.parametrize("side", PEERS, ids=lambda side: side.key)
def test_a_peer_agrees_with_fedsim_and_leaves_no_process(side: Side, workload: str) -> None:
    if why := side.missing():
        pytest.skip(why)
    task = WORKLOADS[workload]
    fedsim = next(s for s in SIDES if s.key == "fedsim").entry(task)
    assert fedsim.start.func is Fedsim  # type: ignore[attr-defined]
    timings = measure([fedsim, side.entry(task)], repetitions=1)  # raises if they disagree
    assert [timing.failure for timing in timings] == ["", ""]


@pytest.mark.slow
def test_no_process_of_ray_outlives_flowers_simulation() -> None:
    side = next(s for s in SIDES if s.key == "flower")
    if why := side.missing():
        pytest.skip(why)
    session = side.setup(WORKLOADS["W3-1k"])
    assert isinstance(session, Remote)
    session.advance(1)
    family = processes.tree(session._process.pid)
    assert len(family) > 3
    session.close()
    assert processes.alive(family) == []
