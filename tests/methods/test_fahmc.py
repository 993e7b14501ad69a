"""FA-HMC and FA-LD through the engine, step by step against programs that share no code with it.

The engine's random numbers are rebuilt from the names of their streams and given to the plain NumPy
programs of tests.oracles, in float64: what is compared is one and the same chain, to 1e-10. What
the exact recursion of tests.oracles says of the law of that chain then holds for the engine, too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedsim.data import Examples, FederatedData
from fedsim.strategies.fahmc import FAHMC, FALD, FAHMCParams, FALDParams
from tests.methods.sampling import (
    BERNOULLI,
    SEED,
    Chains,
    Path,
    Problem,
    gaussian_problem,
    minibatches,
    momentum_noise,
    regression_problem,
    run,
)
from tests.oracles import conjugate, ess, fahmc_numpy
from tests.oracles.fahmc_numpy import Rows
from tests.oracles.gaussian import Array, GaussianClients, errors, random_clients, two_groups
from tests.oracles.gaussian_recursion import Sampler, round_recursion

SIZES = (4, 12, 9, 7)
BATCH, DIM, CHAINS, ROUNDS = 3, 3, 2, 3
PRECISION, TEMPERATURE, ETA = 0.7, 0.5, 0.15
RNG = np.random.default_rng(0)
SHARDS = [(RNG.normal(size=(n, DIM)), RNG.integers(2, size=n).astype(float)) for n in SIZES]
WEIGHT = np.array(SIZES) / sum(SIZES)
START = RNG.normal(size=(CHAINS, DIM))
LOGISTIC = regression_problem(SHARDS, "custom", **BERNOULLI)


def gradient(client: int, theta: Array, rows: Rows | None) -> Array:
    """∇f_c of the logistic regression with the prior N(0, 1/λ): leapfrogs are not linear."""
    X, y = SHARDS[client]
    factor = 1.0
    if rows is not None:
        factor, X, y = len(y) / len(rows), X[rows], y[rows]
    residual = 1 / (1 + np.exp(-X @ theta)) - y
    return np.asarray(factor * (X.T @ residual) / WEIGHT[client] + PRECISION * theta)


def fahmc(**options: Any) -> FAHMC:
    """The strategy under test, with the module's settings unless told otherwise."""
    common = {
        "step_size": ETA,
        "prior_precision": PRECISION,
        "temperature": TEMPERATURE,
        "chains": CHAINS,
    }
    return FAHMC(FAHMCParams(**{**common, **options}))


def plain(
    rho: float,
    K: int,
    T: int,
    batch_size: int | None = None,
    cohorts: list[list[int]] | None = None,
    control: bool = False,
) -> Array:
    """The same chains by the NumPy program, (rounds, chains, d)."""
    out = np.empty((ROUNDS, CHAINS, DIM))
    for chain in range(CHAINS):
        shared, private = momentum_noise(DIM, len(SIZES), ROUNDS, T, K, chain)
        batches = None
        if batch_size is not None:
            drawn = minibatches(SIZES, ROUNDS, T * K, 2, batch_size, chain)
            batches = drawn.reshape(ROUNDS, T, K, 2, len(SIZES), batch_size)
        x = START[chain]
        for r in range(ROUNDS):
            anchor = x

            def corrected(c: int, q: Array, rows: Rows | None, x: Array = anchor) -> Array:
                if rows is None or not control:
                    return gradient(c, q, rows)
                # on one minibatch both, so that their noise cancels
                return gradient(c, q, rows) - gradient(c, x, rows) + gradient(c, x, None)

            x = fahmc_numpy.fahmc(
                corrected,
                x,
                WEIGHT,
                shared[r : r + 1],
                private[r : r + 1],
                ETA,
                K,
                rho,
                TEMPERATURE,
                None if batches is None else batches[r : r + 1],
                None if cohorts is None else [cohorts[r]],
                control,
            )[0]
            out[r, chain] = x
    return out


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
@pytest.mark.parametrize("batch_size", [None, BATCH])
@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(
    ("rho", "K", "T", "fraction"),
    [(1.0, 4, 1, 1.0), (0.0, 2, 3, 1.0), (0.3, 3, 2, 0.5), (0.5, 2, 1, 0.75)],
)
def test_engine_is_the_plain_program(
    rho: float, K: int, T: int, fraction: float, control: bool, batch_size: int | None, path: Path
) -> None:
    """Ragged shards, two chains, a temperature, a prior; with and without everything optional."""
    strategy = fahmc(
        shared_variance=rho,
        leapfrog_steps=K,
        trajectories_per_round=T,
        fraction_train=fraction,
        control_variate=control,
    )
    found = run(strategy, LOGISTIC, START, ROUNDS, batch_size=batch_size, path=path)
    assert {len(cohort) for cohort in found.cohorts} == {round(fraction * len(SIZES))}
    expected = plain(rho, K, T, batch_size, found.cohorts, control)
    np.testing.assert_allclose(found.theta, expected, rtol=0, atol=1e-10)
    _check_gradients(found, K * T, control, batch_size)


def _check_gradients(found: Chains, leapfrogs: int, control: bool, batch_size: int | None) -> None:
    """K·T per example with all rows; 2·K·T·b with minibatches, and twice that with CV.

    The exchange of CV comes on top, over all rows.
    """
    members = found.cohorts[0]
    rows = sum(SIZES[c] for c in members)
    if batch_size is None:
        expected = leapfrogs * rows
    else:
        expected = 2 * leapfrogs * batch_size * (1 + control) * len(members)
    assert found.metric(1, "gradients", "system") == expected + control * rows


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("batch_size", [None, BATCH])
@pytest.mark.parametrize("T", [1, 3])
def test_one_leapfrog_is_langevin_dynamics(rho: float, batch_size: int | None, T: int) -> None:
    """Acceptance 8: the engine's FA-HMC at K = 1 and its FA-LD against FA-LD in its own form."""
    settings = {
        "step_size": ETA,
        "prior_precision": PRECISION,
        "temperature": TEMPERATURE,
        "chains": CHAINS,
        "shared_variance": rho,
    }
    strategies = (
        FAHMC(FAHMCParams(**settings, leapfrog_steps=1, trajectories_per_round=T)),
        FALD(FALDParams(**settings, steps_per_round=T)),
    )
    for strategy in strategies:
        found = run(strategy, LOGISTIC, START, ROUNDS, batch_size=batch_size)
        for chain in range(CHAINS):
            shared, private = momentum_noise(DIM, len(SIZES), ROUNDS, T, 1, chain)
            batches = None
            if batch_size is not None:
                batches = minibatches(SIZES, ROUNDS, T, 1, batch_size, chain)[:, :, 0]
            expected = fahmc_numpy.fald(
                gradient,
                START[chain],
                WEIGHT,
                shared,
                private,
                ETA**2 / 2,
                rho,
                TEMPERATURE,
                batches,
            )
            np.testing.assert_allclose(found.theta[:, chain], expected, rtol=0, atol=1e-12)
        rows = sum(SIZES) if batch_size is None else BATCH * len(SIZES)
        assert found.metric(1, "gradients", "system") == T * rows


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_one_client_is_a_leapfrog_sampler(rho: float, path: Path) -> None:
    """Acceptance 8: alone, w_c = 1, so private and shared momenta have the same law."""
    X, y = SHARDS[1]
    problem = regression_problem([(X, y)], "custom", **BERNOULLI)
    K = 7
    strategy = fahmc(leapfrog_steps=K, shared_variance=rho, temperature=1.0)
    found = run(strategy, problem, START, ROUNDS, path=path)
    for chain in range(CHAINS):
        shared, private = momentum_noise(DIM, 1, ROUNDS, 1, K, chain)
        momenta = shared[:, 0] if rho else private[:, 0, 0]
        expected = fahmc_numpy.leapfrog(
            lambda q: X.T @ (1 / (1 + np.exp(-X @ q)) - y) + PRECISION * q,
            START[chain],
            momenta,
            ETA,
            K,
        )
        np.testing.assert_allclose(found.theta[:, chain], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_averaged_momentum_has_unit_variance(rho: float, fraction: float) -> None:
    """Acceptance 1. Without a gradient, η = K = 1 moves the server by Σ w_c p_c.

    10^6 numbers of variance τ = .5: the estimate's standard error is .14 %, so a band of 1 % is 7
    of them.
    """
    dim, chains, rounds = 50_000, 4, 5
    sizes = (1, 2, 3, 5, 7)
    problem = regression_problem([(np.zeros((n, dim)), np.zeros(n)) for n in sizes])
    strategy = fahmc(
        step_size=1.0,
        leapfrog_steps=1,
        shared_variance=rho,
        prior="flat",
        chains=chains,
        fraction_train=fraction,
    )
    found = run(strategy, problem, np.zeros((chains, dim)), rounds)
    moves = np.diff(found.theta, axis=0, prepend=0)
    assert np.var(moves) == pytest.approx(TEMPERATURE, rel=0.01)
    # equal shares of shared noise would show up as correlation between chains
    assert abs(np.corrcoef(moves.swapaxes(0, 1).reshape(chains, -1))[0, 1]) < 0.01


def affine_map(
    problem: Problem, sampler: Sampler, fraction: float = 1.0, **options: Any
) -> tuple[Array, Array, Chains]:
    """A and b of a round, read off the engine: at temperature 0 from 0 and the unit vectors."""
    d = problem.dim
    strategy = fahmc(
        step_size=sampler.step_size,
        leapfrog_steps=sampler.leapfrog_steps,
        trajectories_per_round=sampler.trajectories,
        control_variate=sampler.control_variates,
        shared_variance=sampler.shared_variance,
        chains=d + 1,
        warm_up=1,
        fraction_train=fraction,
        **options,
    )
    found = run(strategy, problem, np.vstack([np.zeros(d), np.eye(d)]), 1)
    b, *columns = found.theta[0]
    return np.stack([column - b for column in columns], axis=1), b, found


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_engine_has_the_recursions_affine_map(control: bool, fraction: float) -> None:
    """Acceptance 2, 3: on Gaussian clients with weights 3, 1, 2, … the law is the recursion's."""
    rows = [3, 1, 2, 2, 1]
    problem = random_clients(seed=4, clients=5, dim=3)
    problem = replace(problem, weight=np.array(rows) / sum(rows))
    eta = 0.3 / np.sqrt(problem.smoothness)
    sampler = Sampler(eta, 4, trajectories=2, control_variates=control)
    A, b, found = affine_map(gaussian_problem(problem, rows), sampler, fraction, prior="flat")
    recursion = round_recursion(problem, sampler, [(1.0, tuple(found.cohorts[0]))])
    np.testing.assert_allclose(A, recursion.A[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(b, recursion.b[0], rtol=0, atol=1e-12)


def test_two_groups_have_the_recursions_affine_map() -> None:
    """Acceptance 4, but for Monte Carlo: with this map the law is within W2 = .02 of the target."""
    sampler = Sampler(0.02, 10)
    A, b, _ = affine_map(gaussian_problem(two_groups()), sampler, prior="flat")
    recursion = round_recursion(two_groups(), sampler)
    np.testing.assert_allclose([A[0, 0], b[0]], [recursion.A[0, 0, 0], recursion.b[0, 0]])
    law, target = recursion.stationary(), two_groups().target()
    assert np.hypot(law.mean - target.mean, np.sqrt(law.cov) - np.sqrt(target.cov)) <= 0.02


NOISE_SD, PRIOR = 0.8, 2.0


def regression() -> tuple[Problem, GaussianClients, list[tuple[Array, Array]]]:
    """Ten clients of 20 to 65 rows whose features have other centres and scales."""
    rng, shards = np.random.default_rng(5), []
    beta = rng.normal(size=4)
    for c in range(10):
        X = 0.5 * rng.normal(size=4) + rng.uniform(0.7, 1.3, 4) * rng.normal(size=(20 + 5 * c, 4))
        shards.append(
            (X, X @ (beta + 0.1 * rng.normal(size=4)) + NOISE_SD * rng.normal(size=len(X)))
        )
    problem = regression_problem(shards, noise_sd=NOISE_SD)
    return problem, conjugate.regression_clients(shards, PRIOR, NOISE_SD**2), shards


@pytest.mark.parametrize(
    ("a", "control", "mean_bound", "cov_bound"),
    [(0.05, False, 0.03, 0.01), (0.1, True, 1e-9, 0.002)],
)
def test_conjugate_regression_is_within_the_bounds(
    a: float, control: bool, mean_bound: float, cov_bound: float
) -> None:
    """Acceptance 5: the engine's map is the recursion's, whose law is near the closed form."""
    problem, clients, shards = regression()
    sampler = Sampler(a / np.sqrt(clients.smoothness), 10, control_variates=control)
    A, b, _ = affine_map(problem, sampler, prior_precision=PRIOR)
    recursion = round_recursion(clients, sampler)
    np.testing.assert_allclose(A, recursion.A[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(b, recursion.b[0], rtol=0, atol=1e-10)
    X, y = (np.concatenate(parts) for parts in zip(*shards, strict=True))
    exact = conjugate.posterior(X, y, PRIOR, NOISE_SD**2)
    law = recursion.stationary()
    off = np.abs(law.mean - exact.mean) / np.sqrt(np.diag(exact.cov))
    assert off.max() <= mean_bound
    assert errors(law, exact).cov <= cov_bound


def test_effective_draws_per_gradient_beat_langevin() -> None:
    """Acceptance 6, with the gradients that the engine counts: K = 10 a round, FA-LD 1.

    At a = .2 FA-HMC has ≥ 5 times the effective draws of FA-LD per gradient. At matched bias (FA-LD
    averaging every 10 steps at a = .2 against FA-HMC at a = .1) the gain is smaller, about 2.5.
    """
    clients = random_clients(seed=2)
    rows = gaussian_problem(clients)
    unit = 1 / np.sqrt(clients.smoothness)
    rates: dict[str, float] = {}
    for name, a, K, T in (
        ("hmc", 0.2, 10, 1),
        ("ld", 0.2, 1, 1),
        ("hmc .1", 0.1, 10, 1),
        ("ld 10", 0.2, 1, 10),
    ):
        sampler = Sampler(a * unit, K, T)
        spent = affine_map(rows, sampler, prior="flat")[2].metric(1, "gradients", "system")
        cost = spent / len(clients.weight)  # one row each
        assert cost == K * T
        rounds = ess.worst_autocorrelation_time(round_recursion(clients, sampler))
        rates[name] = 1000 / (cost * rounds)
    assert rates["hmc"] >= 5 * rates["ld"]
    assert 1.5 < rates["hmc .1"] / rates["ld 10"] < 4


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
@pytest.mark.parametrize("batch_size", [None, BATCH])
@pytest.mark.parametrize("control", [False, True])
def test_traced_graphs_change_nothing(control: bool, batch_size: int | None, path: Path) -> None:
    strategy = fahmc(shared_variance=0.3, leapfrog_steps=3, control_variate=control)
    options: dict[str, Any] = {"batch_size": batch_size, "path": path, "trace": True}
    found = run(strategy, LOGISTIC, START, ROUNDS, **options)
    expected = plain(0.3, 3, 1, batch_size, control=control)
    np.testing.assert_allclose(found.theta, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3])
def test_blocks_change_nothing(chunk: int) -> None:
    strategy = fahmc(shared_variance=0.3, leapfrog_steps=3)
    found = run(strategy, LOGISTIC, START, ROUNDS, batch_size=BATCH, chunk=chunk)
    np.testing.assert_allclose(found.theta, plain(0.3, 3, 1, BATCH), rtol=0, atol=1e-10)


def test_same_seed_same_bits_other_seed_other_chain() -> None:
    def theta(seed: int) -> Array:
        return run(
            fahmc(shared_variance=0.5), LOGISTIC, START, 2, seed=seed, batch_size=BATCH
        ).theta

    first = theta(SEED)
    assert np.array_equal(first, theta(SEED))
    assert np.abs(first - theta(SEED + 1)).min() > 1e-3


def test_order_of_the_clients_does_not_matter() -> None:
    """With shared momenta the numbers are no client's own: swapping clients swaps nothing else."""
    order = [2, 0, 3, 1]
    swapped = regression_problem([SHARDS[c] for c in order], "custom", **BERNOULLI)
    there = run(fahmc(), LOGISTIC, START, ROUNDS).theta
    np.testing.assert_allclose(run(fahmc(), swapped, START, ROUNDS).theta, there, atol=1e-12)


def test_equal_weights_count_every_client_the_same() -> None:
    """w_c = 1/N instead of n_c/n, with f_c scaled to it: the target stays, the map does not."""
    _, clients, shards = regression()
    sizes = np.array([len(y) for _, y in shards])
    likelihood = clients.precision - PRIOR * np.eye(4)
    scale = (sizes / sizes.sum() * len(sizes))[:, None, None]
    precision = likelihood * scale + PRIOR * np.eye(4)
    force = clients.force * scale[:, 0]
    mean = np.linalg.solve(precision, force[..., None])[..., 0]
    equal = GaussianClients(precision, mean, np.full(10, 0.1))
    np.testing.assert_allclose(equal.target().mean, clients.target().mean, atol=1e-10)
    sampler = Sampler(0.1 / np.sqrt(equal.smoothness), 5)
    problem, _, _ = regression()
    A, b, _ = affine_map(problem, sampler, prior_precision=PRIOR, weighted_by="uniform")
    recursion = round_recursion(equal, sampler)
    np.testing.assert_allclose(A, recursion.A[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(b, recursion.b[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_client_without_rows_changes_nothing(path: Path) -> None:
    """Its weight is 0; its potential is the prior's, so that nothing is infinite."""
    data = LOGISTIC.data
    empty = replace(data, shards=(*data.shards, np.empty(0, np.int64)))
    found = run(fahmc(), replace(LOGISTIC, data=empty), START, ROUNDS, path=path)
    there = run(fahmc(), LOGISTIC, START, ROUNDS, path=path)
    np.testing.assert_allclose(found.theta, there.theta, atol=1e-12)


def test_example_weights_are_repetitions() -> None:
    """A row of weight 2 is two rows in the potential; w_c still counts rows, for the average."""
    X, y = SHARDS[1]
    examples = Examples(X, y, np.repeat([2.0, 1.0], 6))
    one = FederatedData(LOGISTIC.data.info, examples, (np.arange(len(y)),))
    twice = np.r_[0:6, 0:12]
    repeated = regression_problem([(X[twice], y[twice])], "custom", **BERNOULLI)
    found = run(fahmc(), replace(LOGISTIC, data=one), START, ROUNDS)
    np.testing.assert_allclose(found.theta, run(fahmc(), repeated, START, ROUNDS).theta, atol=1e-12)


@pytest.mark.parametrize("prior", ["laplace", "student_t"])
def test_priors_by_their_densities(prior: str) -> None:
    """A noise-free Langevin step moves by −η²/2 ∇f: compared with SciPy's log densities."""
    from scipy import stats

    df, scale = 5.0, PRECISION**-0.5
    law = stats.t(df, scale=scale) if prior == "student_t" else stats.laplace(scale=scale / 2**0.5)
    strategy = fahmc(
        leapfrog_steps=1, prior=prior, prior_df=df, warm_up=1, step_size=0.1, chains=CHAINS
    )
    problem = regression_problem([(np.zeros((2, DIM)), np.zeros(2))])
    moved = run(strategy, problem, START, 1).theta[0] - START
    slope = (law.logpdf(START + 1e-6) - law.logpdf(START - 1e-6)) / 2e-6
    np.testing.assert_allclose(moved, 0.005 * slope, rtol=1e-6)
