"""Asks a cluster what it has, in a process of its own: python -m fedsim.cluster.probe ADDRESS.

The process joins as a driver does, so that it also shows whether drivers are let in; the command
itself stays free of Ray, which keeps threads and its settings for the life of a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from fedsim.errors import FedsimError, UserError

TIMEOUT = 60.0
"""Seconds that an answer may take."""
REFUSED = "AuthenticationError"
FEW_TRIES = {"RAY_NUM_REDIS_GET_RETRIES": "3"}
"""Of a second each; Ray makes twenty before it says that its token is refused."""


def ask(address: str, environment: dict[str, str]) -> dict[str, Any]:
    """Returns address, version, dashboard, nodes and resources of the cluster at `address`.

    address: HOST:PORT or "auto". environment: what to add to this process's for the driver.

    Raises:
      UserError: the cluster wants a token, or another one.
      FedsimError: there is no cluster, or it does not answer.
    """
    done = _run(address, {**FEW_TRIES, **environment})
    if done.returncode and REFUSED not in done.stderr:  # a busy machine may need all its tries
        done = _run(address, environment)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if any(REFUSED in line for line in lines):
        raise UserError(
            f"the cluster at {address} refuses this token, or the lack of one: set RAY_AUTH_MODE to"
            " token, and RAY_AUTH_TOKEN_PATH to the file that its other nodes have"
        )
    raise FedsimError(
        f"cannot join the cluster at {address}: {lines[-1] if lines else 'no reason'}"
    )


def _run(address: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs this module; raises FedsimError if it takes too long."""
    try:
        return subprocess.run(
            [sys.executable, "-P", "-m", "fedsim.cluster.probe", address],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise FedsimError(
            f"what is at {address} did not answer as a Ray cluster within {TIMEOUT:.0f} s"
        ) from None


def main(address: str) -> None:
    """Joins the cluster and prints one line of JSON about it."""
    import ray

    context = ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    total, free = ray.cluster_resources(), ray.available_resources()
    document = {
        "address": context.address_info["gcs_address"],
        "ray": ray.__version__,
        "python": sys.version.partition(" ")[0],
        "dashboard": f"http://{context.dashboard_url}" if context.dashboard_url else None,
        "nodes": [_node(each) for each in ray.nodes()],
        "total": _counts(total),
        "free": _counts(free),
    }
    sys.stdout.write(json.dumps(document) + "\n")
    ray.shutdown()


def _node(node: dict[str, Any]) -> dict[str, Any]:
    port = node.get("MetricsExportPort", 0)  # negative while Ray looks for one
    return {
        "id": node["NodeID"],
        "host": node["NodeManagerAddress"],
        "name": node["NodeManagerHostname"],
        "alive": node["Alive"],
        **_counts(node["Resources"]),
        "metrics": f"http://{node['NodeManagerAddress']}:{port}/metrics" if port > 0 else None,
    }


def _counts(resources: dict[str, float]) -> dict[str, float]:
    """Returns CPUs and GPUs, and memory and space for objects in MiB."""
    mib = 2**20
    return {
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "memory_mib": round(resources.get("memory", 0.0) / mib),
        "object_store_mib": round(resources.get("object_store_memory", 0.0) / mib),
    }


if __name__ == "__main__":
    main(sys.argv[1])
