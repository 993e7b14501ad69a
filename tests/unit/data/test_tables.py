"""CSV, Parquet and NPZ by path: what is read, and what is said of files that are wrong."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsim.data import DATASETS, PARTITIONS, FederatedData, build_data
from fedsim.errors import ScenarioError, UserError

GOOD = """age,job,hours,site,w,part,label
30,clerk,40,a,1,train,no
41,chef,10.5,a,2,train,yes
52,clerk,38,b,0.5,train,yes
23,"pilot, old",20,b,1,train,no
33,chef,8,b,1,test,no
"""


def csv(tmp_path: Path, text: str = GOOD, **parameters: Any) -> FederatedData:
    path = tmp_path / "t.csv"
    path.write_text(text)
    given = {"target": "label", "scale": "none", "test_fraction": 0.0, "dtype": "float64"}
    partition = parameters.pop("partition", PARTITIONS["iid"](clients=1))
    data = DATASETS["csv"](path=str(path), **(given | parameters))
    return build_data(data, partition, 0)


def refused(tmp_path: Path, text: str = GOOD, **parameters: Any) -> str:
    with pytest.raises(UserError) as error:
        csv(tmp_path, text, **parameters)
    assert error.value.exit_status == 2
    return str(error.value).replace(f"{tmp_path}/", "")


ROLES: dict[str, Any] = {"client": "site", "weight": "w", "split": "part", "one_hot": ["job"]}


def test_every_role_of_a_column(tmp_path: Path) -> None:
    data = csv(tmp_path, **ROLES, partition=PARTITIONS["natural"](column="site"))
    names = ("age", "job=chef", "job=clerk", "job=pilot, old", "hours")
    assert data.info.feature_names == names
    assert data.train.x.tolist() == [
        [30, 0, 1, 0, 40],
        [41, 1, 0, 0, 10.5],
        [52, 0, 1, 0, 38],
        [23, 0, 0, 1, 20],
    ]
    assert data.train.y.tolist() == [0, 1, 1, 0]
    assert data.info.class_names == ("no", "yes")
    assert data.train.weights().tolist() == [1, 2, 0.5, 1]
    assert [rows.tolist() for rows in data.shards] == [[0, 1], [2, 3]]
    assert data.test is not None
    assert data.test.y.tolist() == [0]
    given = csv(tmp_path, **ROLES, partition=PARTITIONS["given"]())
    assert all(map(np.array_equal, given.shards, data.shards))


def test_features_may_be_chosen_and_ordered(tmp_path: Path) -> None:
    data = csv(tmp_path, features=["hours", "age"])
    assert data.train.x[:2].tolist() == [[40, 30], [10.5, 41]]


def test_a_real_target(tmp_path: Path) -> None:
    data = csv(tmp_path, target="hours", target_kind="real", features=["age"])
    assert data.info.target == "real"
    assert data.train.y.tolist() == [40, 10.5, 38, 20, 8]


def test_numeric_classes_sort_as_numbers(tmp_path: Path) -> None:
    data = csv(tmp_path, "x,label\n1,10\n2,2\n3,10\n")
    assert data.info.class_names == ("2", "10")
    assert data.train.y.tolist() == [1, 0, 1]


def test_declared_classes_keep_their_order(tmp_path: Path) -> None:
    data = csv(tmp_path, features=["age"], classes=["yes", "no"])
    assert data.train.y.tolist() == [1, 0, 0, 1, 1]


def test_rows_with_empty_values_can_be_dropped(tmp_path: Path) -> None:
    text = "x,label\n1,0\n,1\n3,1\n4,NA\n"
    assert csv(tmp_path, text, missing="drop").train.x.tolist() == [[1], [3]]
    message = refused(tmp_path, text)
    assert "t.csv:3: data: column 'x' is empty" in message
    assert "t.csv:5: data: column 'label' is empty" in message
    assert "missing: drop" in message


def test_every_ragged_row_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, 'a,label\n1,0\n1,2,0\n"x\ny",1\n3\n')
    assert "t.csv:3: data.path: 3 values and the header has 2 columns" in message
    assert "t.csv:6: data.path: 1 values" in message  # after a value of two lines
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "parameters", "message"),
    [
        (GOOD, {"target": "lable"}, "no column 'lable'. did you mean 'label'?"),
        (GOOD, {"features": ["age", "agee"]}, "no column 'agee'"),
        (GOOD, {}, "t.csv:2: data.features: column 'job': not a number (got 'clerk')"),
        (GOOD, {"features": ["age", "label"]}, "the target 'label' cannot be a feature"),
        (GOOD, {"features": ["age"], "classes": ["no"]}, "t.csv:3: data.target: column 'label'"),
        (GOOD, {"features": ["age"], "split": "site"}, "not 'train', 'validation' or 'test'"),
        (GOOD, {"features": ["age"], "weight": "job"}, "t.csv:2: data.weight: column 'job'"),
        ("x,label\n1,0.5\n", {}, "target_kind: real"),
        ("x,label\n1,0\ninf,1\n", {}, "t.csv:3: data.features: column 'x': not a finite"),
        ("x,w,label\n1,-1,0\n", {"weight": "w"}, "t.csv:2: data.weight: column 'w'"),
        ("x;label\n1;0\n", {}, "set data.separator: ';'"),
        ("", {}, "the file is empty"),
        ("x,label\n", {}, "no rows below the header"),
        ("x,x,label\n1,2,0\n", {}, "names 'x' twice"),
        ("x,,label\n1,2,0\n", {}, "column 2 of the header has no name"),
        ('x,label\n"1"2,0\n', {}, "t.csv:2: not CSV"),
    ],
)
def test_wrong_tables_say_what_would_be_right(
    tmp_path: Path, text: str, parameters: dict[str, Any], message: str
) -> None:
    assert message in refused(tmp_path, text, **parameters)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("csv", "parquet"):
        for path, message in (("gone", "does not exist"), (".", "is a folder")):
            with pytest.raises(UserError, match=message):
                DATASETS[name](path=str(tmp_path / path), target="y").load(0)
        with pytest.raises(UserError, match="is not"):
            DATASETS[name](path=str(tmp_path / "binary"), target="y").load(0)
    with pytest.raises(UserError, match="is not a file of plain NumPy arrays"):
        DATASETS["npz"](path=str(tmp_path / "binary")).load(0)


def test_parquet_is_the_same_as_csv(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    expected = csv(tmp_path, **ROLES)
    pd.read_csv(tmp_path / "t.csv").to_parquet(tmp_path / "t.parquet")
    data = DATASETS["parquet"](
        path=str(tmp_path / "t.parquet"),
        target="label",
        scale="none",
        test_fraction=0.0,
        dtype="float64",
        **ROLES,
    )
    found = build_data(data, PARTITIONS["iid"](clients=1), 0)
    assert np.array_equal(found.train.x, expected.train.x)
    assert np.array_equal(found.train.y, expected.train.y)
    assert found.info.feature_names == expected.info.feature_names


def test_empty_values_in_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    frame = pd.DataFrame({"x": [1.0, np.nan, 3.0], "s": ["a", "b", None], "y": [0, 1, 1]})
    frame.to_parquet(tmp_path / "t.parquet")
    data = DATASETS["parquet"](path=str(tmp_path / "t.parquet"), target="y", one_hot=["s"])
    with pytest.raises(ScenarioError) as error:
        data.load(0)
    assert [(p.line, p.message) for p in error.value.problems] == [
        (2, "column 'x' is empty"),
        (3, "column 's' is empty"),
    ]


def npz(tmp_path: Path, arrays: dict[str, Any], **parameters: Any) -> FederatedData:
    np.savez(tmp_path / "t.npz", **arrays)
    data = DATASETS["npz"](path=str(tmp_path / "t.npz"), test_fraction=0.0, **parameters)
    return build_data(data, PARTITIONS["iid"](clients=2), 0)


def test_npz(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.int16).reshape(6, 2, 2)
    arrays = {"x": x, "y": np.arange(6) % 2, "w": np.ones(6), "xt": x[:2], "yt": np.array([0, 1])}
    data = npz(tmp_path, arrays, weight="w", test_x="xt", test_y="yt")
    assert np.array_equal(data.train.x, x.astype(np.float32))
    assert data.info.input_shape == (2, 2)
    assert (data.info.num_classes, data.info.target) == (2, "class")
    assert data.test is not None
    assert len(data.test) == 2
    real = npz(tmp_path, {"x": x, "y": np.ones((6, 3))})
    assert (real.info.target, real.train.y.shape, real.train.y.dtype) == ("real", (6, 3), "f4")


@pytest.mark.parametrize(
    ("arrays", "parameters", "message"),
    [
        ({"x": np.ones((3, 1))}, {}, "no array 'y'; it has x"),
        ({"x": np.ones(3), "y": np.ones(3)}, {}, "it must be (n, …features)"),
        ({"x": np.ones((3, 1)), "y": np.ones(2)}, {}, "one value is needed for each row"),
        ({"x": np.full((3, 1), np.nan), "y": np.ones(3)}, {}, "x is not finite in row 0"),
        ({"x": np.ones((3, 1)), "y": np.array([0, 1, -1])}, {}, "they start at 0"),
        ({"x": np.ones((3, 1)), "y": np.array([0, 1, 5])}, {"num_classes": 3}, "the class 5"),
        ({"x": np.ones((0, 1)), "y": np.ones(0)}, {}, "there are no rows"),
        ({"x": np.array([["a"]]), "y": np.ones(1)}, {}, "float32 or float64"),
        ({"x": np.ones((2, 1)), "y": np.ones(2), "w": np.array([1, -1])}, {"weight": "w"}, "row 1"),
        ({"x": np.ones((2, 1)), "y": np.ones(2)}, {"test_x": "x"}, "go together"),
        ({"x": np.array([[None]]), "y": np.ones(1)}, {}, "plain NumPy arrays"),
    ],
)
def test_wrong_npz(
    tmp_path: Path, arrays: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        npz(tmp_path, arrays, **parameters)
    assert message in str(error.value)


def test_a_damaged_npz(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as file:
        file.writestr("x.npy", b"nonsense")
        file.writestr("y.npy", b"nonsense")
    with pytest.raises(UserError, match="plain NumPy arrays"):
        DATASETS["npz"](path=str(tmp_path / "t.npz")).load(0)
