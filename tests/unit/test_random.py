"""Streams belong to their names; global generators come back as they were."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.random import generator, integer, key, seeded_globals

IDS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)


@given(seed=st.integers(0, 2**63 - 2), ids=IDS)
def test_a_stream_is_its_name(seed: int, ids: list[int]) -> None:
    first = generator(seed, "noise", *ids).random(4)
    generator(seed + 1, "other").random(100)  # what else is drawn does not matter
    np.testing.assert_array_equal(first, generator(seed, "noise", *ids).random(4))
    assert 0 <= integer(seed, "noise", *ids) < 2**63
    assert 0 <= key(seed, "noise", *ids) < 2**128


def test_names_that_differ_anywhere_are_other_streams() -> None:
    names = [
        (0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 0), (0, "a", 1, 0),
        (0, "a", 0, 1), (0, "a", -1), (0, "aa"), (0, ""),
    ]  # fmt: skip
    assert len({key(*name) for name in names}) == len(names)
    drawn = {tuple(generator(*name).random(2)) for name in names}
    assert len(drawn) == len(names)


def test_streams_of_neighbouring_names_are_not_correlated() -> None:
    drawn = np.stack([generator(0, "noise", 1, p).standard_normal(4000) for p in range(20)])
    off = np.corrcoef(drawn)[np.triu_indices(20, 1)]
    assert np.abs(off).max() < 6 / 4000**0.5
    assert abs(off.mean()) < 6 / (190 * 4000) ** 0.5


def test_a_known_value_does_not_change_between_versions() -> None:
    """A run's numbers are a promise: whoever changes them has to say so in the changelog."""
    assert key(7, "batches", 1, 2) == 13138653848991152555692677173845462377
    plain = np.random.Generator(np.random.Philox(key=13138653848991152555692677173845462377))
    assert generator(7, "batches", 1, 2).random() == plain.random()


def test_seeds_beyond_64_bits_are_refused() -> None:
    with pytest.raises(struct.error):
        key(2**63, "a")


def test_globals_are_seeded_inside_and_restored_after() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = (random.random(), np.random.random())  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    with seeded_globals(3, "strategy", 1):
        inside = (random.random(), np.random.random())  # noqa: NPY002
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002
    with seeded_globals(3, "strategy", 1):
        assert (random.random(), np.random.random()) == inside  # noqa: NPY002
    with seeded_globals(3, "strategy", 2):
        assert random.random() != inside[0]


def test_globals_are_restored_when_the_block_raises() -> None:
    def fail() -> None:
        with seeded_globals(0, "x"):
            random.random()
            np.random.random()  # noqa: NPY002
            raise ValueError("oh")

    before = states()
    with pytest.raises(ValueError, match="oh"):
        fail()
    assert states() == before


def states() -> tuple[object, object]:
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), repr(legacy)
