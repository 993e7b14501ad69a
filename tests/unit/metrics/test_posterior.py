import sys

import numpy as np
import pytest

from fedsim.errors import UserError
from fedsim.metrics import posterior
from fedsim.metrics.posterior import diagnostics, split_rhat


def ar1(chains: int, draws: int, k: int, rho: float, seed: int = 0) -> np.ndarray:
    """Stationary AR(1) chains of unit variance; ESS is n (1 − rho) / (1 + rho)."""
    rng = np.random.default_rng(seed)
    x = np.empty((chains, draws, k))
    x[:, 0] = rng.normal(size=(chains, k))
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * rng.normal(size=(chains, k))
    return x


def brute_rank_rhat(x: np.ndarray) -> float:
    """Vehtari et al. 2021, written out for one scalar (chains, even number of draws)."""
    from scipy.stats import norm, rankdata

    half = x.shape[1] // 2
    parts = np.concatenate([x[:, :half], x[:, half:]])

    def rhat(values: np.ndarray) -> float:
        z = norm.ppf((rankdata(values).reshape(values.shape) - 0.375) / (values.size + 0.25))
        within = z.var(1, ddof=1).mean()
        between = half * z.mean(1).var(ddof=1)
        return float(np.sqrt(((half - 1) / half * within + between / half) / within))

    return max(rhat(parts), rhat(np.abs(parts - np.median(parts))))


def test_rank_rhat_equals_the_papers_formula() -> None:
    x = ar1(4, 200, 3, 0.5) + np.arange(4)[:, None, None] * [0.0, 0.1, 1.0]
    got = diagnostics({"w": x})
    expected = [brute_rank_rhat(x[..., i]) for i in range(3)]
    assert got.rhat == pytest.approx(expected, rel=1e-6)
    assert got.names == ("w[0]", "w[1]", "w[2]")


def test_ess_and_mcse_recover_what_is_known_of_an_autoregression() -> None:
    x = ar1(4, 4000, 6, 0.6)
    got = diagnostics({"w": x})
    known = x[..., 0].size * 0.4 / 1.6
    assert got.ess_bulk == pytest.approx(np.full(6, known), rel=0.15)
    assert got.mcse_mean == pytest.approx(got.sd / np.sqrt(known), rel=0.1)
    assert got.converged
    assert got.flags() == []


def test_chains_that_disagree_are_flagged_with_the_worst_named() -> None:
    x = ar1(4, 300, 4, 0.0)
    x[2, :, 3] += 3
    got = diagnostics({"a": x[..., :2], "b.weight": x[..., 2:].reshape(4, 300, 1, 2)})
    assert not got.converged
    assert got.worst(1).index[0] == "b.weight[0, 1]"
    assert any("R-hat is above 1.01" in flag and "b.weight[0, 1]" in flag for flag in got.flags())
    assert any(flag.startswith("Bulk ESS is below 400") for flag in got.flags())
    assert got.summary()["rhat_max"] == got.rhat.max() > 1.3


def test_constant_and_nan_scalars_are_counted_and_do_not_spoil_the_rest() -> None:
    x = ar1(4, 300, 5, 0.0)
    x[..., 1] = 0.25
    x[1, 7, 2] = np.nan
    x[0, 0, 3] = np.inf
    got = diagnostics({"w": x})
    assert got.constant == ("w[1]",)
    assert got.nonfinite == ("w[2]", "w[3]")
    assert got.names == ("w[0]", "w[4]")
    assert np.isfinite(got.rhat).all()
    assert np.isfinite(got.split_rhat_max)
    assert (got.total, got.candidates) == (5, 2)
    assert not got.converged
    assert any("never move" in flag for flag in got.flags())
    assert any("diverged" in flag for flag in got.flags())


def test_nothing_but_constants() -> None:
    got = diagnostics({"w": np.ones((4, 50, 2))})
    assert got.names == ()
    assert not got.converged
    assert np.isnan(got.summary()["rhat_max"])
    assert len(got.worst()) == 0


def test_chains_standing_still_at_different_places_have_not_converged() -> None:
    x = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 50, 1))
    got = diagnostics({"w": x})
    assert got.constant == ()
    assert not got.converged
    assert got.split_rhat_max == np.inf
    assert any("R-hat is above" in flag for flag in got.flags())


@pytest.mark.parametrize(("chains", "draws"), [(1, 100), (4, 3), (1, 1)])
def test_too_few_chains_or_draws_are_said_and_do_not_crash(chains: int, draws: int) -> None:
    got = diagnostics({"w": ar1(chains, draws, 2, 0.0), "b": ar1(chains, draws, 1, 0.0)[..., 0]})
    assert np.isnan(got.rhat).all()
    assert any("too few" in flag for flag in got.flags())
    assert not got.converged


def test_two_chains_are_called_few() -> None:
    flags = diagnostics({"w": ar1(2, 2000, 1, 0.0)}).flags()
    assert flags == ["Only 2 chains: R-hat wants at least 4."]


def test_above_the_limit_the_worst_and_an_even_spread_are_diagnosed() -> None:
    x = ar1(4, 60, 300, 0.0).astype(np.float32)
    bad = [17, 111, 299]
    x[0][:, bad] += 5
    few, all_of_them = diagnostics({"w": x}, limit=20), diagnostics({"w": x}, limit=None)
    assert len(few.names) == 20
    assert {f"w[{i}]" for i in bad} <= set(few.names)
    assert few.rhat.max() == all_of_them.rhat.max()
    assert few.split_rhat_max == all_of_them.split_rhat_max
    order = [int(name[2:-1]) for name in few.names]
    assert order == sorted(set(order))
    # Every figure belongs to the scalar it is listed under.
    pick = [all_of_them.names.index(name) for name in few.names]
    assert np.array_equal(few.ess_bulk, all_of_them.ess_bulk[pick])
    assert few.mean == pytest.approx(x.mean((0, 1))[order], abs=1e-6)
    assert few.names == diagnostics({"w": x}, limit=20).names


def test_names_survive_the_chunks() -> None:
    x = ar1(4, 8, 2 * posterior.CHUNK + 3, 0.0)
    got = diagnostics({"a": x[..., :5], "b": x[..., 5:]})
    assert got.mean == pytest.approx(x.mean((0, 1)))
    assert got.sd == pytest.approx(x.std((0, 1), ddof=1))


def test_split_rhat_ignores_the_middle_draw_of_an_odd_number() -> None:
    x = ar1(4, 101, 2, 0.3)
    spoiled = x.copy()
    spoiled[:, 50] = 1e9
    assert split_rhat(spoiled) == pytest.approx(split_rhat(x))


def test_shapes_that_disagree_are_refused() -> None:
    for wrong in ({"a": np.ones((4, 5)), "b": np.ones((4, 6))}, {"a": np.ones(4)}, {}):
        with pytest.raises(ValueError, match="draws must be"):
            diagnostics(wrong)


def test_without_arviz_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("arviz", "arviz_stats", "arviz_stats.base", "arviz_base"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r'pip install "fedsim-fl\[bayes\]"'):
        diagnostics({"w": ar1(4, 10, 1, 0.0)})


def test_importing_the_metrics_imports_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, fedsim.metrics; "
        "print([m for m in ('arviz', 'scipy', 'pandas', 'torch', 'xarray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_limit_of_rhat_is_the_users() -> None:
    x = ar1(4, 2000, 2, 0.0)
    x[0, :, 1] += 0.3  # R-hat 1.007
    assert diagnostics({"w": x}).converged
    strict = diagnostics({"w": x}, rhat_good=1.005)
    assert not strict.converged
    assert strict.summary()["rhat_above_limit"] == 1
    assert strict.flags()[0].startswith("R-hat is above 1.005 in 1 of 2 scalars")
