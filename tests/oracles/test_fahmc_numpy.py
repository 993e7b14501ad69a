"""The three plain samplers against each other."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles.fahmc_numpy import Rows, fahmc, fald, leapfrog
from tests.oracles.gaussian import Array

ROUNDS, STEPS, CLIENTS, DIM, ROWS, BATCH = 6, 3, 4, 3, 12, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(CLIENTS, ROWS, DIM))
Y = RNG.integers(2, size=(CLIENTS, ROWS))
WEIGHT = RNG.dirichlet(np.ones(CLIENTS))
START = RNG.normal(size=DIM)
SHARED = RNG.normal(size=(ROUNDS, STEPS, DIM))
PRIVATE = RNG.normal(size=(ROUNDS, STEPS, CLIENTS, DIM))


def gradient(client: int, theta: Array, rows: Rows | None) -> Array:
    """Logistic regression with a unit prior: not quadratic, so the leapfrogs are not linear."""
    chosen = np.arange(ROWS) if rows is None else rows
    x, y = X[client, chosen], Y[client, chosen]
    residual = 1 / (1 + np.exp(-x @ theta)) - y
    return np.asarray(ROWS / len(chosen) * (x.T @ residual) + theta)


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("minibatches", [False, True])
def test_one_leapfrog_is_langevin(rho: float, minibatches: bool) -> None:
    eta = 0.1
    batches = RNG.integers(ROWS, size=(ROUNDS, STEPS, 1, 2, CLIENTS, BATCH))
    hmc = fahmc(
        gradient,
        START,
        WEIGHT,
        SHARED,
        PRIVATE,
        eta,
        leapfrog_steps=1,
        shared_variance=rho,
        temperature=0.5,
        batches=batches if minibatches else None,
    )
    langevin = fald(
        gradient,
        START,
        WEIGHT,
        SHARED,
        PRIVATE,
        eta**2 / 2,
        shared_variance=rho,
        temperature=0.5,
        batches=batches[:, :, 0, 0] if minibatches else None,
    )
    np.testing.assert_allclose(hmc, langevin, rtol=0, atol=1e-13)
    assert np.ptp(langevin) > 0.1


def test_one_client_is_the_lone_leapfrog() -> None:
    shared, private = SHARED[:, :1], PRIVATE[:, :1, :1]
    hmc = fahmc(gradient, START, np.ones(1), shared, private, 0.1, 7, shared_variance=0.3)
    momenta = np.sqrt(0.3) * shared[:, 0] + np.sqrt(0.7) * private[:, 0, 0]
    lone = leapfrog(lambda q: gradient(0, q, None), START, momenta, 0.1, 7)
    np.testing.assert_allclose(hmc, lone, rtol=0, atol=1e-12)


def test_leapfrog_is_reversible_and_nearly_conserves_energy() -> None:
    def energy(q: Array, p: Array) -> float:
        logits = X[0] @ q
        return float(np.sum(np.logaddexp(0, logits) - Y[0] * logits) + (q @ q + p @ p) / 2)

    p = SHARED[0, 0]
    ends = {
        eta: leapfrog(lambda q: gradient(0, q, None), START, p[None], eta, round(1 / eta))[0]
        for eta in (0.05, 0.025)
    }
    finest = leapfrog(lambda q: gradient(0, q, None), START, p[None], 1e-3, 1000)[0]
    coarse, fine = (np.linalg.norm(ends[eta] - finest) for eta in (0.05, 0.025))
    assert coarse / fine == pytest.approx(4, rel=0.1)
    # The momentum at the end, by a central difference of the positions around it.
    around = [
        leapfrog(lambda q: gradient(0, q, None), START, p[None], 1e-3, n)[0] for n in (999, 1001)
    ]
    momentum = (around[1] - around[0]) / 2e-3
    assert energy(finest, momentum) == pytest.approx(energy(START, p), rel=1e-4)


def test_control_variates_make_equal_starts_agree_on_the_gradient() -> None:
    """A vanishing step moves by η²/2 times the global gradient at x, with or without them."""
    eta = 1e-4
    zeros = np.zeros((1, 1, DIM)), np.zeros((1, 1, CLIENTS, DIM))
    total = sum(w * gradient(c, START, None) for c, w in enumerate(WEIGHT))
    for corrected in (False, True):
        end = fahmc(gradient, START, WEIGHT, *zeros, eta, 1, 1.0, control_variates=corrected)[0]
        np.testing.assert_allclose((START - end) / (eta**2 / 2), total, rtol=1e-6)


def test_a_cohort_of_equal_weights_leaves_the_absent_untouched() -> None:
    def watched(client: int, theta: Array, rows: Rows | None) -> Array:
        assert client in (0, 2)
        return gradient(client, theta, rows)

    cohorts = [[0, 2]] * ROUNDS
    fahmc(watched, START, WEIGHT, SHARED, PRIVATE, 0.1, 2, 0.5, cohorts=cohorts)
