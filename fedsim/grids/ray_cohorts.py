"""The engine `ray`: a cohort's leaves are divided among workers in other processes.

Each worker gets one message a round: a reference to what all clients are told, which is stored once
however many clients there are, and a run of neighbouring leaves. With a reduction it sends back the
means of complete subtrees, so that traffic grows with the workers and not with the clients. What
the clients keep stays with the driver and travels with the work: a worker that dies takes nothing
with it (docs/decisions/0009-ray-engine.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from flwr.app import RecordDict

from fedsim.clients.base import Client, DirectClient
from fedsim.data import FederatedData
from fedsim.errors import RunFailed
from fedsim.grids.actor import Actor, Place, Refused, Site, Trained
from fedsim.grids.cohort import Cohorts
from fedsim.grids.collect import CohortResult, joined
from fedsim.grids.connection import links, room_for
from fedsim.grids.evaluate import Job, Sums, clients_of
from fedsim.grids.execution import Execution
from fedsim.grids.pool import GRACE, Ignored, Late, Pool, store_errors
from fedsim.grids.shards import Shards
from fedsim.grids.worker import Keep, Order, Share, counted
from fedsim.means import MeanTree
from fedsim.messages import Arrays, config_of, to_tensors
from fedsim.scenario.sections import ClientResources

T = TypeVar("T")
Kept = Sequence[tuple[Sequence[int], Arrays]]
"""The states that some partitions keep, stacked."""


class RayCohorts(Cohorts):
    """Computes cohorts of one client class on the workers of a Ray cluster."""

    def __init__(
        self,
        client: Client | DirectClient,
        data: FederatedData,
        shards: Shards,
        execution: Execution,
        seed: int,
        state_budget: int,
        workers: int,
        needs: ClientResources,
        deadline: float | None = None,
        grows: bool = False,
    ) -> None:
        """execution: of a worker. shards: the driver's view of `data`. needs: of a worker.

        deadline: seconds a client may take for one message. grows: whether there are more workers
        than `workers` where the cluster gets room for more.
        """
        import ray

        super().__init__(client, shards, execution, seed, state_budget)
        self._deadline = deadline
        only = replace(data, validation=None, test=None, ood=None, truth={})
        site = stored(Site(client, only, execution, seed))
        kind = ray.remote(Actor).options(num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0)
        self._pool = Pool(
            partial(kind.remote, site), workers, partial(room_for, needs) if grows else None
        )
        if not execution.memory:  # a run that goes on keeps the memory that it began with
            memory = least_memory(self._pool.places, needs.gpus)
            self.execution = replace(execution, memory=memory)
        self._told: tuple[RecordDict, Order, Any] | None = None  # the last single message
        self._graphs, self._trace_seconds = 0, 0.0
        self._halved: Counter[int] = Counter()
        self._seen: list[dict[str, Any]] = []

    def close(self) -> None:
        """Ends the workers and forgets the clients' states."""
        self._pool.close()
        super().close()

    def record(self) -> dict[str, Any]:
        """Returns what was decided and spent; graphs and tracing of the worker with most."""
        facts: dict[str, Any] = {
            "blocks": self.bounds,
            "graphs": self._graphs,
            "trace_seconds": round(self._trace_seconds, 3),
            "workers": self._seen,
            "workers_lost": self._pool.lost,
            **links(),
        }
        if self.execution.memory:
            facts |= {"memory": self.execution.memory, "lane_bytes": self.lanes}
        return facts | ({"halved": counted(self._halved)} if self._halved else {})

    def _train(
        self, order: Order, shares: Sequence[Share], keep: Keep
    ) -> tuple[list[CohortResult], MeanTree]:
        order = replace(order, deadline=self._deadline)
        costs = self.shards.sizes + 1
        ranges = divided(shares, len(self._pool), lambda share: int(costs[share.partitions].sum()))
        told = stored(order)

        def call(mine: Sequence[Share]) -> Callable[[Any], Any]:
            states = self.states.select([p for share in mine for p in share.partitions])
            return lambda handle: handle.train.remote(told, mine, states)

        most = max(sum(len(share.members) for share in mine) for mine in ranges)
        most *= max(order.chains, 1)  # each is timed by itself
        outs = self._pool.run([call(mine) for mine in ranges], self._patience(most))
        tree = MeanTree(order.leaves)
        parts: list[CohortResult] = []
        for mine, out in zip(ranges, outs, strict=True):
            if isinstance(out, Late):
                reason = self._late()
                members = [i for share in mine for i in share.members]
                parts.append(CohortResult([], {}, {}, dict.fromkeys(members, reason)))
                for share in mine:
                    tree.add(share.leaf, {}, 0.0)
                continue
            trained = _not_refused(out)
            parts += trained.parts
            tree.graft(trained.tree)
            for partitions, kept in trained.kept:
                keep(partitions, kept)
            self._note(trained)
        self._note_places(order)
        return parts, tree

    def start(self, content: RecordDict, message_type: str, partition: int) -> int:
        """Starts computing one message to one client; returns its number for `finished`.

        It must be one that a client trains on: others are computed together, by `run`.
        """
        told = self._told
        if told is None or told[0] is not content or told[1].message_type != message_type:
            records = {name: to_tensors(r) for name, r in content.array_records.items()}
            order = Order(message_type, records, config_of(content), deadline=self._deadline)
            told = self._told = content, order, stored(order)
        _, order, reference = told
        shares, states = [Share(0, [0], [partition])], self.states.select([partition])
        self._note_places(order)
        patience = self._patience(max(order.chains, 1))
        return self._pool.submit(lambda h: h.train.remote(reference, shares, states), patience)

    def idle(self) -> int:
        """Returns how many workers have nothing to do."""
        return self._pool.idle()

    def ignore(self, number: int) -> None:
        """Says that nobody needs what was started under this number."""
        self._pool.ignore(number)

    def finished(self) -> dict[int, tuple[CohortResult, Kept]]:
        """Returns what has been computed since the last call, by number.

        With each, what the client would keep, which `states` takes if the reply is taken.
        """
        results: dict[int, tuple[CohortResult, Kept]] = {}
        for number, out in self._pool.done().items():
            if isinstance(out, Ignored):
                results[number] = CohortResult([], {}, {}, {0: "nobody waited for it"}), []
                continue
            if isinstance(out, Late):
                results[number] = CohortResult([], {}, {}, {0: self._late()}), []
                continue
            trained = _not_refused(out)
            self._note(trained)
            results[number] = joined(trained.parts), trained.kept
        return results

    def _evaluated(
        self, order: Order, partitions: Sequence[int], jobs: Sequence[Job]
    ) -> Sequence[Sums | str]:
        order = replace(order, deadline=self._deadline)
        ranges = divided(jobs, len(self._pool), lambda job: 1)
        sizes = self.shards.evaluation_sizes(partitions)
        told, everyone = stored(order), stored(list(partitions))

        def call(mine: Sequence[Job]) -> Callable[[Any], Any]:
            members = [i for job in mine if job.members is not None for i in job.members.tolist()]
            states = self.states.select([partitions[i] for i in members])
            return lambda handle: handle.evaluate.remote(told, everyone, mine, states)

        most = max((sum(len(clients_of(job, sizes)) for job in mine) for mine in ranges), default=0)
        outs = self._pool.run([call(mine) for mine in ranges], self._patience(most))
        found: list[Sums | str] = []
        for mine, out in zip(ranges, outs, strict=True):
            late = isinstance(out, Late)
            found += [self._late()] * len(mine) if late else _not_refused(out).outs
        return found

    def _patience(self, clients: int) -> float | None:
        """Returns the seconds that a worker has for so many clients (and chains); None: all."""
        return None if self._deadline is None else clients * self._deadline + GRACE

    def _late(self) -> str:
        return f"no answer within {self._deadline:g} s (deadline)"

    def _note(self, trained: Trained) -> None:
        self._graphs = max(self._graphs, trained.graphs)
        self._trace_seconds = max(self._trace_seconds, trained.trace_seconds)
        self._halved.update(trained.halved)

    def _note_places(self, order: Order) -> None:
        """Notes who computes from this round on, if that has changed."""
        workers = [vars(place) for place in self._pool.places]
        if not self._seen or self._seen[-1]["workers"] != workers:
            from_round = int(order.config.get("server-round", 0))
            self._seen.append({"from_round": from_round, "workers": workers})


def least_memory(places: Sequence[Place], gpus: float) -> int:
    """Returns the bytes that each worker may use of its device; 0 where one has none of its own.

    gpus: that a worker takes; beyond one, it computes on one of them all the same.
    """
    return int(min((place.memory for place in places), default=0) * min(gpus, 1.0))


def divided(items: Sequence[T], parts: int, cost: Callable[[T], int]) -> list[Sequence[T]]:
    """Returns the items as at most `parts` runs of neighbours, of about equal cost; none is empty.

    cost: of an item, > 0.
    """
    ends = np.cumsum([cost(item) for item in items])
    parts = min(parts, len(items))
    cuts = [0]
    for k in range(1, parts):
        cut = int(np.searchsorted(ends, ends[-1] * k / parts)) + 1
        cuts.append(min(max(cut, cuts[-1] + 1), len(items) - (parts - k)))
    return [items[a:b] for a, b in pairwise([*cuts, len(items)])] if parts else []


def stored(value: object) -> Any:
    """Puts a value into Ray's store, once for all workers; returns the reference.

    Raises RunFailed if it is full, or if something of the user's cannot be sent.
    """
    import ray

    try:
        with store_errors():
            return ray.put(value)
    except TypeError as error:
        raise RunFailed(
            "the client, its model or its data cannot be sent to other processes: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _not_refused(out: Any) -> Any:
    if isinstance(out, Refused):
        raise RunFailed(out.reason)
    return out
