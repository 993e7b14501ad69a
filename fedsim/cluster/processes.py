"""The processes of a cluster on this machine: found by their POSIX session, ended by their number.

Ray is started in a session of its own, which its daemons and workers inherit. A number is not given
to a new session as long as a member of the old one lives (Linux, XNU), so that a session is the
cluster's as long as one of the processes remembered from its start is in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from fedsim.cluster.state import Process

if TYPE_CHECKING:
    import psutil

SCHEDULER, STORE = "raylet", "gcs_server"
"""Names of the daemons without which there is no cluster."""

GRACE = 8.0
"""Seconds that a group of processes has to end by itself."""

STORE_GRACE = 2.0
"""The same for the control store, which waits for other machines' nodes to hang up. It has nothing
to save: it keeps all in memory."""


def members(session: int) -> list[psutil.Process]:
    """Returns the living processes of a session, and those that they started elsewhere."""
    import psutil

    found: dict[int, psutil.Process] = {}
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):
            if os.getsid(pid) == session:
                process = psutil.Process(pid)
                for each in (process, *process.children(recursive=True)):
                    found[each.pid] = each
    return [each for each in found.values() if _lives(each)]


def describe(found: Sequence[psutil.Process]) -> tuple[Process, ...]:
    """Returns what to remember of processes."""
    import psutil

    described = []
    for each in found:
        with suppress(psutil.Error):
            described.append(Process(each.pid, each.create_time(), each.name()))
    return tuple(described)


def living(remembered: Sequence[Process]) -> list[Process]:
    """Returns those that still run."""
    import psutil

    found = []
    for each in remembered:
        with suppress(psutil.Error):
            process = psutil.Process(each.pid)
            if abs(process.create_time() - each.began) < 1 and _lives(process):
                found.append(each)
    return found


def is_up(remembered: Sequence[Process]) -> bool:
    """Returns whether the daemons that a cluster cannot do without run."""
    return {SCHEDULER, STORE} <= {each.name for each in living(remembered)}


def end(session: int, remembered: Sequence[Process]) -> int:
    """Ends what is left of a cluster and returns how many processes that were.

    The scheduler goes first and the control store last, as in `ray stop`: otherwise the rest
    complains of their death. What does not listen is killed.
    """
    import psutil

    if not living(remembered):
        return 0
    found = members(session)
    names = {each: _name(each) for each in found}
    groups = (
        [each for each in found if names[each] == SCHEDULER],
        [each for each in found if names[each] not in (SCHEDULER, STORE)],
        [each for each in found if names[each] == STORE],
    )
    for group in groups:
        for each in group:
            with suppress(psutil.Error):
                each.terminate()
        psutil.wait_procs(group, timeout=STORE_GRACE if group is groups[-1] else GRACE)
    late = [each for each in {*found, *members(session)} if _lives(each)]
    for each in late:
        with suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(late, timeout=GRACE)
    return len({*found, *late})


def _name(process: psutil.Process) -> str:
    import psutil

    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _lives(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
