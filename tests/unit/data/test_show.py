"""Who holds what: the table, the picture, and the line above them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedsim.data import DATASETS, PARTITIONS, FederatedData, build_data, describe
from fedsim.data.describe import summary
from fedsim.data.show import plot_partition, show_table


def build(name: str, partition: str, **given: Any) -> FederatedData:
    return build_data(DATASETS[name](), PARTITIONS[partition](**given), 0)


def test_class_counts_add_up() -> None:
    data = build("digits", "dirichlet", clients=6, alpha=0.3, holdout=0.25)
    table = describe(data)
    digits = [str(i) for i in range(10)]
    assert list(table.columns) == ["client", "rows", "holdout", "weight", *digits]
    assert (table[digits].sum(axis=1) == table["rows"]).all()
    assert table["rows"].sum() + table["holdout"].sum() == len(data.train) == 1438
    third = data.shard(3)
    assert table.loc[3, "7"] == int((third.y == 7).sum())


def test_real_targets_and_weights() -> None:
    table = describe(build("bayesian_linear", "iid", clients=4))
    data = build("bayesian_linear", "iid", clients=4)
    assert table["target_mean"][2] == pytest.approx(data.shard(2).y.mean())
    assert table["target_sd"][2] == pytest.approx(data.shard(2).y.std())
    gaussian = describe(build("gaussian_clients", "given"))
    assert list(gaussian.columns) == ["client", "rows", "holdout", "weight"]
    assert gaussian["weight"].tolist() == pytest.approx([0.1] * 10)


def test_a_class_named_like_a_column_does_not_replace_it() -> None:
    data = build("digits", "iid", clients=2)
    names = ("rows", *data.info.class_names[1:])  # type: ignore[index]
    renamed = FederatedData(
        info=type(data.info)("d", (1, 8, 8), 10, "class", None, names),
        train=data.train,
        shards=data.shards,
    )
    table = describe(renamed)
    assert table["rows"].tolist() == [719, 719]
    assert table["class rows"].sum() == (data.train.y == 0).sum()


def printed(data: FederatedData, **given: Any) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show_table(data, **given))
    return console.export_text()


def test_the_table_shows_the_counts() -> None:
    data = build("breast_cancer", "quantity_skew", clients=5, min_size=10)
    text = printed(data, max_clients=3)
    assert "malignant" in text
    assert "and 2 more clients" in text
    benign = int((data.shard(0).y == 1).sum())
    line = next(line for line in text.splitlines() if line.strip("│ ").startswith("0 "))
    assert [int(v) for v in line.strip("│ ").split("│")][-1] == benign


def test_the_summary_counts_everything() -> None:
    data = build("digits", "iid", clients=4, holdout=0.5)
    text = summary(data)
    assert text.startswith("digits: 718 training rows of 1 × 8 × 8 features")
    for part in ("4 clients of 179 to 180 rows", "720 held out by clients", "359 test rows"):
        assert part in text
    assert "10 clients of 1 row each" in summary(build("gaussian_clients", "given"))


@pytest.mark.parametrize(
    ("name", "partition", "given"),
    [
        ("digits", "dirichlet", {"clients": 12, "alpha": 0.2}),
        ("digits", "dirichlet", {"clients": 80, "alpha": 1.0}),
        ("bayesian_linear", "given", {}),
        ("bayesian_linear", "iid", {"clients": 100}),
        ("gaussian_clients", "given", {}),
    ],
)
def test_a_picture_is_written_whole(
    tmp_path: Path, name: str, partition: str, given: dict[str, Any]
) -> None:
    from matplotlib.image import imread

    data = build(name, partition, **given)
    files = plot_partition(data, tmp_path / "new" / "partition.png")
    assert [path.name for path in files] == ["partition.png", "partition.svg"]
    assert sorted(path.name for path in files[0].parent.iterdir()) == [f.name for f in files]
    pixels = imread(files[0])[..., :3]
    # Not blank: the axes hold more than ink on white.
    assert len(np.unique((pixels.reshape(-1, 3) * 255).astype(np.uint8), axis=0)) > 20
    assert "<svg" in files[1].read_text()


def test_the_picture_is_the_same_each_time(tmp_path: Path) -> None:
    data = build("digits", "iid", clients=3)
    first, second = (plot_partition(data, tmp_path / name)[1] for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
