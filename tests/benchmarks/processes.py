"""A process and its descendants: their memory, and their end. Reads /proc, so Linux only.

Elsewhere a process has no known descendants and no known memory.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

Tree = dict[int, str]
"""Process ids and when each was started, so that an id that is used again is not mistaken."""

GRACE = 5.0
"""Seconds that a process has after it has been asked to end."""


def tree(root: int) -> Tree:
    """Returns the process and all of its descendants that are alive."""
    parents: dict[int, int] = {}
    started: Tree = {}
    for folder in Path("/proc").glob("[0-9]*"):
        stat = _stat(int(folder.name))
        if stat is not None:
            parents[int(folder.name)], started[int(folder.name)] = int(stat[1]), stat[19]
    found = {root: started.get(root, "")}
    while more := {p for p, parent in parents.items() if parent in found and p not in found}:
        found |= {p: started[p] for p in more}
    return found


def peak_mb(processes: Tree) -> float | None:
    """Returns the sum of the processes' peaks of resident memory in MB (10⁶ bytes).

    Pages that processes share count once for each of them.
    """
    total = 0
    for pid in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) * 1024
    return total / 1e6 if total else None


def end(processes: Tree) -> None:
    """Asks the processes to end, and after GRACE seconds no longer asks."""
    _send(processes, signal.SIGCONT)
    for how in (signal.SIGTERM, signal.SIGKILL):
        _send(processes, how)
        deadline = time.monotonic() + GRACE
        while alive(processes) and time.monotonic() < deadline:
            time.sleep(0.02)


def _send(processes: Tree, what: signal.Signals) -> None:
    for pid in alive(processes):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, what)


def alive(processes: Tree) -> list[int]:
    """Returns the ids of those that have not ended."""
    stats = {pid: _stat(pid) for pid in processes}
    return [p for p, s in stats.items() if s is not None and s[0] != "Z" and s[19] == processes[p]]


def _stat(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat after the name: 0 is the state, 1 the parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
