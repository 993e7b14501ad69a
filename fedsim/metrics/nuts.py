"""Draws of a small linear model's posterior by NUTS on the pooled data.

Hoffman and Gelman, "The No-U-Turn Sampler", JMLR 15 (2014), as implemented in BlackJAX, with its
window adaptation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsim.errors import RunFailed, UserError

CHAINS = 4
WARM_UP = 1000
DRAWS = 2500
MAX_RHAT = 1.01

Floats = np.ndarray[Any, np.dtype[np.float64]]


def require() -> None:
    """Raises UserError with what to install if BlackJAX is missing."""
    try:
        import blackjax  # noqa: F401
    except ImportError as error:
        raise UserError(
            'posterior.reference: nuts needs BlackJAX: pip install "fedsim-fl[reference]"'
        ) from error


def linear_posterior(
    x: Floats,
    y: np.ndarray[Any, np.dtype[np.int64]],
    weight: Floats,
    shapes: Sequence[tuple[int, ...]],
    *,
    precision: float,
    temperature: float,
    seed: int,
) -> Floats:
    """Returns draws (chains, draws, d) of a logistic or softmax regression's weights.

    x: (n, features); y: (n,) classes; weight: (n,) of the rows' log-likelihoods. shapes: of the
    weight matrix, (1, features) for one logit or (classes, features), and of the bias if there is
    one; d counts their entries, in C order. The target is (likelihood · N(0, I/precision)) to the
    power 1/temperature. Raises RunFailed if NUTS itself has not converged.
    """
    require()
    import blackjax
    import jax
    import jax.numpy as jnp

    sizes = [int(np.prod(shape)) for shape in shapes]
    binary = shapes[0][0] == 1

    def chain(key: Any) -> Any:
        features, labels, weights = jnp.asarray(x), jnp.asarray(y), jnp.asarray(weight)

        def log_density(theta: Any) -> Any:
            parts = jnp.split(theta, np.cumsum(sizes)[:-1])
            logits = features @ parts[0].reshape(shapes[0]).T
            if len(parts) > 1:
                logits = logits + parts[1]
            if binary:
                log_p = -jnp.logaddexp(0.0, jnp.where(labels == 1, -logits[:, 0], logits[:, 0]))
            else:
                log_p = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
            prior = -0.5 * precision * (theta**2).sum()
            return ((weights * log_p).sum() + prior) / temperature

        start_key, warm_key, run_key = jax.random.split(key, 3)
        start = 0.1 * jax.random.normal(start_key, (sum(sizes),), jnp.float64)
        adaptation = blackjax.window_adaptation(blackjax.nuts, log_density)
        (state, tuned), _ = adaptation.run(warm_key, start, num_steps=WARM_UP)
        kernel = blackjax.nuts(log_density, **tuned).step

        def step(state: Any, key: Any) -> Any:
            state, info = kernel(key, state)
            return state, (state.position, info.is_divergent)

        return jax.lax.scan(step, state, jax.random.split(run_key, DRAWS))[1]

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed % 2**32), CHAINS)
        draws, divergent = jax.jit(lambda keys: jax.lax.map(chain, keys))(keys)
        found: Floats = np.asarray(draws, np.float64)
    _check(found, int(divergent.sum()))
    return found


def _check(draws: Floats, divergent: int) -> None:
    from fedsim.metrics.posterior import diagnostics

    rhat = diagnostics({"theta": draws}, limit=None).summary()["rhat_max"]
    if divergent or not rhat <= MAX_RHAT:
        raise RunFailed(
            f"the NUTS reference itself has not converged: {divergent} divergent transitions,"
            f" largest R-hat {rhat:.3f}; set posterior.reference: none"
        )
