"""The simulated clock: durations by hand, who is done first by brute force, speeds by their law."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedsim.clients.base import Batching, Plan
from fedsim.grids.clock import SimulatedClock, examples_of, first_done
from fedsim.grids.lanes import Stream
from tests.engines.toys import drawn


def clock(**fields: Any) -> SimulatedClock:
    """Returns a clock of clients that process ten examples for each of their partition's number."""
    return SimulatedClock(fields.pop("seed", 0), lambda kind, config, p: 10.0 * p, **fields)


def test_a_duration_is_the_sum_of_its_parts() -> None:
    own = clock(seconds=2.0, seconds_per_example=0.5, latency=0.25, bandwidth=1000.0)
    assert own.duration("train", {}, 3, 500) == 0.25 + 2 * 500 / 1000 + 2.0 + 0.5 * 30
    assert own.duration("train.gradient", {}, 0, 0) == 0.25 + 2.0
    assert own.duration("query.num_examples", {}, 3, 500) == 0.25 + 1.0


def test_a_speed_divides_the_compute_alone() -> None:
    own = clock(seconds=2.0, seconds_per_example=0.5, latency=0.25, sigma=1.0)
    for p in range(5):
        expected = 0.25 + (2.0 + 5.0 * p) / own.speed(p)
        assert own.duration("train", {}, p, 0) == pytest.approx(expected, rel=1e-15)


def test_speeds_are_the_clients_and_the_seeds() -> None:
    one, again, other = clock(sigma=1.0), clock(sigma=1.0), clock(sigma=1.0, seed=1)
    speeds = [one.speed(p) for p in range(50)]
    assert speeds == [again.speed(p) for p in reversed(range(50))][::-1]
    assert len({*speeds, *(other.speed(p) for p in range(50))}) == 100
    assert {clock().speed(p) for p in range(50)} == {1.0}


def test_speeds_are_log_normal_with_median_one() -> None:
    """Fixed seed; both bounds are five standard errors."""
    logs = np.log([clock(sigma=0.7).speed(p) for p in range(4000)])
    assert abs(logs.mean()) < 5 * 0.7 / math.sqrt(4000)
    assert abs(logs.std() - 0.7) < 5 * 0.7 / math.sqrt(2 * 4000)


def test_jitter_belongs_to_round_and_dispatch() -> None:
    own = clock(seconds=1.0, jitter=0.5)
    told = [{"server-round": r, "dispatch": d} for r in (1, 2) for d in (0, 1, 2)]
    durations = [own.duration("train", config, 1, 0) for config in told]
    assert len(set(durations)) == 6
    assert durations == [own.duration("train", config, 1, 0) for config in told]
    assert own.duration("train", {"server-round": 1}, 1, 0) == durations[0]


def test_who_is_done_first_by_brute_force() -> None:
    """Random messages, many of them done at one instant, against a sort of all of them."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        finishes = {f"m{i}": float(t) for i, t in enumerate(rng.integers(0, 4, rng.integers(1, 9)))}
        left, taken = dict(finishes), []
        while left:
            most = int(rng.integers(1, 4))
            now, done = first_done(left, most)
            assert 1 <= len(done) <= most
            assert all(left.pop(i) == now for i in done)
            assert not left or min(left.values()) >= now
            taken += done
        assert taken == sorted(finishes, key=lambda i: (finishes[i], int(i[1:])))
    with pytest.raises(ValueError, match="nothing is under way"):
        first_done({}, 1)


@pytest.mark.parametrize("kind", ["epochs", "sampled"])
@pytest.mark.parametrize("n", [1, 7, 8, 30])
@pytest.mark.parametrize("count", [0, 1, 3, 11])
def test_a_plans_examples_are_those_that_are_drawn(kind: Any, n: int, count: int) -> None:
    batching = Batching(kind, 8)
    plan = Plan(steps=count, batching=batching)
    rows = drawn(Stream(0, 1, "train"), batching, n, count, partition=0)
    assert examples_of(plan, n) == int((rows >= 0).sum())


def test_examples_of_whole_shards_and_of_none() -> None:
    plan = Plan(steps=3, batching=Batching("full"), minibatches_per_step=2, init_minibatches=1)
    assert examples_of(plan, 5) == 7 * 5
    assert examples_of(plan, 0) == 0
    assert examples_of(Plan(steps=3, batching=Batching("none")), 5) == 0


def test_a_second_dispatch_has_streams_of_its_own() -> None:
    first, second = Stream(0, 1, "train", 0), Stream(0, 1, "train", 1)
    absent = Stream(0, 1, "train")
    assert first.root("batches") == absent.root("batches") != second.root("batches")
    numbers = [s.generator("noise", 3, 0, 2).standard_normal(4) for s in (first, absent, second)]
    assert (numbers[0] == numbers[1]).all()
    assert not (numbers[0] == numbers[2]).any()
