"""Workers that outlive a run: to start one takes seconds, and few tests ask about that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from fedsim.grids import ray_cohorts
from fedsim.grids.actor import Actor, Site
from fedsim.grids.pool import Pool, _Worker


class Settling(Actor):
    """A worker that can be begun anew in its process."""

    def settle(self, site: Site) -> None:
        """Does what a new worker does."""
        self._worker.close()
        Actor.__init__(self, site)


free: list[Any] = []
"""Handles of those that no run uses."""


seen: list[str] = []
"""The address of their cluster."""


class WarmPool(Pool):
    """A pool that takes the workers of earlier ones, and leaves its own to later ones."""

    def __init__(self, make: Callable[[], Any], *arguments: Any) -> None:
        assert isinstance(make, partial)
        (self._site,) = make.args
        super().__init__(make, *arguments)

    def _started(self) -> _Worker:
        if not free:
            return super()._started()
        handle = free.pop()
        handle.settle.remote(self._site)
        return _Worker(handle, handle.place.remote())

    def close(self) -> None:
        """Keeps the workers."""
        free.extend(worker.handle for worker in self._slots)
        self._slots = []


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the tests that ask for it share workers, as long as one cluster is up."""
    import ray

    cluster = ray.get_runtime_context().gcs_address
    if seen and seen[-1] != cluster:
        free.clear()
    seen[:] = [cluster]
    monkeypatch.setattr(ray_cohorts, "Pool", WarmPool)
    monkeypatch.setattr(ray_cohorts, "Actor", Settling)
