"""The sides that fedsim is compared with do the same work, and the harness notices if not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.benchmarks.batched import BmmLoop, VmapLoop
from tests.benchmarks.loops import EchoLoop, SequentialLoop, ThreadedLoop
from tests.benchmarks.sampling import HMCLoop, Posterior, SequentialHMC, VmapHMC
from tests.benchmarks.session import Session
from tests.benchmarks.workloads import WORKLOADS

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["W1", "W2"])
def test_a_side_that_has_not_trained_is_outside_the_tolerance(name: str) -> None:
    workload = WORKLOADS[name]
    loop = SequentialLoop(workload)
    before = loop.result()
    loop.advance(workload.warm_up)
    assert workload.disagreement(before, loop.result()) > 2 * workload.tolerance


def test_echo_adds_the_mean_client_id_every_round() -> None:
    workload = replace(WORKLOADS["W3-1k"], cohort=4)
    loop = EchoLoop(workload)
    loop.advance(3)
    assert torch.equal(loop.parameters()[0], torch.full((1000,), 4.5))


SMALL_POSTERIOR = Posterior(chains=2, leapfrogs=3, descent=2, burn_in=0)


def test_both_samplers_by_hand_take_the_same_trajectories() -> None:
    one, other = SequentialHMC(SMALL_POSTERIOR), VmapHMC(SMALL_POSTERIOR)
    one.advance(4)
    other.advance(4)
    assert torch.allclose(torch.stack(one.draws), torch.stack(other.draws), atol=1e-12)
    assert len(one.draws) == 2


@pytest.mark.parametrize("loop", [SequentialHMC, VmapHMC])
def test_the_descent_ends_near_the_mode_of_the_pooled_posterior(loop: type[HMCLoop]) -> None:
    """Without noise the average of the clients' descents is at rest where Σ w_c ∇f_c = 0, up to the
    clients' drift, which is of the order of the squared step size.
    """
    sampler = loop(Posterior(chains=1, descent=150, step_size=0.02, leapfrogs=6))
    sampler.advance(150)
    q = sampler.q[0].clone().requires_grad_()
    one = torch.ones((), dtype=torch.float64)
    nll = [sampler.potential(q, x, y, torch.ones_like(y), one) for x, y in sampler.shards]
    prior = 0.5 * sampler.posterior.precision * q.square().sum()
    pooled = torch.stack(nll).sum() - (len(nll) - 1) * prior
    (gradient,) = torch.autograd.grad(pooled, [q])
    start = torch.zeros_like(q).requires_grad_()
    nll = [sampler.potential(start, x, y, torch.ones_like(y), one) for x, y in sampler.shards]
    (steepest,) = torch.autograd.grad(torch.stack(nll).sum(), [start])
    assert gradient.norm() < 0.1 * steepest.norm()


@pytest.mark.slow
def test_the_engine_samples_the_posterior_that_the_loop_samples() -> None:
    from tests.benchmarks.sampling import FedsimChains

    posterior = Posterior()
    by_hand, engine = VmapHMC(posterior), FedsimChains(posterior)
    for session in (by_hand, engine):
        session.advance(posterior.warm_up)
    assert posterior.disagreement(engine.result(), by_hand.result()) < posterior.tolerance
    assert engine.measures()["ess a round"] > 0.05
    engine.close()
