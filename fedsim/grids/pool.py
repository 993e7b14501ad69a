"""Workers in other processes, by Ray: started, given work, replaced when they are lost.

What a call computes depends on its arguments alone, so a call whose worker dies is made again on
another one, and the result is the same.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.errors import RunFailed, UserError
from fedsim.grids.actor import Place, send_tensors_by_numpy
from fedsim.scenario.sections import EngineParams

START_PATIENCE = 120.0
"""Seconds until at least one worker must be ready."""

TOGETHER = 20.0
"""Seconds that a run waits for all of its workers before it begins with those that are ready."""

TRIES = 5
"""Workers that may die over one call before the call is what kills them."""

GRACE = 10.0
"""Seconds that a worker has beyond its clients' deadlines, before it counts as hung itself."""

Call = Callable[[Any], Any]
"""Takes an actor's handle, starts the work and returns Ray's reference to the result."""


@dataclass
class _Worker:
    """place: None until the actor is ready, whose reference `ready` is."""

    handle: Any
    ready: Any
    place: Place | None = None


class Late:
    """The result of a call whose worker did not answer within the deadline."""


class Pool:
    """As many workers as were asked for, or as there are at the moment."""

    def __init__(self, make: Callable[[], Any], count: int) -> None:
        """make: returns the handle of a new actor with a method `place`."""
        self._make = make
        self._slots: list[_Worker] = [self._started() for _ in range(count)]
        self.lost = 0
        """Workers that died or were ended because they hung."""
        self._await_first()

    def _started(self) -> _Worker:
        handle = self._make()
        return _Worker(handle, handle.place.remote())

    @property
    def places(self) -> list[Place]:
        """Where the workers that are ready are."""
        return [worker.place for worker in self._slots if worker.place is not None]

    def __len__(self) -> int:
        return len(self._slots)

    def alive(self) -> list[Any]:
        """Returns the handles of the workers that are ready, those replaced meanwhile included.

        Waits while there is none. Raises RunFailed if none can be started.
        """
        self._look(0.0)
        if not self.places:
            self._await_first()
        return [worker.handle for worker in self._slots if worker.place is not None]

    def run(self, calls: Sequence[Call], deadline: float | None = None) -> list[Any]:
        """Returns the calls' results in order; a Late where a worker has not answered by then.

        deadline: seconds from now.
        Raises RunFailed if a call kills one worker after the other, or raises.
        """
        import ray

        results: list[Any] = [None] * len(calls)
        deaths = Counter[int]()
        until = None if deadline is None else time.monotonic() + deadline
        pending: dict[Any, tuple[int, Any]] = {}
        handles = self.alive()
        for number, call in enumerate(calls):
            handle = handles[number % len(handles)]
            pending[call(handle)] = number, handle
        while pending:
            timeout = None if until is None else max(until - time.monotonic(), 0.0)
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=timeout)
            if not ready:
                for number, handle in pending.values():
                    results[number] = Late()
                    self.replace(handle)
                return results
            number, handle = pending.pop(ready[0])
            try:
                results[number] = ray.get(ready[0])
                if getattr(results[number], "stuck", False):
                    self.replace(handle)
            except ray.exceptions.RayTaskError as error:
                raise RunFailed(f"a worker failed: {_last_line(error)}") from error
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                deaths[number] += 1
                if deaths[number] == TRIES:
                    raise RunFailed(
                        f"{TRIES} workers died one after the other over the same clients:"
                        f" {_last_line(error)}"
                    ) from error
                self.replace(handle)
                handles = self.alive()
                busy = Counter(id(other) for _, other in pending.values())
                handle = min(handles, key=lambda each: busy[id(each)])
                pending[calls[number](handle)] = number, handle
            except ray.exceptions.RayError as error:
                raise RunFailed(f"Ray: {_last_line(error)}") from error
        return results

    def replace(self, handle: Any) -> None:
        """Ends a worker that is lost or hung and starts another in its place."""
        import ray

        for slot, worker in enumerate(self._slots):
            if worker.handle is handle:
                ray.kill(handle)
                self.lost += 1
                self._slots[slot] = self._started()

    def close(self) -> None:
        """Ends all workers."""
        import ray

        for worker in self._slots:
            ray.kill(worker.handle)
        self._slots = []

    def _await_first(self) -> None:
        """Waits until all workers are ready, after a while until some are."""
        began = time.monotonic()
        while len(self.places) < len(self._slots):
            waited = time.monotonic() - began
            if self.places and waited > TOGETHER:
                return
            if waited > START_PATIENCE:
                raise RunFailed(
                    f"no worker was ready within {START_PATIENCE:g} s; the cluster has"
                    f" {resources()}: ask for less (engine.workers, engine.client_resources)"
                )
            self._look(0.2)

    def _look(self, seconds: float) -> None:
        """Notes which of the starting workers are ready by now."""
        import ray

        starting = {w.ready: w for w in self._slots if w.place is None}
        if not starting:
            return
        ready, _ = ray.wait(list(starting), num_returns=len(starting), timeout=seconds)
        for reference in ready:
            try:
                starting[reference].place = ray.get(reference)
            except ray.exceptions.ActorDiedError as error:
                if "creation task" in str(error):  # what the constructor raised it will raise again
                    raise RunFailed(f"a worker cannot start: {_last_line(error)}") from error
                self.replace(starting[reference].handle)
            except ray.exceptions.RayError as error:
                raise RunFailed(f"a worker cannot start: {_last_line(error)}") from error


def resources() -> str:
    """Returns what the cluster has, in words."""
    import ray

    found = ray.cluster_resources()
    cpus, gpus = found.get("CPU", 0), found.get("GPU", 0)
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


_connected: Any = None
"""What ray.init returned to `connect`."""


def dashboard() -> str:
    """Returns the address of the cluster's dashboard; nothing if it has none."""
    url = getattr(_connected, "dashboard_url", None)
    return f"http://{url}" if url else ""


def connect(engine: EngineParams, cpus: int) -> None:
    """Connects this process to the scenario's cluster, or starts Ray on this machine.

    cpus: those of this machine that may be used. Raises UserError where that fails.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "the engine ray needs Ray, which is not installed: pip install 'fedsim-fl[ray]'"
        ) from error
    global _connected
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if engine.address is None:
            wanted = (engine.workers or 1) * engine.client_resources.cpus
            _connected = ray.init(
                "local",
                num_cpus=max(cpus, -int(-wanted // 1)),
                object_store_memory=engine.object_store_mb * 10**6,
                include_dashboard=False,
                **quiet,
            )
        else:
            try:
                _connected = ray.init(engine.address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"there is no Ray cluster at {engine.address}: {_last_line(error)}"
                ) from error
    send_tensors_by_numpy(copy=False)


def worker_count(engine: EngineParams) -> int:
    """Returns how many workers the scenario asks for, or as many as the cluster has room for.

    Raises UserError if there is no room for one.
    """
    import ray

    needs, found = engine.client_resources, ray.cluster_resources()
    room = [int(found.get("CPU", 0) / needs.cpus)] if needs.cpus else []
    room += [int(found.get("GPU", 0) / needs.gpus)] if needs.gpus else []
    most = min(room)
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


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
