"""FA-HMC, FA-LD and a lone leapfrog sampler as plain loops over explicit noise and minibatches.

Three separate programs on purpose: FA-LD is written as Langevin dynamics, not as FA-HMC with one
leapfrog, and the lone sampler knows nothing of clients. All numbers are float64.

A gradient is `gradient(client, theta (d,), rows) -> (d,)` of the potential f_c, where `rows` is
the minibatch's index array (any length), or None for the whole shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.oracles.gaussian import Array

Rows = NDArray[np.int64]
Gradient = Callable[[int, Array, Rows | None], Array]


def fahmc(
    gradient: Gradient,
    start: Array,
    weight: Array,
    shared: Array,
    private: Array,
    step_size: float,
    leapfrog_steps: int,
    shared_variance: float,
    temperature: float = 1.0,
    batches: NDArray[np.int64] | None = None,
    cohorts: Sequence[Sequence[int]] | None = None,
    control_variates: bool = False,
) -> Array:
    """One chain of FA-HMC.

    Args:
        gradient: of f_c; see the module.
        start: x0 (d,).
        weight: w_c (C,), summing to 1.
        shared: ξ (R, T, d), of rounds and trajectories.
        private: ξ_c (R, T, C, d).
        step_size: η.
        leapfrog_steps: K.
        shared_variance: ρ in [0, 1].
        temperature: τ, the variance of the momentum.
        batches: rows (R, T, K, 2, C, b), first the minibatch of g, then that of g'; None: all.
        cohorts: the clients of every round; None: all. Weights are renormalised over a cohort.
        control_variates: correct every gradient by the whole-shard gradients at the server's x.

    Returns:
        The server's x after every round, (R, d).
    """
    x = np.array(start, dtype=np.float64)
    rounds, trajectories, _ = shared.shape
    draws = np.empty((rounds, len(x)))
    for r in range(rounds):
        members = list(cohorts[r]) if cohorts is not None else list(range(len(weight)))
        w = {c: weight[c] / sum(weight[j] for j in members) for c in members}
        anchors = {c: gradient(c, x, None) for c in members} if control_variates else {}
        average = np.zeros_like(x)
        for c in members:
            correction = np.zeros_like(x)
            if control_variates:
                correction = sum(w[j] * anchors[j] for j in members) - anchors[c]
            q = x.copy()
            for t in range(trajectories):
                p = np.sqrt(shared_variance) * shared[r, t]
                p = p + np.sqrt((1 - shared_variance) / w[c]) * private[r, t, c]
                p = np.sqrt(temperature) * p
                for k in range(leapfrog_steps):
                    first, second = (None, None) if batches is None else batches[r, t, k, :, c]
                    g = gradient(c, q, first) + correction
                    moved = q + step_size * p - step_size**2 / 2 * g
                    g_moved = gradient(c, moved, second) + correction
                    p = p - step_size / 2 * (g + g_moved)
                    q = moved
            average += w[c] * q
        x = average
        draws[r] = x
    return draws


def fald(
    gradient: Gradient,
    start: Array,
    weight: Array,
    shared: Array,
    private: Array,
    langevin_step: float,
    shared_variance: float,
    temperature: float = 1.0,
    batches: NDArray[np.int64] | None = None,
) -> Array:
    """One chain of FA-LD: θ ← θ − h ∇f_c(θ) + sqrt(2hτ) ξ, averaged every T steps.

    `langevin_step` is h (FA-HMC's η²/2 at K = 1), `batches` (R, T, C, b); the rest as in `fahmc`.
    Returns (R, d).
    """
    h, theta_server, out = langevin_step, np.array(start, dtype=np.float64), []
    spread = np.sqrt(2 * h * temperature)
    for r in range(shared.shape[0]):
        ends = []
        for c, w in enumerate(weight):
            theta = theta_server
            for t in range(shared.shape[1]):
                rows = None if batches is None else batches[r, t, c]
                common = np.sqrt(shared_variance) * shared[r, t]
                own = np.sqrt((1 - shared_variance) / w) * private[r, t, c]
                theta = theta - h * gradient(c, theta, rows) + spread * (common + own)
            ends.append(theta)
        theta_server = np.tensordot(weight, np.stack(ends), axes=1)
        out.append(theta_server)
    return np.stack(out)


def leapfrog(
    gradient: Callable[[Array], Array],
    start: Array,
    momenta: Array,
    step_size: float,
    leapfrog_steps: int,
) -> Array:
    """One client alone: unadjusted HMC by kick, drift, kick, with full gradients.

    Written in the half-step form (p − η/2 ∇f; q + η p; p − η/2 ∇f), which is algebraically the
    position form that FA-HMC uses. `momenta` (N, d) starts each trajectory. Returns (N, d).
    """
    q, ends = np.array(start, dtype=np.float64), []
    for momentum in momenta:
        p = momentum
        for _ in range(leapfrog_steps):
            half = p - 0.5 * step_size * gradient(q)
            q = q + step_size * half
            p = half - 0.5 * step_size * gradient(q)
        ends.append(q)
    return np.stack(ends)
