"""Who holds which rows, as arrays: plain loops over clients are the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data import (
    DATASETS,
    PARTITIONS,
    DataInfo,
    Examples,
    FederatedData,
    Partition,
    build_data,
    describe,
)
from fedsim.data.check import check_federated
from fedsim.data.partitions.base import hold_out, rows_by_owner
from fedsim.errors import UserError

OWNERS = st.lists(st.integers(-1, 6), max_size=60).map(lambda owners: np.array(owners, np.int64))


@given(OWNERS)
def test_rows_by_owner_is_a_search_for_each_client(owner: Any) -> None:
    found = rows_by_owner(owner, 7)
    assert len(found) == 7
    for client, rows in enumerate(found):
        assert np.array_equal(rows, np.flatnonzero(owner == client))
        assert rows.dtype == np.int64
    assert found.total == (owner >= 0).sum()
    assert np.array_equal(owner[found.rows], found.owners())


@given(OWNERS, st.lists(st.integers(0, 6), max_size=10))
def test_take_is_the_clients_one_by_one(owner: Any, clients: list[int]) -> None:
    whole = rows_by_owner(owner, 7)
    part = whole.take(np.array(clients, np.int64))
    assert [rows.tolist() for rows in part] == [whole[c].tolist() for c in clients]
    sizes = Partition.sized(whole.sizes).take(np.array(clients, np.int64)).sizes
    assert np.array_equal(sizes, part.sizes)


def test_tuples_and_lists_become_a_partition() -> None:
    examples = Examples(np.ones((6, 1)), np.zeros(6))
    info = DataInfo("d", (1,), None, "real")
    data = FederatedData(info, examples, ([0, 4], np.array([2], np.uint8), []), [[1], [], [3]])  # type: ignore[arg-type]
    assert isinstance(data.shards, Partition)
    assert isinstance(data.holdouts, Partition)
    assert [rows.tolist() for rows in data.shards] == [[0, 4], [2], []]
    assert data.shards.offsets.tolist() == [0, 2, 3, 3]
    assert data.shards[-2].tolist() == [2]
    assert [rows.tolist() for rows in data.shards[1:]] == [[2], []]
    assert len(data.holdout(0)) == 1
    with pytest.raises(IndexError):
        data.shards[3]
    with pytest.raises(TypeError, match="made when asked for"):
        Partition.sized([2, 3])[0]


def test_what_is_held_out_is_uniformly_random() -> None:
    shards = rows_by_owner(np.arange(40_000) % 4_000, 4_000)  # 10 rows each
    kept, held = hold_out(shards, 0.3, 5)
    assert held is not None
    assert set(kept.sizes) == {7}
    place = (held.rows // 4_000).astype(int)  # which of its owner's ten rows, in order
    counts = np.bincount(place, minlength=10)
    assert np.abs(counts - 1200).max() < 5 * (4_000 * 0.3 * 0.7) ** 0.5
    again, other = hold_out(shards, 0.3, 5)[1], hold_out(shards, 0.3, 6)[1]
    assert again is not None
    assert other is not None
    assert np.array_equal(again.rows, held.rows)
    assert not np.array_equal(other.rows, held.rows)


@pytest.mark.parametrize(
    ("rows", "offsets", "message"),
    [
        ([0, 1, 2], [0, 2], "offsets must go from 0 up to the 3 rows"),
        ([0, 1, 2], [1, 2, 3], "offsets must go from 0"),
        ([0, 1, 2], [0, 2, 1, 3], "offsets must go from 0"),
        ([0, 1, 7], [0, 2, 3], "shards[1] must hold rows of train, 0..3, and holds 7"),
        ([0, -1, 2], [0, 2, 3], "shards[0] must hold rows of train, 0..3, and holds -1"),
        ([0, 1, 1], [0, 2, 3], "in more than one shard"),
    ],
)
def test_wrong_arrays(rows: list[int], offsets: list[int], message: str) -> None:
    examples = Examples(np.ones((4, 1)), np.array([0, 1, 0, 1]))
    shards = Partition(np.array(rows), np.array(offsets))
    with pytest.raises(UserError) as error:
        check_federated(FederatedData(DataInfo("d", (1,), 2, "class"), examples, shards), "mine")
    assert message in str(error.value)


def test_rows_are_sorted_within_their_client() -> None:
    examples = Examples(np.ones((5, 1)), np.array([0, 1, 0, 1, 0]))
    shards = Partition(np.array([3, 0, 4, 2, 1]), np.array([0, 3, 5]))
    data = FederatedData(DataInfo("d", (1,), 2, "class"), examples, shards)
    checked = check_federated(data, "mine").shards
    assert [rows.tolist() for rows in checked] == [[0, 3, 4], [1, 2]]


def test_the_table_is_a_loop_over_the_clients() -> None:
    rng = np.random.default_rng(0)
    data = build_data(
        DATASETS["bayesian_linear"](rows_per_client=20), PARTITIONS["iid"](clients=9), 0
    )
    weighted = Examples(data.train.x, data.train.y, rng.random(len(data.train)))
    data = FederatedData(data.info, weighted, (*data.shards, np.zeros(0, np.int64)))  # type: ignore[arg-type]
    table = describe(data)
    for client, rows in enumerate(data.shards):
        own = weighted.take(rows)
        line = table.iloc[client]
        assert line["rows"] == len(own)
        assert line["weight"] == pytest.approx(own.weights().sum())
        if len(own):
            assert line["target_mean"] == pytest.approx(own.y.mean())
            assert line["target_sd"] == pytest.approx(own.y.std())
    assert np.isnan(table["target_mean"].iloc[-1])
    assert np.isnan(table["target_sd"].iloc[-1])
    some = describe(data, np.array([7, 2]))
    assert some.drop(columns="client").equals(
        table.iloc[[7, 2]].reset_index(drop=True).drop(columns="client")
    )


def test_a_hopeless_draw_is_not_repeated() -> None:
    examples = Examples(np.zeros((20_000, 1)), np.arange(20_000) % 10)
    partition = PARTITIONS["dirichlet"](clients=10_000, alpha=0.1, max_tries=10**6)
    with pytest.raises(UserError, match="none of 1 draws of 'dirichlet'"):
        partition.assign(examples, DataInfo("d", (1,), 10, "class"), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iid", "natural", "quantity_skew"])
def test_a_million_clients_partition(name: str) -> None:
    n, clients = 4_000_000, 1_000_000
    site = np.random.default_rng(0).permutation(n) % clients
    examples = Examples(np.zeros((n, 1), np.float32), np.arange(n) % 10, columns={"site": site})
    given_: dict[str, Any] = {"column": "site"} if name == "natural" else {"clients": clients}
    info = DataInfo("d", (1,), 10, "class")
    owner, found = PARTITIONS[name](**given_, seed=1).assign(examples, info, 0)
    shards, holdouts = hold_out(rows_by_owner(owner, found), 0.25, 0)
    assert holdouts is not None
    assert len(shards) == clients
    assert shards.sizes.min() >= 1
    assert shards.rows is not None
    assert holdouts.rows is not None
    used = np.bincount(np.concatenate([shards.rows, holdouts.rows]), minlength=n)
    assert (used == 1).all()
