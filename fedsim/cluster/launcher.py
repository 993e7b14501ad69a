"""Clusters on other machines, by Ray's own launcher: a YAML file says which machines and how.

The token travels by the file: `file_mounts` copies it to every node, and every `ray start` there
has RAY_AUTH_MODE=token. A file that leaves one of them out is refused, because Ray would start an
open cluster from it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedsim.cluster import connect, state
from fedsim.cluster.installed import ray_version
from fedsim.cluster.local import RAY
from fedsim.cluster.processes import living
from fedsim.cluster.token import shared_token
from fedsim.errors import FedsimError, Problem, ScenarioError, UserError

SHARED = "~/.ray/auth_token"
"""Where Ray looks for the token, here and on the nodes."""
MODE = "RAY_AUTH_MODE=token"
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
PREPARES = ("initialization_commands", "setup_commands")


def up(path: Path, yes: bool) -> state.Launched:
    """Starts, or updates, the cluster that a launcher file describes; Ray asks unless `yes`.

    Raises:
      UserError: no Ray, another cluster is up, or the file is no good.
      FedsimError: Ray's launcher failed; it has said why.
    """
    version = ray_version()
    name = check(path)
    with state.lock():
        cluster = state.Launched(path.absolute(), name, version)
        match state.read():
            case state.Local() as found if living(found.processes):
                raise UserError(
                    f"a cluster is already running at {found.address}; `fedsim cluster down` ends"
                    " it, and another can be launched then"
                )
            case state.Launched() as other if other.file != cluster.file:
                raise UserError(
                    f"the cluster of {other.file} is up; `fedsim cluster down` ends it, and another"
                    " can be launched then"
                )
        shared_token()
        # Before and not after: a launch that fails half-way leaves machines that cost money.
        state.write(cluster)
        _ray("up", *(["--yes"] if yes else []), str(path))
    return cluster


def down(cluster: state.Launched, yes: bool) -> None:
    """Ends a cluster and forgets it; Ray asks unless `yes`. Raises FedsimError if Ray fails."""
    with state.lock():
        _ray("down", *(["--yes"] if yes else []), str(cluster.file))
        state.forget()


def ask(cluster: state.Launched) -> dict[str, Any]:
    """Returns what `probe.ask` says on the cluster's head; raises FedsimError if it cannot."""
    there = "fedsim cluster status --address auto --json"
    answer = _ray("exec", str(cluster.file), there, capture=True)
    start, end = answer.find("{\n"), answer.rfind("}")
    try:
        found: dict[str, Any] = json.loads(answer[start : end + 1])
    except ValueError:
        raise FedsimError(
            f"the head of {cluster.file} did not say how it stands but\n{answer.strip()}"
        ) from None
    return found


def check(path: Path) -> str:
    """Returns the name of the cluster that a launcher file describes.

    Raises UserError: no such file, no YAML, not a launcher file, or one without authentication.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise UserError(f"cannot read {path}: {why}; deploy/ray/ has files to start from") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if found := problems(config, str(path)):
        raise ScenarioError(found)
    return str(config["cluster_name"])


def problems(config: object, file: str) -> list[Problem]:
    """Returns what keeps a launcher file from describing a cluster with authentication."""
    if not isinstance(config, Mapping) or not {"cluster_name", "provider"} <= set(config):
        return [Problem("", "no file of Ray's launcher: cluster_name, provider", file=file)]
    found = []
    mounts = config.get("file_mounts") or {}
    if not (isinstance(mounts, Mapping) and any(_is_shared(mounts, there) for there in mounts)):
        found.append(
            Problem(
                "file_mounts",
                "the token does not reach the nodes",
                hint=f'Write "{SHARED}": "{SHARED}"; with docker, the home folder in the container',
                file=file,
            )
        )
    everywhere = any(MODE in line for name in PREPARES for line in _lines(config, name))
    for name in STARTS:
        starts = [line for line in _lines(config, name) if "ray start" in line]
        if not starts or not (everywhere or all(MODE in line for line in starts)):
            found.append(
                Problem(
                    name,
                    "Ray would start without authentication",
                    hint=f"Write {MODE} before `ray start`",
                    file=file,
                )
            )
    return found


def _is_shared(mounts: Mapping[str, Any], there: str) -> bool:
    here = os.path.expanduser(str(mounts[there]))
    return here == os.path.expanduser(SHARED) and str(there).endswith("/.ray/auth_token")


def _lines(config: Mapping[str, Any], name: str) -> Sequence[str]:
    lines = config.get(name) or ()
    return [str(line) for line in lines] if isinstance(lines, Sequence) else ()


def _ray(*words: str, capture: bool = False) -> str:
    """Runs a command of Ray's launcher, whose questions and progress the user sees.

    Returns its output if `capture`; raises FedsimError if it fails.
    """
    done = subprocess.run(
        [*RAY, *words],
        env={**os.environ, **connect.COMMON},
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    if done.returncode:
        raise FedsimError(
            f"`ray {words[0]}` ended with status {done.returncode}; what it says is above"
        )
    return done.stdout or ""
