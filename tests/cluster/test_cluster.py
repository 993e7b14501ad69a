"""A cluster of two nodes on one machine: who is let in, what is said of it, how it ends."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path

import pytest

import fedsim
from fedsim.cli.guard import execute
from fedsim.cluster import connect, processes, state
from tests.cluster.nodes import (
    SECONDS,
    Nodes,
    answer,
    end_session,
    left,
    start_driver,
    start_node,
)

pytestmark = pytest.mark.xdist_group("ray")


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Calls fedsim; returns exit status, output and complaints."""
    capsys.readouterr()
    status = execute(list(arguments))
    return status, *capsys.readouterr()


def test_a_driver_with_the_token_runs_on_both_nodes_and_imports_what_was_shipped(
    two_nodes: Nodes, tmp_path: Path
) -> None:
    mine = tmp_path / "my_module_of_the_test.py"
    mine.write_text("VALUE = 1\n")
    package = Path(fedsim.__file__).parent
    elsewhere = tmp_path / "elsewhere"  # workers also look where their driver was started
    elsewhere.mkdir()
    paths = [str(package), str(mine)]
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


def strangers(two_nodes: Nodes, folder: Path) -> dict[str, dict[str, str]]:
    """Returns the environments of those who have no token, and of those who have another."""
    without = {name: value for name, value in two_nodes.environment.items() if "AUTH" not in name}
    other = folder / "another"
    other.write_text("0" * 64)
    # Ray looks into the home folder by itself.
    return {
        "without": {**without, "HOME": str(folder)},
        "wrong": {**two_nodes.environment, "RAY_AUTH_TOKEN_PATH": str(other)},
    }


def test_without_the_token_nobody_joins(two_nodes: Nodes, tmp_path: Path) -> None:
    outside = strangers(two_nodes, tmp_path)
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
    assert len(answer(start_driver(two_nodes.address, two_nodes.environment))["nodes"]) == 2


def test_the_token_is_for_its_owner_alone(two_nodes: Nodes) -> None:
    cluster = state.read()
    assert isinstance(cluster, state.Local)
    assert re.fullmatch("[0-9a-f]{64}", cluster.token.read_text())
    for path, mode in (
        (cluster.token, 0o600),
        (cluster.token.parent, 0o700),
        (cluster.folder, 0o700),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_status_shows_the_nodes(two_nodes: Nodes, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = command(capsys, "cluster", "status", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["address"] == two_nodes.address
    assert [node["alive"] for node in found["nodes"]] == [True, True]
    assert {node["host"] for node in found["nodes"]} == {"127.0.0.2", "127.0.0.3"}
    assert (found["total"]["cpus"], found["total"]["gpus"]) == (2, 0)
    assert found["total"]["object_store_mib"] == 200
    assert found["ray"] == state.read().ray
    assert Path(found["logs"]).is_dir()


def test_only_one_cluster_is_up(two_nodes: Nodes, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = command(capsys, "cluster", "up", "--port", "0")
    assert status == 2
    assert f"already running at {two_nodes.address}" in err


def test_auto_is_the_cluster_that_is_up(two_nodes: Nodes) -> None:
    at = connect.resolve("auto")
    assert at == two_nodes.address
    assert connect.environment(at) == two_nodes.environment


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
    status, out, _ = command(capsys, "cluster", "down")
    assert status == 0
    assert f"processes of the cluster at {cluster.address}" in out
    assert [each for each in mine if each.is_running()] == []
    assert processes.members(cluster.session) == []
    assert processes.SCHEDULER in {each.name() for each in bystander if each.is_running()}
    assert not cluster.token.exists()
    assert command(capsys, "cluster", "down")[:2] == (
        0,
        "There is no cluster that `fedsim cluster up` started.\n",
    )
