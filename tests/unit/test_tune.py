"""What is tried, who is given up, and who wins: on made-up times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

from fedsim.cli.tune import changes_of
from fedsim.errors import RunFailed
from fedsim.grids.execution import Execution
from fedsim.random import generator
from fedsim.scenario import Scenario
from fedsim.setup import Setup, prepare
from fedsim.tune import (
    MAX_CANDIDATES,
    MAX_TURNS,
    Candidate,
    Measured,
    Result,
    candidates,
    halving,
    tune,
    winner,
)

AUTO = Candidate("mapped", 0, 4)
ALONE = Candidate("one_by_one", 0, 4)


def mapped(chunk: int, threads: int = 4) -> Candidate:
    return Candidate("mapped", chunk, threads)


def test_chunks_and_threads_are_tried_around_the_automatic_choice() -> None:
    found = candidates(AUTO, ["mapped"], block=32, cohort=100, largest=10**6)
    assert found[0] == AUTO
    assert {c.chunk for c in found} == {0, 8, 16, 64, 100}
    assert {c.threads for c in found} == {1, 2, 4}
    assert len(found) == len(set(found)) == 15


@pytest.mark.parametrize(
    ("block", "cohort", "largest", "chunks"),
    [
        (1, 1, 100, {0}),
        (3, 5, 100, {0, 1, 2, 5}),
        (50, 100, 60, {0, 12, 25, 60}),
        (0, 0, 100, {0}),  # nothing is mapped, or the client is no loop of steps
    ],
)
def test_a_chunk_is_no_larger_than_the_cohort_or_what_fits(
    block: int, cohort: int, largest: int, chunks: set[int]
) -> None:
    found = candidates(Candidate("mapped", 0, 1), ["mapped"], block, cohort, largest)
    assert {c.chunk for c in found} == chunks


def test_one_by_one_has_no_chunks() -> None:
    found = candidates(ALONE, ["one_by_one", "mapped"], block=8, cohort=10, largest=100)
    assert [c for c in found if c.path == "one_by_one"] == [
        ALONE,
        Candidate("one_by_one", 0, 2),
        Candidate("one_by_one", 0, 1),
    ]


def test_there_are_few_candidates_on_a_large_machine() -> None:
    automatic = Candidate("mapped", 0, 96)
    found = candidates(automatic, ["mapped", "one_by_one"], 64, 1000, 10**6)
    assert len(found) == MAX_CANDIDATES
    assert found[0] == automatic
    assert {96, 64} <= {c.threads for c in found}


def clock(seconds: dict[Candidate, float], spread: float = 0.0) -> dict[Candidate, Any]:
    """Returns turns that take so long, times a drift that all share, and counts them."""
    rng = generator(0, "clock")
    drift = itertools.count()

    def turn(one: float) -> Callable[[], float]:
        return lambda: one * (1 + next(drift) / 100) * (1 + spread * rng.uniform(-1, 1))

    return {candidate: turn(one) for candidate, one in seconds.items()}


def test_the_fastest_gets_most_turns_and_wins() -> None:
    times = {AUTO: 1.0} | {mapped(c): 0.5 + c / 100 for c in range(1, 16)}
    measured = halving(clock(times, spread=0.003), [AUTO], lambda: True)
    turns = {c: len(m.seconds) for c, m in measured.items()}
    assert turns[AUTO] == turns[mapped(1)] == MAX_TURNS
    assert turns[mapped(15)] == 3
    assert sum(turns.values()) < 16 * MAX_TURNS / 3
    assert winner(measured, [AUTO]) == mapped(1)
    assert measured[mapped(1)].ratio(measured[AUTO]) == pytest.approx(0.51, abs=0.02)


def test_a_machine_that_slows_down_chooses_nobody() -> None:
    """The last candidate of every pass is asked later: pairs and turned orders make up for it."""
    measured = halving(clock({AUTO: 1.0} | {mapped(c): 1.0 for c in range(1, 8)}), [AUTO], _always)
    assert winner(measured, [AUTO]) == AUTO


def _always() -> bool:
    return True


@pytest.mark.parametrize(("gain", "wins"), [(0.03, False), (0.08, True)])
def test_a_gain_within_the_noise_changes_nothing(gain: float, wins: bool) -> None:
    other = mapped(7)
    measured = halving(clock({AUTO: 1.0, other: 1 - gain}), [AUTO], lambda: True)
    assert (winner(measured, [AUTO]) == other) is wins


def test_what_the_file_says_stays_unless_something_beats_it() -> None:
    written, other = mapped(9), mapped(3)
    close = halving(clock({AUTO: 1.0, written: 1.02}), [written, AUTO], _always)
    assert winner(close, [written, AUTO]) == written
    slow = halving(clock({AUTO: 1.0, written: 1.5, other: 2.0}), [written, AUTO], _always)
    assert winner(slow, [written, AUTO]) == AUTO


def test_time_is_kept_and_a_single_turn_decides_nothing() -> None:
    other = mapped(3)
    left = iter([True] * 3 + [False] * 100)
    measured = halving({AUTO: lambda: 1.0, other: lambda: 0.1}, [AUTO], lambda: next(left))
    assert [len(m.seconds) for m in measured.values()] == [1, 2]
    assert winner(measured, [AUTO]) == AUTO


def fails() -> float:
    raise RunFailed("does not map\n(a hint)")


def test_a_candidate_that_fails_is_left_out_with_its_reason() -> None:
    other = mapped(3)
    measured = halving({AUTO: lambda: 1.0, ALONE: fails, other: lambda: 0.5}, [AUTO], _always)
    assert measured[ALONE].problem.startswith("does not map")
    assert not measured[ALONE].seconds
    assert winner(measured, [AUTO]) == other


def test_anything_is_better_than_what_does_not_work() -> None:
    measured = halving({AUTO: fails, ALONE: lambda: 1.0, mapped(3): fails}, [AUTO], _always)
    assert winner(measured, [AUTO]) == ALONE
    assert winner({AUTO: Measured(AUTO, [], "no")}, [AUTO]) == AUTO


# What is written


def result(best: Candidate, written: Candidate = AUTO) -> Result:
    return Result(AUTO, written, best, {}, 32)


def test_one_section_serves_entries_that_agree() -> None:
    best = result(mapped(64, 2))
    fields = {"path": "mapped", "chunk": 64, "threads": 2}
    assert changes_of({None: {}, "": {}}, {"": best}) == [(("engine",), fields)]
    engines: dict[str | None, Any] = {None: {}, "A": {}, "B": {"dtype": "float64"}}
    assert changes_of(engines, {"A": best, "B": best}) == [(("engine",), fields)]
    assert changes_of(engines, {"A": result(AUTO), "B": result(AUTO)}) == []


def test_entries_that_differ_get_their_own() -> None:
    engines: dict[str | None, Any] = {None: {"chunk": 8}, "A": {}, "B": {}, "C": {"threads": 1}}
    results: dict[str, Result | str] = {
        "A": result(AUTO, mapped(8)),
        "B": result(ALONE, mapped(8)),
        "C": result(mapped(8), mapped(8, 1)),
        "D": "not to be tuned",
    }
    assert changes_of({**engines, "D": {}}, results) == [
        (("compare", "A", "engine"), {"chunk": None}),  # what the top says must not reach it
        (("compare", "B", "engine"), {"path": "one_by_one", "chunk": None, "threads": 4}),
        (("compare", "C", "engine"), {"path": "mapped", "chunk": 8, "threads": 4}),
    ]


def test_back_to_the_automatic_choice_replaces_only_what_is_there() -> None:
    back = result(AUTO, mapped(8, 1))
    changes = changes_of({None: {"path": "mapped", "chunk": 8}, "": {}}, {"": back})
    assert changes == [(("engine",), {"path": "auto", "chunk": None})]


# Measuring


def setup_of(**sections: Any) -> Setup:
    base: dict[str, Any] = {
        "rounds": 2,
        "data": {"name": "digits", "rows": 200},
        "partition": {"name": "iid", "clients": 8},
        "model": "softmax",
        "task": "classification",
        "strategy": "fedavg",
    }
    (spec,) = Scenario.from_dict(base | sections).expand()
    return prepare(spec.scenario)


def test_rounds_are_measured_and_the_setup_is_left_as_it_was() -> None:
    setup = setup_of(
        strategy={"name": "FedAdam", "eta": 0.01}, engine={"threads": 2, "chunk": 3, "trace": False}
    )
    before = {name: tensor.clone() for name, tensor in setup.arrays.items()}
    told: list[str] = []
    found = tune(setup, 2.0, told.append)
    assert found.written == Candidate("mapped", 3, 2)
    assert found.automatic.chunk == 0
    assert found.block in (4, 8)
    assert found.best in found.measured
    assert {c.path for c in found.measured} == {"mapped", "one_by_one"}
    assert all(s > 0 for m in found.measured.values() for s in m.seconds)
    assert any("turn 1" in words for words in told)
    assert all(tensor.equal(before[name]) for name, tensor in setup.arrays.items())
    assert getattr(setup.strategy, "m_t", None) is None
    assert isinstance(setup.execution, Execution)


def test_without_time_the_scenario_stays_as_it_is() -> None:
    setup = setup_of()
    found = tune(setup, 0.0)
    assert found.best == found.written == found.automatic
    assert math.isfinite(found.measured[found.automatic].milliseconds)
