"""Low-precision SGHMC: exact moments of a step, and the stationary variance on N(0, 1).

The stationary figures come from 20,000 independent chains over 40 states 10 steps (.9 units of
time) apart: the variance is known to about .25 %, so bands of 3 % are ten standard errors and those
of 1 % four; the seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.integrate import quad
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fedsim.clients.low_precision import (
    Coefficients,
    LowPrecision,
    Noise,
    Phase,
    coefficients,
    quantise,
    sghmc_f,
    sghmc_l,
    sghmc_vc,
)
from fedsim.clients.quantisers import BlockFloatingPoint, FixedPoint

STEP, MASS, FRICTION = 0.09, 2.0, 3.0  # η, u, γ
FIXED = FixedPoint(word_length=8, fraction_length=4)
CHAINS = 20_000
DOUBLE = torch.float64

Step = Callable[[Phase, Tensor, Coefficients, Noise, Phase, Phase], Phase]


def scalar(value: float, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def standard(
    step: float = STEP, temperature: float = 1.0, dtype: torch.dtype = DOUBLE
) -> Coefficients:
    return coefficients(*(scalar(v, dtype) for v in (step, FRICTION, MASS, temperature)))


class Source:
    """A seeded source of a step's random tensors."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self.generator, self.shape = torch.Generator().manual_seed(seed), shape

    def normal(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, dtype=DOUBLE)

    def uniform(self) -> Tensor:
        return torch.rand(self.shape, generator=self.generator, dtype=DOUBLE)

    def uniforms(self) -> Phase:
        return Phase(self.uniform(), self.uniform())

    def noise(self) -> Noise:
        private = Phase(self.normal(), self.normal())
        quiet = torch.zeros(self.shape, dtype=DOUBLE)
        return Noise(private, Phase(quiet, quiet), scalar(1.0), scalar(0.0))


def step_f(s: Phase, g: Tensor, c: Coefficients, n: Noise, r: Phase, k: Phase) -> Phase:
    return sghmc_f(s, g, c, n)


def step_l(fixed: FixedPoint = FIXED) -> Step:
    return lambda s, g, c, n, r, k: sghmc_l(s, g, c, n, r, fixed)


def step_vc(fixed: FixedPoint = FIXED, corrected: bool = True) -> Step:
    return lambda s, g, c, n, r, k: sghmc_vc(s, g, c, n, r, k, fixed, corrected)


def stationary_variance(
    step: Step, c: Coefficients, number_format: FixedPoint | None = FIXED, seed: int = 0
) -> float:
    """E x² on U = x²/2 after a burn-in of 100 steps."""
    source = Source(seed, (CHAINS,))
    state, squares = Phase(*(torch.zeros(CHAINS, dtype=DOUBLE),) * 2), []
    for t in range(500):
        weights = quantise(state.x, source.uniform(), number_format)
        gradient = quantise(weights, source.uniform(), number_format)
        state = step(state, gradient, c, source.noise(), source.uniforms(), source.uniforms())
        if t >= 100 and t % 10 == 0:
            squares.append(state.x.square().mean().item())
    return float(np.mean(squares))


def exact_variance(c: Coefficients, covariance: float = 1.0) -> float:
    """The same without Monte Carlo, in full precision, by the discrete Lyapunov equation."""
    A = np.array(
        [
            [1 - c.gradient_x.item(), c.velocity.item()],
            [-c.gradient_v.item(), c.decay.item()],
        ]
    )
    cross = covariance * c.covariance.item()
    Q = np.array([[c.variance_x.item(), cross], [cross, c.variance_v.item()]])
    return float(solve_discrete_lyapunov(A, Q)[0, 0])


@pytest.mark.parametrize("z", [1e-6, 1e-3, 0.27, 0.499, 0.501, 3.0])
def test_coefficients_are_the_integrals_of_the_diffusion(z: float) -> None:
    """Every moment as an integral over the noise's (or force's) age s, all integrands positive."""
    eta, tau = z / FRICTION, 0.7
    c = standard(eta, tau)
    rate = 2 * FRICTION * MASS * tau

    def on_v(s: float) -> float:
        return math.exp(-FRICTION * s)

    def on_x(s: float) -> float:
        return -math.expm1(-FRICTION * s) / FRICTION

    def integral(f: Callable[[float], float]) -> float:
        return eta * float(quad(lambda r: f(r * eta), 0, 1, epsabs=0, epsrel=1e-12)[0])

    slope = c.slope.item()
    expected = {
        "decay": on_v(eta),
        "velocity": integral(on_v),
        "gradient_v": MASS * integral(on_v),
        "gradient_x": MASS * integral(on_x),
        "variance_v": rate * integral(lambda s: on_v(s) ** 2),
        "variance_x": rate * integral(lambda s: on_x(s) ** 2),
        "covariance": rate * integral(lambda s: on_x(s) * on_v(s)),
    }
    for name, value in expected.items():
        assert getattr(c, name).item() == pytest.approx(value, rel=1e-11), name
    assert slope == pytest.approx(expected["covariance"] / expected["variance_v"], rel=1e-11)
    # The best linear prediction leaves the least: exact at leading order even where it cancels.
    residual = rate * integral(lambda s: (on_x(s) - slope * on_v(s)) ** 2)
    assert c.variance_x_given_v.item() == pytest.approx(residual, rel=1e-9)


@pytest.mark.parametrize("z", [1e-6, 1e-4, 1e-2, 0.3, 0.501, 2.0])
def test_coefficients_keep_their_digits_in_float32(z: float) -> None:
    exact, single = standard(z / FRICTION), standard(z / FRICTION, dtype=torch.float32)
    for name, value in exact._asdict().items():
        assert getattr(single, name).item() == pytest.approx(value.item(), rel=2e-5), name


def test_published_figures_without_monte_carlo() -> None:
    c = standard()
    assert exact_variance(c) == pytest.approx(1.0309, abs=5e-4)
    assert exact_variance(c._replace(gradient_x=-c.gradient_x)) == pytest.approx(1.440, abs=5e-4)
    assert exact_variance(c, covariance=0.0) == pytest.approx(0.8238, abs=5e-4)


@pytest.mark.slow
def test_full_precision_step_has_the_exact_stationary_variance() -> None:
    c = standard()
    found = stationary_variance(step_f, c, number_format=None)
    assert found == pytest.approx(exact_variance(c), rel=0.01)


@pytest.mark.parametrize("step", [step_f, step_vc()], ids=["F", "VC"])
def test_f_and_vc_keep_the_stationary_variance(step: Step) -> None:
    """η = .09, FL = 4, within 3 %. Plain rounding (L) is .8 % off here: see the next test."""
    c = standard()
    assert stationary_variance(step, c) == pytest.approx(exact_variance(c), rel=0.03)


@pytest.mark.slow
def test_vc_is_exact_on_a_coarse_grid_where_rounding_after_the_step_is_not() -> None:
    """η = .3, FL = 2: Var(ξx | ξv) = .025 > Δ²/4 = .016, so Q_vc can correct everything."""
    coarse, c = FixedPoint(word_length=8, fraction_length=2), standard(0.3)
    truth = exact_variance(c)
    assert stationary_variance(step_vc(coarse), c, coarse) == pytest.approx(truth, rel=0.01)
    assert stationary_variance(step_l(coarse), c, coarse) > 1.025 * truth


@pytest.mark.slow
def test_vc_cannot_correct_where_rounding_alone_has_more_variance() -> None:
    """η = .03, FL = 2: Var(ξx | ξv) is .2 % of Δ²/4; both are over-dispersed.

    The limit of the method, not of the code: no grid-valued draw has so little variance.
    """
    coarse, c = FixedPoint(word_length=8, fraction_length=2), standard(0.03)
    truth = exact_variance(c)
    assert c.variance_x_given_v.item() < 0.003 * coarse.grid(torch.zeros(1)).step.item() ** 2 / 4
    assert stationary_variance(step_vc(coarse), c, coarse) > 1.1 * truth
    assert stationary_variance(step_l(coarse), c, coarse) > 1.1 * truth


@pytest.mark.slow
def test_vc_as_printed_loses_the_covariance() -> None:
    printed = step_vc(corrected=False)
    assert stationary_variance(printed, standard()) == pytest.approx(0.82, abs=0.02)


@pytest.mark.parametrize("step", [step_f, step_vc()], ids=["F", "VC"])
def test_the_plus_sign_as_printed_is_caught(step: Step) -> None:
    c = standard()
    assert stationary_variance(step, c._replace(gradient_x=-c.gradient_x)) > 1.3


@pytest.mark.parametrize("accumulator", ["F", "L", "VC"])
def test_one_step_has_the_moments_of_the_diffusion(accumulator: str) -> None:
    """10^6 draws of one step from a grid point, at η = .3 where both variances exceed Δ²/4.

    Bands are 5 standard errors; L adds between 0 and Δ²/4 to each variance.
    """
    step = {"F": step_f, "L": step_l(), "VC": step_vc()}[accumulator]
    count, c = 1_000_000, standard(0.3)
    source = Source(3, (count,))
    start = Phase(torch.full((count,), 0.5, dtype=DOUBLE), torch.full((count,), -1.0, dtype=DOUBLE))
    gradient = torch.full((count,), 0.75, dtype=DOUBLE)
    end = step(start, gradient, c, source.noise(), source.uniforms(), source.uniforms())
    e = math.exp(-FRICTION * 0.3)
    mean_v = -e - MASS / FRICTION * (1 - e) * 0.75
    mean_x = 0.5 - (1 - e) / FRICTION - MASS / FRICTION**2 * (0.9 + e - 1) * 0.75
    assert end.v.mean().item() == pytest.approx(
        mean_v, abs=5 * (c.variance_v.item() / count) ** 0.5
    )
    assert end.x.mean().item() == pytest.approx(
        mean_x, abs=5 * (c.variance_x.item() / count) ** 0.5
    )
    added = (2.0**-4) ** 2 / 4 if accumulator == "L" else 0.0
    for found, exact in ((end.v.var(), c.variance_v), (end.x.var(), c.variance_x)):
        band = 5 * exact.item() * (2 / count) ** 0.5
        assert exact.item() - band < found.item() < exact.item() + added + band
    covariance = torch.cov(torch.stack([end.x, end.v]))[0, 1].item()
    band = 5 * (2 * c.variance_x.item() * c.variance_v.item() / count) ** 0.5
    assert covariance == pytest.approx(c.covariance.item(), abs=band)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("accumulator", ["full", "variance_corrected"])
def test_average_over_clients_has_unit_noise(rho: float, accumulator: str) -> None:
    """Var Σ w_c v'_c = Var ξv, whatever ρ: 200,000 rounds of 4 clients, 5 s.e. = 1.6 % bands.

    At ρ = 1 nothing private is left, and Q_vc adds what rounding must: Σ w_c² Δ²/4 at most.
    """
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)[:, None]
    shape, c = (4, 200_000), standard(0.3)
    source, common = Source(5, shape), Source(6, shape[1:])
    noise = Noise(
        private=Phase(source.normal(), source.normal()),
        shared=Phase(common.normal(), common.normal()),
        private_variance=(1 - rho) / weight,
        shared_variance=scalar(rho),
    )
    state = Phase(torch.zeros(shape, dtype=DOUBLE), torch.zeros(shape, dtype=DOUBLE))
    gradient = torch.zeros(shape, dtype=DOUBLE)
    if accumulator == "full":
        end = sghmc_f(state, gradient, c, noise)
    else:
        end = sghmc_vc(state, gradient, c, noise, source.uniforms(), source.uniforms(), FIXED)
    added = 0.0 if accumulator == "full" or rho < 1 else 0.3 * (2.0**-4) ** 2 / 4
    for found, exact in ((end.v, c.variance_v), (end.x, c.variance_x)):
        variance = (weight * found).sum(0).var().item()
        assert 0.984 * exact.item() < variance < 1.016 * exact.item() + added
    averages = torch.stack([(weight * end.x).sum(0), (weight * end.v).sum(0)])
    assert torch.cov(averages)[0, 1].item() == pytest.approx(c.covariance.item(), rel=0.03)


@pytest.mark.parametrize("number_format", [FIXED, BlockFloatingPoint(8)])
def test_step_can_be_mapped_over_clients_and_traced(
    number_format: FixedPoint | BlockFloatingPoint,
) -> None:
    clients, source, c = 3, Source(9, (3, 4, 2)), standard()
    state, gradient = Phase(source.normal(), source.normal()), source.normal()
    noise, rounding, category = source.noise(), source.uniforms(), source.uniforms()

    def one(
        x: Tensor, v: Tensor, g: Tensor, normal: Phase, r: Phase, k: Phase
    ) -> tuple[Tensor, Tensor]:
        quiet = Phase(torch.zeros_like(x), torch.zeros_like(v))
        own = Noise(normal, quiet, scalar(1.0), scalar(0.0))
        return tuple(sghmc_vc(Phase(x, v), g, c, own, r, k, number_format))

    inputs = (*state, gradient, noise.private, rounding, category)
    mapped = torch.vmap(one)(*inputs)
    traced = make_fx(torch.vmap(one))(*inputs)(*inputs)
    for client in range(clients):

        def pick(pair: Phase, client: int = client) -> Phase:
            return Phase(pair.x[client], pair.v[client])

        alone = one(*pick(state), gradient[client], *map(pick, (noise.private, rounding, category)))
        for whole in (mapped, traced):
            torch.testing.assert_close((whole[0][client], whole[1][client]), alone)


def test_parameters_say_what_is_wrong() -> None:
    assert LowPrecision().format_for(2) == FixedPoint(8, 4)
    assert LowPrecision().gradient_format_for(2) == BlockFloatingPoint(8, None)
    rows = LowPrecision(number_format="block_floating_point", block="row", word_length=6)
    assert rows.format_for(3) == BlockFloatingPoint(6, (1, 2))
    assert rows.format_for(1) == BlockFloatingPoint(6, None)
    assert LowPrecision(gradient_format="full").gradient_format_for(1) is None
    assert LowPrecision(gradient_format="same").gradient_format_for(1) == FixedPoint(8, 4)
    with pytest.raises(ValidationError, match="fraction_length must be less than word_length"):
        LowPrecision(word_length=4, fraction_length=4)
    with pytest.raises(ValidationError, match="word_length"):
        LowPrecision(word_length=1, fraction_length=0)
