"""Many clients: rows made when asked for are the rows of a table, and a million cost no memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsim import Examples, FederatedData, Run, Scenario, UserError, run
from fedsim.data import DATASETS, PARTITIONS, Partition, build_data

MILLION = Path(__file__).parents[2] / "scenarios" / "million_clients.yaml"
SMALL = (
    "rounds=4",
    "data.clients=300",
    "data.test_clients=10",
    "strategy.fraction_train=0.05",
    "evaluate.server_every=2",
)


def small(out: Path, *more: str) -> Run:
    return run(Scenario.load(MILLION, [*SMALL, *more]), out=out)


def as_table(seed: int) -> FederatedData:
    """Returns the rows of all clients of the small scenario in one table."""
    params = Scenario.load(MILLION, SMALL).data
    made = build_data(
        DATASETS["synthetic_clients"](**params.model_dump()), PARTITIONS["given"](), seed
    )
    parts = [made.shard(client) for client in range(made.clients)]
    train = Examples(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))
    rows = np.arange(made.shards.total)
    return FederatedData(made.info, train, Partition(rows, made.shards.offsets), test=made.test)


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_made_rows_train_as_those_of_a_table(tmp_path: Path, path: str) -> None:
    made = small(tmp_path, f"engine.path={path}")
    data = f"data={{name: custom, factory: '{__name__}:as_table'}}"
    rest = [each for each in SMALL if not each.startswith("data.")]
    scenario = Scenario.load(MILLION, [*rest, f"engine.path={path}", data])
    table = run(scenario, out=tmp_path)
    assert made.parameters().keys() == table.parameters().keys()
    for name, values in made.parameters().items():
        assert np.array_equal(values, table.parameters()[name])
    assert made.summary["metrics"] == table.summary["metrics"]


def test_a_run_says_how_many_rows_the_clients_have(tmp_path: Path) -> None:
    import pandas as pd

    found = small(tmp_path, "data.clients=5000", "strategy.fraction_train=0.002")
    told = found.summary["data"]
    table = pd.read_csv(found.artifact("partition.csv"))
    assert told["clients"] == 5000
    assert told["rows"] > 5000 * 25
    assert told["rows_per_client"]["median"] == pytest.approx(30, abs=2)
    assert len(table) == 100
    assert table["client"].iloc[[0, -1]].tolist() == [0, 4999]


def test_what_needs_all_rows_is_refused_before_the_run(tmp_path: Path) -> None:
    method = "{name: fa-ld, step_size: 0.01, chains: 2}"
    with pytest.raises(UserError) as error:
        small(tmp_path, f"strategy={method}", "client=null", "posterior.reference=nuts")
    assert "nuts needs all rows at once" in str(error.value)
    assert not list(tmp_path.iterdir())


MEASURED = """
import resource, sys
from fedsim import Scenario, run
scenario = Scenario.load(sys.argv[1], sys.argv[3:])
run(scenario, out=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_million_clients_take_the_memory_of_a_thousand(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    peaks = []
    for clients, fraction in ((1_000, 0.1), (1_000_000, 0.0001)):
        overrides = [f"data.clients={clients}", f"strategy.fraction_train={fraction}", "rounds=20"]
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(MILLION), str(tmp_path), *overrides],
            capture_output=True,
            text=True,
            check=True,
        )
        unit = 1 if sys.platform == "darwin" else 1024
        peaks.append(int(done.stdout.split()[-1]) * unit)
    assert peaks[1] - peaks[0] < 200e6
