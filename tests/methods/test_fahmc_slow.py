"""FA-HMC through the engine by Monte Carlo: Gaussian clients, and logistic regression against NUTS.

Independent copies of a Gaussian problem are one problem with block-diagonal precisions: copies ×
chains are all chains.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import block_diag
from scipy.stats import wasserstein_distance

from fedsim.strategies.fahmc import FAHMC, FAHMCParams
from tests.methods.sampling import BERNOULLI, gaussian_problem, regression_problem, run
from tests.oracles import nuts
from tests.oracles.gaussian import (
    Array,
    Gaussian,
    GaussianClients,
    errors,
    random_clients,
    two_groups,
    wasserstein2,
)
from tests.oracles.gaussian_recursion import Sampler, round_recursion

pytestmark = pytest.mark.slow


def sample(
    clients: GaussianClients,
    sampler: Sampler,
    copies: int,
    chains: int,
    rounds: int,
    burn_in: int,
    start: Array,
) -> Array:
    """Returns draws (rounds − burn_in, copies · chains, d) of the engine."""
    dim = clients.mean.shape[1]
    many = GaussianClients(
        np.stack([block_diag(*[P] * copies) for P in clients.precision]),
        np.tile(clients.mean, copies),
        clients.weight,
    )
    strategy = FAHMC(
        FAHMCParams(
            step_size=sampler.step_size,
            leapfrog_steps=sampler.leapfrog_steps,
            shared_variance=sampler.shared_variance,
            prior="flat",
            chains=chains,
        )
    )
    begin = np.broadcast_to(np.tile(start, copies), (chains, copies * dim))
    options = {"trace": True, "chunk": len(clients.weight)}
    found = run(strategy, gaussian_problem(many), begin, rounds, **options)
    return found.theta[burn_in:].reshape(rounds - burn_in, -1, dim)


def moments(draws: Array) -> Gaussian:
    """Mean and covariance of draws (rounds, chains, d)."""
    flat = draws.reshape(-1, draws.shape[-1])
    return Gaussian(flat.mean(0), np.atleast_2d(np.cov(flat.T)))


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_moments_are_the_recursions(rho: float) -> None:
    """Acceptance 2: 2,000 chains of 160 rounds, the first 60 discarded, K = 10, a = .2.

    The chains start 3 posterior scales off the mean with no spread. The effective draws are some
    20,000: errors of .005 of the mean and .008 of the covariance are to be expected.
    """
    clients = random_clients(seed=2, equal_weights=True)
    sampler = Sampler(0.2 / np.sqrt(clients.smoothness), 10, shared_variance=rho)
    law = round_recursion(clients, sampler).stationary()
    start = law.mean + 3 * np.sqrt(np.diag(law.cov))
    draws = sample(clients, sampler, copies=4, chains=500, rounds=160, burn_in=60, start=start)
    off = errors(moments(draws), law)
    assert off.mean <= 0.015
    assert off.cov <= 0.02


def test_two_groups_of_scalar_clients() -> None:
    """Acceptance 4: η = .02, K = 10, T = 1: W2 ≤ .05 from N(16.2, 1.6).

    2,000 chains of 400 rounds, correlated over 160: the mean's standard error is about .02.
    """
    sampler = Sampler(0.02, 10)
    start = np.array([15.0])
    draws = sample(
        two_groups(), sampler, copies=40, chains=50, rounds=900, burn_in=500, start=start
    )
    assert wasserstein2(moments(draws), two_groups().target()) <= 0.05


PRIOR, STEP = 1.0, 0.2


def logistic_shards() -> list[tuple[Array, Array]]:
    """Ten clients of 100 rows each: three features around other centres, other coefficients."""
    rng, shards = np.random.default_rng(8), []
    beta = rng.normal(size=3)
    for _ in range(10):
        X = rng.normal(size=3) + rng.normal(size=(100, 3))
        logits = X @ (beta + 0.3 * rng.normal(size=3))
        shards.append((X, (rng.uniform(size=100) < 1 / (1 + np.exp(-logits))).astype(float)))
    return shards


@pytest.fixture(scope="module")
def reference() -> Array:
    """NUTS draws (draws, d) of the pooled posterior."""
    X, y = (np.concatenate(parts) for parts in zip(*logistic_shards(), strict=True))
    return nuts.logistic_regression(X, y, PRIOR, draws=5000).reshape(-1, X.shape[1])


@pytest.mark.parametrize(
    ("control", "trajectories", "rounds", "low", "high"),
    [(False, 1, 700, 0.0, 0.08), (True, 1, 700, 0.0, 0.035), (False, 5, 250, 0.5, np.inf)],
    ids=["plain", "control variates", "five trajectories"],
)
def test_logistic_regression_against_nuts(
    reference: Array, control: bool, trajectories: int, rounds: int, low: float, high: float
) -> None:
    """Acceptance 7: a = η sqrt(L) = .2 and K = 10, L bounding the curvature of the potentials.

    200 chains from near the mode (40 rounds without noise, 60 of burn-in). The bounds were stated
    for a problem that was not described: this one has clients as different as they allow; milder
    ones have less bias at T = 1 and at T = 5. The last case is the negative control: so much drift
    must be seen.
    """
    shards = logistic_shards()
    rows, chains = sum(len(y) for _, y in shards), 200
    smoothness = max(
        np.linalg.eigvalsh(X.T @ X / 4).max() * rows / len(y) + PRIOR for X, y in shards
    )
    strategy = FAHMC(
        FAHMCParams(
            step_size=STEP / float(smoothness) ** 0.5,
            leapfrog_steps=10,
            trajectories_per_round=trajectories,
            control_variate=control,
            prior_precision=PRIOR,
            chains=chains,
            warm_up=40,
        )
    )
    problem = regression_problem(shards, "custom", **BERNOULLI)
    found = run(strategy, problem, np.zeros((chains, problem.dim)), rounds, trace=True, chunk=10)
    draws = found.theta[100:].reshape(-1, problem.dim)
    distances = [
        wasserstein_distance(draws[:, i], reference[:, i]) / reference[:, i].std()
        for i in range(problem.dim)
    ]
    assert low <= float(np.mean(distances)) <= high
