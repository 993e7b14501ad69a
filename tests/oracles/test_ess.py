"""Exact effective sample sizes, and what they say of FA-HMC against FA-LD."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles.ess import (
    autocorrelation_time,
    ess_per_1000_gradients,
    gradients_per_round,
    worst_autocorrelation_time,
)
from tests.oracles.gaussian import errors, random_clients
from tests.oracles.gaussian_recursion import Recursion, Sampler, round_recursion

PROBLEM = random_clients(seed=0)
STEP = 1 / np.sqrt(PROBLEM.smoothness)
HMC = Sampler(0.2 * STEP, leapfrog_steps=10)
LANGEVIN = Sampler(0.02 * STEP**2, kind="fa-ld")  # h = a² / (2 L) at a = .2


def chain(A: np.ndarray, Q: np.ndarray) -> Recursion:
    return Recursion(np.ones(1), A[None], np.zeros((1, len(A))), Q[None])


def test_scalar_autoregression_has_time_1_plus_phi_over_1_minus_phi() -> None:
    for phi in (-0.5, 0.0, 0.9):
        time = autocorrelation_time(chain(np.array([[phi]]), np.eye(1)))
        assert time[0] == pytest.approx((1 + phi) / (1 - phi), rel=1e-12)


def test_vector_autoregression_matches_the_summed_autocovariances() -> None:
    A = np.array([[0.8, 0.3], [-0.1, 0.5]])
    recursion = chain(A, np.array([[1.0, 0.4], [0.4, 2.0]]))
    cov = recursion.stationary().cov
    total = cov + sum(2 * np.linalg.matrix_power(A, k) @ cov for k in range(1, 400))
    expected = np.diag(total) / np.diag(cov)
    np.testing.assert_allclose(autocorrelation_time(recursion), expected, rtol=1e-10)
    assert worst_autocorrelation_time(recursion) >= expected.max()


def test_gradients_are_counted_per_client() -> None:
    assert gradients_per_round(HMC, separate_minibatches=False) == 10
    assert gradients_per_round(HMC, separate_minibatches=True) == 19
    assert gradients_per_round(LANGEVIN, separate_minibatches=True) == 1
    five = Sampler(0.1, leapfrog_steps=3, trajectories=5, control_variates=True)
    assert gradients_per_round(five, separate_minibatches=False) == 16


def ess(sampler: Sampler, separate: bool = False) -> float:
    return ess_per_1000_gradients(round_recursion(PROBLEM, sampler), sampler, separate)


def test_fahmc_has_five_times_the_effective_draws_of_fald_per_gradient() -> None:
    """About 10 with g' reused; 5 if every half step pays for a minibatch of its own."""
    assert ess(HMC) / ess(LANGEVIN) == pytest.approx(9.9, abs=0.5)
    assert ess(HMC, separate=True) / ess(LANGEVIN, separate=True) == pytest.approx(5.2, abs=0.3)


def test_at_matched_bias_the_advantage_is_two_and_a_half() -> None:
    hmc = Sampler(0.1 * STEP, leapfrog_steps=10)
    langevin = Sampler(0.02 * STEP**2, trajectories=10, kind="fa-ld")
    bias = [
        errors(round_recursion(PROBLEM, s).stationary(), PROBLEM.target()).mean
        for s in (hmc, langevin)
    ]
    assert bias[0] == pytest.approx(bias[1], rel=0.1)
    assert ess(hmc) / ess(langevin) == pytest.approx(2.5, abs=0.1)
