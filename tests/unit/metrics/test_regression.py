import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics as sk

from fedsim.metrics import regression as r

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(50,), (50, 3)])
def test_scores_agree_with_scikit_learn(shape: tuple[int, ...]) -> None:
    y = RNG.normal(size=shape)
    mean = y + 0.3 * RNG.normal(size=shape)
    assert r.rmse(mean, y) == pytest.approx(math.sqrt(sk.mean_squared_error(y, mean)), rel=1e-12)
    assert r.r2(mean, y) == pytest.approx(sk.r2_score(y, mean), rel=1e-12)
    assert r.scores(mean, y) == {"rmse": r.rmse(mean, y), "r2": r.r2(mean, y)}


def test_gaussian_nll_agrees_with_scipy() -> None:
    y, mean, sd = RNG.normal(size=20), RNG.normal(size=20), RNG.uniform(0.1, 2, 20)
    expected = -norm.logpdf(y, mean, sd).mean()
    assert r.gaussian_nll(mean, sd**2, y) == pytest.approx(expected, rel=1e-12)
    assert r.gaussian_nll(mean, 4.0, y) == pytest.approx(-norm.logpdf(y, mean, 2).mean())


def test_a_target_that_does_not_vary_has_no_r2() -> None:
    assert math.isnan(r.r2([1.0, 2.0], [3.0, 3.0]))


def test_wrong_shapes_and_variances_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        r.rmse(np.zeros((5, 1)), np.zeros(5))
    with pytest.raises(ValueError, match="do not match"):
        r.rmse([], [])
    with pytest.raises(ValueError, match="positive"):
        r.gaussian_nll([0.0], 0.0, [0.0])
