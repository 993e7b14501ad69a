"""Where a run was computed: versions, processor, and the state of the working directory's git."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fedsim

PACKAGES = ("flwr", "torch", "numpy", "pandas", "safetensors")
# Results are the same to the bit only while these are.
DECISIVE = ("fedsim", "packages", "cpu_capability", "machine")


@cache
def describe() -> dict[str, Any]:
    """Returns the environment of this process, JSON-able; `git` is None outside a repository."""
    import torch

    return {
        "python": platform.python_version(),
        "fedsim": fedsim.__version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "git": _git(Path.cwd()),
    }


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns what decides the last bits of a result and has changed: name → [then, now]."""
    return {
        name: [then.get(name), now.get(name)]
        for name in DECISIVE
        if then.get(name) != now.get(name)
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _git(folder: Path) -> dict[str, Any] | None:
    commit = _ask_git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _ask_git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _ask_git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
