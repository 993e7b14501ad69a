"""The sides that fedsim is compared with do the same work, and the harness notices if not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.benchmarks.batched import BmmLoop, VmapLoop
from tests.benchmarks.harness import DisagreementError, Timing, measure
from tests.benchmarks.loops import EchoLoop, SequentialLoop, ThreadedLoop
from tests.benchmarks.report import table
from tests.benchmarks.sides import SIDES, Session, Side
from tests.benchmarks.workloads import WORKLOADS, Workload

SMALL_MLP = replace(WORKLOADS["W1"], clients=8, cohort=5, rounds=2)
SMALL_CNN = replace(WORKLOADS["W2"], clients=4, cohort=3, examples=30, batch=20)


@pytest.fixture(autouse=True)
def _restore_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _difference(a: Session, b: Session) -> float:
    a.advance(2)
    b.advance(2)
    return max(
        float((x - y).norm() / y.norm())
        for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.parametrize("loop", [VmapLoop, BmmLoop])
def test_batched_loops_compute_what_the_sequential_loop_computes(loop: type[VmapLoop]) -> None:
    assert _difference(loop(SMALL_MLP), SequentialLoop(SMALL_MLP)) < 1e-5


def test_threads_compute_what_the_sequential_loop_computes() -> None:
    assert _difference(ThreadedLoop(SMALL_CNN), SequentialLoop(SMALL_CNN)) < 1e-5


@pytest.mark.parametrize("name", ["W1", "W2"])
def test_training_lowers_the_loss(name: str) -> None:
    workload = replace(WORKLOADS[name], clients=10, cohort=5)
    loop = SequentialLoop(workload)
    before = workload.result(loop.parameters())
    loop.advance(4)
    assert workload.result(loop.parameters()) < 0.9 * before


def test_echo_adds_the_mean_client_id_every_round() -> None:
    workload = replace(WORKLOADS["W3-1k"], cohort=4)
    loop = EchoLoop(workload)
    loop.advance(3)
    assert torch.equal(loop.parameters()[0], torch.full((1000,), 4.5))


class _Idle:
    def __init__(self, workload: Workload) -> None:
        self.start = [p.detach() for p in workload.model().parameters()]

    def advance(self, rounds: int) -> None:
        """Does nothing."""

    def parameters(self) -> list[Tensor]:
        return self.start


def test_a_side_that_did_not_do_the_work_is_refused() -> None:
    sides = [Side("loop", ("W1",), SequentialLoop), Side("idle", ("W1",), _Idle)]
    with pytest.raises(DisagreementError, match="idle ends at"):
        measure(SMALL_MLP, sides, repetitions=1)


def test_ratios_are_medians_over_paired_repetitions() -> None:
    slow, fast = Timing("slow", [2.0, 4.0, 90.0], 1.0), Timing("fast", [1.0, 1.0, 30.0], 1.0)
    assert fast.ratio(slow) == pytest.approx(1 / 3)
    assert slow.median == 4.0
    assert "| fast | 1000.00 | 1000.00–30000.00 | 0.33 | -3000.00 | 1.0000 |" in table(
        WORKLOADS["W1"], [slow, fast]
    )


def test_every_workload_has_sides_and_every_side_a_workload() -> None:
    used = {name for side in SIDES for name in side.workloads}
    assert used == set(WORKLOADS)
