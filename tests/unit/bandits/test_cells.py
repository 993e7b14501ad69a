"""Axes and the tree of cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedsim.bandits.axes import Axis, to_unit, to_values
from fedsim.bandits.cells import ROOT, CellTree

LINEAR = Axis(name="x", low=-2.0, high=6.0)
LOG = Axis(name="lr", low=1e-4, high=1.0, scale="log")
WHOLE = Axis(name="k", low=1, high=7, scale="integer")


def level(tree: CellTree, depth: int) -> np.ndarray:
    """Returns all cells of a depth."""
    cells = ROOT
    for step in range(depth):
        cells = tree.children(step, cells)
    return cells


@pytest.mark.parametrize("arity", [2, 3, 5])
@pytest.mark.parametrize("axes", [(LINEAR,), (LOG, LINEAR), (LINEAR, WHOLE), (WHOLE, WHOLE, LOG)])
def test_every_depth_is_a_partition_of_the_box(axes: tuple[Axis, ...], arity: int) -> None:
    """The cells of a depth are disjoint, cover the box, and children cover their parent."""
    tree = CellTree(axes, arity)
    rng = np.random.default_rng(0)
    points = to_unit(axes, to_values(axes, rng.random((200, len(axes)))))
    for depth in range(5):
        cells = level(tree, depth)
        assert np.array_equal(cells, np.unique(cells))
        low, high = tree.bounds(depth, cells)
        assert np.isclose((high - low).prod(1).sum(), 1.0)
        inside = ((points[:, None] >= low) & (points[:, None] < high)).all(2)
        assert (inside.sum(1) == 1).all()
        below = tree.children(depth, cells)
        assert np.isin(tree.parents(below), cells).all()


def test_centres_are_the_middle_in_the_axis_own_scale() -> None:
    tree = CellTree((LINEAR, LOG))
    np.testing.assert_allclose(tree.centres(0, ROOT), [[2.0, 1e-2]])
    np.testing.assert_allclose(tree.centres(1, level(tree, 1)), [[0.0, 1e-2], [4.0, 1e-2]])
    np.testing.assert_allclose(tree.centres(2, level(tree, 2))[:2], [[0.0, 1e-3], [0.0, 1e-1]])


def test_whole_numbers_are_divided_until_each_has_a_cell() -> None:
    tree = CellTree((WHOLE,))
    seen = []
    for depth in range(5):
        cells = level(tree, depth)
        values = tree.centres(depth, cells)[:, 0]
        assert np.array_equal(values, np.unique(values))
        seen.append(values.tolist())
    assert seen[0] == [4.0]
    assert seen[3] == seen[4] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_large_ranges_of_whole_numbers_are_exact() -> None:
    axis = Axis(name="k", low=0, high=2**31 - 2, scale="integer")
    tree = CellTree((axis,), 3)
    cells, depth = ROOT, 0
    while True:
        low, high = tree._bounds(depth, cells)
        if (high - low == 1).all():
            break
        cells, depth = tree.children(depth, cells)[-3:], depth + 1
    assert tree.centres(depth, cells)[-1, 0] == 2**31 - 2


@pytest.mark.parametrize("axis", [LINEAR, LOG, WHOLE])
def test_units_and_values_are_inverse(axis: Axis) -> None:
    values = axis.value(np.linspace(0, 1, 101))
    assert values.min() == pytest.approx(axis.low)
    assert values.max() == pytest.approx(axis.high)
    np.testing.assert_allclose(axis.value(axis.unit(values)), values)


def test_the_tree_ends_where_numbers_would() -> None:
    tree = CellTree((LINEAR,), 16)
    cells = np.array([16**tree.max_depth - 1])
    assert len(tree.children(tree.max_depth, cells)) == 0
    assert tree.centres(tree.max_depth, cells)[0, 0] <= 6.0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"low": 1.0, "high": 1.0}, "low must be < high"),
        ({"low": 0.0, "high": 1.0, "scale": "log"}, "needs low > 0"),
        ({"low": 0.5, "high": 3.0, "scale": "integer"}, "needs whole numbers"),
        ({"low": 0.0, "high": 2.0**33, "scale": "integer"}, "at most 2"),
    ],
)
def test_axes_that_make_no_sense_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Axis(name="x", **given)
