import math

import numpy as np
import pytest

from fedsim.report.compare import Cell, best_of, compare, headline_columns
from fedsim.report.content import ReportInput
from fedsim.report.figures import figures
from fedsim.report.series import cost, last, series
from tests.unit.report.fakes import FakeRecord, FakeRun, fake_runs, frame


def run(
    label: str, seed: int, rows: list[tuple[int, str, str, float]], status: str = "finished"
) -> FakeRun:
    return FakeRun(f"{label}-{seed}", FakeRecord(label, seed), frame(rows), status)


def test_series_stack_the_seeds_over_the_rounds_they_share() -> None:
    a = run("A", 0, [(1, "test", "nll", 1.0), (2, "test", "nll", 0.5), (3, "test", "nll", 0.4)])
    b = run("A", 1, [(1, "test", "nll", 2.0), (2, "test", "nll", 1.5)])
    (found,) = series([a, b], "test", "nll")
    assert found.x.tolist() == [1, 2]
    assert found.y.tolist() == [[1.0, 0.5], [2.0, 1.5]]
    assert series([a], "test", "absent") == []
    assert series([a], "test", "nll", "bytes") == []  # what a run has not logged is not drawn


def test_costs_add_up_to_the_evaluation_and_nothing_is_spent_before_the_first_round() -> None:
    rows = [(0, "test", "nll", 3.0), (2, "test", "nll", 1.0), (4, "test", "nll", 0.5)]
    rows += [(r, "system", "bytes_up", 10.0) for r in (1, 2, 3, 4)]
    rows += [(r, "system", "bytes_down", 5.0) for r in (1, 2, 3, 4)]
    (found,) = series([run("A", 0, rows)], "test", "nll", "bytes")
    assert found.x.tolist() == [0, 30, 60]
    total = cost(frame(rows), "bytes")
    assert total is not None
    assert total.to_dict() == {1: 15, 2: 30, 3: 45, 4: 60}
    assert cost(frame(rows), "gradients") is None


def test_simulated_seconds_are_an_axis_for_the_runs_that_have_them() -> None:
    rows = [(r, "test", "nll", 1.0 / r) for r in (1, 2, 3)]
    timed = rows + [(r, "system", "simulated_seconds", 2.5) for r in (1, 2, 3)]
    runs = [run("timed", 0, timed), run("untimed", 0, rows)]
    (found,) = series(runs, "test", "nll", "simulated_seconds")
    assert (found.label, found.x.tolist()) == ("timed", [2.5, 5.0, 7.5])

    def names(own: list[FakeRun]) -> set[str]:
        report = ReportInput("t", own, "c", "y", columns=["test/nll"])
        return {shown.name for shown in figures(report)}

    assert "curves_simulated_seconds" in names(runs)
    assert "curves_simulated_seconds" not in names(runs[1:])


def test_last_is_of_the_latest_round_whatever_the_order() -> None:
    rows = frame([(5, "test", "nll", 0.5), (2, "test", "nll", 2.0)])
    assert last(rows, "test", "nll") == 0.5
    assert math.isnan(last(rows, "test", "absent"))


def test_comparison_averages_over_seeds() -> None:
    runs = [run("A", s, [(1, "test", "accuracy", v)]) for s, v in enumerate((0.8, 0.9))]
    runs.append(run("B", 0, [(1, "test", "accuracy", 0.5)], "failed"))
    found = compare(runs)
    assert found.columns == ("test/accuracy",)
    a, b = found.rows
    assert a.cells["test/accuracy"].mean == pytest.approx(0.85)
    assert a.cells["test/accuracy"].sd == pytest.approx(np.std([0.8, 0.9], ddof=1))
    assert b.cells["test/accuracy"].sd is None
    assert (a.seeds, b.statuses) == ((0, 1), ("failed",))


def test_headline_prefers_the_test_split_and_adds_ood() -> None:
    found = headline_columns(fake_runs((0,)))
    assert found == ("test/accuracy", "test/nll", "test/brier", "test/ece", "ood/auroc")
    assert headline_columns([run("A", 0, [(1, "client", "rmse", 1.0)])]) == ("client/rmse",)
    assert headline_columns([run("A", 0, [])]) == ()


def cell(*values: float) -> Cell:
    return Cell(values)


def test_best_is_not_over_claimed() -> None:
    clear, close, far = cell(0.90, 0.91), cell(0.895, 0.909), cell(0.5, 0.51)
    assert best_of([clear, close, far], "test/accuracy") == [True, True, False]
    assert best_of([clear, close, far], "test/nll") == [False, False, True]
    assert best_of([clear, close], "test/accuracy") == [False, False]  # nothing told apart
    assert best_of([cell(0.9), cell(0.1)], "test/accuracy") == [False, False]  # one seed
    assert best_of([clear, cell(math.nan, 0.2)], "test/accuracy") == [False, False]
    assert best_of([clear, far], "test/unheard_of") == [False, False]
    assert best_of([clear], "test/accuracy") == [False]


def test_a_diverged_seed_makes_the_mean_nan() -> None:
    runs = [run("A", s, [(1, "test", "nll", v)]) for s, v in enumerate((0.8, math.nan))]
    assert str(compare(runs).rows[0].cells["test/nll"]) == "NaN"
