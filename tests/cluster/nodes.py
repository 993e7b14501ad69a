"""Second nodes and drivers for tests: processes with a given environment, ended by number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli.guard import execute
from fedsim.cluster import local, probe, processes

DRIVER = Path(__file__).with_name("driver.py")
STORE = 100 * local.MIB
SECONDS = 90.0
SETTINGS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@dataclass(frozen=True)
class Nodes:
    """Two nodes, and how a driver joins them."""

    address: str
    """HOST:PORT."""
    environment: dict[str, str]
    """What a driver's process needs."""
    sessions: tuple[int, int]
    """The POSIX sessions of head and second node."""
    prefix: tuple[str, ...] = ()
    """What comes before the command of a driver: it runs on the head's host."""


def environment(added: Mapping[str, str]) -> dict[str, str]:
    """Returns this process's environment without what concerns a cluster, and `added`."""
    base = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**base, "OMP_NUM_THREADS": "1", **added}


def start_driver(
    address: str,
    added: Mapping[str, str],
    paths: Sequence[str] = (),
    prefix: Sequence[str] = (),
    cwd: Path | None = None,
) -> subprocess.Popen[str]:
    """Starts a driver; `answer` waits for it."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-P", str(DRIVER), address, *paths],
        env=environment(added),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(driver: subprocess.Popen[str]) -> dict[str, Any]:
    """Returns what a driver says; fails if it was not let in."""
    out, err = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def start_node(
    address: str, host: str, added: Mapping[str, str], prefix: Sequence[str] = (), cpus: int = 1
) -> subprocess.Popen[str]:
    """Starts a node that asks to join, in a session of its own; ends when it has, or could not."""
    words = [
        *local.RAY,
        "start",
        f"--address={address}",
        f"--node-ip-address={host}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={STORE}",
    ]
    return subprocess.Popen(
        [*prefix, *words],
        env=environment(added),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_session(session: int) -> None:
    """Ends whatever runs in a session that this module opened."""
    remembered = processes.describe(processes.members(session))
    processes.end(session, remembered)


def left(session: int) -> list[str]:
    """Returns the command lines of what still runs in a session."""
    return [" ".join(each.cmdline()) for each in processes.members(session)]


def strangers(joining: Mapping[str, str], folder: Path) -> dict[str, dict[str, str]]:
    """Returns the environments of those who have no token, and of those who have another.

    joining: the environment of a driver that is let in. folder: their home.
    """
    without = {name: value for name, value in joining.items() if "AUTH" not in name}
    other = folder / "another"
    other.write_text("0" * 64)
    # Ray looks into the home folder by itself, and tries many times.
    hurried = {"HOME": str(folder), **probe.FEW_TRIES}
    return {
        "without": {**without, **hurried},
        "wrong": {**joining, **hurried, "RAY_AUTH_TOKEN_PATH": str(other)},
    }


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Calls fedsim; returns exit status, output and complaints."""
    capsys.readouterr()
    status = execute(list(arguments))
    return status, *capsys.readouterr()
