"""Searches by one client: HCT against its definition, and what all of them keep."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedsim.bandits.axes import Axis, Floats
from fedsim.bandits.cells import CellTree
from fedsim.bandits.hct import HCT
from fedsim.bandits.learners import NEW, PNE, TPE, Learner, RandomSearch, State, cell_means
from fedsim.bandits.rules import Confidence, log_term

AXES = (Axis(name="x", low=0.0, high=1.0), Axis(name="k", low=1, high=5, scale="integer"))
TREE = CellTree(AXES)
NU1, RHO, C, DELTA = 1.0, 0.6, 0.1, 0.05


def reward(points: Floats, rng: np.random.Generator) -> Floats:
    x, k = points.T
    best = 1 - np.abs(x - 0.3) - 0.05 * np.abs(k - 4)
    return best + 0.1 * rng.standard_normal(len(points))


MAKE: dict[str, Callable[[State], Learner]] = {
    "pne": lambda s: PNE(TREE, Confidence(log_term(4000, 1, DELTA), NU1, RHO, C), 2, s),
    "hct": lambda s: HCT(TREE, NU1, RHO, C, DELTA, s),
    "random": lambda s: RandomSearch(AXES, 5, s),
    "tpe": lambda s: TPE(AXES, 2, s),
}


def search(learner: Learner, budget: int, rng: np.random.Generator) -> Floats:
    """Returns all points that were pulled."""
    pulled = []
    while budget:
        points = learner.ask(budget, rng)
        assert 1 <= len(points) <= budget
        learner.tell(points, reward(points, rng))
        budget -= len(points)
        pulled.append(points)
    return np.concatenate(pulled)


@pytest.mark.parametrize("name", MAKE)
def test_what_is_found_is_good_and_in_the_box(name: str) -> None:
    if name == "tpe":
        pytest.importorskip("optuna")
    learner = MAKE[name](NEW)
    assert learner.recommend() is None
    points = search(learner, 60 if name == "tpe" else 1500, np.random.default_rng(0))
    assert (points >= [0, 1]).all()
    assert (points <= [1, 5]).all()
    assert np.array_equal(points[:, 1], np.rint(points[:, 1]))
    best = learner.recommend()
    assert best is not None
    assert 1 - abs(best[0] - 0.3) - 0.05 * abs(best[1] - 4) > 0.75


@pytest.mark.parametrize("name", MAKE)
def test_a_search_goes_on_from_its_state(name: str) -> None:
    if name == "tpe":
        pytest.importorskip("optuna")
    budget = 40 if name == "tpe" else 300
    one, other = MAKE[name](NEW), MAKE[name](NEW)
    a, b = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(3):
        first = search(one, budget, a)
        other = MAKE[name]({k: np.array(v) for k, v in other.state().items()})
        np.testing.assert_array_equal(search(other, budget, b), first)


def test_hct_follows_its_definition() -> None:
    """Every U and B, written again from the formulas, after each pull; and who is split."""
    learner, rng = HCT(TREE, NU1, RHO, C, DELTA), np.random.default_rng(2)
    rewards: dict[int, list[float]] = {}
    for t in range(1, 400):
        ahead = 2 ** math.ceil(math.log2(t))
        log = math.log(1 / min(1.0, (RHO / (3 * NU1)) ** 0.125 * DELTA / ahead))

        def upper(i: int, log: float = log) -> float:
            own = rewards.get(i, [])
            smooth = NU1 * RHO ** learner.depth[i]
            return np.mean(own) + smooth + C * math.sqrt(log / len(own)) if own else math.inf

        def bound(i: int, upper: Callable[[int], float] = upper) -> float:
            below = learner.children[i]
            return min(upper(i), max(map(bound, below))) if below else upper(i)

        def threshold(i: int, log: float = log) -> int:
            return math.ceil(C**2 * log / (NU1 * RHO ** learner.depth[i]) ** 2)

        node = 0
        while learner.children[node] and len(rewards.get(node, [])) >= threshold(node):
            node = max(learner.children[node], key=bound)
        points = learner.ask(1, rng)
        np.testing.assert_array_equal(points[0], learner.points[node])
        values = reward(points, rng)
        rewards.setdefault(node, []).append(float(values[0]))
        leaf = not learner.children[node]
        learner.tell(points, values)
        assert bool(learner.children[node]) == (not leaf or len(rewards[node]) >= threshold(node))


def test_means_leave_failures_out() -> None:
    values = np.array([1.0, np.nan, 3.0, np.nan])
    means, good = cell_means(values, np.array([3, 1, 0]))
    assert good.tolist() == [2, 0, 0]
    assert means[0] == 2.0
    assert np.isnan(means[1:]).all()
