"""Scaling of features by what the training rows say, never by test rows."""

from __future__ import annotations

import numpy as np

from fedsim.data.base import Scale
from fedsim.data.examples import Array


def affine(
    x: Array, scale: Scale, value_range: tuple[float, float] | None, per_feature: bool
) -> tuple[Array, Array]:
    """Returns (shift, factor) such that (x - shift) * factor is scaled, in float64.

    x: (n, *feature) training features. value_range: the fixed range that "unit" maps to 0..1;
    without it the training minimum and maximum of each feature. A constant feature becomes 0.
    """
    axis: tuple[int, ...] | None = (0,) if per_feature else None
    if scale == "none":
        return np.zeros(()), np.ones(())
    if scale == "unit" and value_range is not None:
        low, high = np.array(value_range[0]), np.array(value_range[1])
        width = high - low
    elif scale == "unit":
        low = np.asarray(x.min(axis=axis), dtype=np.float64)
        width = np.asarray(x.max(axis=axis), dtype=np.float64) - low
    else:
        low = np.asarray(x.mean(axis=axis, dtype=np.float64))
        width = np.asarray(x.std(axis=axis, dtype=np.float64))
        # The mean of equal values is off by rounding: such a deviation is none.
        width = np.where(width <= 1e-12 * np.abs(low), 0.0, width)
    return low, np.where(width > 0, 1.0 / np.where(width > 0, width, 1.0), 0.0)


def apply(x: Array, shift: Array, factor: Array) -> Array:
    """Returns (x - shift) * factor in x's dtype."""
    if shift.ndim == 0 and float(shift) == 0.0 and float(factor) == 1.0:
        return x
    return ((x - shift) * factor).astype(x.dtype)
