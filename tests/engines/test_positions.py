"""Which rows a client visits: properties of `positions`."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedsim.clients.base import Batching
from fedsim.grids.lanes import ARGSORT_LIMIT, positions
from fedsim.random import generator

SIZES = st.integers(1, 40)


@given(n=st.integers(0, 60), size=SIZES, epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_row_once_an_epoch(n: int, size: int, epochs: int, seed: int) -> None:
    per_epoch = max(-(-n // size), 1)
    table = positions(Batching("epochs", size), n, epochs * per_epoch, generator(seed, "t"))
    assert table.shape == (epochs * per_epoch, size)
    for epoch in table.reshape(epochs, -1):
        assert sorted(epoch[epoch >= 0]) == list(range(n))
    # padding stands at the end of an epoch's last batch and nowhere else
    full, last = divmod(n, size)
    expected = ([size] * full + [last] * (last > 0)) or [0]
    assert (table >= 0).sum(1).tolist() == expected * epochs


@given(n=st.integers(1, 60), size=SIZES, count=st.integers(1, 20), seed=st.integers(0, 9))
def test_a_run_of_fewer_steps_sees_the_same_rows(n: int, size: int, count: int, seed: int) -> None:
    for kind in ("epochs", "sampled"):
        long = positions(Batching(kind, size), n, count + 7, generator(seed, "t"))
        short = positions(Batching(kind, size), n, count, generator(seed, "t"))
        np.testing.assert_array_equal(long[:count], short)


@given(n=st.integers(1, 60), size=SIZES, count=st.integers(1, 9), seed=st.integers(0, 9))
def test_samples_are_without_replacement(n: int, size: int, count: int, seed: int) -> None:
    table = positions(Batching("sampled", size), n, count, generator(seed, "t"))
    assert table.shape == (count, size)
    for row in table:
        kept = row[row >= 0]
        assert len(kept) == len(set(kept)) == min(n, size)
        assert kept.max() < n


def test_large_shards_are_sampled_without_replacement() -> None:
    n = ARGSORT_LIMIT + 1
    table = positions(Batching("sampled", 100), n, 5, generator(0, "t"))
    assert all(len(set(row)) == 100 for row in table)
    assert table.min() >= 0
    assert table.max() < n


def test_every_row_is_as_likely() -> None:
    for n in (12, ARGSORT_LIMIT + 4):  # both ways of drawing
        size = n // 2
        count = 4000 if n == 12 else 40
        table = positions(Batching("sampled", size), n, count, generator(1, "t"))
        share = np.bincount(table.ravel(), minlength=n) / count
        # each row's count is Binomial(count, 1/2)
        assert abs(share.mean() - 0.5) < 1e-12
        assert np.abs(share - 0.5).max() < 6 * 0.5 / count**0.5


def test_full_and_none() -> None:
    assert positions(Batching("full"), 4, 3, generator(0, "t")).tolist() == [[0, 1, 2, 3]] * 3
    assert positions(Batching("none"), 4, 3, generator(0, "t")).shape == (3, 0)
    assert positions(Batching("epochs", 5), 4, 0, generator(0, "t")).shape == (0, 0)
