"""The closed-form regression posterior against numerical integration and as federated clients."""

from __future__ import annotations

import numpy as np

from tests.oracles.conjugate import posterior, regression_clients
from tests.oracles.gaussian import errors
from tests.oracles.gaussian_recursion import Sampler, round_recursion

RNG = np.random.default_rng(0)


def test_moments_match_quadrature_in_two_dimensions() -> None:
    X = RNG.normal(size=(20, 2))
    y = X @ [1.0, -0.5] + 0.6 * RNG.normal(size=20)
    law = posterior(X, y, prior_precision=2.0, noise_variance=0.36)
    grid = np.linspace(-3, 3, 601)
    beta = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    log_density = -((y - beta @ X.T) ** 2).sum(1) / (2 * 0.36) - (beta**2).sum(1)
    mass = np.exp(log_density - log_density.max())
    mass /= mass.sum()
    mean = mass @ beta
    np.testing.assert_allclose(law.mean, mean, atol=1e-9)
    np.testing.assert_allclose(
        law.cov, (mass[:, None] * (beta - mean)).T @ (beta - mean), atol=1e-9
    )


def test_federated_potentials_have_the_pooled_posterior() -> None:
    shards = []
    for shift in RNG.normal(size=10):
        X = RNG.normal(size=(RNG.integers(5, 60), 4)) + shift
        shards.append((X, X @ np.arange(4.0) + shift + RNG.normal(size=len(X))))
    clients = regression_clients(shards, prior_precision=1.0, noise_variance=1.0)
    pooled = posterior(
        np.concatenate([X for X, _ in shards]), np.concatenate([y for _, y in shards]), 1.0, 1.0
    )
    target = clients.target()
    np.testing.assert_allclose(target.mean, pooled.mean, atol=1e-11)
    np.testing.assert_allclose(target.cov, pooled.cov, atol=1e-13)

    step = 1 / np.sqrt(clients.smoothness)
    exact = errors(
        round_recursion(clients, Sampler(0.1 * step, control_variates=True)).stationary(), pooled
    )
    assert exact.mean < 1e-9
    assert exact.cov <= 0.002
