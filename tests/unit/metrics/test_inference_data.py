import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.errors import UserError
from fedsim.metrics import NO_METROPOLIS, to_inference_data, write_inference_data

RNG = np.random.default_rng(0)
DRAWS = {
    "weight": RNG.normal(size=(4, 10, 2, 3)).astype(np.float32),
    "net/bias": RNG.normal(size=(4, 10)),
}


def reopened(path: Path) -> Any:
    """Opens the file as a user would: by arviz, or by xarray where only arviz-base is there."""
    if importlib.util.find_spec("arviz") is None:
        return importlib.import_module("xarray").open_datatree(path)
    return importlib.import_module("arviz").from_netcdf(str(path))


def test_the_file_opens_with_groups_dimensions_labels_and_attributes(tmp_path: Path) -> None:
    data = to_inference_data(
        DRAWS,
        scenario="Körner & <co>",
        seed=3,
        sample_stats={"diverging": np.zeros((4, 10), bool)},
        observed_data={"y": np.arange(5)},
        dims={"weight": ["class", "feature"]},
        coords={"class": ["cat", "dog"], "unused": [1]},
    )
    path = write_inference_data(data, tmp_path / "deep" / "posterior.nc")
    found = reopened(path)
    weight = found["posterior"]["weight"]
    assert weight.dims == ("chain", "draw", "class", "feature")
    assert weight.dtype == np.float32
    assert np.array_equal(weight.values, DRAWS["weight"])
    assert list(weight["class"].values) == ["cat", "dog"]
    assert np.array_equal(found["posterior"]["net.bias"].values, DRAWS["net/bias"])
    assert found["sample_stats"]["diverging"].dims == ("chain", "draw")
    assert found["observed_data"]["y"].dims == ("y_dim_0",)
    for attrs in (found.attrs, found["posterior"].attrs):
        assert attrs["scenario"] == "Körner & <co>"
        assert attrs["seed"] == "3"
        assert attrs["note"] == NO_METROPOLIS
        assert attrs["created_with"].startswith("fedsim ")


def test_groups_that_were_not_given_are_absent(tmp_path: Path) -> None:
    data = to_inference_data(DRAWS, scenario="s", seed=0)
    found = reopened(write_inference_data(data, tmp_path / "posterior.nc"))
    assert "sample_stats" not in found
    assert "posterior" in found


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "posterior.nc"
    path.write_bytes(b"old")

    class Broken:
        def to_netcdf(self, name: str, engine: str) -> None:
            Path(name).write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_inference_data(Broken(), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["posterior.nc"]


def test_dimensions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        to_inference_data(DRAWS, scenario="s", seed=0, dims={"weight": ["class"]})
    with pytest.raises(ValueError, match="scalar"):
        to_inference_data({"scalar": np.ones(4)}, scenario="s", seed=0)


def test_without_arviz_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("arviz", "arviz_base"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r'pip install "fedsim-fl\[bayes\]"'):
        to_inference_data(DRAWS, scenario="s", seed=0)
