"""Workers in other processes, by Ray: started, given work, replaced when they are lost.

What a call computes depends on its arguments alone, so a call whose worker dies is made again on
another one, and the result is the same.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.cluster.connect import environment, resolve
from fedsim.errors import RunFailed, UserError
from fedsim.grids.actor import Place, send_tensors_by_numpy
from fedsim.scenario.sections import ClientResources, EngineParams

START_PATIENCE = 120.0
"""Seconds until at least one worker must be ready."""

START_TRIES = 3
"""Attempts to start Ray on this machine, to each of which it gives half a minute itself."""

TOGETHER = 20.0
"""Seconds that a run waits for all of its workers before it begins with those that are ready."""

TRIES = 5
"""Workers that may die over one call before the call is what kills them."""

LOOK_AGAIN = 5.0
"""Seconds between two looks at whether nodes have joined."""

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


@dataclass
class _Flight:
    """A call under way. patience: seconds that it may take once its worker has come to it.

    until: when it is given up; infinite until its turn has come. deaths: workers that died over it.
    """

    number: int
    call: Call
    patience: float
    handle: Any = None
    until: float = math.inf
    deaths: int = 0


class Late:
    """The result of a call whose worker did not answer within the deadline."""


class Pool:
    """As many workers as were asked for, or as there are at the moment."""

    def __init__(
        self, make: Callable[[], Any], count: int, room: Callable[[], int] | None = None
    ) -> None:
        """make: returns the handle of a new actor with a method `place`.

        room: returns how many there could be by now, so that those are started which nodes that
        have joined meanwhile have room for. None: it stays at `count`.
        """
        self._make, self._room = make, room
        self._asked = time.monotonic()
        self._slots: list[_Worker] = [self._started() for _ in range(count)]
        self._flights: dict[Any, _Flight] = {}  # by Ray's reference to the result
        self._results: dict[int, Any] = {}  # by number, until somebody asks
        self._count = 0
        self.lost = 0
        """Workers that died or were ended because they hung."""
        try:
            self._await_first()
        except BaseException:  # an interrupt, too: workers that start late would stay
            self.close()
            raise

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

    def idle(self) -> int:
        """Returns how many of the workers that are ready have nothing to do."""
        busy = {id(flight.handle) for flight in self._flights.values()}
        return sum(id(handle) not in busy for handle in self.alive())

    def run(self, calls: Sequence[Call], deadline: float | None = None) -> list[Any]:
        """Returns the calls' results in order; a Late where a worker has not answered by then.

        deadline: seconds for each, from when its worker has come to it. Raises RunFailed if a call
        kills one worker after the other, or raises.
        """
        self._grow()
        numbers = [self.submit(call, deadline) for call in calls]
        while not self._results.keys() >= set(numbers):
            self._wait(None)
        return [self._results.pop(number) for number in numbers]

    def _grow(self) -> None:
        """Starts workers on what has joined the cluster."""
        if self._room is None or time.monotonic() < self._asked + LOOK_AGAIN:
            return
        self._asked = time.monotonic()
        for _ in range(self._room() - len(self._slots)):
            self._slots.append(self._started())

    def submit(self, call: Call, deadline: float | None = None) -> int:
        """Starts a call on the worker with least to do; returns a number for it."""
        self._count += 1
        patience = math.inf if deadline is None else deadline
        self._start(_Flight(self._count, call, patience))
        return self._count

    def done(self) -> dict[int, Any]:
        """Returns the results of submitted calls that are done by now, by number, each once.

        Raises RunFailed as `run` does.
        """
        while self._wait(0.0):
            pass
        results, self._results = self._results, {}
        return results

    def _wait(self, timeout: float | None) -> bool:
        """Waits for the next call that is done; returns whether there was one in time."""
        import ray

        if not self._flights:
            return False
        for flight in self._first():
            if flight.until == math.inf:
                flight.until = time.monotonic() + flight.patience
        first = min(flight.until for flight in self._flights.values())
        if first < math.inf:
            left = max(first - time.monotonic(), 0.0)
            timeout = left if timeout is None else min(timeout, left)
        ready, _ = ray.wait(list(self._flights), num_returns=1, timeout=timeout)
        for reference in ready:
            self._land(reference)
        if not ready:
            self._give_up_late()
        return bool(ready)

    def _start(self, flight: _Flight) -> None:
        busy = Counter(id(other.handle) for other in self._flights.values())
        flight.handle = min(self.alive(), key=lambda each: busy[id(each)])
        flight.until = math.inf
        with store_errors():  # what a call says beside references goes there, too
            reference = flight.call(flight.handle)
        self._flights[reference] = flight

    def _first(self) -> list[_Flight]:
        """Returns what each worker computes now: workers take their calls in order."""
        found: dict[int, _Flight] = {}
        for flight in self._flights.values():
            found.setdefault(id(flight.handle), flight)
        return list(found.values())

    def _land(self, reference: Any) -> None:
        """Takes the result of a call that is done; starts it again if its worker has died."""
        import ray

        flight, first = self._flights[reference], self._first()
        del self._flights[reference]
        try:
            with store_errors():  # a worker's replies go there, too
                result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise RunFailed(f"a worker failed: {_last_line(error)}") from error
        except _of_the_dead() as error:
            # a worker that was ended here, or died over another call, is not held against this one
            if self.replace(flight.handle):
                blamed = next(each for each in first if each.handle is flight.handle)
                blamed.deaths += 1
                if blamed.deaths == TRIES:
                    raise RunFailed(
                        f"{TRIES} workers died one after the other over the same clients:"
                        f" {_last_line(error)}"
                    ) from error
            self._start(flight)
            return
        except ray.exceptions.RayError as error:
            raise RunFailed(f"Ray: {_last_line(error)}") from error
        if getattr(result, "stuck", False):
            self.replace(flight.handle)
        self._results[flight.number] = result

    def _give_up_late(self) -> None:
        """Gives up the calls whose time is over, and their workers."""
        now = time.monotonic()
        late = {r: flight for r, flight in self._flights.items() if flight.until <= now}
        for reference, flight in late.items():
            del self._flights[reference]
            self.replace(flight.handle)
            self._results[flight.number] = Late()

    def replace(self, handle: Any) -> bool:
        """Ends a worker that is lost or hung and starts another; returns False if that was done."""
        import ray

        for slot, worker in enumerate(self._slots):
            if worker.handle is handle:
                ray.kill(handle)
                self.lost += 1
                self._slots[slot] = self._started()
                return True
        return False

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
                if error.actor_init_failed:  # what the constructor raised it will raise again
                    raise RunFailed(f"a worker cannot start: {_last_line(error)}") from error
                self.replace(starting[reference].handle)
            except _of_the_dead():
                self.replace(starting[reference].handle)
            except ray.exceptions.RayError as error:
                raise RunFailed(f"a worker cannot start: {_last_line(error)}") from error


@contextmanager
def store_errors() -> Iterator[None]:
    """Raises RunFailed where Ray's object store is full."""
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError

    try:
        yield
    except ObjectStoreFullError as error:
        raise RunFailed(
            "Ray's object store is full; give it more with engine.object_store_mb"
        ) from error
    except OutOfDiskError as error:
        raise RunFailed(
            "Ray's object store is full, and so is the disk that takes what it has no room for;"
            " give it more with engine.object_store_mb"
        ) from error


def _of_the_dead() -> tuple[type[Exception], ...]:
    """Returns what Ray raises where a worker is gone: killed, by Ray too where memory is short."""
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError

    return RayActorError, ObjectLostError, OutOfMemoryError, NodeDiedError


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
                    f" {_last_line(error)}"
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
                    f"Ray does not start on this machine: {_last_line(error)}"
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


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
