"""Divides one message's cohort into leaves, has them computed, and puts the replies together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedsim.clients.base import Client, DirectClient, Plan
from fedsim.errors import RunFailed
from fedsim.grids.collect import CohortResult, joined
from fedsim.grids.evaluate import Job, Sums, clients_of, evaluation_jobs, evaluation_means
from fedsim.grids.execution import (
    BLOCK_FLOATS,
    LEAVES,
    REPLIES_FLOATS,
    SMALL_LANE,
    Execution,
    divide,
)
from fedsim.grids.room import fitting
from fedsim.grids.shards import Shards
from fedsim.grids.states import BUDGET, ClientStates, keep_some
from fedsim.grids.worker import Keep, Order, Share, Worker, counted
from fedsim.means import MeanTree
from fedsim.messages import Arrays, Reduction

NUM_EXAMPLES = "query.num_examples"
"""The type of the message that asks for the number of rows."""


def computed_alone(message_type: str) -> bool:
    """Says whether a client answers such messages by itself: by `train`, or one of its actions.

    Evaluation is computed for all clients together, and their sizes are known without them.
    """
    return message_type != NUM_EXAMPLES and _kind(message_type) != "evaluate"


def _kind(message_type: str) -> str:
    return message_type.partition(".")[0]


class Cohorts:
    """Computes cohorts of one client class in this process; keeps the clients' own state."""

    def __init__(
        self,
        client: Client | DirectClient,
        shards: Shards,
        execution: Execution,
        seed: int,
        state_budget: int = BUDGET,
    ) -> None:
        """state_budget: bytes of the clients' states in memory; what is beyond goes to disk."""
        self.shards, self.execution, self.seed = shards, execution, seed
        self.worker = Worker(client, shards, execution, seed)
        self.states = ClientStates(state_budget)
        self.bounds: dict[str, list[int]] = {}  # clients of each block, in the first round
        self.lanes: dict[str, int] = {}  # bytes of a client and chain, where blocks follow from it

    @property
    def client(self) -> Client | DirectClient:
        """The client that is computed."""
        return self.worker.client

    @client.setter
    def client(self, client: Client | DirectClient) -> None:
        self.worker.client = client

    def close(self) -> None:
        """Ends the worker threads and forgets the clients' states."""
        self.worker.close()
        self.states.close()

    def record(self) -> dict[str, Any]:
        """Returns what was decided and spent while running: blocks and seconds of tracing."""
        cache = self.worker.cache
        facts: dict[str, Any] = {
            "blocks": self.bounds,
            "graphs": len(cache),
            "trace_seconds": round(cache.seconds, 3),
        }
        if self.lanes:
            facts["lane_bytes"] = self.lanes
        if self.worker.halved:
            facts["halved"] = counted(self.worker.halved)
        return facts

    def run(
        self,
        message_type: str,
        records: dict[str, Arrays],
        config: Mapping[str, Any],
        partitions: Sequence[int],
        reduction: Reduction | None = None,
    ) -> CohortResult:
        """Returns the replies of `partitions` to one message; with `reduction` only their means."""
        if message_type == NUM_EXAMPLES:  # what every node can say without its client
            sizes = torch.from_numpy(self.shards.sizes[np.asarray(partitions, np.int64)])
            return CohortResult([*range(len(partitions))], {}, {"num-examples": sizes.double()})
        order = Order(message_type, records, config, reduction=reduction)
        if _kind(message_type) == "evaluate" and not self._scores():
            return self._evaluate(order, partitions)
        leaves, together = self._leaves(order, partitions)
        order = replace(order, leaves=len(leaves), together=together)
        shares = [
            Share(leaf, members, [partitions[i] for i in members])
            for leaf, members in enumerate(leaves)
        ]
        kept: list[tuple[Sequence[int], Arrays]] = []
        # with a reduction, who is rejected is known to the worker, which then keeps nothing
        keep = self.states.scatter if reduction else lambda ids, own: kept.append((ids, own))
        parts, tree = self._train(order, shares, keep)
        result = joined(parts, averaged=reduction is not None)
        rejected = {partitions[i] for i in result.errors}
        for ids, own in kept:
            keep_some(self.states.scatter, ids, own, [p not in rejected for p in ids])
        result.reduced = reduction is not None
        result.means = tree.result() if result.reduced else None
        return result

    def _scores(self) -> bool:
        """Says whether the client answers `evaluate` as it answers other messages, by `score`.

        Raises RunFailed if it does not answer at all.
        """
        if not isinstance(self.client, DirectClient):
            return False
        if type(self.client).score is DirectClient.score:
            raise RunFailed(
                f"client {type(self.client).__name__} does not evaluate; set"
                " evaluate.clients_every: 0"
            )
        return True

    def _train(
        self, order: Order, shares: Sequence[Share], keep: Keep
    ) -> tuple[list[CohortResult], MeanTree]:
        return self.worker.train(order, shares, self.states, keep)

    def _leaves(self, order: Order, partitions: Sequence[int]) -> tuple[list[list[int]], bool]:
        """Returns the positions in the cohort that make up each leaf, and `Order.together`.

        They depend on shapes and scenario alone, so that every engine adds in the same order.
        """
        count = len(partitions)
        client = self.worker.answering(order.message_type)
        if isinstance(client, DirectClient) or self.execution.path == "one_by_one":
            size = max(-(-count // LEAVES), 1)
            return [list(range(i, min(i + size, count))) for i in range(0, count, size)], False
        plans = self.worker.plans(client, order, partitions)
        sizes = self.shards.sizes[np.asarray(partitions, np.int64)].tolist()
        floats = self._floats(plans[0], order.records, max(sizes))
        chunk, fit = self.execution.chunk or None, None
        if self.execution.memory and chunk is None:
            largest = max(range(count), key=lambda i: (sizes[i], -partitions[i]))
            fit = self._fit(client, order, plans[largest], partitions[largest])
        blocks = divide(plans, sizes, chunk, floats, fit)
        self.bounds.setdefault(order.message_type, [len(members) for members in blocks])
        # a device's memory is for one block at a time
        return blocks, floats <= SMALL_LANE or self.execution.memory > 0

    def _fit(self, client: Client, order: Order, plan: Plan, partition: int) -> int:
        """Returns how many clients like this one a block may hold on the device."""
        shards = self.shards
        lane = self.worker.lane_bytes(client, order, plan, partition)
        self.lanes[order.message_type] = max(lane, self.lanes.get(order.message_type, 0))
        resident = shards.sample.bytes + client.model.bytes
        return fitting(self.execution.memory, resident, lane, plan.chains, shards.dtype.itemsize)

    def _floats(self, plan: Plan, records: dict[str, Arrays], rows: int) -> int:
        """Returns roughly how many floats of state and data one client and chain takes."""
        parameters = sum(t.numel() for r in records.values() for t in r.values())
        parameters //= max(plan.chains, 1)
        features = self.shards.sample.x[:1].numel()
        if plan.steps:
            parameters *= 4  # gradients and intermediate values
        elif parameters > SMALL_LANE:
            parameters = max(parameters * BLOCK_FLOATS // REPLIES_FLOATS, SMALL_LANE)
        return parameters + 2 * (plan.batching.size or rows) * features

    def _evaluate(self, order: Order, partitions: Sequence[int]) -> CohortResult:
        """Returns weighted means of the client's per-example metrics over each one's rows.

        A client one of whose jobs was given up has an error instead.
        """
        client = self.client
        assert isinstance(client, Client)
        sizes = self.shards.evaluation_sizes(partitions)
        jobs = evaluation_jobs(client, sizes, self.execution.path == "mapped")
        outs = self._evaluated(order, partitions, jobs)
        means = evaluation_means(sizes, (out for out in outs if not isinstance(out, str)))
        errors: dict[int, str] = {}
        for job, out in zip(jobs, outs, strict=True):
            if isinstance(out, str):
                errors |= dict.fromkeys(clients_of(job, sizes).tolist(), out)
        good = [i for i in range(len(partitions)) if i not in errors]
        if errors:
            index = torch.tensor(good, dtype=torch.int64)
            means = {name: value[index] for name, value in means.items()}
        return CohortResult(good, {}, means, errors)

    def _evaluated(
        self, order: Order, partitions: Sequence[int], jobs: Sequence[Job]
    ) -> Sequence[Sums | str]:
        """Returns the jobs' sums in their order; a reason for one that was given up."""
        return self.worker.evaluate(order, partitions, jobs, self.states)
