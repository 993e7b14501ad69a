"""The Ray cluster that this process is connected to: how, what it has, where its pages are."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.cluster.connect import environment, resolve
from fedsim.errors import RunFailed, UserError
from fedsim.grids.actor import send_tensors_by_numpy
from fedsim.scenario.sections import ClientResources, EngineParams

START_TRIES = 3
"""Attempts to start Ray on this machine, to each of which it gives half a minute itself."""


def resources() -> str:
    """Returns what the cluster has, in words."""
    import ray

    found = ray.cluster_resources()
    cpus, gpus = found.get("CPU", 0), found.get("GPU", 0)
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


@dataclass(frozen=True)
class _Connection:
    """What `connect` connected to.

    asked: for what. cluster: Ray's address of it. modules: the user's that its workers have.
    """

    asked: tuple[object, ...]
    cluster: str
    dashboard: str
    modules: frozenset[str]


_connection: _Connection | None = None


def links() -> dict[str, Any]:
    """Returns the addresses of the cluster's dashboard and of its nodes' metrics, if it has one."""
    if _connection is None or not _connection.dashboard:
        return {}
    import ray

    metrics = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort", 0) > 0  # negative before there is one
    ]
    return {"dashboard": _connection.dashboard, "metrics": metrics}


def _cluster() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def connect(engine: EngineParams, cpus: int, modules: Iterable[str] = ()) -> None:
    """Connects this process to the scenario's cluster, or starts Ray on this machine.

    cpus: those of this machine that may be used. modules: the user's, by name, which other machines
    need beside fedsim. Raises UserError where that fails.
    """
    global _connection
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "the engine ray needs Ray, which is not installed: pip install 'fedsim-fl[ray]'"
        )
    address = None if engine.address is None else resolve(engine.address)
    # Ray reads these when it is imported
    os.environ.update(environment(address or ""))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    _keep_standard_output()
    own = max(cpus, math.ceil((engine.workers or 1) * engine.client_resources.cpus))
    asked = (address,) if address else (own, engine.object_store_mb)
    wanted = frozenset(modules) if address else frozenset[str]()
    earlier = _connection if ray.is_initialized() else None
    if earlier and earlier.cluster == _cluster():
        if earlier.asked == asked:
            wanted |= earlier.modules  # so that runs that take turns have one connection
        if earlier.asked != asked or not wanted <= earlier.modules:
            ray.shutdown()  # another cluster, one too small for this run, or without its modules
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            store = engine.object_store_mb * 10**6
            context = _started_here(num_cpus=own, object_store_memory=store, **quiet)
        else:
            try:
                context = ray.init(address, runtime_env=shipped(wanted), **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"there is no Ray cluster at {engine.address}, or it does not let us in:"
                    f" {last_line(error)}"
                ) from error
        url = getattr(context, "dashboard_url", None)
        _connection = _Connection(asked, _cluster(), f"http://{url}" if url else "", wanted)
    send_tensors_by_numpy(copy=False)


def _keep_standard_output() -> None:
    """Keeps Ray from saying there, among our results, that a worker has died: the run says it."""
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *arguments, **named: None


def _started_here(**settings: Any) -> Any:
    """Starts Ray on this machine; returns what it says of itself. Raises RunFailed."""
    import ray

    tries = 0
    while True:
        tries += 1
        try:
            return ray.init("local", include_dashboard=False, **settings)
        except Exception as error:  # Ray raises just that where a busy machine takes too long
            ray.shutdown()
            if tries == START_TRIES:
                raise RunFailed(
                    f"Ray does not start on this machine: {last_line(error)}"
                ) from error


def shipped(modules: Iterable[str]) -> dict[str, Any]:
    """Returns the runtime environment that brings fedsim and the user's modules to the workers.

    Packages that pip has installed here are the cluster's own matter.
    """
    paths = []
    own = sorted({module.partition(".")[0] for module in modules} - {"__main__", "fedsim"})
    for name in ["fedsim", *own]:  # what is in __main__ travels by itself
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        # a package is a folder, or several if none of them has an __init__.py
        places = spec.submodule_search_locations or (
            [spec.origin or ""] if spec.has_location else []
        )
        paths += [
            place
            for place in map(str, places)
            if name == "fedsim" or not {"site-packages", "dist-packages"} & set(Path(place).parts)
        ]
    return {"py_modules": paths}


def worker_count(engine: EngineParams) -> int:
    """Returns how many workers the scenario asks for, or as many as the cluster has room for.

    Raises UserError if there is no room for one.
    """
    needs = engine.client_resources
    most = room_for(needs)
    if most < 1:
        raise UserError(
            f"a worker needs {needs.cpus:g} CPUs and {needs.gpus:g} GPUs"
            f" (engine.client_resources), and the cluster has {resources()}"
        )
    if engine.workers is not None and engine.workers > most:
        raise UserError(
            f"engine.workers is {engine.workers}, and the cluster, with {resources()}, has room for"
            f" {most} of {needs.cpus:g} CPUs and {needs.gpus:g} GPUs each"
        )
    return engine.workers or most


def room_for(needs: ClientResources) -> int:
    """Returns how many workers the cluster has room for.

    A worker is on one node: what is left over on several makes no further one.
    """
    import ray

    return sum(_room(node["Resources"], needs) for node in ray.nodes() if node["Alive"])


def _room(found: Mapping[str, float], needs: ClientResources) -> int:
    """Returns how many workers fit into a node's resources."""
    room = [int(found.get("CPU", 0) / needs.cpus)] if needs.cpus else []
    room += [int(found.get("GPU", 0) / needs.gpus)] if needs.gpus else []
    return min(room)


def last_line(error: BaseException) -> str:
    """Returns the last line of what an error says, where Ray puts the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
