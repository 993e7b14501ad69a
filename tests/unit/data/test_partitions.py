"""Properties that every partition has, whatever the rows: checked on random labels."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsim.data import PARTITIONS, DataInfo, Examples, PartitionParams
from fedsim.data.partitions.base import hold_out, rows_by_owner
from fedsim.data.partitions.dirichlet import dirichlet_shares
from fedsim.data.partitions.quantity import apportion
from fedsim.errors import UserError
from fedsim.random import generator

INFO = DataInfo("rows", (1,), 5, "class")


def labelled(y: np.ndarray) -> Examples:
    return Examples(np.zeros((len(y), 1)), y, columns={"site": np.char.add("site ", y.astype(str))})


def random_rows(n: int, classes: int, seed: int) -> Examples:
    return labelled(generator(seed, "test.labels").integers(0, classes, n))


def partition_of(name: str, clients: int, min_size: int = 1) -> PartitionParams:
    settings_of = {
        "dirichlet": {"alpha": 0.5},
        "label_quantity": {"alpha": 1.0, "size_alpha": 1.0},
        "pathological": {"classes_per_client": 2},
    }
    return PARTITIONS[name](clients=clients, min_size=min_size, **settings_of.get(name, {}))


SIZED = ["iid", "dirichlet", "shards", "pathological", "quantity_skew", "label_quantity"]


@pytest.mark.parametrize("name", SIZED)
@settings(max_examples=30)
@given(
    n=st.integers(20, 400),
    clients=st.integers(1, 12),
    min_size=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_every_row_is_owned_once_and_no_client_is_too_small(
    name: str, n: int, clients: int, min_size: int, seed: int
) -> None:
    examples = random_rows(n, 4, seed)
    try:
        owner, found = partition_of(name, clients, min_size).assign(examples, INFO, seed)
    except UserError:
        # A skew may not exist; the others are refused only where there are too few rows.
        assert clients * min_size > n or name not in ("iid", "quantity_skew")
        assume(False)
    assert found == clients
    shards = rows_by_owner(owner, found)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(n))
    assert all(np.array_equal(rows, np.unique(rows)) for rows in shards)
    if name not in ("shards", "pathological"):  # these say nothing about sizes; build_data checks
        assert min(map(len, shards)) >= min_size


@pytest.mark.parametrize("name", SIZED)
def test_the_seed_decides(name: str) -> None:
    examples = random_rows(300, 5, 0)
    partition = partition_of(name, 6)
    first, _ = partition.assign(examples, INFO, 1)
    again, _ = partition.assign(examples, INFO, 1)
    other, _ = partition.assign(examples, INFO, 2)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_neither_the_hash_seed_nor_the_order_of_keys_matters() -> None:
    program = (
        "import hashlib, numpy as np\n"
        "from fedsim.data import DATASETS, PARTITIONS, build_data\n"
        "keys = {'clients': 7, 'alpha': 0.3, 'min_size': 4, 'holdout': 0.2}\n"
        "if hash('a') % 2: keys = dict(reversed(keys.items()))\n"
        "data = build_data(DATASETS['bayesian_logistic'](), PARTITIONS['dirichlet'](**keys), 5)\n"
        "parts = [*data.shards, *data.holdouts, data.train.x]\n"
        "print(hashlib.sha256(b''.join(p.tobytes() for p in parts)).hexdigest())\n"
    )
    digests = set()
    for hash_seed in ("0", "1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1", "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_iid_sizes_differ_by_at_most_one() -> None:
    owner, _ = PARTITIONS["iid"](clients=7).assign(random_rows(100, 3, 0), INFO, 0)
    assert set(np.bincount(owner)) == {14, 15}


@settings(max_examples=30)
@given(k=st.integers(1, 6), clients=st.integers(6, 20), seed=st.integers(0, 1000), n=st.just(600))
def test_pathological_gives_exactly_k_classes(k: int, clients: int, seed: int, n: int) -> None:
    examples = labelled(np.arange(n) % 6)
    partition = PARTITIONS["pathological"](clients=clients, classes_per_client=k)
    owner, _ = partition.assign(examples, INFO, seed)
    counts = np.array([np.bincount(examples.y[owner == c], minlength=6) for c in range(clients)])
    assert ((counts > 0).sum(axis=1) == k).all()
    takers = (counts > 0).sum(axis=0)
    assert takers.max() - takers.min() <= 1


def test_shards_of_sorted_labels_hold_few_classes() -> None:
    examples = labelled(np.arange(1000) % 10)
    owner, _ = PARTITIONS["shards"](clients=50, shards_per_client=2).assign(examples, INFO, 0)
    assert set(np.bincount(owner)) == {20}
    assert max(len(np.unique(examples.y[owner == c])) for c in range(50)) == 2


def test_self_balancing_brings_sizes_together() -> None:
    examples = random_rows(2000, 10, 0)
    spread = {}
    for balancing in (False, True):
        partition = PARTITIONS["dirichlet"](clients=10, alpha=0.1, self_balancing=balancing)
        sizes = [np.bincount(partition.assign(examples, INFO, s)[0]) for s in range(20)]
        spread[balancing] = np.std(sizes)
    assert spread[True] < 0.8 * spread[False]


def test_a_redraw_is_a_new_draw() -> None:
    examples = random_rows(400, 10, 0)
    loose = PARTITIONS["dirichlet"](clients=10, alpha=0.1)
    strict = PARTITIONS["dirichlet"](clients=10, alpha=0.1, min_size=10, max_tries=10_000)
    first, _ = loose.assign(examples, INFO, 3)
    large, _ = strict.assign(examples, INFO, 3)
    assert np.bincount(first, minlength=10).min() < 10 <= np.bincount(large, minlength=10).min()


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 0.01, 1.0, 1e6])
def test_dirichlet_shares_sum_to_one_at_any_concentration(alpha: float) -> None:
    shares = dirichlet_shares(np.full(20, alpha), generator(0, "test"))
    assert np.isfinite(shares).all()
    assert shares.sum() == pytest.approx(1.0)
    assert shares.max() > 0.9 if alpha < 0.001 else True


def test_dirichlet_shares_have_the_moments_of_the_dirichlet() -> None:
    concentration = np.array([0.2, 0.5, 1.5])
    rng = generator(0, "test.moments")
    draws = np.array([dirichlet_shares(concentration, rng) for _ in range(20_000)])
    total = concentration.sum()
    mean = concentration / total
    assert draws.mean(axis=0) == pytest.approx(mean, abs=0.01)
    assert draws.var(axis=0) == pytest.approx(mean * (1 - mean) / (total + 1), abs=0.005)


def test_power_law_sizes() -> None:
    partition = PARTITIONS["quantity_skew"](clients=4, law="power", exponent=1.0)
    owner, _ = partition.assign(random_rows(2504, 3, 0), INFO, 0)
    # 4 rows first, then 2500 by 1, 1/2, 1/3, 1/4 of 25/12.
    assert sorted(np.bincount(owner)) == [301, 401, 601, 1201]


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30), st.integers(0, 10_000))
def test_apportion_is_whole_and_near(parts: list[float], total: int) -> None:
    shares = np.array(parts) / sum(parts)
    counts = apportion(shares, total)
    assert counts.sum() == total
    assert np.abs(counts - shares * total).max() < 1 + 1e-9


def test_natural_is_one_client_a_value_in_sorted_order() -> None:
    examples = labelled(np.array([2, 0, 1, 2, 0, 2]))
    owner, clients = PARTITIONS["natural"](column="site").assign(examples, INFO, 0)
    assert clients == 3
    assert owner.tolist() == [2, 0, 1, 2, 0, 2]


def test_natural_keeps_the_largest_values() -> None:
    examples = labelled(np.array([2, 0, 1, 2, 0, 2]))
    largest = PARTITIONS["natural"](column="site", clients=2)
    assert largest.assign(examples, INFO, 0)[0].tolist() == [1, 0, -1, 1, 0, 1]
    dropped = PARTITIONS["natural"](column="site", min_size=3, drop_small=True)
    owner, clients = dropped.assign(examples, INFO, 0)
    assert (owner.tolist(), clients) == ([0, -1, -1, 0, -1, 0], 1)
    assert [rows.tolist() for rows in rows_by_owner(owner, clients)] == [[0, 3, 5]]


def test_a_column_can_be_skewed_instead_of_the_classes() -> None:
    examples = Examples(np.zeros((90, 1)), np.zeros(90), columns={"hour": np.arange(90) % 3})
    partition = PARTITIONS["pathological"](clients=3, classes_per_client=1, column="hour")
    owner, _ = partition.assign(examples, DataInfo("t", (1,), None, "real"), 0)
    assert all(len(np.unique(examples.columns["hour"][owner == c])) == 1 for c in range(3))


@given(fraction=st.floats(0.01, 0.99), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_holdouts_are_disjoint_and_leave_a_row(fraction: float, sizes: list[int]) -> None:
    shards = rows_by_owner(np.repeat(np.arange(len(sizes)), sizes), len(sizes))
    kept, held = hold_out(shards, fraction, 0)
    assert held is not None
    for whole, train, evaluate in zip(shards, kept, held, strict=True):
        assert np.array_equal(np.sort(np.concatenate([train, evaluate])), whole)
        assert len(train) >= 1
        assert len(evaluate) == min(round(fraction * len(whole)), len(whole) - 1)
