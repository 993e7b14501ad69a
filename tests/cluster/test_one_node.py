"""The cluster that `fedsim cluster up` starts by default, from its start to its end, in order."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsim.cli.guard import execute
from fedsim.cluster import connect, local, probe, processes, state
from fedsim.errors import UserError
from tests.cluster.nodes import SECONDS, answer, call, left, start_driver, strangers

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def cluster(state_home: Path) -> Iterator[state.Local]:
    """What the command starts; the last test ends it."""
    words = ["--cpus", "1", "--gpus", "0", "--port", "0", "--object-store", "100"]
    assert execute(["cluster", "up", *words]) == 0
    found = state.read()
    assert isinstance(found, state.Local)
    try:
        yield found
    finally:
        if state.read() is not None:
            local.stop(found)
        assert left(found.session) == []


def test_a_driver_with_the_token_joins(cluster: state.Local) -> None:
    at = connect.resolve("auto")
    assert at == cluster.address
    found = answer(start_driver(at, connect.environment(at)))
    assert found["address"] == at
    assert found["cpus"] == 1
    assert [seen["ran_on"] for seen in found["nodes"].values()] == list(found["nodes"])


def test_a_driver_without_it_or_with_another_does_not(cluster: state.Local, tmp_path: Path) -> None:
    outside = strangers(connect.of_local(cluster), tmp_path)
    drivers = [start_driver(cluster.address, each) for each in outside.values()]
    with pytest.raises(UserError, match="refuses this token, or the lack of one"):
        probe.ask(cluster.address, outside["wrong"])
    for driver in drivers:
        _, complaint = driver.communicate(timeout=SECONDS)
        assert driver.returncode != 0
        assert "AuthenticationError" in complaint


def test_the_token_is_for_its_owner_alone(cluster: state.Local) -> None:
    assert re.fullmatch("[0-9a-f]{64}", cluster.token.read_text())
    assert stat.S_IMODE(cluster.token.stat().st_mode) == 0o600
    for folder in (cluster.token.parent, cluster.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_nobody_outside_is_listened_to(cluster: state.Local) -> None:
    hosts = {
        connection.laddr.ip
        for process in processes.members(cluster.session)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert hosts
    assert hosts <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.slow  # on a busy machine Ray may need more than its usual patience
def test_status_shows_it(cluster: state.Local, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "cluster", "status", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["address"] == cluster.address
    assert found["ray"] == cluster.ray
    (node,) = found["nodes"]
    assert (node["host"], node["alive"], node["cpus"]) == ("127.0.0.1", True, 1)
    assert found["total"] == {
        "cpus": 1,
        "gpus": 0,
        "memory_mib": found["total"]["memory_mib"],
        "object_store_mib": 100,
    }
    assert found["token"] == str(cluster.token)
    assert Path(found["logs"]).is_dir()


def test_only_one_is_up(cluster: state.Local, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "cluster", "up", "--port", "0")
    assert status == 2
    assert f"already running at {cluster.address}" in err


def test_down_leaves_nothing(cluster: state.Local, capsys: pytest.CaptureFixture[str]) -> None:
    mine = processes.members(cluster.session)
    assert {processes.SCHEDULER, processes.STORE} <= {each.name() for each in mine}
    status, out, _ = call(capsys, "cluster", "down")
    assert status == 0
    assert f"processes of the cluster at {cluster.address}" in out
    assert [each for each in mine if each.is_running()] == []
    assert left(cluster.session) == []
    assert not cluster.folder.exists()
    assert not cluster.token.exists()
    assert state.read() is None
