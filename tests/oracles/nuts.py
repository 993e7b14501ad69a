"""A NUTS reference for logistic regression, by blackjax in float64.

Nothing is stored: the draws are computed where they are needed, in seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.oracles.gaussian import Array


def logistic_regression(
    X: Array,
    y: Array,
    prior_precision: float,
    draws: int = 2000,
    chains: int = 4,
    warmup: int = 500,
    seed: int = 0,
    max_rhat: float = 1.01,
) -> Array:
    """Draws of the posterior of β in P(y = 1) = 1 / (1 + exp(−X β)), β ~ N(0, I / λ).

    Skips the calling test where blackjax is not installed.

    Args:
        X: (n, d), a column of ones included where an intercept is wanted (it has the same prior).
        y: (n,) of 0 and 1.
        prior_precision: λ > 0.
        draws: kept per chain.
        chains: run side by side after one window adaptation each, from overdispersed starts.
        warmup: adaptation steps per chain.
        seed: of the chains.
        max_rhat: the largest rank R-hat accepted.

    Returns:
        (chains, draws, d) float64.

    Raises:
        RuntimeError: a divergence, or a rank R-hat above `max_rhat`: not to be used as a truth.
    """
    jax = pytest.importorskip("jax")
    pytest.importorskip("blackjax")
    with jax.enable_x64(True):
        positions, divergent = _sample(X, y, prior_precision, draws, chains, warmup, seed)
    rhat = rank_rhat(positions)
    if divergent or rhat.max() > max_rhat:
        raise RuntimeError(f"NUTS failed: {divergent} divergences, R-hat {rhat.max():.4f}")
    return positions


def _sample(
    X: Array, y: Array, prior_precision: float, draws: int, chains: int, warmup: int, seed: int
) -> tuple[Array, int]:
    import blackjax
    import jax
    import jax.numpy as jnp

    features, labels = jnp.asarray(X, jnp.float64), jnp.asarray(y, jnp.float64)

    def log_density(beta: Any) -> Any:
        logits = features @ beta
        fit = jnp.sum(labels * logits - jnp.logaddexp(0.0, logits))
        return fit - 0.5 * prior_precision * beta @ beta

    adaptation = blackjax.window_adaptation(blackjax.nuts, log_density)

    def chain(key: Any) -> Any:
        start_key, warm_key, sample_key = jax.random.split(key, 3)
        start = jax.random.normal(start_key, (X.shape[1],), jnp.float64)
        (state, tuned), _ = adaptation.run(warm_key, start, num_steps=warmup)
        kernel = blackjax.nuts(log_density, **tuned).step

        def step(state: Any, key: Any) -> Any:
            state, info = kernel(key, state)
            return state, (state.position, info.is_divergent)

        return jax.lax.scan(step, state, jax.random.split(sample_key, draws))[1]

    keys = jax.random.split(jax.random.key(seed), chains)
    positions, divergent = jax.jit(jax.vmap(chain))(keys)
    return np.asarray(positions, dtype=np.float64), int(divergent.sum())


def rank_rhat(draws: Array) -> Array:
    """Rank-normalised split R-hat, the larger of bulk and folded (Vehtari et al. 2021).

    Args:
        draws: (chains, draws, d).

    Returns:
        (d,), at least about 1.
    """
    from scipy.stats import norm, rankdata

    half = draws.shape[1] // 2
    split = np.concatenate([draws[:, :half], draws[:, half : 2 * half]])
    folded = np.abs(split - np.median(split, axis=(0, 1)))

    def normalised_rhat(values: Array) -> Array:
        count = values.shape[0] * values.shape[1]
        ranks = rankdata(values.reshape(count, -1), axis=0).reshape(values.shape)
        z = norm.ppf((ranks - 0.375) / (count + 0.25))
        within = z.var(axis=1, ddof=1).mean(axis=0)
        between = z.mean(axis=1).var(axis=0, ddof=1)
        return np.asarray(np.sqrt((half - 1) / half + between / within))

    return np.maximum(normalised_rhat(split), normalised_rhat(folded))
