"""Number formats and roundings: the acceptance figures by 10^6 draws, the rest exactly.

Statistical bands are 4.5 standard errors or wider: with these seeds fixed they cannot flake, and a
new seed would fail less than once in 10^5.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsim.clients.quantisers import (
    BlockFloatingPoint,
    FixedPoint,
    categorical,
    nearest,
    stochastic,
    variance_corrected,
    variance_corrected_grid,
)

DRAWS = 1_000_000
FIXED = FixedPoint(word_length=8, fraction_length=4)
GAP = 2.0**-4
GRID = FIXED.grid(torch.zeros((), dtype=torch.float64))


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def uniforms(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_vc(mean: Tensor, variance: Tensor, seed: int = 0) -> Tensor:
    shape = mean.shape
    return variance_corrected(
        mean,
        variance,
        normals(seed, *shape),
        uniforms(seed + 1, *shape),
        uniforms(seed + 2, *shape),
        GRID,
    )


def test_fixed_point_rounds_to_the_nearest_multiple_and_saturates() -> None:
    x = tensor(0.0, 0.03, 0.04, -0.04, 1.0, 7.93, 7.99, 100.0, -8.0, -8.1)
    expected = tensor(0.0, 0.0, 0.0625, -0.0625, 1.0, 7.9375, 7.9375, 7.9375, -8.0, -8.0)
    torch.testing.assert_close(nearest(x, GRID), expected, rtol=0, atol=0)


def test_stochastic_rounding_goes_up_exactly_when_the_uniform_fills_the_cell() -> None:
    x = tensor(0.25, 0.25) * GAP
    torch.testing.assert_close(stochastic(x, tensor(0.74, 0.76), GRID), tensor(0, GAP))
    torch.testing.assert_close(stochastic(-x, tensor(0.24, 0.26), GRID), tensor(-GAP, 0))
    assert stochastic(tensor(9.0), tensor(0.5), GRID).item() == 8 - GAP


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_rounding_is_unbiased(fraction: float, dtype: torch.dtype) -> None:
    """The band .005 Δ is ten standard errors at least."""
    mean = (-37 + fraction) * GAP
    u = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0), dtype=dtype)
    draws = stochastic(torch.full((DRAWS,), mean, dtype=dtype), u, GRID).double()
    assert abs(draws.mean().item() - mean) <= 0.005 * GAP
    assert draws.var().item() == pytest.approx(fraction * (1 - fraction) * GAP**2, rel=0.01)


@pytest.mark.parametrize("mean", [-0.5, -0.2, 0.0, 0.3, 0.5])
def test_categorical_has_the_mean_and_variance_asked_for(mean: float) -> None:
    """Exactly: the uniforms are the midpoints of a partition of [0, 1)."""
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    draws = categorical(tensor(mean) * GAP, tensor(0.25) * GAP**2, u, tensor(GAP)) / GAP
    assert draws.mean().item() == pytest.approx(mean, abs=1e-5)
    assert draws.var(correction=0).item() == pytest.approx(0.25, abs=1e-5)
    assert set(draws.unique().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("variance", [0.05, 0.15, 0.25, 0.3, 1.0, 10.0])  # of Δ²; v0 = .25
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.3, 0.5, 0.98])
def test_variance_corrected_has_the_mean_and_variance_asked_for(
    variance: float, fraction: float
) -> None:
    """Below v0 only where rounding alone has not more variance already; then that remains."""
    mean = torch.full((DRAWS,), (5 + fraction) * GAP, dtype=torch.float64)
    draws = draw_vc(mean, tensor(variance) * GAP**2)
    assert torch.equal(draws, nearest(draws, GRID))
    assert abs(draws.mean().item() - mean[0].item()) <= 0.01 * GAP * max(1, variance**0.5)
    reached = max(variance, fraction * (1 - fraction))
    assert draws.var().item() == pytest.approx(reached * GAP**2, rel=0.02)


def test_variance_corrected_stays_on_the_grid_beyond_the_range() -> None:
    mean = tensor(-50.0, -8.01, 7.95, 1e6)
    for variance in (0.0, 0.1 * GAP**2, 1.0):
        draws = draw_vc(mean, tensor(variance))
        assert torch.equal(draws, nearest(draws, GRID))
        assert draws[0].item() == -8.0
        assert draws[3].item() == 8 - GAP


def test_zero_variance_at_a_grid_point_returns_it() -> None:
    points = torch.arange(-128, 128, dtype=torch.float64) * GAP
    assert torch.equal(draw_vc(points, tensor(0.0)), points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_exponent_is_the_floor_of_log2_of_the_largest(dtype: torch.dtype) -> None:
    block = BlockFloatingPoint(word_length=8)
    for exponent in (-100, -3, 0, 7, 100):
        power = torch.tensor(2.0**exponent, dtype=dtype)
        below = torch.nextafter(power, torch.zeros((), dtype=dtype))
        for value, expected in ((power, exponent), (below, exponent - 1), (-power, exponent)):
            grid = block.grid(torch.stack([value, value / 3]))
            assert grid.step.item() == 2.0 ** (expected - 6)
            assert grid.low.item() == -(2.0 ** (expected + 1))
            assert grid.high.item() == 2.0 ** (expected + 1) - 2.0 ** (expected - 6)


def test_blocks_by_row_do_not_see_each_other_and_zeros_stay_zero() -> None:
    x = torch.tensor([[1.0, 0.3, -0.7], [1e-3, 3e-4, 0.0], [0.0, 0.0, 0.0]])
    grid = BlockFloatingPoint(8, dims=(1,)).grid(x)
    assert grid.step.shape == (3, 1)
    rounded = nearest(x, grid)
    assert torch.all((rounded - x).abs() <= grid.step / 2)
    assert torch.equal(rounded[2], torch.zeros(3))
    assert torch.equal(nearest(x[1], BlockFloatingPoint(8).grid(x[1])), rounded[1])
    assert torch.isfinite(stochastic(x, torch.full_like(x, 0.999), grid)).all()


def test_variance_corrected_in_blocks_keeps_noise_around_zero() -> None:
    """A mean near zero would give a block too small for its noise; 400,000 draws, 6 s.e. bands."""
    mean = torch.tensor([1e-3, -2e-4], dtype=torch.float64).repeat(200_000, 1)
    variance = torch.full_like(mean, 0.04)
    grid = variance_corrected_grid(BlockFloatingPoint(8, dims=(1,)), mean, variance)
    shape = tuple(mean.shape)
    draws = variance_corrected(
        mean, variance, normals(0, *shape), uniforms(1, *shape), uniforms(2, *shape), grid
    )
    torch.testing.assert_close(draws.mean(0), mean[0], rtol=0, atol=0.003)
    torch.testing.assert_close(draws.var(0), variance[0], rtol=0.02, atol=0)
