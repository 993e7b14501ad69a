"""Data whose clients' rows are made when asked for: generated, sliced out of files, or a user's."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

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
from fedsim.data.describe import MAX_MADE, listed, summary
from fedsim.data.show import plot_partition, show_table
from fedsim.errors import RunFailed, UserError


def synthetic(seed: int = 0, **given: Any) -> FederatedData:
    return build_data(DATASETS["synthetic_clients"](**given), PARTITIONS["given"](), seed)


def test_a_client_is_the_same_whoever_asks_and_however_many_there_are() -> None:
    data, larger = synthetic(clients=50, rows=7), synthetic(clients=80, rows=7)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(larger.shard, range(49, -1, -1)))[::-1]
    for client, examples in enumerate(found):
        assert np.array_equal(examples.x, data.shard(client).x)
        assert np.array_equal(examples.y, data.shard(client).y)
    assert not np.array_equal(found[0].x, found[1].x)
    assert not np.array_equal(found[0].x, synthetic(1, clients=50, rows=7).shard(0).x)
    assert data.test is not None
    assert len(data.test) == 100 * 7
    assert not set(map(bytes, data.test.x)) & {row.tobytes() for f in found for row in f.x}


def test_features_have_the_moments_of_the_paper() -> None:
    beta, features, clients = 2.0, 5, 4000
    data = synthetic(clients=clients, rows=6, features=features, beta=beta, test_clients=0)
    x = np.stack([data.shard(client).x for client in range(clients)]).astype(np.float64)
    # within a client only Σ = diag(j^-1.2); its centre has variance β² + 1, of which β² is shared
    within = x.var(axis=1, ddof=1).mean(axis=0)
    assert within == pytest.approx(np.arange(1, features + 1) ** -1.2, rel=0.05)
    centres = np.cov(x.mean(axis=1).T)
    off = centres[~np.eye(features, dtype=bool)]
    assert off == pytest.approx(beta**2, rel=0.15)
    assert np.diag(centres) - within / 6 == pytest.approx(beta**2 + 1, rel=0.15)


def test_labels_are_linear_in_each_client_and_alpha_moves_none() -> None:
    plain, moved = (synthetic(clients=3, rows=40, alpha=alpha) for alpha in (0.0, 5.0))
    for client in range(3):
        assert np.array_equal(plain.shard(client).x, moved.shard(client).x)
        assert np.array_equal(plain.shard(client).y, moved.shard(client).y)


@pytest.mark.parametrize(("shared", "low", "high"), [(1.0, 0.8, 1.0), (0.0, 0.0, 0.35)])
def test_what_is_shared_can_be_learned_from_other_clients(
    shared: float, low: float, high: float
) -> None:
    from sklearn.linear_model import LogisticRegression

    data = synthetic(clients=600, rows=10, features=8, classes=4, shared=shared)
    assert data.test is not None
    parts = [data.shard(client) for client in range(data.clients)]
    x, y = np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts])
    score = LogisticRegression(max_iter=500).fit(x, y).score(data.test.x, data.test.y)
    assert low <= score <= high


def test_numbers_of_rows() -> None:
    ranged = synthetic(clients=1000, rows=[3, 9]).shards.sizes
    assert set(ranged) == set(range(3, 10))
    law = synthetic(clients=20_000, rows=50, rows_sigma=1.0, max_rows=400).shards.sizes
    assert np.median(law) == pytest.approx(50, rel=0.05)
    assert np.log(law[law < 400]).std() == pytest.approx(0.95, rel=0.1)
    assert law.min() >= 1
    assert law.max() == 400
    data = synthetic(clients=5, rows=[3, 9])
    assert [len(data.shard(c)) for c in range(5)] == data.shards.sizes.tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": 0}, "data.rows: must be at least 1 (got 0)"),
        ({"rows": [5, 2]}, "data.rows: is no range (got [5, 2])"),
        ({"rows": [1, 2, 3]}, "1 ≤ least ≤ most"),
        ({"rows": [1, 9], "rows_sigma": 1.0}, "is a range and log-normal"),
        ({"features": 10**6, "classes": 1000}, "data.features"),
    ],
)
def test_numbers_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        synthetic(clients=3, **given)
    assert message in str(error.value)


def test_a_million_clients_cost_no_object_each() -> None:
    data = synthetic(clients=10**6, rows=[1, 40])
    assert data.shards.offsets.nbytes == 8 * (10**6 + 1)
    assert len(data.train) < 10**3
    text = summary(data)
    assert "1,000,000 clients of 1 to 40 rows (median 2" in text
    assert len(data.shard(999_999)) == data.shards.sizes[-1]


def test_who_holds_what_is_shown_of_some(tmp_path: Path) -> None:
    data = synthetic(clients=100_000, rows=4)
    shown = listed(data)
    assert len(shown) == MAX_MADE
    assert {0, 99_999} <= set(shown.tolist())
    table = describe(data, shown)
    assert table["client"].tolist() == shown.tolist()
    assert (table.iloc[:, 4:].sum(axis=1) == 4).all()
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show_table(data, 5))
    assert "and 99,995 more clients" in console.export_text()
    for path in plot_partition(data, tmp_path / "partition"):
        assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("partition", "given"),
    [("iid", {"clients": 3}), ("natural", {"column": "client"}), ("given", {"holdout": 0.2})],
)
def test_partitions_and_holdouts_are_refused(partition: str, given: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        build_data(DATASETS["synthetic_clients"](), PARTITIONS[partition](**given), 0)
    assert "use partition: {name: given} without holdout" in str(error.value)
    with pytest.raises(UserError, match="7 clients and synthetic_clients has 1000"):
        build_data(DATASETS["synthetic_clients"](), PARTITIONS["given"](clients=7), 0)


INFO = DataInfo("mine", (2,), 3, "class")


def rows(n: int) -> Examples:
    return Examples(np.ones((n, 2), np.float32), np.arange(n) % 3)


def custom(monkeypatch: pytest.MonkeyPatch, **given: Any) -> FederatedData:
    module: Any = type(sys)("users_data")
    given = {"info": INFO, "train": rows(3), "shards": Partition.sized([2, 3, 4]), **given}
    module.make = lambda: FederatedData(**given)
    monkeypatch.setitem(sys.modules, "users_data", module)
    return build_data(DATASETS["custom"](factory="users_data:make"), PARTITIONS["given"](), 0)


def test_a_users_function_makes_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = custom(monkeypatch, make=lambda client: rows(client + 2))
    assert [len(data.shard(client)) for client in range(3)] == [2, 3, 4]
    assert describe(data)["2"].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "without rows, make(client) is needed"),
        ({"make": rows, "shards": ([0], [1])}, "Partition.sized(sizes)"),
        ({"make": rows, "holdouts": Partition.sized([1, 1, 1])}, "nothing is held out"),
        ({"make": rows, "shards": Partition.sized([2, 0])}, "at least one row"),
        ({"make": lambda c: rows(c + 1)}, "client 0: make returned 1 rows and shards says 2"),
        ({"make": lambda c: 1 // c}, "make raised ZeroDivisionError"),
        ({"make": lambda _: np.ones(2)}, "make returned ndarray, not Examples"),
        ({"make": lambda _: Examples(np.ones((2, 3)), np.zeros(2, int))}, "features of shape (3,)"),
        ({"make": lambda _: Examples(np.full((2, 2), np.nan), np.zeros(2, int))}, "not finite"),
    ],
)
def test_wrong_makers_are_found_before_the_run(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        custom(monkeypatch, **given)
    assert message in str(error.value)


def test_a_client_that_goes_wrong_later_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    data = custom(monkeypatch, make=lambda client: rows(1 if client == 1 else client + 2))
    with pytest.raises(RunFailed, match="client 1: make returned 1 rows and shards says 3"):
        data.shard(1)


def saved(folder: Path, **arrays: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    given = {
        "x": rng.integers(0, 255, (12, 2, 3), dtype=np.uint8),
        "y": rng.integers(0, 4, 12, dtype=np.int32),
        "offsets": np.array([0, 3, 4, 12]),
    } | arrays
    for name, array in given.items():
        np.save(folder / f"{name}.npy", array)
    return {name: str(folder / f"{name}.npy") for name in given}


def sliced(**given: Any) -> FederatedData:
    return build_data(DATASETS["sliced"](**given), PARTITIONS["given"](), 0)


def test_slices_of_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    paths = saved(
        tmp_path,
        weight=np.arange(12.0),
        test_x=rng.random((5, 2, 3)),
        test_y=np.array([0, 1, 2, 3, 0]),
    )
    data = sliced(**paths)
    x, y = np.load(paths["x"]), np.load(paths["y"])
    assert data.info.input_shape == (2, 3)
    assert data.info.num_classes == 4
    assert data.shards.sizes.tolist() == [3, 1, 8]
    for client, cut in enumerate((slice(0, 3), slice(3, 4), slice(4, 12))):
        made = data.shard(client)
        assert type(made.x) is np.ndarray
        assert (made.x.dtype, made.y.dtype) == (np.float32, np.int64)
        assert np.array_equal(made.x, x[cut].astype(np.float32))
        assert np.array_equal(made.y, y[cut])
        assert np.array_equal(made.weights(), np.arange(12.0)[cut])
    assert data.test is not None
    assert len(data.test) == 5
    real = sliced(**saved(tmp_path, y=np.arange(12.0)), dtype="float64")
    assert real.info.target == "real"
    assert real.shard(1).y.tolist() == [3.0]


def test_everything_wrong_about_the_files_is_said_at_once(tmp_path: Path) -> None:
    paths = saved(tmp_path, y=np.zeros(11, int), offsets=np.array([0, 5, 5, 12]))
    with pytest.raises(UserError) as error:
        sliced(**paths | {"test_x": str(tmp_path / "no.npy")})
    text = str(error.value)
    for message in (
        f"data.y: has 11 rows and {paths['x']} has 12",
        "data.offsets: give client 1 0 rows; each needs at least 1",
        "data.test_x: is not a file of one plain NumPy array (.npy): there is no file",
        "test_x and test_y go together",
    ):
        assert message in text


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones(12)}, "features are (n, …) numbers"),
        ({"x": np.full((12, 2), "a")}, "features are (n, …) numbers"),
        ({"y": np.ones((12, 2), int)}, "targets are (n,) integers"),
        ({"offsets": np.array([0.0, 12.0])}, "(clients + 1,) integers"),
        ({"offsets": np.array([1, 12])}, "must go from 0 to the 12 rows of x"),
        ({"offsets": np.array([0, 9])}, "go from 0 to 9"),
        ({"y": np.array([-1] * 12)}, "class indices go down to -1"),
        ({"weight": np.ones((12, 1))}, "weights are (n,) numbers"),
    ],
)
def test_wrong_files(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        sliced(**saved(tmp_path, **arrays))
    assert message in str(error.value)


def test_pickled_and_compressed_files_are_refused(tmp_path: Path) -> None:
    paths = saved(tmp_path)
    np.save(tmp_path / "x.npy", np.array([{}, []], object), allow_pickle=True)
    np.savez(tmp_path / "y.npz", y=np.zeros(3))
    with pytest.raises(UserError) as error:
        sliced(**paths | {"y": str(tmp_path / "y.npz")})
    assert str(error.value).count("is not a file of one plain NumPy array (.npy)") == 2
