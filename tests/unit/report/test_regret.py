"""Regret over pulls, and the pictures of cells."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsim.bandits.axes import Axis
from fedsim.bandits.cells import ROOT, CellTree
from fedsim.report import plots
from fedsim.report.content import CellPicture
from fedsim.report.regret import regret_of


def run_of(label: str, seed: int, pulls: list[float], regret: list[float]) -> Any:
    rows = [
        (r + 1, "train", name, value)
        for name, values in (("pulls", pulls), ("regret", regret), ("simple_regret", regret))
        for r, value in enumerate(values)
    ]
    metrics = pd.DataFrame(rows, columns=["round", "split", "name", "value"])
    return SimpleNamespace(record=SimpleNamespace(label=label, seed=seed), metrics=metrics)


RUNS = [run_of("a", 0, [10, 100], [5, 50]), run_of("a", 1, [20, 60, 100], [4, 12, 20])]


def test_cumulative_regret_is_interpolated_from_zero() -> None:
    (curve,) = regret_of(RUNS, "regret")
    assert curve.pulls[[0, -1]].tolist() == [0, 100]
    np.testing.assert_allclose(curve.values, [0.5 * curve.pulls, 0.2 * curve.pulls])


def test_simple_regret_holds_until_the_next() -> None:
    (curve,) = regret_of(RUNS, "simple_regret")
    assert curve.pulls.tolist() == [10, 20, 60, 100]
    assert curve.values[0].tolist() == [5, 5, 5, 50]
    assert np.isnan(curve.values[1][0])
    assert curve.values[1][1:].tolist() == [4, 12, 20]


def test_runs_without_pulls_have_no_curve() -> None:
    other = run_of("b", 0, [], [])
    assert regret_of([other], "regret") == []
    assert [c.label for c in regret_of([*RUNS, other], "regret")] == ["a"]


def picture(axes: tuple[Axis, ...], best: list[list[float]]) -> CellPicture:
    """Returns five depths of which the half near the middle is kept."""
    tree, cells, rows = CellTree(axes), ROOT, []
    for depth in range(5):
        low, high = tree.bounds(depth, cells)
        kept = (np.abs((low + high) / 2 - 0.5) <= 0.3).all(1)
        rows += [(depth, cell, keep) for cell, keep in zip(cells, kept, strict=True)]
        cells = tree.children(depth, cells[kept])
    depths, numbers, kept_flags = (np.array(column) for column in zip(*rows, strict=True))
    arrays = {
        "names": np.array([a.name for a in axes]), "low": np.array([a.low for a in axes]),
        "high": np.array([a.high for a in axes]), "scale": np.array([a.scale for a in axes]),
        "arity": np.array(2), "depth": depths, "cell": numbers, "kept": kept_flags,
        "own_client": np.array([0, 0]), "own_depth": np.array([5, 5]), "own_cell": cells[:2],
        "best": np.array(best), "optima": np.array(best),
    }  # fmt: skip
    return CellPicture(arrays)


LOG, WHOLE = (
    Axis(name="lr", low=1e-3, high=1.0, scale="log"),
    Axis(name="k", low=1, high=8, scale="integer"),
)


@pytest.mark.parametrize(
    ("axes", "best"), [((LOG,), [[0.03]]), ((LOG, WHOLE), [[0.03, 4.0]])], ids=["line", "square"]
)
def test_cells_are_drawn_in_one_and_two_dimensions(
    axes: tuple[Axis, ...], best: list[list[float]], tmp_path: Path
) -> None:
    made = picture(axes, best)
    assert made.drawable
    figure = plots.cells_plot(made)
    png, _ = plots.save(figure, tmp_path / "cells")
    assert png.stat().st_size > 10_000
    titles = {ax.get_title(loc="left") for ax in figure.axes} | {
        ax.get_ylabel() for ax in figure.axes
    }
    assert titles & {"recommended", "Depth"}


def test_three_axes_are_not_drawn() -> None:
    axes = (LOG, WHOLE, Axis(name="x", low=0.0, high=1.0))
    assert not picture(axes, [[0.03, 4.0, 0.5]]).drawable
