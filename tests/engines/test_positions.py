"""Which rows a client visits: properties of `positions`, alone and among others."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedsim.clients.base import Batching
from fedsim.grids import minibatches
from fedsim.grids.lanes import Stream
from fedsim.grids.minibatches import ARGSORT_LIMIT, GOLDEN, mix, positions, stream_keys
from tests.engines.toys import drawn

SIZES = st.integers(1, 40)
WORD = 2**64 - 1


def stream(seed: int) -> Stream:
    """Returns a stream for a seed."""
    return Stream(seed, 1, "train")


def cohort(
    batching: Batching, sizes: list[int], counts: list[int], chains: int = 1, seed: int = 0
) -> np.ndarray[Any, Any]:
    """Returns the positions of several clients drawn together."""
    keys = stream_keys(stream(seed).root("batches"), np.arange(len(sizes)), range(chains))
    return positions(
        batching,
        np.array(sizes),
        np.array(counts),
        keys,
        lambda client, chain: stream(seed).generator("batches", client, chain, 0),
    )


def splitmix(state: int) -> int:
    """Returns SplitMix64's output in Python's integers, from the paper's figure."""
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def test_the_words_are_splitmix64() -> None:
    # the published outputs of seed 1234567
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    steps = np.arange(1, 4, dtype=np.uint64)
    assert mix(np.uint64(1234567) + GOLDEN * steps).tolist() == known


def test_a_shuffle_is_the_order_of_its_words() -> None:
    root, client, n = stream(3).root("batches"), 5, 11
    golden = int(GOLDEN)
    own = splitmix((root + golden * (client + 1)) & WORD)
    key = splitmix((own + golden) & WORD)  # chain 0
    table = drawn(stream(3), Batching("epochs", n), n, 2, client)
    for epoch in range(2):
        words = [splitmix((key + golden * ((epoch << 32) + i + 1)) & WORD) for i in range(n)]
        assert table[epoch].tolist() == sorted(range(n), key=words.__getitem__)


@given(n=st.integers(0, 60), size=SIZES, epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_row_once_an_epoch(n: int, size: int, epochs: int, seed: int) -> None:
    per_epoch = max(-(-n // size), 1)
    table = drawn(stream(seed), Batching("epochs", size), n, epochs * per_epoch, 0)
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
        long = drawn(stream(seed), Batching(kind, size), n, count + 7, 2)
        short = drawn(stream(seed), Batching(kind, size), n, count, 2)
        np.testing.assert_array_equal(long[:count], short)


@given(
    clients=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12)), min_size=1, max_size=6),
    size=st.integers(1, 20),
    kind=st.sampled_from(["epochs", "sampled"]),
    limit=st.sampled_from([2**20, 40]),
)
def test_the_others_do_not_matter(
    clients: list[tuple[int, int]], size: int, kind: Any, limit: int
) -> None:
    sizes, counts = map(list, zip(*clients, strict=True))
    before, minibatches.SORT_KEYS = minibatches.SORT_KEYS, limit
    try:
        together = cohort(Batching(kind, size), sizes, counts, chains=2)
    finally:
        minibatches.SORT_KEYS = before
    assert together.shape == (len(sizes), 2, max(counts), size)
    for i, (n, count) in enumerate(clients):
        for chain in range(2):
            alone = drawn(stream(0), Batching(kind, size), n, count, i, chain)
            np.testing.assert_array_equal(together[i, chain, :count], alone)
            assert (together[i, chain, count:] == -1).all()


@given(n=st.integers(1, 60), size=SIZES, count=st.integers(1, 9), seed=st.integers(0, 9))
def test_samples_are_without_replacement(n: int, size: int, count: int, seed: int) -> None:
    table = drawn(stream(seed), Batching("sampled", size), n, count, 0)
    assert table.shape == (count, size)
    for row in table:
        kept = row[row >= 0]
        assert len(kept) == len(set(kept)) == min(n, size)
        assert kept.max() < n


def test_samples_come_in_the_order_of_the_rows() -> None:
    # a partial sort leaves them in another order on another processor, or beside a larger client
    for n in (12, 1000, ARGSORT_LIMIT):
        together = cohort(Batching("sampled", 9), [n, ARGSORT_LIMIT], [20, 20])
        assert (np.diff(together, axis=-1) > 0).all()
        np.testing.assert_array_equal(together[0], cohort(Batching("sampled", 9), [n], [20])[0])


def test_large_shards_are_sampled_without_replacement() -> None:
    n = ARGSORT_LIMIT + 1
    table = drawn(stream(0), Batching("sampled", 100), n, 5, 0)
    assert all(len(set(row)) == 100 for row in table)
    assert table.min() >= 0
    assert table.max() < n


def test_every_row_is_as_likely() -> None:
    for n in (12, ARGSORT_LIMIT + 4):  # both ways of drawing
        size = n // 2
        count = 4000 if n == 12 else 40
        table = drawn(stream(1), Batching("sampled", size), n, count, 0)
        share = np.bincount(table.ravel(), minlength=n) / count
        # each row's count is Binomial(count, 1/2)
        assert abs(share.mean() - 0.5) < 1e-12
        assert np.abs(share - 0.5).max() < 6 * 0.5 / count**0.5


def test_every_order_is_as_likely() -> None:
    """The 24 orders of 4 rows over 200 clients × 60 passes: chi-square, 23 degrees of freedom.

    49.7 is its 0.999 quantile.
    """
    table = cohort(Batching("epochs", 4), [4] * 200, [60] * 200).reshape(-1, 4)
    _, counts = np.unique(table @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24
    expected = len(table) / 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7
