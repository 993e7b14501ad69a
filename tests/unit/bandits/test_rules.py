"""Widths and elimination: against brute force, and soundness on random instances."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedsim.bandits.rules import (
    Confidence,
    best_cell,
    global_survivors,
    intersected,
    local_survivors,
    log_term,
    spread,
    survivors,
)


def test_pulls_make_the_width_the_smoothness() -> None:
    confidence = Confidence(log_term(10_000, 10, 0.01), 1.0, 0.5, 0.1)
    assert confidence.log_term == pytest.approx(math.log(1e7))
    for depth in range(12):
        pulls = confidence.pulls(depth)
        assert confidence.width(pulls) <= confidence.smoothness(depth) * (1 + 1e-12)
        if pulls > 1:
            assert confidence.width(pulls - 1) > confidence.smoothness(depth)
        assert confidence.pulls(depth, clients=7) == math.ceil(pulls / 7)
        assert confidence.pulls(depth, clients=7, least=5) == max(math.ceil(pulls / 7), 5)
    assert confidence.width(0) == math.inf


def test_survivors_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = int(rng.integers(1, 9))
        low = rng.random(n)
        high, among = low + rng.random(n), rng.random(n) < 0.8
        kept = survivors(low, high, 0.1, among)
        for i in range(n):
            beaten = any(high[i] + 0.1 < low[j] for j in range(n) if among[j])
            assert kept[i] == (among[i] and not beaten)


def test_the_optimal_cell_survives_wherever_the_intervals_hold() -> None:
    """Δ-close functions, optimum within ν1 ρ^h of its cell's centre, means within their widths."""
    rng = np.random.default_rng(2)
    for _ in range(500):
        n, clients = int(rng.integers(2, 12)), int(rng.integers(1, 6))
        delta, slack, wide, narrow = rng.random(4) * [0.5, 0.5, 0.2, 0.4]
        base = rng.random(n)
        apart = rng.uniform(-1, 1, (clients, n))
        apart -= apart.mean(0)
        apart *= delta / max(np.abs(apart).max(), 1e-12)
        values = base + apart
        g = base + rng.uniform(-wide, wide, n)
        for own in values:
            optimum = int(rng.integers(n))
            own = own.copy()
            best = own[optimum] + slack  # somewhere in that cell
            if own.max() > best:
                continue  # another centre would be above the optimum
            mean = own + rng.uniform(-narrow, narrow, n)
            assert global_survivors(g, wide, slack + 2 * delta)[optimum]
            low, high = intersected(g, wide, delta, mean, np.full(n, narrow))
            assert (low <= own + 1e-12).all()
            assert (high >= own - 1e-12).all()
            assert survivors(low, high, slack, np.ones(n, bool))[optimum]


def test_what_is_unknown_is_neither_dropped_nor_drops_others() -> None:
    mean = np.array([0.9, np.nan, 0.1])
    assert global_survivors(mean, 0.05, 0.1).tolist() == [True, True, False]
    own = np.array([np.nan, np.nan, 0.1])
    low, high = intersected(mean, 0.05, 0.0, own, np.array([np.inf, np.inf, 0.2]))
    assert (low[1], high[1]) == (-np.inf, np.inf)
    assert low[0] == pytest.approx(0.85)
    assert best_cell(low, high, np.ones(3, bool)) == 0
    assert best_cell(low, high, np.array([False, True, False])) is None


def test_bounds_that_contradict_leave_the_best_cell() -> None:
    low, high = np.array([0.8, 0.1]), np.array([0.2, 0.2])  # of the first, no value is possible
    everyone = np.ones(2, bool)
    assert not survivors(low, high, 0.0, everyone).any()
    assert local_survivors(low, high, 0.0, everyone).tolist() == [True, False]


def test_pulls_are_spread_evenly() -> None:
    assert spread(11, 4).tolist() == [3, 3, 3, 2]
    assert spread(0, 3).tolist() == [0, 0, 0]
