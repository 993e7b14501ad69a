import math

import pytest

from fedsim.report import sense


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", 1), ("test/accuracy", 1), ("accuracy@mean", 1), ("ood/auroc", 1), ("nll", -1),
        ("ece_15", -1), ("gaussian_nll", -1), ("ess_bulk_min", 1), ("train_loss", -1),
        ("something", 0), ("accurate", 0), ("", 0), ("ecezar", 0),
    ],
)  # fmt: skip
def test_direction_and_arrow(metric: str, expected: int) -> None:
    assert sense.direction(metric) == expected
    assert sense.arrow(metric) == {1: "↑", -1: "↓", 0: ""}[expected]


@pytest.mark.parametrize(
    ("value", "sd", "expected"),
    [
        (0.89123, 0.00234, "0.891 ±\u00a00.002"),
        (0.89123, 0.00134, "0.8912 ±\u00a00.0013"),
        (0.89123, None, "0.8912"),
        (123.456, 7.0, "123 ±\u00a07"),
        (-3.14159, 0.2, "−3.1 ±\u00a00.2"),
        (0.5, 0.0, "0.5000 ±\u00a00"),
        (0.0000123, None, "0.00001230"),
        (12345.6, None, "12346"),
        (math.nan, 0.1, "NaN"),
        (-math.inf, None, "−∞"),
        (0.5, math.nan, "0.5000"),
    ],
)
def test_number(value: float, sd: float | None, expected: str) -> None:
    assert sense.number(value, sd) == expected


def test_quantity_and_duration() -> None:
    assert sense.quantity(12_345_678, "B") == "12.3 MB"
    assert sense.quantity(999) == "999"
    assert sense.quantity(3.84e6) == "3.84 M"
    assert sense.duration(41.23) == "41.2 s"
    assert sense.duration(185) == "3 min 05 s"
    assert sense.duration(7_830) == "2 h 10 min"


def test_heading() -> None:
    assert sense.heading("test/nll") == "NLL (nats) ↓"
    assert sense.heading("test/nll", named=True) == "test: NLL (nats) ↓"
    assert sense.heading("ood/auroc", named=True) == "OOD AUROC ↑"
