import math

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import norm

from fedsim.metrics import distances as d

RNG = np.random.default_rng(0)


def covariance(k: int) -> np.ndarray:
    a = RNG.normal(size=(k, k))
    return a @ a.T + 0.1 * np.eye(k)


def test_w1_of_a_shift_is_the_shift_in_standard_deviations() -> None:
    reference = RNG.normal(size=(1000, 3)) * [1.0, 5.0, 0.1]
    got = d.wasserstein1_marginal(reference + 1.0, reference)
    assert got == pytest.approx(1 / reference.std(0), rel=1e-9)


def test_w1_between_sample_sizes_equals_the_integral_of_the_quantile_gap() -> None:
    q = (np.arange(40_000) + 0.5) / 40_000
    # For N(0, s²) against N(0, 1) the quantile gap integrates to |s − 1| sqrt(2/π).
    draws, reference = 1.5 * norm.ppf(q[::4]), norm.ppf(q)
    got = d.wasserstein1_marginal(draws, reference)
    assert got == pytest.approx([0.5 * math.sqrt(2 / math.pi)], rel=2e-3)


def test_a_reference_that_does_not_vary() -> None:
    same, off = d.wasserstein1_marginal([[1.0, 2.0]] * 3, [[1.0, 1.0]] * 4)
    assert same == 0
    assert math.isinf(off)


def test_dimensions_must_agree() -> None:
    with pytest.raises(ValueError, match="dimension"):
        d.wasserstein1_marginal(np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="square"):
        d.relative_cov_error(np.zeros((2, 3)), np.eye(2))
    with pytest.raises(ValueError, match="draws"):
        d.wasserstein1_marginal(np.zeros((2, 2, 2)), np.zeros((2, 2)))


def test_bures_against_scipy_matrix_roots_and_in_one_dimension() -> None:
    m1, m2, a, b = RNG.normal(size=4), RNG.normal(size=4), covariance(4), covariance(4)
    root = sqrtm(a)
    spread = np.trace(a + b - 2 * sqrtm(root @ b @ root)).real
    expected = math.sqrt(np.sum((m1 - m2) ** 2) + spread)
    assert d.bures_w2(m1, a, m2, b) == pytest.approx(expected, rel=1e-9)
    assert d.bures_w2(m2, b, m1, a) == pytest.approx(expected, rel=1e-9)
    assert d.bures_w2(1.0, 4.0, 4.0, 64.0) == pytest.approx(math.hypot(3, 6))


def test_bures_of_equal_and_of_singular_gaussians() -> None:
    a = covariance(5)
    assert d.bures_w2(np.zeros(5), a, np.zeros(5), a) < 1e-6
    flat = np.diag([1.0, 0.0])
    assert d.bures_w2([0, 0], flat, [0, 0], np.zeros((2, 2))) == pytest.approx(1)


def test_mean_and_covariance_errors_by_hand() -> None:
    assert d.mean_error_sd([1.0, 3.0], [0.0, 0.0], [2.0, 3.0]) == pytest.approx([0.5, 1.0])
    assert d.relative_mean_error([3.0, 4.0], [0, 0], np.diag([9.0, 16.0])) == pytest.approx(1)
    assert d.relative_cov_error(1.1 * np.eye(3), np.eye(3)) == pytest.approx(0.1)
