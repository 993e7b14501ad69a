"""How good predictions of real numbers are. Pure NumPy, computed in float64.

`mean` and `y` have one shape, (n,) or (n, k); the scores average over every element.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def rmse(mean: ArrayLike, y: ArrayLike) -> float:
    """Returns the root mean squared error, in the unit of `y`."""
    predicted, target = _checked(mean, y)
    return float(np.sqrt(np.mean((predicted - target) ** 2)))


def r2(mean: ArrayLike, y: ArrayLike) -> float:
    """Returns 1 − Σ(y − mean)² / Σ(y − ȳ)², at most 1; for several outputs their plain average.

    NaN where `y` does not vary, because no share of a zero variance can be explained.
    """
    predicted, target = _checked(mean, y)
    residual = np.sum((target - predicted) ** 2, axis=0)
    total = np.sum((target - target.mean(0)) ** 2, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.mean(np.where(total > 0, 1.0 - residual / total, np.nan)))


def gaussian_nll(mean: ArrayLike, variance: ArrayLike, y: ArrayLike) -> float:
    """Returns the mean of ½ log(2πv) + (y − mean)² / 2v, in nats.

    variance: positive, broadcastable to `y` (a posterior predictive variance: noise plus spread of
    the draws). Raises ValueError where it is not positive.
    """
    predicted, target = _checked(mean, y)
    v = np.asarray(variance, dtype=np.float64)
    if (v <= 0).any():
        raise ValueError("the variance must be positive")
    return float(np.mean(0.5 * np.log(2 * np.pi * v) + (target - predicted) ** 2 / (2 * v)))


def scores(mean: ArrayLike, y: ArrayLike) -> dict[str, float]:
    """Returns rmse and r2 under these names."""
    return {"rmse": rmse(mean, y), "r2": r2(mean, y)}


def _checked(mean: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    predicted, target = np.asarray(mean, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if predicted.shape != target.shape or not target.size:
        raise ValueError(f"predictions {predicted.shape} and targets {target.shape} do not match")
    return predicted, target
