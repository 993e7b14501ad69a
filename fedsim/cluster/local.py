"""A Ray head on this machine, with a token, and nobody but this machine to talk to by default."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from fedsim.cluster import addresses, connect, processes, state
from fedsim.cluster.installed import ray_version
from fedsim.cluster.token import new_token
from fedsim.errors import FedsimError, UserError

MIB = 2**20
OBJECT_STORE = 1024 * MIB
"""Bytes for objects unless asked otherwise, on a machine that has them: a round's objects are the
model and a few sums of its size."""
SHARE = 0.3
"""Part of the memory that objects take at most unless asked otherwise; Ray's own default."""
SMALLEST_STORE = 80 * MIB
"""Bytes; Ray refuses less than 75 MiB."""
LARGEST_SHARE = 0.8

TIMEOUT = 120.0
"""Seconds that a start may take."""
TAIL = 20
"""Lines of Ray's log that are shown when it fails."""
RAYS = "ray"
"""Ray's folder in a cluster's."""
RAY = (sys.executable, "-P", "-m", "ray.scripts.scripts")
"""Ray's own command. -P: a module of the folder that one works in must not stand in for Ray's."""


@dataclass(frozen=True)
class Head:
    """What to start. None: as many as Ray finds."""

    cpus: int | None = None
    gpus: int | None = None
    host: str = "127.0.0.1"
    port: int = 6379
    """0 for any that is free."""
    object_store: int | None = None
    """Bytes; None: a share of the memory."""


def start(head: Head) -> state.Local:
    """Starts a head and returns it; it runs on when this process ends. Remembers it.

    Raises:
      UserError: no Ray, a cluster is up already, the host is not this machine's, the port is taken,
        more memory for objects than there is.
      FedsimError: Ray did not start; says how its log ends.
    """
    version = ray_version()
    addresses.check_host(head.host)
    store = object_store(head.object_store, _memory())
    with state.lock():
        _nothing_running()
        port = addresses.free_port(head.host, head.port)
        token = state.folder() / "token"
        new_token(token)
        # A folder of its own, closed to others: Ray opens the one that it is given to everybody.
        # Short, since the path of a socket has at most 107 bytes.
        place = Path(
            tempfile.mkdtemp(prefix="fedsim-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
        )
        planned = state.Local(
            address=addresses.join(head.host, port),
            loopback=addresses.is_loopback(head.host),
            session=0,
            processes=(),
            folder=place,
            token=token,
            object_store=store,
            ray=version,
        )
        cluster = _start(planned, command(head, port, store, place / RAYS))
        state.write(cluster)
    return cluster


def stop(cluster: state.Local, keep_logs: bool = False) -> int:
    """Ends the processes of a cluster and returns how many there were; forgets it.

    Removes its token and, unless `keep_logs`, what Ray wrote.
    """
    ended = processes.end(cluster.session, cluster.processes)
    cluster.token.unlink(missing_ok=True)
    if not keep_logs:
        shutil.rmtree(cluster.folder, ignore_errors=True)
    state.forget()
    return ended


def command(head: Head, port: int, store: int, place: Path) -> list[str]:
    """Returns the call of Ray that starts a head.

    store: bytes for objects. place: folder for what Ray writes.
    """
    counts = {"--num-cpus": head.cpus, "--num-gpus": head.gpus}
    return [
        *RAY,
        "start",
        "--head",
        f"--node-ip-address={head.host}",
        f"--port={port}",
        f"--temp-dir={place}",
        f"--object-store-memory={store}",
        "--dashboard-host=127.0.0.1",
        f"--ray-client-server-port={addresses.free_port(head.host, 0)}",  # Ray has no word for none
        "--disable-usage-stats",
        *(f"{name}={count}" for name, count in counts.items() if count is not None),
    ]


def object_store(asked: int | None, memory: int) -> int:
    """Returns the bytes for objects on a machine with `memory` bytes; raises UserError."""
    if asked is None:
        return max(SMALLEST_STORE, min(OBJECT_STORE, int(SHARE * memory)))
    if not SMALLEST_STORE <= asked <= LARGEST_SHARE * memory:
        raise UserError(
            f"--object-store {asked // MIB}: this machine has {memory // MIB} MiB of memory; from"
            f" {SMALLEST_STORE // MIB} to {int(LARGEST_SHARE * memory) // MIB} can be for objects"
        )
    return asked


def _nothing_running() -> None:
    """Raises UserError if a cluster is remembered and runs."""
    match state.read():
        case state.Launched(file=file):
            raise UserError(
                f"the cluster of {file} is up; `fedsim cluster down` ends it, and one can be"
                " started here then"
            )
        case state.Local() as found if processes.living(found.processes):
            raise UserError(
                f"a cluster is already running at {found.address}; `fedsim cluster status` shows"
                " it, `fedsim cluster down` ends it"
            )
        case state.Local() as dead:
            stop(dead)


def _start(planned: state.Local, words: list[str]) -> state.Local:
    log = planned.folder / "start.log"
    environment = {**os.environ, **connect.of_local(planned)}
    environment.pop("RAY_ADDRESS", None)
    with open(log, "wb") as output:
        ray = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    session = ray.pid

    def give_up() -> None:
        ray.kill()
        ray.wait()
        processes.end(session, processes.describe(processes.members(session)))
        planned.token.unlink(missing_ok=True)

    try:
        status = _wait(ray)
        found = processes.describe(processes.members(session))
    except BaseException:
        give_up()
        shutil.rmtree(planned.folder, ignore_errors=True)
        raise
    if status == 0 and processes.is_up(found):
        return replace(planned, session=session, processes=found)
    give_up()
    why = f"took more than {TIMEOUT:.0f} s" if status is None else f"ended with status {status}"
    raise FedsimError(
        f"Ray's start {why}. Its log ends with\n{tail(log)}\nAll that it wrote is in"
        f" {planned.folder}"
    )


def _wait(ray: subprocess.Popen[bytes]) -> int | None:
    try:
        return ray.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        return None


def tail(log: Path, lines: int = TAIL) -> str:
    """Returns the last lines of a file that say something."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
