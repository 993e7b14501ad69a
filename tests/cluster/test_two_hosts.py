"""Two hosts that share nothing but a cable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.cluster import connect, probe
from tests.cluster.nodes import SECONDS, Nodes, answer, environment, start_driver
from tests.cluster.scenarios import assert_the_same_on

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def test_a_driver_on_one_host_runs_tasks_on_the_other(two_hosts: Nodes) -> None:
    found = answer(start_driver(two_hosts.address, two_hosts.environment, (), two_hosts.prefix))
    assert found["address"] == two_hosts.address
    assert found["cpus"] == 2
    assert len(found["nodes"]) == 2
    assert [seen["ran_on"] for seen in found["nodes"].values()] == list(found["nodes"])


def test_status_on_the_heads_host(two_hosts: Nodes) -> None:
    words = [sys.executable, "-m", "tests.e2e.command", "cluster", "status", "--json"]
    shown = subprocess.run(
        [*two_hosts.prefix, *words],
        cwd=ROOT, env=environment({}), check=True, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    document = json.loads(shown.stdout)
    assert {node["host"] for node in document["nodes"]} == {"10.213.77.1", "10.213.77.2"}


def test_other_machines_do_not_reach_it_without_the_token(two_hosts: Nodes) -> None:
    joining = {**connect.COMMON, **probe.FEW_TRIES}
    stranger = start_driver(two_hosts.address, joining, (), two_hosts.prefix)
    _, complaint = stranger.communicate(timeout=SECONDS)
    assert stranger.returncode != 0
    assert "AuthenticationError" in complaint


def test_a_scenario_runs_across_both_and_gives_the_same_bits(
    two_hosts: Nodes, tmp_path: Path
) -> None:
    assert_the_same_on(two_hosts, tmp_path)
