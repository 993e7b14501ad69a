"""The test functions, their maxima, and the tilted families."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import dual_annealing

from fedsim.bandits.functions import BASES, Tilted, tilts
from fedsim.data.sets.bandit_objectives import BanditObjectives, read_row


def grid(name: str, count: int, dimension: int) -> np.ndarray:
    base = BASES[name]
    line = np.linspace(base.low, base.high, count)
    return np.stack(np.meshgrid(*[line] * dimension), -1).reshape(-1, dimension)


@pytest.mark.parametrize(
    ("name", "at", "best"),
    [
        ("himmelblau", [3.0, 2.0], 1.0),
        ("rastrigin", [0.0, 0.0], 1.0),
        ("double_sine", [0.5], 1.0),
        ("garland", [math.pi / 6], 2 * math.pi / 3 * (1 - math.pi / 6)),
    ],
)
def test_the_maxima_are_known_and_values_lie_in_the_unit_interval(
    name: str, at: list[float], best: float
) -> None:
    dimension = len(at)
    values = BASES[name].value(grid(name, 401 if dimension == 2 else 100_001, dimension))
    assert BASES[name].value(np.array([at]))[0] == pytest.approx(best)
    assert values.max() <= best + 1e-12
    assert values.min() >= -1e-12
    assert values.min() < 0.2
    found = Tilted(name, np.zeros(dimension))
    assert found.value(found.optimum()[None])[0] == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("name", list(BASES))
def test_the_optimum_of_a_tilted_function(name: str) -> None:
    """Against simulated annealing, which knows nothing of the function."""
    rng = np.random.default_rng(3)
    d = BASES[name].dimension or 2
    for _ in range(2):
        f = Tilted(name, rng.uniform(-0.1, 0.1, d))
        base = BASES[name]
        other = dual_annealing(
            lambda x, f=f: -float(f.value(np.asarray(x)[None])[0]),
            [(base.low, base.high)] * d, rng=np.random.default_rng(0), maxiter=300,
        )  # fmt: skip
        assert f.value(f.optimum()[None])[0] >= -other.fun - 1e-7


@pytest.mark.parametrize(("clients", "delta"), [(2, 0.3), (10, 0.158), (50, 0.008)])
def test_the_heterogeneity_is_exact(clients: int, delta: float) -> None:
    """sup |f_m − mean f| over a fine grid, and at the corners, where a linear function has it."""
    functions = BanditObjectives(clients=clients, delta=delta).functions(seed=4)
    points = np.concatenate([grid("himmelblau", 41, 2), [[a, b] for a in (-5, 5) for b in (-5, 5)]])
    values = np.array([f.value(points) for f in functions])
    mean = values.mean(0)
    assert np.abs(values - mean).max() == pytest.approx(delta)
    np.testing.assert_allclose(mean, BASES["himmelblau"].value(points), atol=1e-12)


def test_one_direction_cannot_differ_from_itself() -> None:
    assert not tilts(np.ones((1, 2)), 0.5).any()


def test_rows_describe_the_functions() -> None:
    params = BanditObjectives(base="rastrigin", dimension=3, clients=4, delta=0.1, noise=0.2)
    source = params.load(0)
    assert source.truth is not None
    truth = source.truth(source.examples)
    assert float(truth["delta"]) == pytest.approx(0.1)
    for row, f, optimum in zip(
        source.examples.x, params.functions(0), truth["optima"], strict=True
    ):
        read, noise, found = read_row(row)
        assert read.base == "rastrigin"
        assert noise == 0.2
        np.testing.assert_array_equal(read.weights, f.weights)
        np.testing.assert_array_equal(found, optimum)
        assert np.abs(found).max() <= 1


def test_the_parameters_survive_being_written_and_read() -> None:
    params = BanditObjectives(base="garland", clients=3)
    assert BanditObjectives(**params.model_dump()) == params
