"""A worker in a process of its own: an actor of a Ray cluster.

What comes in and goes out are plain dataclasses of tensors; Ray pickles them, between processes of
one cluster that share its token.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.base import Client, DirectClient
from fedsim.data import FederatedData
from fedsim.errors import FedsimError
from fedsim.grids.collect import CohortResult
from fedsim.grids.evaluate import Job, Sums
from fedsim.grids.execution import Execution
from fedsim.grids.memory import keep_freed_memory
from fedsim.grids.room import device_memory
from fedsim.grids.shards import Integers, Shards
from fedsim.grids.states import BUDGET, ClientStates
from fedsim.grids.worker import Order, Share, Worker
from fedsim.means import TreeParts
from fedsim.messages import Arrays

ALIGNMENT = 64
"""Bytes on which torch's own memory is aligned."""

States = Sequence[tuple[Integers, Arrays]]
"""Partitions and their states, stacked, by form."""


@dataclass(frozen=True)
class Site:
    """Everything that a worker needs beside its orders."""

    client: Client | DirectClient
    data: FederatedData
    execution: Execution
    seed: int


@dataclass(frozen=True)
class Trained:
    """What a worker has made of its shares.

    tree: of the means, if they were asked for. kept: the clients' states. halved: how many blocks
    did not fit into memory, by clients. stuck: whether the worker still computes a client that
    missed its deadline, so that it is better ended. graphs, trace_seconds: of its traces so far.
    """

    parts: list[CohortResult]
    tree: TreeParts
    kept: list[tuple[list[int], Arrays]]
    halved: Counter[int]
    stuck: bool
    graphs: int
    trace_seconds: float


@dataclass(frozen=True)
class Evaluated:
    """What a worker has found of some jobs of an evaluation; reasons for those it gave up.

    stuck: as Trained's.
    """

    outs: list[Sums | str]
    stuck: bool


@dataclass(frozen=True)
class Place:
    """Where a worker is. device: what it computes on. memory: of that, in bytes; 0 for a CPU."""

    host: str
    pid: int
    node: str
    device: str
    memory: int = 0


@dataclass(frozen=True)
class Refused:
    """The message of a FedsimError, which ends the run."""

    reason: str


@dataclass
class _Kept:
    """Collects what clients keep."""

    found: list[tuple[list[int], Arrays]] = field(default_factory=list)

    def __call__(self, partitions: Sequence[int], states: Arrays) -> None:
        self.found.append((list(partitions), states))


class Actor:
    """The actor. Its log, where the tracebacks of clients are, is its standard error."""

    def __init__(self, site: Site) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        send_tensors_by_numpy(copy=True)
        # parameters and data come as views of shared memory, which nobody writes to
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        device = torch.device(site.execution.device)
        shards = Shards(site.data, getattr(torch, site.execution.dtype), device)
        self._worker = Worker(site.client, shards, site.execution, site.seed)
        self._worker.explain = explain

    def place(self) -> Place:
        """Returns where the actor is, once it is ready."""
        return place_of(self._worker.shards.device)

    def train(self, order: Order, shares: Sequence[Share], states: States) -> Trained | Refused:
        """Returns the replies of the shares' clients, or the tree of their means."""
        kept = _Kept()
        worker = self._worker
        worker.halved = Counter()
        try:
            parts, tree = worker.train(order, shares, _states(states), kept)
        except FedsimError as error:
            return Refused(f"{error}{where_the_log_is()}")
        return Trained(
            parts,
            tree.parts(),
            kept.found,
            worker.halved,
            worker.stuck,
            len(worker.cache),
            worker.cache.seconds,
        )

    def evaluate(
        self, order: Order, partitions: Sequence[int], jobs: Sequence[Job], states: States
    ) -> Evaluated | Refused:
        """Returns the sums of some jobs of a cohort's evaluation."""
        worker = self._worker
        try:
            outs = worker.evaluate(order, partitions, jobs, _states(states))
        except FedsimError as error:
            return Refused(f"{error}{where_the_log_is()}")
        return Evaluated(outs, worker.stuck)


def place_of(device: torch.device) -> Place:
    """Returns where this process is."""
    import ray

    name = device.type
    if device.type == "cuda":
        name = f"cuda ({torch.cuda.get_device_properties(0).name})"
    node = ray.get_runtime_context().get_node_id()
    return Place(socket.gethostname(), os.getpid(), node, name, device_memory(device))


def _states(given: States) -> ClientStates:
    states = ClientStates(BUDGET)
    for partitions, stacked in given:
        states.scatter(partitions, stacked)
    return states


def explain(error: Exception) -> str:
    """Returns a client's failure in one line; the traceback goes to the log."""
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}{where_the_log_is()}"


def where_the_log_is() -> str:
    """Returns " (log: host:path)" of this process's standard error, if that is a file."""
    sys.stderr.flush()
    try:
        path = os.readlink(f"/proc/self/fd/{sys.stderr.fileno()}")
    except (OSError, ValueError):
        return ""
    return f" (log: {socket.gethostname()}:{path})" if os.path.isfile(path) else ""


# Tensors as NumPy arrays: Ray shares those among the processes of a machine without a copy


def send_tensors_by_numpy(copy: bool) -> None:
    """Makes Ray send this process's tensors as arrays.

    copy: the receiver gets memory of its own; otherwise read-only shared memory.
    """
    from ray import util

    rebuild = _copied if copy else _shared
    util.register_serializer(torch.Tensor, serializer=_as_numpy, deserializer=rebuild)


Sent = tuple[np.ndarray[Any, Any], torch.dtype | None]
"""A tensor's numbers, and the type that they are of where NumPy knows it by no name."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""By bytes."""


def _as_numpy(tensor: Tensor) -> Sent:
    plain = tensor.detach().cpu().contiguous()
    try:
        return plain.numpy(), None
    except TypeError:  # NumPy has no such type: bfloat16, those of 8 bits
        return plain.view(_INTEGERS[plain.element_size()]).numpy(), plain.dtype


def _shared(sent: Sent) -> Tensor:
    array, dtype = sent
    if array.ctypes.data % ALIGNMENT:  # products of the same numbers may differ by where they are
        return _copied(sent)
    tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.view(dtype)


def _copied(sent: Sent) -> Tensor:
    array, dtype = sent
    tensor = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype)
    tensor.numpy()[...] = array
    return tensor if dtype is None else tensor.view(dtype)
