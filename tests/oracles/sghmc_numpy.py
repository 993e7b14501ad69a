"""SGHMC on one potential as a plain loop over explicit noise, in the textbook's formulas.

Written with the covariance matrix of (ξx, ξv) and its Cholesky factor; float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.oracles.gaussian import Array


def sghmc(
    gradient: Callable[[Array, int], Array],
    start: Array,
    normal_x: Array,
    normal_v: Array,
    step_size: float,
    friction: float,
    inverse_mass: float,
    temperature: float = 1.0,
) -> Array:
    """One chain, at rest at first.

    Args:
        gradient: of U at x (d,), given x and the step's number.
        start: x0 (d,).
        normal_x: (N, d) standard normals: what of ξx is independent of ξv.
        normal_v: (N, d) standard normals: ξv.
        step_size: η.
        friction: γ.
        inverse_mass: u.
        temperature: τ.

    Returns:
        x after every step, (N, d).
    """
    eta, gamma, u = step_size, friction, inverse_mass
    e = np.exp(-gamma * eta)
    var_v = u * (1 - e**2)
    var_x = u / gamma**2 * (2 * gamma * eta + 4 * e - e**2 - 3)
    cov = u / gamma * (1 - 2 * e + e**2)
    factor = np.linalg.cholesky(temperature * np.array([[var_v, cov], [cov, var_x]]))
    x, v, out = np.array(start, dtype=np.float64), np.zeros(len(start)), []
    for n, (z_x, z_v) in enumerate(zip(normal_x, normal_v, strict=True)):
        g = gradient(x, n)
        noise_v, noise_x = factor @ np.stack([z_v, z_x])
        x = x + (1 - e) / gamma * v - u / gamma**2 * (gamma * eta + e - 1) * g + noise_x
        v = e * v - u / gamma * (1 - e) * g + noise_v
        out.append(x)
    return np.stack(out)
