"""Workers in other processes, by Ray: started, given work, replaced when they are lost.

What a call computes depends on its arguments alone, so a call whose worker dies is made again on
another one, and the result is the same.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fedsim.errors import RunFailed
from fedsim.grids.actor import Place
from fedsim.grids.connection import last_line, resources

START_PATIENCE = 120.0
"""Seconds until at least one worker must be ready."""

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
    ignored: nobody needs its result.
    """

    number: int
    call: Call
    patience: float
    handle: Any = None
    until: float = math.inf
    deaths: int = 0
    ignored: bool = False


class Late:
    """The result of a call whose worker did not answer within the deadline."""


class Ignored:
    """Stands for the result of a call that nobody needs: its worker is done with it, or gone."""


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
        self._grow()
        self._count += 1
        patience = math.inf if deadline is None else deadline
        self._start(_Flight(self._count, call, patience))
        return self._count

    def ignore(self, number: int) -> None:
        """Says that nobody needs a submitted call's result, or minds how it ends.

        It is not begun again if its worker dies; `done` says by an Ignored when the worker is free.
        """
        for flight in self._flights.values():
            if flight.number == number:
                flight.ignored = True
        if number in self._results:
            self._results[number] = Ignored()

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
        flights = self._flights.values()
        busy = Counter(id(other.handle) for other in flights)
        # what nobody needs may never end: who waits behind it would wait for ever
        stuck = {id(other.handle) for other in flights if other.ignored}
        flight.handle = min(self.alive(), key=lambda each: (id(each) in stuck, busy[id(each)]))
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
            if not flight.ignored:
                raise RunFailed(f"a worker failed: {last_line(error)}") from error
            result = Ignored()
        except _of_the_dead() as error:
            # a worker that was ended here, or died over another call, is not held against this one
            if self.replace(flight.handle):
                blamed = next(each for each in first if each.handle is flight.handle)
                blamed.deaths += 1
                if blamed.deaths == TRIES and not blamed.ignored:
                    raise RunFailed(
                        f"{TRIES} workers died one after the other over the same clients:"
                        f" {last_line(error)}"
                    ) from error
            if not flight.ignored:
                self._start(flight)
                return
            result = Ignored()
        except ray.exceptions.RayError as error:
            if not flight.ignored:
                raise RunFailed(f"Ray: {last_line(error)}") from error
            result = Ignored()
        if getattr(result, "stuck", False):
            self.replace(flight.handle)
        self._results[flight.number] = Ignored() if flight.ignored else result

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
                    raise RunFailed(f"a worker cannot start: {last_line(error)}") from error
                self.replace(starting[reference].handle)
            except _of_the_dead():
                self.replace(starting[reference].handle)
            except ray.exceptions.RayError as error:
                raise RunFailed(f"a worker cannot start: {last_line(error)}") from error


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
