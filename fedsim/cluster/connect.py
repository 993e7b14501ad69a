"""What a driver needs to join a cluster; the Ray engine calls these two functions.

    at = resolve("auto")                  # raises UserError before anything starts
    os.environ.update(environment(at))    # before the first import of ray: it reads them then
    import ray
    ray.init(address=at)

A driver runs on a machine of the cluster: Ray wants a node at its side.
"""

from __future__ import annotations

import os

from fedsim.cluster import addresses, state
from fedsim.cluster.processes import is_up
from fedsim.errors import UserError

AUTO = "auto"


def resolve(address: str) -> str:
    """Returns the HOST:PORT of a cluster to join, or "auto" for one that only Ray can find.

    "auto" means, in this order: $RAY_ADDRESS, the cluster that `fedsim cluster up` started here, or
    the node that runs on this machine, which Ray looks for itself.

    Raises:
      UserError: the address is malformed, nothing answers there, or the cluster that was started
        here has died.
    """
    cluster = state.read()
    here = cluster if isinstance(cluster, state.Local) else None
    if address == AUTO:
        if given := os.environ.get("RAY_ADDRESS"):
            return given
        if here is None:
            return AUTO
        address = here.address
    if here is not None and here.address == address and not is_up(here.processes):
        raise UserError(
            f"the cluster at {address} is no longer running; `fedsim cluster down` tidies up,"
            " `fedsim cluster up` starts another"
        )
    addresses.reach(address)
    return address


def environment(address: str) -> dict[str, str]:
    """Returns the environment variables with which a process joins the cluster at `address`.

    For the cluster that `fedsim cluster up` started here that is its token; for others the token is
    found as Ray finds it: $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token, if
    $RAY_AUTH_MODE is "token". Ray reads the variables when it is imported.
    """
    cluster = state.read()
    if isinstance(cluster, state.Local) and cluster.address == address:
        return of_local(cluster)
    return {**COMMON}


def of_local(cluster: state.Local) -> dict[str, str]:
    """Returns the environment variables of a process that joins, or is, a node of `cluster`."""
    return {
        **COMMON,
        "RAY_AUTH_MODE": "token",
        # The token itself would come first; empty, it does not count.
        "RAY_AUTH_TOKEN": "",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token),
        **(LOOPBACK if cluster.loopback else {}),
    }


COMMON = {"RAY_USAGE_STATS_ENABLED": "0"}

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray replaces 127.0.0.1 by an address that others reach, unless it is told, by this name on every
system, that there will be no other machine."""
