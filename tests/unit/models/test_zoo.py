"""The models that a scenario can name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.data import DataInfo
from fedsim.errors import Params, UserError
from fedsim.models import MODELS, build_model
from fedsim.models.layers import MaskedBatchNorm

IMAGES = DataInfo("images", (1, 8, 8), 4, "class")
TABLE = DataInfo("table", (6,), 3, "class")
REAL = DataInfo("real", (6,), None, "real")
POTENTIAL = DataInfo("gaussian_clients", (2 + 4,), None, "none")

CASES: list[tuple[dict[str, Any], DataInfo, tuple[int, ...], int]] = [
    ({"name": "linear"}, REAL, (1,), 7),
    ({"name": "linear", "bias": False}, REAL, (1,), 6),
    ({"name": "linear"}, TABLE, (3,), 21),
    ({"name": "softmax"}, TABLE, (3,), 21),
    ({"name": "softmax", "bias": False}, IMAGES, (4,), 256),
    ({"name": "mlp", "hidden": (5,)}, TABLE, (3,), 6 * 5 + 5 + 5 * 3 + 3),
    ({"name": "mlp", "hidden": (5, 4), "activation": "silu", "dropout": 0.5}, TABLE, (3,), 74),
    ({"name": "mlp", "hidden": ()}, REAL, (1,), 7),
    (
        {"name": "cnn", "channels": (2, 3), "hidden": (5,), "dropout": 0.2},
        IMAGES,
        (4,),
        (9 * 2 + 2) + (2 * 9 * 3 + 3) + (3 * 2 * 2 * 5 + 5) + (5 * 4 + 4),
    ),
    *(
        (
            {"name": "cnn", "channels": (12, 5), "hidden": (), "norm": norm},
            IMAGES,
            (4,),
            (9 * 12 + 12) + 2 * 12 + (12 * 9 * 5 + 5) + 2 * 5 + (5 * 2 * 2 * 4 + 4),
        )
        for norm in ("batch", "group")
    ),
    ({"name": "location"}, POTENTIAL, (), 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c[0]))
def test_every_model(case: tuple[Any, DataInfo, Any, int], dtype: torch.dtype) -> None:
    section, info, output, count = case
    model = build_model(MODELS[section["name"]](**section), info, 0, dtype)
    x = torch.randn(3, *info.input_shape, dtype=dtype)
    out = model.apply(model.initial(), x)
    assert tuple(out.shape) == (3, *output)
    assert out.dtype == dtype
    assert model.num_parameters == count
    assert model.convolutional == (section["name"] == "cnn")
    layers = len(section["hidden"]) if section["name"] == "mlp" else 1
    assert len(model.dropouts) == (layers if section.get("dropout") else 0)


def test_every_name_is_tried() -> None:
    assert {case[0]["name"] for case in CASES} | {"custom"} == set(MODELS)


def test_the_start_belongs_to_the_seed_and_not_to_the_global_generator() -> None:
    def start(seed: int) -> dict[str, Tensor]:
        return build_model(MODELS["mlp"](), TABLE, seed, torch.float32).initial()

    torch.manual_seed(1)
    first = start(0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = start(0)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["1.weight"], start(1)["1.weight"])


def test_norms_follow_the_convolutions() -> None:
    def norms(kind: str) -> list[nn.Module]:
        params = MODELS["cnn"](channels=(12, 5), norm=kind)
        module = build_model(params, IMAGES, 0, torch.float32).module
        return [m for m in module.modules() if isinstance(m, (MaskedBatchNorm, nn.GroupNorm))]

    assert norms("none") == []
    assert [layer.running_mean.shape for layer in norms("batch")] == [(12,), (5,)]
    assert [(m.num_groups, m.num_channels) for m in norms("group")] == [(6, 12), (5, 5)]


def test_location_is_the_potential_of_a_gaussian() -> None:
    rng = np.random.default_rng(0)
    mean, root = rng.standard_normal(2), rng.standard_normal((2, 2))
    precision = root @ root.T + np.eye(2)
    theta = rng.standard_normal(2)
    model = build_model(MODELS["location"](), POTENTIAL, 0, torch.float64)
    row = torch.from_numpy(np.concatenate([mean, precision.ravel()]))[None]
    got = model.apply({"theta": torch.from_numpy(theta)}, row)
    assert float(got) == pytest.approx(0.5 * (theta - mean) @ precision @ (theta - mean), rel=1e-12)


class Own(nn.Module):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


def make_for(info: DataInfo, scale: int = 1) -> nn.Module:
    assert info.num_classes is not None
    return Own(info.num_classes * scale)


def make_nothing() -> str:
    return "a string"


def make_failure() -> nn.Module:
    raise RuntimeError("no weights found")


HERE = "tests.unit.models.test_zoo"


def custom(factory: str, **params: Any) -> Params:
    return MODELS["custom"](factory=factory, params=params)


def test_models_of_the_user() -> None:
    assert build_model(custom(f"{HERE}:Own", width=5), TABLE, 0, torch.float32).shapes[
        "linear.weight"
    ] == (5, 6)
    built = build_model(custom(f"{HERE}:make_for", scale=2), TABLE, 0, torch.float64)
    assert built.shapes["linear.weight"] == (6, 6)
    assert built.initial()["linear.weight"].dtype == torch.float64


@pytest.mark.parametrize(
    ("params", "info", "message"),
    [
        (MODELS["softmax"](), REAL, "softmax needs classes"),
        (MODELS["cnn"](), TABLE, "cnn needs images"),
        (MODELS["cnn"](channels=(2,) * 5), IMAGES, "too small for 5"),
        (MODELS["location"](), DataInfo("table", (7,), None, "none"), "location needs the data"),
        (custom("no_such_module_anywhere:make"), TABLE, "cannot import"),
        (custom(f"{HERE}:make_nothing"), TABLE, "returned a str, not an nn.Module"),
        (custom(f"{HERE}:make_failure"), TABLE, "failed: RuntimeError: no weights found"),
        (custom(f"{HERE}:Own", wrong=3), TABLE, "failed: TypeError"),
        (custom(f"{HERE}:Own"), IMAGES, "does not take an input of shape"),
        (custom(f"{HERE}:HERE"), TABLE, "failed: TypeError: 'str'|is not a callable|not callable"),
    ],
)
def test_models_that_do_not_fit(params: Params, info: DataInfo, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(params, info, 0, torch.float32)
