"""Weighted means: against exact sums, along one fixed tree whoever comes first."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.means import SUM_CHUNK, Leaf, MeanTree, mean_dtype, weighted_mean

COUNTS = [1, 2, SUM_CHUNK - 1, SUM_CHUNK, SUM_CHUNK + 1, 5 * SUM_CHUNK + 3]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_weighted_mean_is_the_exact_mean(count: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(count, *shape, dtype=torch.float64) * 10
    w = torch.rand(count, dtype=torch.float64) * 50
    mean = weighted_mean({"x": x}, w)["x"]
    assert mean.shape == shape
    total = math.fsum(w.tolist())
    for got, column in zip(mean.reshape(-1), x.reshape(count, math.prod(shape)).T, strict=True):
        terms = [a * b for a, b in zip(column.tolist(), w.tolist(), strict=True)]
        scale = math.fsum(map(abs, terms)) / total
        assert abs(float(got) - math.fsum(terms) / total) <= 1e-14 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_floats_are_averaged_in_float32_and_kept(dtype: torch.dtype) -> None:
    x, w = torch.randn(1000, 4).to(dtype), torch.rand(1000, dtype=torch.float64)
    mean = weighted_mean({"x": x}, w)["x"]
    assert mean.dtype == dtype
    expected = (x.double() * (w / w.sum())[:, None]).sum(0)
    # one rounding to the dtype, beside the sum's own in float32
    assert (mean.double() - expected).abs().max() <= torch.finfo(dtype).eps * 0.1 + 1e-6


def test_integers_are_averaged_in_float64() -> None:
    x = torch.tensor([[1], [2], [2**40]])
    mean = weighted_mean({"x": x}, torch.ones(3).double())["x"]
    assert mean.dtype == torch.float64
    assert mean.tolist() == [(3 + 2**40) / 3]


def test_weights_of_zero_leave_out() -> None:
    x = torch.tensor([[1.0], [5.0], [3.0]])
    assert weighted_mean({"x": x}, torch.tensor([1.0, 0.0, 1.0]).double())["x"].tolist() == [2.0]
    assert weighted_mean({"x": x}, torch.zeros(3).double())["x"].isnan().all()


def test_the_mean_of_one_is_that_one_to_the_bit() -> None:
    x = torch.randn(1, 1000)
    assert torch.equal(weighted_mean({"x": x}, torch.tensor([0.3]).double())["x"], x[0])
    leaf = Leaf()
    leaf.add({"r": {"x": x[0]}}, 0.3)
    assert torch.equal(leaf.means["r"]["x"], x[0])
    assert leaf.means["r"]["x"].data_ptr() != x.data_ptr()


def by_hand(values: list[float], weights: list[float]) -> tuple[float, float] | None:
    """Returns mean and weight along ((0 1)(2 3))((4 …, by recursion over levels."""
    level: list[tuple[float, float] | None] = [
        (v, w) if w > 0 else None for v, w in zip(values, weights, strict=True)
    ]
    while len(level) > 1:
        merged: list[tuple[float, float] | None] = []
        for pair in itertools.zip_longest(level[::2], level[1::2]):
            there = [node for node in pair if node is not None]
            if len(there) == 2:
                (a, u), (b, v) = there
                merged.append((a + v / (u + v) * (b - a), u + v))
            else:
                merged.append(there[0] if there else None)
        level = merged
    return level[0]


@given(
    leaves=st.lists(
        st.tuples(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1.0, 2.5, 60.0])),
        min_size=1,
        max_size=17,
    ),
    seed=st.integers(0, 99),
)
def test_the_tree_is_one_tree_in_any_order(leaves: list[tuple[float, float]], seed: int) -> None:
    results = []
    for order in (range(len(leaves)), random.Random(seed).sample(range(len(leaves)), len(leaves))):
        tree = MeanTree(len(leaves))
        for leaf in order:
            value, weight = leaves[leaf]
            tree.add(leaf, {"r": {"x": torch.tensor([value], dtype=torch.float64)}}, weight)
        found = tree.result()
        results.append(None if found is None else float(found["r"]["x"]))
    assert results[0] == results[1]
    expected = by_hand([v for v, _ in leaves], [w for _, w in leaves])
    if expected is None:
        assert results[0] is None
    else:
        assert results[0] == pytest.approx(expected[0], rel=1e-12, abs=1e-9)


@given(
    st.lists(
        st.tuples(st.floats(-100, 100), st.floats(0, 50).filter(lambda w: w == 0 or w > 1e-6)),
        min_size=1,
        max_size=40,
    )
)
def test_a_leaf_is_a_running_mean(replies: list[tuple[float, float]]) -> None:
    leaf = Leaf()
    for value, weight in replies:
        leaf.add({"r": {"x": torch.tensor(value, dtype=torch.float64)}}, weight)
    total = math.fsum(w for _, w in replies)
    assert leaf.weight == pytest.approx(total)
    if total:
        expected = math.fsum(v * w for v, w in replies) / total
        assert float(leaf.means["r"]["x"]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_what_waits_in_a_tree_grows_with_its_depth() -> None:
    tree, most = MeanTree(64), 0
    for leaf in range(64):
        tree.add(leaf, {"r": {"x": torch.zeros(1)}}, 1.0)
        most = max(most, len(tree._waiting))
    assert most == 6


def test_mean_dtypes() -> None:
    assert mean_dtype(torch.float64) == torch.float64
    assert mean_dtype(torch.float32) == mean_dtype(torch.bfloat16) == torch.float32
    assert mean_dtype(torch.int64) == mean_dtype(torch.bool) == torch.float64
