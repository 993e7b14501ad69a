"""Clusters for tests, which leave no process behind.

`two_nodes` has both nodes on this machine, `two_hosts` each in a network namespace of its own. Both
are started once for a module and yield the address and environment of a driver (`Nodes`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedsim.cluster import connect, local, state
from tests.cluster.nodes import (
    SECONDS,
    SETTINGS,
    STORE,
    Nodes,
    end_session,
    environment,
    left,
    start_node,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's state folder of its own, for a module."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(home))
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(scope="module")
def two_nodes(state_home: Path) -> Iterator[Nodes]:
    """A head as `fedsim cluster up` starts it and a second node, both on this machine.

    Not on 127.0.0.1: there Ray allows one node alone.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems have one loopback address")
    with ExitStack() as tidy:
        cluster = tidy.enter_context(_head("127.0.0.2"))
        joining = connect.of_local(cluster)
        second = tidy.enter_context(_node(cluster.address, "127.0.0.3", joining))
        yield Nodes(cluster.address, joining, sessions=(cluster.session, second))


@contextmanager
def _node(
    address: str, host: str, added: dict[str, str], prefix: tuple[str, ...] = ()
) -> Iterator[int]:
    """Yields the session of a node that joined."""
    node = start_node(address, host, added, prefix)
    try:
        out, _ = node.communicate(timeout=SECONDS)
        assert node.returncode == 0, out
        yield node.pid
    finally:
        end_session(node.pid)
        assert left(node.pid) == []


HOSTS = ("fedsim-a", "fedsim-b")
ADDRESSES = ("10.213.77.1", "10.213.77.2")


@pytest.fixture(scope="module")
def two_hosts(state_home: Path) -> Iterator[Nodes]:
    """A head and a second node with a network of their own each, joined by a virtual cable."""
    with ExitStack() as tidy:
        try:
            tidy.enter_context(_namespaces())
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            pytest.skip(f"no network namespaces here: {why}")
        first, second = (("ip", "netns", "exec", name) for name in HOSTS)
        cluster = tidy.enter_context(_head_on(first, ADDRESSES[0]))
        joining = connect.of_local(cluster)
        session = tidy.enter_context(_node(cluster.address, ADDRESSES[1], joining, second))
        sessions = (cluster.session, session)
        yield Nodes(cluster.address, joining, sessions, prefix=first)


@contextmanager
def _head_on(prefix: tuple[str, ...], host: str) -> Iterator[state.Local]:
    words = ["--node-ip", host, "--cpus", "1", "--gpus", "0", "--object-store", "100"]
    command = [*prefix, sys.executable, "-m", "tests.e2e.command", "cluster", "up", *words]
    subprocess.run(command, cwd=ROOT, env=environment({}), check=True, timeout=SECONDS)
    cluster = state.read()
    assert isinstance(cluster, state.Local)
    with _ended(cluster):
        yield cluster


@contextmanager
def _head(host: str) -> Iterator[state.Local]:
    head = local.Head(cpus=1, gpus=0, host=host, port=0, object_store=STORE)
    with _ended(local.start(head)) as cluster:
        yield cluster


@contextmanager
def _ended(cluster: state.Local) -> Iterator[state.Local]:
    """Ends a cluster, if the test has not, and sees that nothing is left of it."""
    try:
        yield cluster
    finally:
        if state.read() == cluster:
            local.stop(cluster)
        assert left(cluster.session) == []
        assert not cluster.folder.exists()


@contextmanager
def _namespaces() -> Iterator[None]:
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    made = []
    try:
        for name in HOSTS:
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ends = [f"{name}-eth" for name in HOSTS]
        ip(
            "-n",
            HOSTS[0],
            "link",
            "add",
            ends[0],
            "type",
            "veth",
            "peer",
            ends[1],
            "netns",
            HOSTS[1],
        )
        for name, end, address in zip(HOSTS, ends, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
        yield
    finally:
        for name in made:
            ip("netns", "delete", name)
