"""The recursion against brute-force simulation, closed forms and the method's stated properties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.oracles.fahmc_numpy import fahmc, fald
from tests.oracles.gaussian import (
    Array,
    Gaussian,
    errors,
    random_clients,
    square_root,
    two_groups,
    wasserstein2,
)
from tests.oracles.gaussian_recursion import Recursion, Sampler, all_cohorts, round_recursion

PROBLEM = random_clients(seed=2)
STEP = 1 / np.sqrt(PROBLEM.smoothness)  # η at a = 1
BASE = Sampler(step_size=0.1 * STEP)


def gradient(client: int, theta: Array, rows: object) -> Array:
    return np.asarray(PROBLEM.precision[client] @ theta - PROBLEM.force[client])


def w2(sampler: Sampler) -> float:
    law = round_recursion(PROBLEM, sampler).stationary()
    return errors(law, PROBLEM.target()).w2


def test_bures_distance_of_commuting_covariances_is_the_distance_of_their_roots() -> None:
    a = Gaussian(np.array([1.0, 0.0]), np.diag([4.0, 9.0]))
    b = Gaussian(np.array([0.0, 2.0]), np.diag([1.0, 25.0]))
    assert wasserstein2(a, b) == pytest.approx(np.sqrt(1 + 4 + 1 + 4), rel=1e-12)


def test_bures_distance_matches_the_trace_formula_and_keeps_small_differences() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 5))
    a, b = Gaussian(np.zeros(5), x @ x.T), Gaussian(np.zeros(5), y @ y.T)
    root = square_root(a.cov)
    traces = np.trace(a.cov + b.cov - 2 * square_root(root @ b.cov @ root))
    assert wasserstein2(a, b) == pytest.approx(np.sqrt(traces), rel=1e-10)
    close = Gaussian(a.mean, a.cov * (1 + 1e-10) ** 2)
    assert wasserstein2(a, close) == pytest.approx(1e-10 * np.sqrt(np.trace(a.cov)), rel=1e-3)


def test_target_is_where_the_weighted_gradient_vanishes() -> None:
    target = PROBLEM.target()
    total = sum(w * gradient(c, target.mean, None) for c, w in enumerate(PROBLEM.weight))
    np.testing.assert_allclose(total, 0, atol=1e-12)
    np.testing.assert_allclose(
        target.cov @ np.tensordot(PROBLEM.weight, PROBLEM.precision, 1), np.eye(5), atol=1e-12
    )


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("control_variates", [False, True])
@pytest.mark.parametrize("members", [tuple(range(10)), (0, 3, 4, 8)])
def test_affine_map_is_the_simulators(
    rho: float, control_variates: bool, members: tuple[int, ...]
) -> None:
    """A, b and Q are read off the simulator, which is affine in x and in the noise."""
    sampler = replace(
        BASE,
        step_size=0.3 * STEP,
        leapfrog_steps=4,
        trajectories=3,
        shared_variance=rho,
        temperature=0.7,
        control_variates=control_variates,
    )
    recursion = round_recursion(PROBLEM, sampler, [(1.0, members)])
    noise_size = 3 * 5 + 3 * 10 * 5

    def one_round(x: Array, noise: Array) -> Array:
        end: Array = fahmc(
            gradient,
            x,
            PROBLEM.weight,
            noise[:15].reshape(1, 3, 5),
            noise[15:].reshape(1, 3, 10, 5),
            step_size=sampler.step_size,
            leapfrog_steps=4,
            shared_variance=rho,
            temperature=0.7,
            cohorts=[members],
            control_variates=control_variates,
        )[0]
        return end

    quiet = np.zeros(noise_size)
    b = one_round(np.zeros(5), quiet)
    A = np.stack([one_round(e, quiet) - b for e in np.eye(5)], axis=1)
    load = np.stack([one_round(np.zeros(5), e) - b for e in np.eye(noise_size)], axis=1)
    np.testing.assert_allclose(recursion.b[0], b, rtol=0, atol=1e-12)
    np.testing.assert_allclose(recursion.A[0], A, rtol=0, atol=1e-12)
    np.testing.assert_allclose(recursion.Q[0], load @ load.T, rtol=0, atol=1e-12)


def test_langevin_map_is_the_simulators_and_equals_one_leapfrog() -> None:
    h = 0.02 / PROBLEM.smoothness
    sampler = Sampler(step_size=h, trajectories=3, shared_variance=0.5, kind="fa-ld")
    langevin = round_recursion(PROBLEM, sampler)
    leapfrog = round_recursion(
        PROBLEM,
        Sampler(np.sqrt(2 * h), leapfrog_steps=1, trajectories=3, shared_variance=0.5),
    )
    for name in ("A", "b", "Q"):
        np.testing.assert_allclose(getattr(langevin, name), getattr(leapfrog, name), atol=1e-13)
    zeros = np.zeros((1, 3, 5)), np.zeros((1, 3, 10, 5))
    x = np.arange(5.0)
    end = fald(gradient, x, PROBLEM.weight, *zeros, h, 0.5)[0]
    np.testing.assert_allclose(end, langevin.A[0] @ x + langevin.b[0], atol=1e-12)


@pytest.mark.parametrize("cohort", [None, 3])
def test_stationary_law_is_the_fixed_point_and_the_limit(cohort: int | None) -> None:
    problem = random_clients(seed=1, clients=6, dim=3)
    cohorts = None if cohort is None else all_cohorts(6, cohort)
    sampler = Sampler(0.5 / np.sqrt(problem.smoothness), shared_variance=0.3)
    recursion = round_recursion(problem, sampler, cohorts)
    law = recursion.stationary()
    again = recursion.step(law)
    np.testing.assert_allclose(again.mean, law.mean, atol=1e-11)
    np.testing.assert_allclose(again.cov, law.cov, atol=1e-11)
    far = recursion.after(500, Gaussian(law.mean + 1, 10 * law.cov))
    np.testing.assert_allclose(far.mean, law.mean, atol=1e-9)
    np.testing.assert_allclose(far.cov, law.cov, atol=1e-9)


def test_mixture_moments_match_simulated_cohorts() -> None:
    """20,000 chains of the mixture, 5 sigma bands: fails by chance about 1 time in 10^5."""
    problem = random_clients(seed=3, clients=4, dim=2)
    sampler = Sampler(0.4 / np.sqrt(problem.smoothness), leapfrog_steps=5, shared_variance=0.5)
    recursion = round_recursion(problem, sampler, all_cohorts(4, 2))
    rng, chains, rounds = np.random.default_rng(4), 20_000, 8
    x = np.ones((chains, 2))
    roots = np.stack([square_root(Q) for Q in recursion.Q])
    for _ in range(rounds):
        s = rng.integers(len(roots), size=chains)
        x = np.einsum("nij,nj->ni", recursion.A[s], x) + recursion.b[s]
        x += np.einsum("nij,nj->ni", roots[s], rng.normal(size=(chains, 2)))
    law = recursion.after(rounds, Gaussian(np.ones(2), np.zeros((2, 2))))
    mean_error = np.sqrt(np.diag(law.cov) / chains)
    assert np.all(np.abs(x.mean(0) - law.mean) < 5 * mean_error)
    sample = np.cov(x.T)
    squares = np.var((x - x.mean(0)) ** 2, axis=0)
    assert np.all(np.abs(np.diag(sample - law.cov)) < 5 * np.sqrt(squares / chains))


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("members", [tuple(range(10)), (1, 4, 6)])
def test_averaged_momentum_has_unit_variance(rho: float, members: tuple[int, ...]) -> None:
    """With P = 0 and η = K = T = 1 the round moves by Σ w_c p_c exactly: Q is its covariance."""
    flat = replace(PROBLEM, precision=np.zeros_like(PROBLEM.precision))
    sampler = Sampler(1.0, leapfrog_steps=1, shared_variance=rho)
    recursion = round_recursion(flat, sampler, [(1.0, members)])
    np.testing.assert_allclose(recursion.Q[0], np.eye(5), atol=1e-14)


def test_identical_clients_have_no_bias_but_the_integrators() -> None:
    """One Gaussian everywhere: covariance (P (1 − η² P / 4))⁻¹, whatever K; the mean is exact."""
    alike = random_clients(seed=0, clients=1)
    law = round_recursion(alike, replace(BASE, step_size=0.2 * STEP)).stationary()
    P = alike.precision[0]
    exact = np.linalg.inv(P @ (np.eye(5) - (0.2 * STEP) ** 2 / 4 * P))
    np.testing.assert_allclose(law.cov, exact, rtol=1e-9)
    np.testing.assert_allclose(law.mean, alike.mean[0], atol=1e-10)


@pytest.mark.parametrize("trajectories", [1, 5])
def test_w2_falls_with_the_square_of_the_step_at_fixed_work(trajectories: int) -> None:
    """Slope in [1.8, 2.2]; five trajectories reach it only below a = .05 (1.2 at a = .2)."""
    top = 0.1 if trajectories == 1 else 0.05
    steps = top * 0.5 ** np.arange(4)
    values = [w2(replace(BASE, step_size=a * STEP, trajectories=trajectories)) for a in steps]
    slopes = np.diff(np.log(values)) / np.diff(np.log(steps))
    assert np.all((slopes > 1.8) & (slopes < 2.2)), slopes


@pytest.mark.parametrize(("trajectories", "least"), [(1, 0.01), (5, 0.1)])
def test_w2_has_a_floor_at_fixed_integration_time(trajectories: int, least: float) -> None:
    values = [
        w2(replace(BASE, step_size=STEP / K, leapfrog_steps=K, trajectories=trajectories))
        for K in (10, 40, 160)
    ]
    assert values[-1] > least
    assert values[-1] == pytest.approx(values[0], rel=0.05)


def test_control_variates_remove_the_mean_bias_and_can_diverge() -> None:
    corrected = round_recursion(PROBLEM, replace(BASE, control_variates=True))
    plain = errors(round_recursion(PROBLEM, BASE).stationary(), PROBLEM.target())
    fixed = errors(corrected.stationary(), PROBLEM.target())
    assert plain.mean > 0.01
    assert fixed.mean < 1e-10
    assert fixed.w2 < plain.w2 / 5
    for a, K, T in ((0.4, 10, 5), (0.2, 30, 1)):
        wild = Sampler(a * STEP, leapfrog_steps=K, trajectories=T, control_variates=True)
        recursion = round_recursion(PROBLEM, wild)
        assert recursion.spectral_radius > 1.5
        with pytest.raises(ValueError, match="diverges"):
            recursion.stationary()
        assert round_recursion(PROBLEM, replace(wild, control_variates=False)).spectral_radius < 1


def test_partial_participation_is_biased_for_unequal_weights_only() -> None:
    """E[w_c / W_S] is proportional to w_c only if the weights are equal.

    Otherwise renormalising tilts the target, by an amount that does not shrink with η.
    """
    for equal_weights in (False, True):
        problem = random_clients(seed=2, equal_weights=equal_weights)
        step = 1 / np.sqrt(problem.smoothness)
        coarse, fine = (
            errors(
                round_recursion(problem, Sampler(a * step, 10), all_cohorts(10, 5)).stationary(),
                problem.target(),
            )
            for a in (0.05, 0.0125)
        )
        if equal_weights:
            assert fine.w2 < coarse.w2 / 10
        else:
            assert fine.mean > 0.8 * coarse.mean > 0.01


def test_temperature_scales_the_covariance_only() -> None:
    warm = round_recursion(PROBLEM, BASE).stationary()
    cold = round_recursion(PROBLEM, replace(BASE, temperature=0.1)).stationary()
    np.testing.assert_allclose(cold.cov, 0.1 * warm.cov, rtol=1e-9)
    np.testing.assert_allclose(cold.mean, warm.mean, rtol=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_two_groups_of_scalar_clients(rho: float) -> None:
    problem = two_groups()
    target = problem.target()
    assert target.mean[0] == pytest.approx(16.2, rel=1e-12)
    assert target.cov[0, 0] == pytest.approx(1.6, rel=1e-12)
    sampler = Sampler(step_size=0.02, leapfrog_steps=10, shared_variance=rho)
    law = round_recursion(problem, sampler).stationary()
    assert 0.001 < wasserstein2(law, target) <= 0.02


def test_scalar_autoregression_in_closed_form() -> None:
    chain = Recursion(np.ones(1), np.full((1, 1, 1), 0.9), np.full((1, 1), 2.0), np.ones((1, 1, 1)))
    law = chain.stationary()
    assert law.mean[0] == pytest.approx(20, rel=1e-12)
    assert law.cov[0, 0] == pytest.approx(1 / 0.19, rel=1e-12)
    assert chain.spectral_radius == pytest.approx(0.9)
