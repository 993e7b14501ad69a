"""Our partitions against flwr-datasets': same rules, so the same statistics over many seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedsim.data import PARTITIONS, DataInfo, Examples

pytest.importorskip("flwr_datasets", reason="flwr-datasets, the oracle, is not installed")
hf = pytest.importorskip("datasets", reason="datasets, which the oracle needs, is not installed")

N, CLASSES, CLIENTS, SEEDS = 1000, 10, 10, 40
LABELS = np.arange(N) % CLASSES
EXAMPLES = Examples(np.zeros((N, 1)), LABELS, columns={"label": LABELS})
INFO = DataInfo("index", (1,), CLASSES, "class")


def ours(name: str, **parameters: Any) -> list[np.ndarray]:
    partition = PARTITIONS[name](clients=CLIENTS, **parameters)
    drawn = []
    for seed in range(SEEDS):
        owner, _ = partition.assign(EXAMPLES, INFO, seed)
        drawn.append(counts([LABELS[owner == client] for client in range(CLIENTS)]))
    return drawn


def theirs(make: Callable[[int], Any], seeds: int = SEEDS) -> list[np.ndarray]:
    table = hf.Dataset.from_dict({"label": LABELS.tolist(), "row": list(range(N))})
    drawn = []
    for seed in range(seeds):
        partitioner = make(seed)
        partitioner.dataset = table
        parts = [np.array(partitioner.load_partition(i)["label"]) for i in range(CLIENTS)]
        drawn.append(counts(parts))
    return drawn


def counts(labels: list[np.ndarray]) -> np.ndarray:
    return np.array([np.bincount(y.astype(int), minlength=CLASSES) for y in labels])


def statistics(drawn: list[np.ndarray]) -> dict[str, float]:
    """Size spread, rows of a client's largest class, classes a client has; means over draws."""
    return {
        "size sd": float(np.mean([d.sum(axis=1).std() for d in drawn])),
        "largest class": float(np.mean([d.max(axis=1).mean() for d in drawn])),
        "classes": float(np.mean([(d > 0).sum(axis=1).mean() for d in drawn])),
    }


@pytest.mark.parametrize("alpha", [0.1, pytest.param(1.0, marks=pytest.mark.slow), 100.0])
def test_dirichlet(alpha: float) -> None:
    from flwr_datasets.partitioner import DirichletPartitioner

    expected = statistics(
        theirs(
            lambda seed: DirichletPartitioner(
                CLIENTS, "label", alpha, min_partition_size=1, self_balancing=False, seed=seed
            )
        )
    )
    found = statistics(ours("dirichlet", alpha=alpha, max_tries=1000))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.12), name


def test_iid() -> None:
    from flwr_datasets.partitioner import IidPartitioner

    expected = theirs(lambda seed: IidPartitioner(CLIENTS), seeds=1)[0]
    assert np.array_equal(ours("iid")[0].sum(axis=1), expected.sum(axis=1))


def test_shards() -> None:
    from flwr_datasets.partitioner import ShardPartitioner

    expected = statistics(
        theirs(
            lambda seed: ShardPartitioner(
                CLIENTS, "label", num_shards_per_partition=2, shard_size=50, seed=seed
            )
        )
    )
    found = statistics(ours("shards", shards_per_client=2))
    assert found["size sd"] == expected["size sd"] == 0.0
    assert found["classes"] == pytest.approx(expected["classes"], rel=0.05)
    assert found["largest class"] == pytest.approx(expected["largest class"], rel=0.05)


def test_pathological() -> None:
    from flwr_datasets.partitioner import PathologicalPartitioner

    expected = theirs(
        lambda seed: PathologicalPartitioner(
            CLIENTS, "label", 2, class_assignment_mode="deterministic", seed=seed
        ),
        seeds=3,  # nothing is drawn but the rows
    )
    found = ours("pathological", classes_per_client=2)
    assert {int(c) for d in expected for c in (d > 0).sum(axis=1)} == {2}
    assert {int(c) for d in found for c in (d > 0).sum(axis=1)} == {2}
    assert statistics(found) == pytest.approx(statistics(expected))


def test_natural() -> None:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    expected = theirs(lambda seed: NaturalIdPartitioner("label"), seeds=1)[0]
    owner, clients = PARTITIONS["natural"](column="label").assign(EXAMPLES, INFO, 0)
    found = counts([LABELS[owner == client] for client in range(clients)])
    assert np.array_equal(found, expected)
