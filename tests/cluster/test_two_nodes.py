"""Two nodes on one machine: who is let in, what is said of them, how they end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fedsim
from fedsim.cluster import probe, processes, state
from fedsim.errors import UserError
from tests.cluster.nodes import (
    SECONDS,
    Nodes,
    answer,
    call,
    end_session,
    left,
    start_driver,
    start_node,
    strangers,
)
from tests.cluster.scenarios import assert_the_same_on

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow]


def test_a_driver_with_the_token_runs_on_both_nodes_and_imports_what_was_shipped(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    mine = tmp_path / "my_module_of_the_test.py"
    mine.write_text("VALUE = 1\n")
    spaced = tmp_path / "my_folder_of_the_test"  # a package without an __init__.py
    spaced.mkdir()
    (spaced / "inner.py").write_text("VALUE = 1\n")
    package = Path(fedsim.__file__).parent
    elsewhere = tmp_path / "elsewhere"  # workers also look where their driver was started
    elsewhere.mkdir()
    paths = [str(package), str(mine), str(spaced)]
    found = answer(start_driver(two_nodes.address, two_nodes.environment, paths, cwd=elsewhere))
    assert found["address"] == two_nodes.address
    assert found["cpus"] == 2
    assert len(found["nodes"]) == 2
    for node, seen in found["nodes"].items():
        assert seen["ran_on"] == node
        files = {name: Path(file) for name, file in seen["files"].items()}
        assert files["fedsim"] != package / "__init__.py"
        assert (files["fedsim"].parent / "strategies" / "fedavg.py").is_file()  # past a symlink
        assert files[mine.stem] != mine
        assert files[spaced.name] != spaced
        assert (files[spaced.name] / "inner.py").is_file()


def test_without_the_token_nobody_joins(two_nodes: Nodes, tmp_path: Path) -> None:
    outside = strangers(two_nodes.environment, tmp_path)
    drivers = {name: start_driver(two_nodes.address, each) for name, each in outside.items()}
    nodes = {
        name: start_node(two_nodes.address, "127.0.0.4", each) for name, each in outside.items()
    }
    try:
        for driver in drivers.values():
            _, complaint = driver.communicate(timeout=SECONDS)
            assert driver.returncode != 0
            assert "AuthenticationError" in complaint
        for node in nodes.values():
            complaint, _ = node.communicate(timeout=SECONDS)
            assert node.returncode != 0
            assert re.search("[Aa]uthenticat", complaint)
    finally:
        for node in nodes.values():
            end_session(node.pid)
    assert all(left(node.pid) == [] for node in nodes.values())
    with pytest.raises(UserError, match="refuses this token, or the lack of one"):
        probe.ask(two_nodes.address, outside["wrong"])
    assert len(answer(start_driver(two_nodes.address, two_nodes.environment))["nodes"]) == 2


def test_status_shows_the_nodes(two_nodes: Nodes, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "cluster", "status", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["address"] == two_nodes.address
    assert [node["alive"] for node in found["nodes"]] == [True, True]
    assert {node["host"] for node in found["nodes"]} == {"127.0.0.2", "127.0.0.3"}
    assert (found["total"]["cpus"], found["total"]["gpus"]) == (2, 0)
    assert found["total"]["object_store_mib"] == 200
    assert found["ray"] == state.read().ray
    assert Path(found["logs"]).is_dir()


def test_down_ends_what_up_started_and_nothing_else(
    two_nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last test of the module: the second node, which somebody else started, outlives it."""
    cluster = state.read()
    assert isinstance(cluster, state.Local)
    mine = processes.members(cluster.session)
    assert {processes.SCHEDULER, processes.STORE} <= {each.name() for each in mine}
    bystander = processes.members(two_nodes.sessions[1])
    assert processes.SCHEDULER in {each.name() for each in bystander}
    status, out, _ = call(capsys, "cluster", "down")
    assert status == 0
    assert f"processes of the cluster at {cluster.address}" in out
    assert [each for each in mine if each.is_running()] == []
    assert processes.members(cluster.session) == []
    assert processes.SCHEDULER in {each.name() for each in bystander if each.is_running()}


def test_a_scenario_runs_across_both_and_gives_the_same_bits(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    assert_the_same_on(two_nodes, tmp_path)
