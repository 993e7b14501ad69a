"""Low-precision number formats and the three ways to round to them, as pure torch functions.

Deterministic Q_d, stochastic Q_s and variance-corrected Q_vc quantisation, of fixed point and of
block floating point. Values stay float tensors that lie on the format's grid: low precision is
simulated, no memory is saved. Random numbers come in as tensors, nothing branches on values and
nothing is changed in place, so that every function can be vmapped and traced.

Source: Wang, Chen, Song, Zhang, "Enhancing Low-Precision Sampling via Stochastic Gradient
Hamiltonian Monte Carlo", arXiv 2310.16320, and Q_vc before it in Zhang, Wilson, De Sa,
"Low-Precision Stochastic Gradient Langevin Dynamics", arXiv 2206.09909. Reconstructed here: what
the papers' text leaves open is decided as the docstrings say.

    >>> import torch
    >>> grid = FixedPoint(word_length=8, fraction_length=4).grid(torch.zeros(1))
    >>> nearest(torch.tensor([0.10, 9.0]), grid)
    tensor([0.1250, 7.9375])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MIN_NORMAL_EXPONENT = -126  # of float32; a smaller step would be flushed to zero on some devices
MARGIN = 4.0  # standard deviations that a block's exponent leaves room for in Q_vc


class Grid(NamedTuple):
    """The representable numbers: multiples of `step` from `low` to `high`; broadcast to values."""

    step: Tensor  # Δ > 0, a power of two
    low: Tensor
    high: Tensor


class NumberFormat(Protocol):
    """What a low-precision format must say: the grid it would use for these values."""

    def grid(self, values: Tensor) -> Grid:
        """Returns the grid for `values` (any shape), in their dtype and on their device."""
        ...


@dataclass(frozen=True)
class FixedPoint:
    """WL bits of which FL after the point: Δ = 2^−FL, range [−2^(WL−FL−1), 2^(WL−FL−1) − Δ]."""

    word_length: int
    fraction_length: int

    def grid(self, values: Tensor) -> Grid:
        """The same grid whatever the values; three scalar tensors."""
        step = 2.0**-self.fraction_length
        bound = 2.0 ** (self.word_length - self.fraction_length - 1)
        return Grid(
            step=values.new_full((), step),
            low=values.new_full((), -bound),
            high=values.new_full((), bound - step),
        )


@dataclass(frozen=True)
class BlockFloatingPoint:
    """A WL-bit signed mantissa per number, one exponent E = ⌊log2 max|x|⌋ per block of numbers.

    Δ = 2^(E−(WL−2)), range [−2^(E+1), 2^(E+1) − Δ]. E is an 8-bit exponent: at most 127, and at
    least so large that Δ is a normal float32. A block of zeros has the smallest exponent.
    """

    word_length: int
    dims: tuple[int, ...] | None = None  # the dimensions that share an exponent; None: all

    def grid(self, values: Tensor) -> Grid:
        """Tensors with the block dimensions kept, of size 1."""
        dims = tuple(range(values.ndim)) if self.dims is None else self.dims
        largest = values.abs().amax(dim=dims, keepdim=True) if dims else values.abs()
        # frexp: x = m 2^k with m in [1/2, 1), so ⌊log2 x⌋ = k − 1, exactly also at powers of two.
        exponent = torch.frexp(largest).exponent - 1
        exponent = torch.where(largest > 0, exponent, torch.full_like(exponent, -(2**15)))
        exponent = exponent.clamp(MIN_NORMAL_EXPONENT + self.word_length - 2, 127)
        one = torch.ones_like(largest)
        step = torch.ldexp(one, exponent - (self.word_length - 2))
        bound = 2.0 * torch.ldexp(one, exponent)
        return Grid(step, -bound, bound - step)


def clip(x: Tensor, grid: Grid) -> Tensor:
    """Saturates at the ends of the grid. NaN stays NaN."""
    return torch.minimum(torch.maximum(x, grid.low), grid.high)


def nearest(x: Tensor, grid: Grid) -> Tensor:
    """Q_d: the nearest grid point, ties to even multiples of Δ; shape of `x`."""
    return clip(grid.step * torch.round(x / grid.step), grid)


def stochastic(x: Tensor, uniform: Tensor, grid: Grid) -> Tensor:
    """Q_s = Δ ⌊x/Δ + U⌋, clipped: unbiased inside the range, variance f(1−f)Δ², f = frac(x/Δ).

    Args:
        x: any shape.
        uniform: U in [0, 1), the shape of `x`.
        grid: broadcast to `x`.
    """
    return clip(_stochastic_unclipped(x, uniform, grid.step), grid)


def categorical(mean: Tensor, variance: Tensor, uniform: Tensor, step: Tensor) -> Tensor:
    """Cat(m, s): a draw from {−Δ, 0, Δ} with mean m and variance s.

    P(±Δ) = (s + m² ± mΔ) / (2Δ²). A law only where |m|Δ ≤ s + m² ≤ Δ²; Q_vc asks for no other.

    Args:
        mean: m, any shape.
        variance: s ≥ 0, broadcast.
        uniform: in [0, 1), the shape of the result.
        step: Δ, broadcast.
    """
    second = variance + mean * mean
    up = (second + mean * step) / (2 * step * step)
    down = (second - mean * step) / (2 * step * step)
    zero = torch.zeros_like(uniform)
    return torch.where(uniform < up, step, torch.where(uniform >= 1 - down, -step, zero))


def variance_corrected(
    mean: Tensor,
    variance: Tensor,
    normal: Tensor,
    rounding: Tensor,
    category: Tensor,
    grid: Grid,
) -> Tensor:
    """Q_vc(μ, v, Δ): a random grid point with mean μ and variance v, noise and rounding in one.

    With v0 = Δ²/4, the most that rounding can add:

    - v > v0: x = μ + sqrt(v − v0) ξ and Q_d(x) + Cat(x − Q_d(x), v0). The printed form
      sign(r) Cat(|r|, v0) is the same law, Cat being symmetric.
    - v ≤ v0: q = Q_s(μ), whose variance is vs = f(1−f)Δ², and q + Cat(0, v − vs) if v > vs. Where
      v < vs no grid-valued draw of mean μ has variance v: the variance is vs, the least possible.

    The sum is clipped last; rounding before it is not, or a value beyond the range would leave a
    residual that Cat cannot have. Clipping biases what lies near the ends.

    Args:
        mean: μ, any shape.
        variance: v ≥ 0, broadcast.
        normal: ξ ~ N(0, 1), the shape of `mean`.
        rounding: U in [0, 1) for Q_s, the shape of `mean`.
        category: U in [0, 1) for Cat, the shape of `mean`, independent of `rounding`.
        grid: broadcast.
    """
    step = grid.step
    ceiling = step * step / 4
    x = mean + torch.sqrt(torch.clamp(variance - ceiling, min=0.0)) * normal
    wide_point = step * torch.round(x / step)
    narrow_point = _stochastic_unclipped(mean, rounding, step)
    distance = torch.abs(mean - narrow_point)
    rounded = distance * (step - distance)  # vs = Δ² f (1 − f), as distance is fΔ or (1 − f)Δ

    wide = variance > ceiling
    point = torch.where(wide, wide_point, narrow_point)
    shift = torch.where(wide, x - wide_point, torch.zeros_like(x))
    spread = torch.where(wide, ceiling, torch.clamp(variance - rounded, min=0.0))
    return clip(point + categorical(shift, spread, category, step), grid)


def variance_corrected_grid(number_format: NumberFormat, mean: Tensor, variance: Tensor) -> Grid:
    """The grid that Q_vc rounds to, chosen before the draw.

    A block's exponent makes room for |μ| + 4 sqrt(v): the exponent of μ alone, as in the authors'
    code, would cut the noise of a block that is near zero. Fixed point has one grid only.
    """
    return number_format.grid(torch.abs(mean) + MARGIN * torch.sqrt(variance))


def _stochastic_unclipped(x: Tensor, uniform: Tensor, step: Tensor) -> Tensor:
    cells = x / step
    below = torch.floor(cells)
    # ⌊x/Δ + U⌋ without the sum, whose rounding would move points that are on the grid already.
    up = uniform >= 1 - (cells - below)
    return step * (below + up.to(x.dtype))
