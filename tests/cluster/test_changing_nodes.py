"""Nodes that join a cluster, and are lost, while a scenario runs on it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsim import RunStore, Scenario, run
from fedsim.cluster import connect, processes
from fedsim.grids.pool import LOOK_AGAIN
from tests.cluster.conftest import ROOT, _head, _node
from tests.cluster.nodes import end_session, environment
from tests.e2e.scenarios import same_bits
from tests.e2e.test_ray_kills import saved

if not sys.platform.startswith("linux"):
    pytest.skip("other systems have one loopback address", allow_module_level=True)
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]

GATES = (4, 8, 12, 16)
PATIENCE = 300.0

TEXT = """\
name: changing
rounds: 18
data: {{name: digits, rows: 400, test_fraction: 0.2}}
partition: {{name: dirichlet, clients: 12, alpha: 0.5, min_size: 5, holdout: 0.2}}
model: softmax
task: classification
strategy: fedavg
client:
  name: tests.e2e.models_for_tests:Gated
  params: {{folder: "{folder}", gates: [4, 8, 12, 16]}}
engine: {{chunk: 2, trace: false}}
checkpoint: {{every_rounds: 1}}
evaluate: {{clients_every: 3}}
"""


def test_nodes_join_and_are_lost_and_no_bit_changes(state_home: Path, tmp_path: Path) -> None:
    """The head alone; a second node joins; it is lost in mid-round; a third one joins."""
    (tmp_path / "changing.yaml").write_text(TEXT.format(folder=tmp_path))
    scenario = Scenario.load(tmp_path / "changing.yaml")
    for gate in GATES:
        (tmp_path / f"go-{gate}").touch()
    whole = run(scenario, out=tmp_path / "whole")
    for gate in GATES:
        (tmp_path / f"go-{gate}").unlink()
    with ExitStack() as tidy:
        cluster = tidy.enter_context(_head("127.0.0.2"))
        joining = connect.of_local(cluster)
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.command", "run", str(tmp_path / "changing.yaml"),
             "--engine", "ray", "--address", cluster.address, "--out", str(tmp_path / "runs"),
             "--no-report", "-q"],
            cwd=ROOT, env=environment(joining), stderr=(tmp_path / "stderr").open("wb"),
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        tidy.callback(driver.kill)

        def until(found: Callable[[], Any]) -> None:
            end = time.monotonic() + PATIENCE
            while not found():
                assert driver.poll() is None, (tmp_path / "stderr").read_text()
                assert time.monotonic() < end, (tmp_path / "stderr").read_text()
                time.sleep(0.1)

        def go(gate: int) -> None:
            until(lambda: saved(tmp_path) == gate - 1)
            (tmp_path / f"go-{gate}").touch()

        until(lambda: saved(tmp_path) == 3)
        time.sleep(LOOK_AGAIN)
        second = tidy.enter_context(_node(cluster.address, "127.0.0.3", joining))
        go(4)
        until(lambda: works(second))  # it was not there when the run began
        go(8)
        until(lambda: saved(tmp_path) == 9)
        end_session(second)
        until(lambda: saved(tmp_path) == 11)
        third = tidy.enter_context(_node(cluster.address, "127.0.0.4", joining))
        go(12)
        until(lambda: works(third))
        go(16)
        assert driver.wait(PATIENCE) == 0, (tmp_path / "stderr").read_text()
    (run_id,) = RunStore(tmp_path / "runs").ids()
    found = RunStore(tmp_path / "runs").open(run_id)
    same_bits(found, whole)
    facts = json.loads((found.path / "engine.json").read_text())
    at = [(seen["from_round"], nodes_of(seen)) for seen in facts["workers"]]
    head = at[0][1]
    assert len(head) == 1
    joined = [nodes - head for _, nodes in at if len(nodes) == 2]
    assert len({frozenset(each) for each in joined}) == 2, at
    assert facts["workers_lost"] == 1


def nodes_of(seen: dict[str, Any]) -> set[str]:
    return {worker["node"] for worker in seen["workers"]}


def works(session: int) -> bool:
    """Says whether a node has a worker that is ready: one that starts has a longer name."""
    for each in processes.members(session):
        try:
            if each.name() == "ray::Actor" or each.name().startswith("ray::Actor.tr"):
                return True
        except psutil.NoSuchProcess:
            continue
    return False
