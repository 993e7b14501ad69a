"""Low-precision stochastic gradient HMC: one step with accumulators F, L and VC.

The underdamped Langevin diffusion of the potential U with friction γ, inverse mass u and
temperature τ,

    dx = v dt,    dv = −γ v dt − u ∇U(x) dt + sqrt(2 γ u τ) dB,

whose stationary law is exp(−U/τ) × N(0, uτ), advanced by η exactly for a frozen gradient g. With
e = exp(−γη):

    v' = e v − (u/γ)(1 − e) g + ξv               Var ξv = τ u (1 − e²)
    x' = x + ((1 − e)/γ) v − (u/γ²)(γη + e − 1) g + ξx
                                                 Var ξx = τ (u/γ²)(2γη + 4e − e² − 3)
                                                 Cov(ξx, ξv) = τ (u/γ)(1 − e)²

Accumulators: F keeps x and v in full precision and only takes the gradient at quantised weights;
L rounds both after the step; VC draws both from Q_vc, which makes noise and rounding together have
the right variance.

Source: Wang, Chen, Song, Zhang, arXiv 2310.16320. The moments above were derived anew from the
diffusion; two things differ from the printed algorithm. The gradient enters x' with a minus (with
the printed plus the variance on N(0, 1) is 1.44 instead of 1.03 at η = .09, u = 2, γ = 3). And the
printed VC draws ξx and ξv independently, which loses their covariance (variance .82): `corrected`,
the default, draws v' first and then x' given v'. Nothing can correct a rounding that alone has more
variance than the step: below Var(ξx | ξv) ≈ u γ η³ / 6 = Δ²/4 VC is over-dispersed, nearly as much
as L (FL = 4, η = .03: 1.037 and 1.040 for 1.010; FL = 2, η = .3: 1.109 and 1.149 for 1.109). There
is no Metropolis step: the law is biased at every finite η and gap Δ. Noise shared between clients
is this project's addition.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedsim.clients.quantisers import (
    BlockFloatingPoint,
    FixedPoint,
    NumberFormat,
    stochastic,
    variance_corrected,
    variance_corrected_grid,
)
from fedsim.errors import Params

SERIES_BELOW = 0.5
# z − 2 tanh(z/2) = z³ (1/12 − z²/120 + …), from the Bernoulli numbers; radius of convergence π.
SERIES = (
    1 / 12,
    -1 / 120,
    17 / 20160,
    -31 / 362880,
    691 / 79833600,
    -5461 / 6227020800,
    929569 / 10461394944000,
    -3202291 / 355687428096000,
    221930581 / 243290200817664000,
    -4722116521 / 51090942171709440000,
)


class LowPrecision(Params):
    """Number format and accumulator of a low-precision client."""

    accumulator: Literal["full", "low", "variance_corrected"] = Field(
        default="variance_corrected",
        description="F: x, v in full precision, gradient at rounded weights; L: both rounded; "
        "VC: both drawn by variance-corrected rounding.",
    )
    corrected: bool = Field(
        default=True,
        description="VC only: draw x' given v'. False: independently, as printed (biased).",
    )
    number_format: Literal["fixed_point", "block_floating_point"] = Field(
        default="fixed_point", description="Format of weights and momenta."
    )
    word_length: int = Field(default=8, ge=2, le=24, description="WL, bits of a number.")
    fraction_length: int = Field(
        default=4, ge=0, description="FL, bits after the point (fixed point); gap Δ = 2^−FL."
    )
    block: Literal["tensor", "row"] = Field(
        default="tensor",
        description="Block floating point: one exponent a tensor, or a row of dimension 0.",
    )
    gradient_format: Literal["full", "same", "block_floating_point"] = Field(
        default="block_floating_point",
        description="Q_G, stochastic: none, the weights' format, or WL-bit block floating point.",
    )

    @model_validator(mode="after")
    def _point_inside_the_word(self) -> LowPrecision:
        if self.number_format == "fixed_point" and self.fraction_length >= self.word_length:
            raise ValueError("fraction_length must be less than word_length")
        return self

    def format_for(self, ndim: int) -> NumberFormat:
        """The format of a weight or momentum tensor of one client with `ndim` dimensions."""
        if self.number_format == "fixed_point":
            return FixedPoint(self.word_length, self.fraction_length)
        return self._blocks(ndim)

    def gradient_format_for(self, ndim: int) -> NumberFormat | None:
        """The format of a gradient tensor of one client; None: full precision."""
        if self.gradient_format == "full":
            return None
        return self.format_for(ndim) if self.gradient_format == "same" else self._blocks(ndim)

    def _blocks(self, ndim: int) -> BlockFloatingPoint:
        by_row = self.block == "row" and ndim > 1
        return BlockFloatingPoint(self.word_length, tuple(range(1, ndim)) if by_row else None)


class Phase(NamedTuple):
    """A pair for position and momentum: the state itself, or one random tensor for each."""

    x: Tensor
    v: Tensor


class Noise(NamedTuple):
    """The step's normal noise: sqrt(shared_variance) shared + sqrt(private_variance) private.

    For client c of a federation, shared_variance ρ and private_variance (1−ρ)/w_c (times W_S in a
    cohort S) give the weighted average unit variance. Rounding errors are private to a client, so
    Q_vc takes them out of the private part only: at ρ = 1 nothing is left to take them out of.
    """

    private: Phase  # N(0, 1), shapes of the state
    shared: Phase  # N(0, 1), the same for all clients of the round
    private_variance: Tensor  # scalar or broadcast, ≥ 0
    shared_variance: Tensor  # scalar or broadcast, ≥ 0


class Coefficients(NamedTuple):
    """What one step needs of (η, γ, u, τ), all ≥ 0; scalar or broadcast tensors."""

    decay: Tensor  # e = exp(−γη): of v on v'
    velocity: Tensor  # (1 − e)/γ: of v on x'
    gradient_v: Tensor  # (u/γ)(1 − e): of −g on v'
    gradient_x: Tensor  # (u/γ²)(γη + e − 1): of −g on x'
    variance_v: Tensor  # Var ξv
    variance_x: Tensor  # Var ξx
    covariance: Tensor  # Cov(ξx, ξv)
    slope: Tensor  # Cov(ξx, ξv) / Var ξv
    variance_x_given_v: Tensor  # Var ξx − Cov² / Var ξv


def coefficients(
    step_size: Tensor, friction: Tensor, inverse_mass: Tensor, temperature: Tensor
) -> Coefficients:
    """Coefficients of a step, without the cancellation of the textbook forms at small γη.

    As written, Var ξx subtracts numbers near 4 to leave (2/3)(γη)³: float32 keeps no digit below
    γη ≈ .005. With z = γη, t = tanh(z/2) and g = z − 2t everything is a sum of positive terms:
    1 − e = 2t/(1+t), γη + e − 1 = g + 2t²/(1+t), (1−e)/(1+e) = t, Var(ξx | ξv) = τ (2u/γ²) g and
    Var ξx = Var(ξx | ξv) + τ (u/γ²) t (1−e)²; g has a series at small z.

    Args:
        step_size: η > 0.
        friction: γ > 0.
        inverse_mass: u > 0.
        temperature: τ ≥ 0.
    """
    z = friction * step_size
    t = torch.tanh(z / 2)
    lost = -torch.expm1(-z)  # 1 − e
    g = _excess(z)
    scale_v = temperature * inverse_mass
    scale_x = inverse_mass / (friction * friction)
    given_v = temperature * 2 * scale_x * g
    return Coefficients(
        decay=torch.exp(-z),
        velocity=lost / friction,
        gradient_v=inverse_mass / friction * lost,
        gradient_x=scale_x * (g + 2 * t * t / (1 + t)),
        variance_v=scale_v * -torch.expm1(-2 * z),
        variance_x=given_v + temperature * scale_x * t * lost * lost,
        covariance=scale_v / friction * lost * lost,
        slope=t / friction,
        variance_x_given_v=given_v,
    )


def quantise(x: Tensor, uniform: Tensor, number_format: NumberFormat | None) -> Tensor:
    """Q_W of weights or Q_G of gradients: stochastic rounding, or `x` itself for None.

    Args:
        x: any shape.
        uniform: in [0, 1), the shape of `x`.
        number_format: of the result.
    """
    return x if number_format is None else stochastic(x, uniform, number_format.grid(x))


def sghmc_f(state: Phase, gradient: Tensor, c: Coefficients, noise: Noise) -> Phase:
    """One step with full-precision accumulators (F); also the step of plain SGHMC.

    Args:
        state: (x, v), any one shape.
        gradient: Q_G(∇U(Q_W(x))), for low precision; ∇U(x) for plain SGHMC.
        c: of `coefficients`.
        noise: normals of the shape of the state.
    """
    mean = _mean(state, gradient, c)
    shared, private = torch.sqrt(noise.shared_variance), torch.sqrt(noise.private_variance)
    unit_v = shared * noise.shared.v + private * noise.private.v
    unit_x = shared * noise.shared.x + private * noise.private.x
    noise_v = torch.sqrt(c.variance_v) * unit_v
    noise_x = c.slope * noise_v + torch.sqrt(c.variance_x_given_v) * unit_x
    return Phase(mean.x + noise_x, mean.v + noise_v)


def sghmc_l(
    state: Phase,
    gradient: Tensor,
    c: Coefficients,
    noise: Noise,
    rounding: Phase,
    number_format: NumberFormat,
) -> Phase:
    """One step with low-precision accumulators (L): Q_W of both after the step.

    Rounding adds up to Δ²/4 to the variance of each, every step: over-dispersed for small η.

    Args:
        state: (x, v), on the format's grid.
        gradient: Q_G(∇U(x)).
        c: of `coefficients`.
        noise: normals of the shape of the state.
        rounding: uniforms in [0, 1) of the shape of the state.
        number_format: of x and v.
    """
    exact = sghmc_f(state, gradient, c, noise)
    return Phase(
        quantise(exact.x, rounding.x, number_format), quantise(exact.v, rounding.v, number_format)
    )


def sghmc_vc(
    state: Phase,
    gradient: Tensor,
    c: Coefficients,
    noise: Noise,
    rounding: Phase,
    category: Phase,
    number_format: NumberFormat,
    corrected: bool = True,
) -> Phase:
    """One step with variance-corrected low-precision accumulators (VC).

    v' = Q_vc(μv, Var ξv); then, `corrected`, x' = Q_vc(μx + s (v' − μv), Var(ξx | ξv)) with
    s = Cov/Var ξv: E, Var and Cov of (x', v') are the diffusion's. Not `corrected`, as printed:
    x' = Q_vc(μx, Var ξx), independent of v'. The shared noise is added to the means, the private
    variance goes through Q_vc.

    Args:
        state: (x, v), on the format's grid.
        gradient: Q_G(∇U(x)).
        c: of `coefficients`.
        noise: normals of the shape of the state.
        rounding: uniforms in [0, 1) of the shape of the state, for Q_s.
        category: more of them, independent, for Cat.
        number_format: of x and v.
        corrected: whether ξx and ξv keep their covariance.
    """
    mean = _mean(state, gradient, c)
    shared = torch.sqrt(noise.shared_variance)
    centre_v = mean.v + shared * torch.sqrt(c.variance_v) * noise.shared.v
    variance_v = (noise.private_variance * c.variance_v).expand_as(centre_v)
    grid_v = variance_corrected_grid(number_format, centre_v, variance_v)
    v = variance_corrected(centre_v, variance_v, noise.private.v, rounding.v, category.v, grid_v)

    left = c.variance_x_given_v if corrected else c.variance_x
    centre_x = mean.x + shared * torch.sqrt(left) * noise.shared.x
    if corrected:
        centre_x = centre_x + c.slope * (v - mean.v)
    variance_x = (noise.private_variance * left).expand_as(centre_x)
    grid_x = variance_corrected_grid(number_format, centre_x, variance_x)
    x = variance_corrected(centre_x, variance_x, noise.private.x, rounding.x, category.x, grid_x)
    return Phase(x, v)


def _mean(state: Phase, gradient: Tensor, c: Coefficients) -> Phase:
    """E[x', v'] given the state and the frozen gradient."""
    return Phase(
        state.x + c.velocity * state.v - c.gradient_x * gradient,
        c.decay * state.v - c.gradient_v * gradient,
    )


def _excess(z: Tensor) -> Tensor:
    """z − 2 tanh(z/2) for z ≥ 0, to a relative error of about 1e-14 in float64."""
    square = z * z
    series = torch.zeros_like(z)
    for term in reversed(SERIES):
        series = series * square + term
    # Beyond the threshold the series may overflow, but torch.where does not look at it there.
    return torch.where(z < SERIES_BELOW, z * square * series, z - 2 * torch.tanh(z / 2))
