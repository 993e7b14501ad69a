"""How far draws lie from a posterior that is known, by NUTS or in closed form.

R-hat and ESS compare the chains with one another and cannot see a bias that all share. These can.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def wasserstein1_marginal(draws: ArrayLike, reference: ArrayLike) -> Floats:
    """Returns W1 of each marginal in standard deviations of the reference, (d,) ≥ 0.

    draws: (n, d), reference: (m, d), equally weighted draws; n and m may differ. A reference
    coordinate that does not vary gives inf (or 0 where the draws agree with it).
    """
    from scipy.stats import wasserstein_distance

    a, b = _matrix(draws, "draws"), _matrix(reference, "reference")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"draws of dimension {a.shape[1]}, reference of {b.shape[1]}")
    distance = np.array(
        [wasserstein_distance(x, y) for x, y in zip(a.T, b.T, strict=True)], dtype=np.float64
    )
    return _in_sd(distance, b.std(0))


def mean_error_sd(mean: ArrayLike, reference_mean: ArrayLike, reference_sd: ArrayLike) -> Floats:
    """Returns |mean − reference mean| in reference standard deviations, entry by entry."""
    error = np.abs(np.asarray(mean, np.float64) - np.asarray(reference_mean, np.float64))
    return _in_sd(error, np.broadcast_to(np.asarray(reference_sd, np.float64), error.shape))


def relative_mean_error(
    mean: ArrayLike, reference_mean: ArrayLike, reference_cov: ArrayLike
) -> float:
    """Returns ‖mean − reference mean‖ / sqrt(tr Σ) for means (d,) and Σ = reference_cov (d, d)."""
    error = np.asarray(mean, np.float64) - np.asarray(reference_mean, np.float64)
    return float(np.linalg.norm(error) / np.sqrt(np.trace(_square(reference_cov))))


def relative_cov_error(cov: ArrayLike, reference_cov: ArrayLike) -> float:
    """Returns ‖cov − Σ‖_F / ‖Σ‖_F for two covariance matrices (d, d)."""
    a, b = _square(cov), _square(reference_cov)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def bures_w2(m1: ArrayLike, S1: ArrayLike, m2: ArrayLike, S2: ArrayLike) -> float:
    """Returns the 2-Wasserstein distance of N(m1, S1) and N(m2, S2).

    W2² = ‖m1 − m2‖² + tr(S1 + S2 − 2 (S1^½ S2 S1^½)^½); means (d,), covariances (d, d) positive
    semi-definite. Near zero the traces cancel: values below about 1e-7 sqrt(tr S1) are rounding.
    """
    a, b = _square(S1), _square(S2)
    shift = np.asarray(m1, np.float64).ravel() - np.asarray(m2, np.float64).ravel()
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b @ root)
    spread = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(cross, 0.0)).sum()
    return float(np.sqrt(shift @ shift + max(spread, 0.0)))


def _in_sd(distance: Floats, sd: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(distance == 0, 0.0, distance / sd), dtype=np.float64)


def _matrix(values: ArrayLike, what: str) -> Floats:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{what} must be (n, d), got {matrix.shape}")
    return matrix


def _square(values: ArrayLike) -> Floats:
    matrix = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a covariance must be square, got {matrix.shape}")
    return (matrix + matrix.T) / 2
