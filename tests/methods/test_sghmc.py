"""Federated SGHMC through the engine: against a plain program, and in low precision.

Random numbers are rebuilt from the names of their streams (see test_fahmc.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from scipy.linalg import solve_discrete_lyapunov

from fedsim.clients import sghmc
from fedsim.clients.low_precision import LowPrecision
from fedsim.errors import RunFailed
from fedsim.grids.inline import InlineGrid
from fedsim.grids.lanes import SHARED, Stream
from fedsim.messages import Replies, to_record
from fedsim.random import generator
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig
from fedsim.strategies.sghmc import SGHMC, SGHMCParams
from tests.methods.sampling import (
    BERNOULLI,
    SEED,
    Memory,
    Path,
    Problem,
    gaussian_problem,
    make_grid,
    minibatches,
    regression_problem,
    run,
)
from tests.oracles import sghmc_numpy
from tests.oracles.gaussian import Array, two_groups

SIZES = (4, 12, 9, 7)
DIM, CHAINS, BATCH = 3, 2, 3
ETA, FRICTION, MASS, PRECISION, TEMPERATURE = 0.1, 3.0, 2.0, 0.7, 0.5
GAP = 2.0**-4
RNG = np.random.default_rng(0)
SHARDS = [(RNG.normal(size=(n, DIM)), RNG.integers(2, size=n).astype(float)) for n in SIZES]
WEIGHT = np.array(SIZES) / sum(SIZES)
START = RNG.normal(size=(CHAINS, DIM))
LOGISTIC = regression_problem(SHARDS, "custom", **BERNOULLI)
ALONE = regression_problem(SHARDS[1:2], "custom", **BERNOULLI)


def strategy(**options: Any) -> SGHMC:
    """The strategy under test, with the module's settings unless told otherwise."""
    common = {
        "step_size": ETA,
        "friction": FRICTION,
        "inverse_mass": MASS,
        "prior_precision": PRECISION,
        "temperature": TEMPERATURE,
        "chains": CHAINS,
    }
    return SGHMC(SGHMCParams(**{**common, **options}))


def grid(
    problem: Problem, low: LowPrecision | None = None, batch_size: int | None = None, **options: Any
) -> InlineGrid:
    """The engine over clients of this number format."""
    params = sghmc.SGHMCClientParams(batch_size=batch_size, low_precision=low)
    client = sghmc.SGHMC(params, problem.model, problem.task)
    return make_grid(problem, client=client, **options)


def normals(name: str, client: int, rounds: int, steps: int, chain: int) -> Array:
    """Returns (rounds · steps, d) numbers of one client's (or the shared) stream."""
    return np.stack(
        [
            Stream(SEED, r + 1, "train").generator(name, client, chain, s).standard_normal(DIM)
            for r in range(rounds)
            for s in range(steps)
        ]
    )


def slope(theta: Array, X: Array, y: Array, scale: float = 1.0) -> Array:
    """The gradient of the negative log posterior of rows that stand for `scale` as many."""
    return scale * X.T @ (1 / (1 + np.exp(-X @ theta)) - y) + PRECISION * theta


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
@pytest.mark.parametrize("batch_size", [None, BATCH])
@pytest.mark.parametrize(("rho", "rounds", "steps"), [(1.0, 6, 1), (0.0, 2, 3)])
def test_one_client_is_plain_sghmc(
    rho: float, rounds: int, steps: int, batch_size: int | None, path: Path
) -> None:
    """Velocity lives on from round to round: 2 rounds of 3 steps are 6 steps."""
    X, y = SHARDS[1]
    chosen = strategy(shared_variance=rho, steps_per_round=steps)
    engine = grid(ALONE, batch_size=batch_size, path=path)
    found = run(chosen, ALONE, START, rounds, engine)
    for chain in range(CHAINS):
        source, client = ("shared", SHARED) if rho else ("private", 0)
        z_x, z_v = (normals(f"{source}-{k}", client, rounds, steps, chain) for k in "xv")
        rows = np.broadcast_to(np.arange(len(y)), (rounds * steps, len(y)))
        if batch_size is not None:
            drawn = minibatches([len(y)], rounds, steps, 1, batch_size, chain)
            rows = drawn.reshape(rounds * steps, batch_size)

        def gradient(theta: Array, n: int, rows: Array = rows) -> Array:
            return slope(theta, X[rows[n]], y[rows[n]], len(y) / len(rows[n]))

        settings = (ETA, FRICTION, MASS, TEMPERATURE)
        expected = sghmc_numpy.sghmc(gradient, START[chain], z_x, z_v, *settings)
        ends = expected[steps - 1 :: steps]
        np.testing.assert_allclose(found.theta[:, chain], ends, rtol=0, atol=1e-12)
    used = steps * (len(y) if batch_size is None else batch_size)
    assert found.metric(1, "gradients", "system") == used


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("trace", [False, True])
def test_averages_after_every_step_are_centralised_sghmc(rho: float, trace: bool) -> None:
    """With the clients' noise averaged, which has unit variance, on all rows together."""
    rounds = 5
    found = run(strategy(shared_variance=rho), LOGISTIC, START, rounds, grid(LOGISTIC, trace=trace))
    X, y = (np.concatenate(parts) for parts in zip(*SHARDS, strict=True))
    for chain in range(CHAINS):
        averaged = []
        for k in "xv":
            z = np.sqrt(rho) * normals(f"shared-{k}", SHARED, rounds, 1, chain)
            for c, w in enumerate(WEIGHT):
                z = z + np.sqrt((1 - rho) * w) * normals(f"private-{k}", c, rounds, 1, chain)
            averaged.append(z)
        settings = (ETA, FRICTION, MASS, TEMPERATURE)
        expected = sghmc_numpy.sghmc(
            lambda theta, n: slope(theta, X, y), START[chain], *averaged, *settings
        )
        np.testing.assert_allclose(found.theta[:, chain], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_averaged_noise_has_the_variance_of_one_sampler(rho: float, fraction: float) -> None:
    """Without a gradient, from rest: Var x' = τ (u/γ²)(2γη + 4e − e² − 3); 10^6 numbers, 1 %."""
    dim, chains, eta = 50_000, 4, 0.4
    zeros = [(np.zeros((n, dim)), np.zeros(n)) for n in (1, 2, 3, 5, 7)]
    problem = regression_problem(zeros)
    options = {"shared_variance": rho, "step_size": eta, "prior": "flat", "chains": chains}
    moved = []
    for seed in range(5):
        chosen = strategy(fraction_train=fraction, **options)
        found = run(
            chosen, problem, np.zeros((chains, dim)), 1, grid(problem, seed=seed), seed=seed
        )
        moved.append(found.theta[0])
    e = np.exp(-FRICTION * eta)
    exact = MASS / FRICTION**2 * (2 * FRICTION * eta + 4 * e - e**2 - 3)
    assert np.var(moved) == pytest.approx(TEMPERATURE * exact, rel=0.01)


FORMATS = {
    "F": LowPrecision(accumulator="full"),
    "L": LowPrecision(accumulator="low", gradient_format="same"),
    "VC": LowPrecision(),
    "VC as printed": LowPrecision(corrected=False, gradient_format="full"),
    "block": LowPrecision(number_format="block_floating_point", block="row"),
}


@pytest.mark.parametrize("low", list(FORMATS.values()), ids=list(FORMATS))
@pytest.mark.parametrize("trace", [False, True])
def test_mapped_is_one_by_one(low: LowPrecision, trace: bool) -> None:
    """Ragged minibatches, two chains, a part of the clients; rounding amplifies nothing."""
    chosen: dict[str, Any] = {"shared_variance": 0.3, "steps_per_round": 2, "fraction_train": 0.75}
    paths: tuple[Path, Path] = ("mapped", "one_by_one")
    mapped, alone = (
        run(
            strategy(**chosen),
            LOGISTIC,
            START,
            3,
            grid(LOGISTIC, low, BATCH, path=path, trace=trace),
        ).theta
        for path in paths
    )
    np.testing.assert_allclose(mapped, alone, rtol=0, atol=1e-9)


def replies(low: LowPrecision, rounds: int = 1) -> Replies:
    """The clients' replies to the last of some rounds."""
    chosen, engine = strategy(shared_variance=0.3), grid(LOGISTIC, low)
    record = to_record({LOGISTIC.name: torch.from_numpy(START).reshape(CHAINS, 1, DIM)})
    for server_round in range(1, rounds + 1):
        config = ConfigRecord({"seed": SEED, "server-round": server_round})
        for exchange in chosen.exchanges(server_round):
            messages = exchange.configure(server_round, record, config, engine)
            answers = engine.send_and_receive(messages)
            record = exchange.aggregate(server_round, answers)[0] or record
    engine.close()
    assert isinstance(answers, Replies)
    return answers


@pytest.mark.parametrize("kind", ["L", "VC", "VC as printed"])
def test_what_clients_send_lies_on_the_grid(kind: str) -> None:
    """Also after averages, which do not, came back; 8 bits of which 4 after the point."""
    stacked = replies(FORMATS[kind], rounds=2)
    for record in ("arrays", "velocity"):
        units = stacked.arrays[record][LOGISTIC.name] / GAP
        assert torch.equal(units, units.round())
        assert units.min() >= -128
        assert units.max() <= 127
        assert len(units.unique()) > 5


def test_accumulator_f_does_not_round_the_state() -> None:
    units = replies(FORMATS["F"]).arrays["arrays"][LOGISTIC.name] / GAP
    assert not torch.equal(units, units.round())


@pytest.mark.parametrize("kind", ["L", "VC"])
def test_draws_of_one_client_lie_on_the_grid(kind: str) -> None:
    found = run(strategy(), ALONE, START, 4, grid(ALONE, FORMATS[kind]))
    assert np.array_equal(found.theta / GAP, np.round(found.theta / GAP))


def stationary_variance(
    low: LowPrecision | None, step_size: float, clients: int, rho: float
) -> float:
    """E x² under the prior N(0, 1) alone: 20,000 numbers × 40 states .9 units of time apart.

    The standard error is about .25 %.
    """
    chains, dim = 4, 5_000
    problem = regression_problem(
        [(np.zeros((c + 1, dim)), np.zeros(c + 1)) for c in range(clients)]
    )
    steps = round(0.9 / step_size)
    options: dict[str, Any] = {"prior_precision": 1.0, "temperature": 1.0, "chains": chains}
    if clients > 1:  # averages after every step
        options |= {"steps_per_round": 1}
    else:
        options |= {"steps_per_round": steps}
    chosen = strategy(step_size=step_size, shared_variance=rho, **options)
    each = steps // chosen.params.steps_per_round
    rounds = 50 * each
    found = run(chosen, problem, np.zeros((chains, dim)), rounds, grid(problem, low))
    assert found.metric(rounds, "kinetic") == pytest.approx(1, abs=0.3)
    return float(np.mean(found.theta[10 * each :: each] ** 2))


def exact_variance(step_size: float) -> float:
    """Of full precision on N(0, 1), from the textbook moments by the Lyapunov equation."""
    gamma, u, z = FRICTION, MASS, FRICTION * step_size
    e = np.exp(-z)
    A = [[1 - u / gamma**2 * (z + e - 1), (1 - e) / gamma], [-u / gamma * (1 - e), e]]
    cross = u / gamma * (1 - e) ** 2
    Q = [[u / gamma**2 * (2 * z + 4 * e - e**2 - 3), cross], [cross, u * (1 - e**2)]]
    return float(solve_discrete_lyapunov(np.array(A), np.array(Q))[0, 0])


@pytest.mark.parametrize(
    "kind",
    ["full precision", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("F", "VC"))],
)
def test_stationary_variance_through_the_engine(kind: str) -> None:
    """η = .09, u = 2, γ = 3, FL = 4: within 3 % of full precision (1.031)."""
    low = {
        "full precision": None,
        "F": LowPrecision(accumulator="full", gradient_format="same"),
        "VC": LowPrecision(gradient_format="same"),
    }[kind]
    found = stationary_variance(low, 0.09, clients=1, rho=1.0 if low is None else 0.0)
    assert found == pytest.approx(exact_variance(0.09), rel=0.03)


@pytest.mark.slow
def test_vc_of_several_clients_needs_private_noise() -> None:
    """η = .3, FL = 2, three clients, averages after every step.

    Private noise has room for the rounding errors; with shared noise alone they come on top, as
    with plain rounding.
    """
    coarse: dict[str, Any] = {"fraction_length": 2, "gradient_format": "full"}
    vc = LowPrecision(**coarse)
    exact = exact_variance(0.3)
    private, shared = (stationary_variance(vc, 0.3, 3, rho) for rho in (0.0, 1.0))
    plain = stationary_variance(LowPrecision(accumulator="low", **coarse), 0.3, 3, 0.0)
    assert private == pytest.approx(exact, rel=0.006)
    assert shared > 1.008 * exact
    assert plain > 1.008 * exact


def test_divergence_ends_the_run_with_a_sentence() -> None:
    problem = gaussian_problem(two_groups())
    wild = strategy(step_size=4.0, prior="flat", friction=0.1)
    with pytest.raises(RunFailed, match=r"chain \d has diverged .* or more friction would keep it"):
        run(wild, problem, np.ones((CHAINS, 1)), 200, grid(problem, trace=True))


def test_resumed_run_ends_in_the_same_bits() -> None:
    """The velocity is in the checkpoint: without it the chains would start from rest."""

    def loop(rounds: int) -> tuple[RoundLoop, Memory]:
        memory = Memory()
        engine = grid(LOGISTIC, FORMATS["VC"], BATCH)
        arrays = {LOGISTIC.name: torch.from_numpy(START).reshape(CHAINS, 1, DIM)}
        config = LoopConfig(rounds, SEED, checkpoint_rounds=0)
        chosen = strategy(shared_variance=0.5)
        return RoundLoop(chosen, engine, arrays, config, memory), memory

    whole = loop(5)[0].run().arrays[LOGISTIC.name]
    first, memory = loop(2)
    first.run()
    _, tensors, plain = memory.checkpoints[-1]
    second, _ = loop(5)
    second.load(tensors, plain)  # type: ignore[arg-type]
    assert torch.equal(second.run().arrays[LOGISTIC.name], whole)


def test_warm_up_is_a_descent_without_noise() -> None:
    """Heavy-ball descent ends at the mode, which Newton's method finds, too."""
    found = run(strategy(warm_up=150), LOGISTIC, START, 150, grid(LOGISTIC, trace=True))
    X, y = (np.concatenate(parts) for parts in zip(*SHARDS, strict=True))
    mode = np.zeros(DIM)
    for _ in range(20):
        p = 1 / (1 + np.exp(-X @ mode))
        mode -= np.linalg.solve(
            (X.T * (p * (1 - p))) @ X + PRECISION * np.eye(DIM), slope(mode, X, y)
        )
    np.testing.assert_allclose(found.theta[-1], np.tile(mode, (CHAINS, 1)), atol=1e-6)
    assert not found.memory.draws


def test_streams_of_rounding_are_uniform_and_separate() -> None:
    """Guards the names: two kinds of rounding that shared a stream would be correlated."""
    names = sghmc.SGHMC(
        sghmc.SGHMCClientParams(low_precision=LowPrecision()), LOGISTIC.model, LOGISTIC.task
    )._uniforms()
    assert len(names) == len(set(names)) == 6
    drawn = np.stack([generator(SEED, f"train/{n}", 1, 0, 0, 0).random(10_000) for n in names])
    assert np.abs(np.corrcoef(drawn) - np.eye(6)).max() < 0.05
