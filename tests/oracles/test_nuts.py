"""The NUTS reference where the truth is known: a near-Gaussian and a one-dimensional posterior."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles.nuts import logistic_regression, rank_rhat

RNG = np.random.default_rng(0)


def test_near_gaussian_posterior_is_the_laplace_approximation() -> None:
    """Many rows: skewness is O(n^−½), so mean and covariance agree to a few per cent of a sd."""
    n, dim = 1000, 4
    X = RNG.normal(size=(n, dim))
    y = (RNG.uniform(size=n) < 1 / (1 + np.exp(-X @ [0.5, -0.5, 0.2, 0.0]))).astype(float)
    draws = logistic_regression(X, y, prior_precision=1.0, draws=1000)
    assert draws.shape == (4, 1000, dim)

    mode = np.zeros(dim)
    for _ in range(20):
        p = 1 / (1 + np.exp(-X @ mode))
        hessian = (X.T * (p * (1 - p))) @ X + np.eye(dim)
        mode -= np.linalg.solve(hessian, X.T @ (p - y) + mode)
    cov = np.linalg.inv(hessian)
    flat = draws.reshape(-1, dim)
    assert np.all(np.abs(flat.mean(0) - mode) < 0.1 * np.sqrt(np.diag(cov)))
    assert np.linalg.norm(np.cov(flat.T) - cov) < 0.08 * np.linalg.norm(cov)


def test_skewed_posterior_is_the_quadrature() -> None:
    """Five rows of one class, a weak prior: far from normal, one dimension, exact on a grid."""
    X, y = np.ones((5, 1)), np.ones(5)
    draws = logistic_regression(X, y, prior_precision=0.2).ravel()
    grid = np.linspace(-6, 14, 20_001)
    log_density = -5 * np.logaddexp(0, -grid) - 0.1 * grid**2
    mass = np.exp(log_density - log_density.max())
    mass /= mass.sum()
    mean = mass @ grid
    sd = np.sqrt(mass @ (grid - mean) ** 2)
    assert abs(draws.mean() - mean) < 0.1 * sd
    assert draws.std() == pytest.approx(sd, rel=0.08)


def test_rhat_flags_a_shifted_and_a_narrow_chain() -> None:
    draws = RNG.normal(size=(4, 1000, 3))
    assert rank_rhat(draws).max() < 1.01
    draws[0, :, 1] += 1
    draws[0, :, 2] *= 0.2
    rhat = rank_rhat(draws)
    assert rhat[0] < 1.01
    assert rhat[1] > 1.05
    assert rhat[2] > 1.05
