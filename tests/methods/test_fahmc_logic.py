"""The samplers' own logic through the engine: divergence, draws, starts, resuming."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from fedsim.errors import RunFailed
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig
from tests.methods.sampling import (
    SEED,
    Memory,
    gaussian_problem,
    make_grid,
    run,
)
from tests.methods.test_fahmc import (
    BATCH,
    CHAINS,
    DIM,
    ETA,
    LOGISTIC,
    SIZES,
    START,
    WEIGHT,
    fahmc,
    gradient,
)
from tests.oracles import fahmc_numpy
from tests.oracles.gaussian import GaussianClients, random_clients
from tests.oracles.gaussian_recursion import Sampler, round_recursion


def test_divergence_ends_the_run_with_a_sentence() -> None:
    """CV at a = .4, K = 10, T = 5: spectral radius > 2; the same without CV is stable."""
    clients = random_clients(seed=2)
    sampler = Sampler(0.4 / np.sqrt(clients.smoothness), 10, 5, control_variates=True)
    assert round_recursion(clients, sampler).spectral_radius > 1.5
    settings = {
        "step_size": sampler.step_size,
        "trajectories_per_round": 5,
        "prior": "flat",
        "leapfrog_steps": 10,
    }
    start = np.zeros((CHAINS, 5))
    strategy = fahmc(control_variate=True, **settings)
    with pytest.raises(RunFailed) as caught:
        run(strategy, gaussian_problem(clients), start, 100, trace=True)
    assert re.match(
        r"round \d+: chain \d has diverged \(its root mean square is [\d.e+]+\); a smaller"
        r" step_size or fewer leapfrog_steps, or control_variate: false, would keep it stable",
        str(caught.value),
    )
    stable = run(fahmc(**settings), gaussian_problem(clients), start, 30, trace=True)
    assert np.abs(stable.theta).max() < 100


def test_kinetic_energy_shows_a_divergence() -> None:
    """Clients alike: near 1, and huge beyond the stability limit η² L = 4 of one leapfrog."""
    same = GaussianClients(np.ones((4, 1, 1)), np.zeros((4, 1)), np.full(4, 0.25))
    start = np.random.default_rng(1).normal(size=(2000, 1))
    for eta, low, high in ((0.5, 0.9, 1.1), (2.2, 10.0, np.inf)):
        strategy = fahmc(step_size=eta, prior="flat", chains=2000, temperature=1.0)
        found = run(strategy, gaussian_problem(same), start, 1)
        assert low < found.metric(1, "kinetic") < high


def test_draws_begin_after_warm_up_and_burn_in_and_are_thinned() -> None:
    """Warm-up is a descent without noise: every chain then is the noise-free program's."""
    strategy = fahmc(warm_up=2, burn_in=3, thinning=2, leapfrog_steps=3)
    found = run(strategy, LOGISTIC, START, 10)
    assert [round for round, _ in found.memory.draws] == [7, 9]
    for round, draw in found.memory.draws:
        values = draw[LOGISTIC.name].reshape(CHAINS, -1).numpy()
        np.testing.assert_array_equal(values, found.theta[round - 1])
    quiet = np.zeros((2, 1, DIM)), np.zeros((2, 1, len(SIZES), DIM))
    for chain in range(CHAINS):
        descent = fahmc_numpy.fahmc(gradient, START[chain], WEIGHT, *quiet, ETA, 3, 1.0)
        np.testing.assert_allclose(found.theta[:2, chain], descent, atol=1e-12)
    assert found.metric(10, "total_draws", "system") == 2


def test_init_sd_spreads_the_chains() -> None:
    """200 chains × 100 parameters: the standard error of the sd is .5 %."""
    given = {"theta": torch.zeros(200, 100, dtype=torch.float64)}
    assert fahmc(chains=200).initial(given, SEED)["theta"] is given["theta"]
    spread = fahmc(chains=200, init_sd=3.0)
    start = spread.initial(given, SEED)["theta"]
    assert start.dtype == torch.float64
    assert float(start.std()) == pytest.approx(3, rel=0.03)
    assert torch.equal(start, spread.initial(given, SEED)["theta"])
    assert not torch.equal(start, spread.initial(given, SEED + 1)["theta"])


@pytest.mark.parametrize("control", [False, True])
def test_resumed_run_ends_in_the_same_bits(control: bool) -> None:
    def loop(rounds: int) -> tuple[RoundLoop, Memory]:
        memory = Memory()
        strategy = fahmc(shared_variance=0.5, leapfrog_steps=3, control_variate=control)
        grid = make_grid(LOGISTIC, BATCH)
        arrays = {LOGISTIC.name: torch.from_numpy(START).reshape(CHAINS, *LOGISTIC.shape)}
        config = LoopConfig(rounds, SEED, checkpoint_rounds=0)
        return RoundLoop(strategy, grid, arrays, config, memory), memory

    whole = loop(5)[0].run().arrays[LOGISTIC.name]
    first, memory = loop(2)
    first.run()
    _, tensors, plain_state = memory.checkpoints[-1]
    second, _ = loop(5)
    second.load(tensors, plain_state)  # type: ignore[arg-type]
    assert torch.equal(second.run().arrays[LOGISTIC.name], whole)
