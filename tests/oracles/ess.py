"""Effective sample size of a stationary affine chain x' = A x + b + noise, exactly.

The autocovariance at lag k is A^k Σ, so the asymptotic covariance of sqrt(N) times the average is
V = (I − A)⁻¹ Σ + Σ (I − A)⁻ᵀ − Σ, and the integrated autocorrelation time of the functional u·x is
uᵀV u / uᵀΣ u. Nothing is estimated.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh

from tests.oracles.gaussian import Array
from tests.oracles.gaussian_recursion import Recursion, Sampler


def autocorrelation_time(recursion: Recursion) -> Array:
    """Integrated autocorrelation time of every coordinate, in rounds; shape (d,)."""
    cov, long_run = _covariances(recursion)
    return np.diag(long_run) / np.diag(cov)


def worst_autocorrelation_time(recursion: Recursion) -> float:
    """The largest integrated autocorrelation time of any linear functional, in rounds."""
    cov, long_run = _covariances(recursion)
    return float(eigh(long_run, cov, eigvals_only=True)[-1])


def gradients_per_round(sampler: Sampler, separate_minibatches: bool) -> int:
    """Gradients one client needs a round; control variates need one more for the global gradient.

    A trajectory's last half step moves a momentum that is thrown away, so its gradient is not
    needed: K where g' serves as the next g (full gradients), 2K − 1 where every half step has a
    minibatch of its own. A Langevin step needs one.
    """
    if sampler.kind == "fa-ld":
        one = 1
    elif separate_minibatches:
        one = 2 * sampler.leapfrog_steps - 1
    else:
        one = sampler.leapfrog_steps
    return one * sampler.trajectories + int(sampler.control_variates)


def ess_per_1000_gradients(
    recursion: Recursion, sampler: Sampler, separate_minibatches: bool = False
) -> float:
    """Effective draws, of the slowest linear functional, per 1000 gradients of one client."""
    cost = gradients_per_round(sampler, separate_minibatches)
    return 1000 / (cost * worst_autocorrelation_time(recursion))


def _covariances(recursion: Recursion) -> tuple[Array, Array]:
    cov = recursion.stationary().cov
    resolvent = np.linalg.solve(np.eye(len(cov)) - recursion.mean_map, cov)
    long_run = resolvent + resolvent.T - cov
    return cov, long_run
