"""What `fedsim cluster` says to wrong input, and to a Ray that does not start."""

from __future__ import annotations

import json
import os
import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from fedsim.cluster import addresses, connect, installed, launcher, local, state
from fedsim.errors import FedsimError, UserError
from tests.e2e.conftest import Command, fedsim

__all__ = ["fedsim"]

ROOT = Path(__file__).parents[2]
LOCAL = state.Local(
    address="127.0.0.1:6379",
    loopback=True,
    session=2**22 + 1,  # above the largest number of a process
    processes=(state.Process(2**22 + 1, 1.0, "gcs_server"),),
    folder=Path("/nowhere/ray"),
    token=Path("/nowhere/token"),
    object_store=2**27,
    ray="2.55.1",
)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_without_ray_the_extra_is_named(fedsim: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", absent)
    for words in (["up"], ["up", "x.yaml"], ["status"]):
        result = fedsim("cluster", *words)
        assert (result.status, result.err) == (
            2,
            "fedsim: Ray is not installed: pip install 'fedsim-fl[ray]'\n",
        )


@pytest.mark.parametrize(("found", "old"), [("2.9.3", True), ("2.51.2", True), ("2.52.0", False),
                                            ("3.0.0.dev0", False)])  # fmt: skip
def test_a_ray_without_authentication_is_refused(
    found: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "version", lambda name: found)
    if old:
        with pytest.raises(UserError, match=r"knows no authentication; 2\.52"):
            installed.ray_version()
    else:
        assert installed.ray_version() == found


def test_a_port_that_is_taken(fedsim: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = fedsim("cluster", "up", "--port", port)
    assert result.status == 2
    assert f"port {port} of 127.0.0.1 is taken; choose another with --port" in result.err
    assert state.read() is None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["up", "--node-ip", "example"], "--node-ip takes an IP address; 'example' is none"),
        (["up", "--node-ip", "203.0.113.9"], "203.0.113.9 is no address of this machine"),
        (["up", "--object-store", "10"], "--object-store 10: this machine has"),
        (["up", "--object-store", "100000000"], "can be for objects"),
        (["up", "none.yaml"], "cannot read none.yaml: No such file or directory"),
        (["up", "none.yaml", "--cpus", "2"], "--cpus: none.yaml says what its machines have"),
        (["status"], "no cluster is up; `fedsim cluster up` starts one"),
        (["status", "--address", "here"], "'here' is not the address of a Ray cluster"),
        (["status", "--address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_wrong_input_is_explained(fedsim: Command, words: list[str], complaint: str) -> None:
    result = fedsim("cluster", *words)
    assert result.status == 2
    assert complaint in result.err
    assert result.out == ""
    assert state.read() is None


@pytest.mark.xdist_group("ray")
def test_a_start_that_fails_shows_the_end_of_rays_log(
    fedsim: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("a" * 100)  # no room for the path of a socket
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))
    result = fedsim("cluster", "up", "--port", 0, "--cpus", 1, "--object-store", 100)
    assert result.status == 1
    assert "Ray's start ended with status" in result.err
    assert "AF_UNIX path length cannot exceed" in result.err
    assert state.read() is None
    assert not (state.folder() / "token").exists()


def test_down_without_a_cluster_says_so(fedsim: Command) -> None:
    result = fedsim("cluster", "down")
    assert (result.status, result.err) == (0, "")
    assert "no cluster" in result.out


def test_a_cluster_that_died_is_told_from_one_that_runs(fedsim: Command) -> None:
    with state.lock():
        state.write(LOCAL)
    result = fedsim("cluster", "status")
    assert result.status == 2
    assert "the cluster at 127.0.0.1:6379 is no longer running" in result.err
    result = fedsim("cluster", "down")
    assert (result.status, result.out) == (
        0,
        "The cluster at 127.0.0.1:6379 had died; tidied up.\n",
    )
    assert state.read() is None


def test_a_number_that_went_to_another_process_is_not_taken_for_rays() -> None:
    reused = state.Process(os.getpid(), 1.0, "gcs_server")
    ended = local.stop(state.Local(**{**vars(LOCAL), "session": os.getsid(0),
                                      "processes": (reused,)}))  # fmt: skip
    assert ended == 0  # and this test is still alive


@pytest.mark.parametrize("cluster", [LOCAL, state.Launched(Path("/x/aws.yaml"), "fedsim", "2.55")])
def test_what_is_remembered_is_read_again(cluster: state.Cluster) -> None:
    with state.lock():
        state.write(cluster)
    assert state.read() == cluster
    state.forget()
    state.forget()
    assert state.read() is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "kind": "local", "processes": 3}']
)
def test_a_state_that_cannot_be_read_is_a_sentence(fedsim: Command, text: str) -> None:
    with state.lock():
        (state.folder() / "cluster.json").write_text(text)
    result = fedsim("cluster", "down")
    assert result.status == 2
    assert "is not readable as what this fedsim writes" in result.err


def test_two_commands_at_once(fedsim: Command) -> None:
    with state.lock():
        result = fedsim("cluster", "up", "--port", 0)
    assert result.status == 2
    assert "another `fedsim cluster` is starting or ending a cluster" in result.err


@pytest.mark.parametrize("address", ["", "6379", "host", "host:", ":6379", "host:0", "host:70000",
                                     "http://host:6379", "ray://host:10001"])  # fmt: skip
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UserError, match="write HOST:PORT"):
        addresses.parse(address)


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "[::1]:6379", "head.example:80"])
def test_addresses_are_put_together_as_they_are_taken_apart(address: str) -> None:
    assert addresses.join(*addresses.parse(address)) == address


def test_auto_prefers_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connect.resolve("auto") == "auto"
    with state.lock():
        state.write(LOCAL)
    with pytest.raises(UserError, match="no longer running"):
        connect.resolve("auto")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert connect.resolve("auto") == "10.0.0.1:6379"


def test_only_the_cluster_that_was_started_here_gets_its_token() -> None:
    with state.lock():
        state.write(LOCAL)
    assert connect.environment(LOCAL.address) == {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "",
        "RAY_AUTH_TOKEN_PATH": "/nowhere/token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    assert connect.environment("10.0.0.1:6379") == {"RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.parametrize(
    ("asked", "memory", "expected"),
    [(None, 64 * 2**30, 2**30), (None, 2**30, int(0.3 * 2**30)), (None, 100, 80 * 2**20),
     (200 * 2**20, 2**30, 200 * 2**20)],
)  # fmt: skip
def test_memory_for_objects_is_bounded(asked: int | None, memory: int, expected: int) -> None:
    assert local.object_store(asked, memory) == expected


GOOD = """\
cluster_name: mine
provider: {type: local, head_ip: 10.0.0.1, worker_ips: []}
file_mounts: {"~/.ray/auth_token": "~/.ray/auth_token"}
head_start_ray_commands: [ray stop, RAY_AUTH_MODE=token ray start --head]
worker_start_ray_commands: ["RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379"]
"""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [", "is not YAML"),
        ("[1, 2]", "no file of Ray's launcher"),
        ("name: x", "no file of Ray's launcher"),
        (GOOD.replace("file_mounts", "metadata"), "file_mounts: the token does not reach"),
        (GOOD.replace('"~/.ray/auth_token": ', '"~/token": '), "the token does not reach"),
        (GOOD.replace("RAY_AUTH_MODE=token ray start --head", "ray start --head"),
         "head_start_ray_commands: Ray would start without authentication"),
        (GOOD.replace("worker_start_ray_commands", "head_setup_commands"),
         "worker_start_ray_commands: Ray would start without authentication"),
    ],
)  # fmt: skip
def test_launcher_files_without_authentication_are_refused(
    fedsim: Command, text: str, complaint: str
) -> None:
    Path("x.yaml").write_text(text)
    result = fedsim("cluster", "up", "x.yaml", "--yes")
    assert result.status == 2
    assert complaint in result.err
    assert state.read() is None


def test_launcher_files_may_set_the_mode_for_all_shells(tmp_path: Path) -> None:
    text = GOOD.replace("RAY_AUTH_MODE=token ", "")
    path = tmp_path / "x.yaml"
    path.write_text(text + "setup_commands: [echo export RAY_AUTH_MODE=token >> ~/.bashrc]\n")
    assert launcher.check(path) == "mine"


def test_a_launched_cluster_is_remembered_until_it_is_down(
    fedsim: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for Ray's command that notes how it was called."""
    stand_in = tmp_path / "ray.sh"
    told = {"address": "10.0.0.1:6379", "ray": "2.55.1"}
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase $1 in exec) echo Fetched IP: 10.0.0.1\n'
        f"printf '%s\\n' '{json.dumps(told, indent=2)}';; esac\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(launcher, "RAY", (str(stand_in),))
    Path("x.yaml").write_text(GOOD)
    assert fedsim("cluster", "up", "x.yaml", "--yes").status == 0
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    secret = token.read_text()
    result = fedsim("cluster", "up")
    assert result.status == 2
    assert "x.yaml is up; `fedsim cluster down` ends it" in result.err
    assert json.loads(fedsim("cluster", "status", "--json").out) == told
    assert fedsim("cluster", "up", "x.yaml", "--yes").status == 0  # an update
    assert token.read_text() == secret
    assert fedsim("cluster", "down", "--yes").status == 0
    assert state.read() is None
    path = Path.cwd() / "x.yaml"
    assert (tmp_path / "calls").read_text().splitlines() == [
        "up --yes x.yaml",
        f"exec {path} fedsim cluster status --address auto --json",
        "up --yes x.yaml",
        f"down --yes {path}",
    ]


def test_a_launcher_that_fails_leaves_what_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD)
    monkeypatch.setattr(launcher, "RAY", ("false",))
    with pytest.raises(FedsimError, match="`ray up` ended with status 1"):
        launcher.up(path, yes=True)
    assert state.read() == state.Launched(path, "mine", installed.ray_version())
