"""Bayesian linear regression in closed form, pooled and as Gaussian clients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.gaussian import Array, Gaussian, GaussianClients


def posterior(X: Array, y: Array, prior_precision: float, noise_variance: float) -> Gaussian:
    """Posterior of β in y = X β + N(0, σ²) under the prior N(0, I / λ).

    Args:
        X: (n, d), a column of ones included where an intercept is wanted.
        y: (n,).
        prior_precision: λ > 0.
        noise_variance: σ² > 0.
    """
    precision = X.T @ X / noise_variance + prior_precision * np.eye(X.shape[1])
    factor = np.linalg.cholesky(precision)
    inverse = np.linalg.solve(factor, np.eye(len(precision)))
    cov = inverse.T @ inverse
    return Gaussian(cov @ (X.T @ y) / noise_variance, cov)


def regression_clients(
    shards: Sequence[tuple[Array, Array]], prior_precision: float, noise_variance: float
) -> GaussianClients:
    """The same posterior as federated potentials f_c = NLL_c / w_c − log prior, w_c = n_c / n.

    Every potential is quadratic, so `gaussian_recursion` gives the sampler's exact law; the prior
    counts once in Σ w_c f_c.

    Args:
        shards: (X_c (n_c, d), y_c (n_c,)) of every client.
        prior_precision: λ > 0.
        noise_variance: σ² > 0.
    """
    sizes = np.array([len(y) for _, y in shards], dtype=np.float64)
    weight = sizes / sizes.sum()
    dim = shards[0][0].shape[1]
    precision = np.stack(
        [
            X.T @ X / (noise_variance * w) + prior_precision * np.eye(dim)
            for (X, _), w in zip(shards, weight, strict=True)
        ]
    )
    force = np.stack(
        [X.T @ y / (noise_variance * w) for (X, y), w in zip(shards, weight, strict=True)]
    )
    mean = np.linalg.solve(precision, force[..., None])[..., 0]
    return GaussianClients(precision, mean, weight)
