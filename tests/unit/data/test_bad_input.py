"""Wrong parameters and impossible partitions: refused with exit status 2 and a clear sentence."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedsim.data import DATASETS, PARTITIONS, DataInfo, Examples, FederatedData, build_data
from fedsim.errors import UserError


def refused(data: str, partition: str, given: dict[str, Any], **parameters: Any) -> str:
    with pytest.raises(UserError) as error:
        build_data(DATASETS[data](**parameters), PARTITIONS[partition](**given), 0)
    assert error.value.exit_status == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("partition", "given", "message"),
    [
        ("iid", {"clients": 5000}, "5000 clients cannot share 1438 training rows"),
        ("iid", {"clients": 100, "min_size": 20}, "use at most 71 clients or min_size 14"),
        ("dirichlet", {"clients": 2000, "alpha": 1.0}, "2000 clients cannot share"),
        (
            "dirichlet",
            {"clients": 20, "alpha": 0.001, "min_size": 50, "max_tries": 5},
            "none of 5 draws of 'dirichlet' gave each of 20 clients at least 50 rows",
        ),
        (
            "label_quantity",
            {"clients": 20, "alpha": 0.01, "size_alpha": 0.01, "min_size": 50, "max_tries": 3},
            "Raise size_alpha (now 0.01) or alpha",
        ),
        ("shards", {"clients": 100, "shards_per_client": 50}, "use at most 14"),
        ("pathological", {"clients": 10, "classes_per_client": 11}, "use at most 10"),
        ("pathological", {"clients": 3, "classes_per_client": 3}, "use at least 4"),
        ("pathological", {"clients": 1400, "classes_per_client": 10}, "clients need rows of class"),
        ("natural", {"column": "site"}, "no column 'site'; it has no columns"),
        ("given", {"clients": 3}, "'digits' comes with 1438"),
        ("pathological", {"clients": 7, "min_size": 200}, "less than 200"),
    ],
)
def test_partitions_that_do_not_exist(partition: str, given: dict[str, Any], message: str) -> None:
    assert message in refused("digits", partition, given)


def test_natural_says_which_values_are_too_small() -> None:
    parameters = {"clients": 2, "rows_per_client": [3, 10]}
    message = refused(
        "bayesian_linear", "natural", {"column": "client", "min_size": 5}, **parameters
    )
    assert "1 values of column 'client' have less than 5 training rows: 0 (3)" in message
    assert "drop_small: true" in message
    many = refused("bayesian_linear", "natural", {"column": "client", "clients": 9}, **parameters)
    assert "use at most 2" in many


def test_label_skew_needs_labels() -> None:
    message = refused("bayesian_linear", "dirichlet", {"clients": 3, "alpha": 1.0})
    assert "needs classes" in message
    assert "'client'" in message


def test_splits_that_leave_nothing() -> None:
    iid = {"clients": 1}
    both = refused("digits", "iid", iid, test_fraction=0.6, validation_fraction=0.4)
    assert "their sum must be below 1" in both
    assert "use at most 1797" in refused("digits", "iid", iid, rows=2000)
    assert "less than one row" in refused("digits", "iid", iid, rows=20, test_fraction=0.01)


def test_wrong_row_counts() -> None:
    message = refused("bayesian_linear", "given", {}, clients=3, rows_per_client=[1, 2])
    assert "2 numbers, the smallest 1, for 3 clients" in message
    assert "smallest 0" in refused("bayesian_linear", "given", {}, rows_per_client=0)
    assert "use fewer" in refused("bayesian_linear", "given", {}, rows_per_client=10**9)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("iid", {"clients": 0}),
        ("iid", {"clients": "ten"}),
        ("iid", {"clients": "10"}),
        ("iid", {"clients": 10.5}),
        ("iid", {"clients": 10, "holdout": 1.0}),
        ("iid", {"clients": 10, "min_size": 0}),
        ("iid", {"clients": 10, "alpha": 1.0}),
        ("iid", {}),
        ("dirichlet", {"clients": 10, "alpha": 0.0}),
        ("dirichlet", {"clients": 10, "alpha": float("nan")}),
        ("natural", {}),
    ],
)
def test_wrong_parameters(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PARTITIONS[name](**given)


@pytest.mark.parametrize("components", [DATASETS, PARTITIONS])
def test_every_parameter_is_described(components: dict[str, Any]) -> None:
    for name, params in components.items():
        assert params.model_fields["name"].default == name
        for field, about in params.model_fields.items():
            assert field == "name" or (about.description or "").strip(), (name, field)


def custom(monkeypatch: pytest.MonkeyPatch, made: Any, partition: str = "iid") -> FederatedData:
    module: Any = type(sys)("users_data")
    module.make = lambda: made
    monkeypatch.setitem(sys.modules, "users_data", module)
    sized = {"clients": 2} if partition == "iid" else {}
    data = DATASETS["custom"](factory="users_data:make", test_fraction=0.0)
    return build_data(data, PARTITIONS[partition](**sized), 0)


CLASSES = Examples(np.ones((4, 1)), np.array([0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "returned NoneType; return fedsim.data.Examples"),
        ((np.ones(3), np.ones(3)), "returned tuple of ndarray, ndarray; return"),
        (Examples([[1.0]], np.ones(1)), "x is list; make it a NumPy array"),  # type: ignore[arg-type]
        (Examples(np.ones((2, 1)), np.array(["a", "b"])), "y has shape (2,) and dtype <U1"),
        (Examples(np.ones((2, 1), np.float16), np.ones(2)), "make it float32 or float64"),
        ((CLASSES, DataInfo("d", (2,), 2, "class")), "the data declares (2,)"),
        ((CLASSES, DataInfo("d", (1,), None, "class")), "num_classes must be given"),
        ((CLASSES, DataInfo("d", (1,), None, "real")), "y must hold floats"),
        ((CLASSES, DataInfo("d", (1,), 1, "class")), "holds the class 1"),
        ((CLASSES, DataInfo("d", (1,), 3, "class")), "no client has a training row of class 2"),
    ],
)
def test_wrong_factories(monkeypatch: pytest.MonkeyPatch, made: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        custom(monkeypatch, made)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("shards", "holdouts", "message"),
    [
        ((), None, "shards is empty"),
        ((np.array([0, 1]), np.array([1])), None, "in more than one shard"),
        ((np.array([0, 9]),), None, "0..3"),
        ((np.array([0.5]),), None, "1-d integer array"),
        ((np.array([], dtype=int),), None, "no rows to train on"),
        ((np.array([0, 1]),), (), "0 holdouts and 1 shards"),
    ],
)
def test_wrong_federated_data(
    monkeypatch: pytest.MonkeyPatch, shards: Any, holdouts: Any, message: str
) -> None:
    info = DataInfo("mine", (1,), 2, "class")
    with pytest.raises(UserError) as error:
        custom(monkeypatch, FederatedData(info, CLASSES, shards, holdouts), "given")
    assert message in str(error.value)


def test_factories_that_cannot_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = type(sys)("users_data")
    module.value = 3
    module.fails = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "users_data", module)
    for factory, message in (
        ("users_data", "not an import path"),
        ("no_such_module:f", "cannot import"),
        ("users_data:nothing", "no attribute"),
        ("users_data:value", "is not a function"),
        ("users_data:fails", "raised ZeroDivisionError: division by zero"),
    ):
        assert message in refused("custom", "iid", {"clients": 1}, factory=factory)


def test_a_class_that_no_client_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = type(sys)("users_data")
    examples = Examples(np.ones((40, 1)), np.arange(40) % 2)
    module.make = lambda: (
        examples,
        DataInfo("d", (1,), 3, "class", None, ("cat", "dog", "owl")),
    )
    monkeypatch.setitem(sys.modules, "users_data", module)
    message = refused("custom", "iid", {"clients": 2}, factory="users_data:make")
    assert "class 'owl'" in message
    assert "allow_missing_classes: true" in message
    allowed = DATASETS["custom"](factory="users_data:make", allow_missing_classes=True)
    assert build_data(allowed, PARTITIONS["iid"](clients=2), 0).info.num_classes == 3
