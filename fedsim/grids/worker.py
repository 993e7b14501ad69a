"""Computes clients: in this process's threads, for whoever divides a cohort among workers.

A worker is given whole leaves of the tree along which a cohort is averaged, and merges them as far
as they go. What it computes depends on the leaves alone, not on who else computes the others.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils._pytree import tree_map

from fedsim.clients.base import Batch, Client, DirectClient, Plan, Reply
from fedsim.errors import FedsimError, RunFailed
from fedsim.grids.collect import CohortResult, Collector, Numbers, Outcome, plain, reduced
from fedsim.grids.evaluate import Job, Sums, clients_of, evaluate_job
from fedsim.grids.execute import at, channels_last, run_mapped, run_one
from fedsim.grids.execution import Execution, form_of
from fedsim.grids.lanes import Block, Stream
from fedsim.grids.room import first_step, lane_bytes
from fedsim.grids.shards import Held, Integers, Shards
from fedsim.grids.states import ClientStates, keep_some
from fedsim.grids.trace import TraceCache
from fedsim.means import MeanTree
from fedsim.messages import Arrays, Reduction

J = TypeVar("J")
R = TypeVar("R")

Keep = Callable[[Sequence[int], Arrays], None]
"""Takes the states that some partitions keep, stacked."""


@dataclass(frozen=True)
class Order:
    """One message to a cohort: what all its clients are told, and what becomes of the replies.

    leaves: of the whole cohort's tree. together: blocks are computed in turn, and the threads share
    the clients of each operation; otherwise each thread computes blocks of its own. reduction:
    given if only the replies' means are wanted. deadline: seconds after which a client that is
    still computed counts as failed.
    """

    message_type: str
    records: dict[str, Arrays]
    config: Mapping[str, Any]
    leaves: int = 1
    together: bool = False
    reduction: Reduction | None = None
    deadline: float | None = None

    @property
    def chains(self) -> int:
        """The leading axis of the records; 0 for none."""
        return int(self.config.get("chains", 0))

    def stream(self, seed: int) -> Stream:
        """Returns the name of the message's random streams."""
        server_round = int(self.config.get("server-round", 0))
        return Stream(seed, server_round, self.message_type, int(self.config.get("dispatch", 0)))


@dataclass(frozen=True)
class Share:
    """A leaf of the cohort's tree: clients that one call computes, or a few in turn.

    members: their positions in the cohort. partitions: theirs.
    """

    leaf: int
    members: Sequence[int]
    partitions: Sequence[int]


class Worker:
    """Computes clients of one class over resident shards, with threads and graphs of its own."""

    def __init__(
        self, client: Client | DirectClient, shards: Shards, execution: Execution, seed: int
    ) -> None:
        self.client, self.shards, self.execution, self.seed = client, shards, execution, seed
        client.model.place(shards.device)
        self.cache = TraceCache(execution.trace)
        self.halved: Counter[int] = Counter()
        """How many blocks did not fit into the device's memory and were divided, by clients."""
        self.stuck = False
        """Whether a client that missed its deadline may still be computed."""
        self.explain: Callable[[Exception], str] = lambda e: f"{type(e).__name__}: {e}"
        """Returns why a client failed, in one line."""
        self._actions: dict[str, Client] = {}
        self._lanes: dict[object, int] = {}
        self._planned: tuple[object, object, dict[int, Plan]] = (None, None, {})
        self._pool = self._threads()

    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            self.execution.threads, "fedsim", initializer=torch.set_num_threads, initargs=(1,)
        )

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def train(
        self, order: Order, shares: Sequence[Share], states: ClientStates, keep: Keep
    ) -> tuple[list[CohortResult], MeanTree]:
        """Returns the clients' replies in parts, to be `joined`; with a reduction, their means are
        in the tree.

        states: what the clients kept before. keep: takes what they keep now. Raises RunFailed
        where a block of mapped clients, which cannot be told apart, fails.
        """
        records = tree_map(lambda t: t.to(self.shards.device), order.records)
        client = self.answering(order.message_type)
        if isinstance(client, DirectClient):
            return self._direct(client, order, records, shares, states, keep)
        if self.execution.path == "one_by_one":
            return self._one_by_one(client, order, records, shares, states, keep)
        return self._mapped(client, order, records, shares, states, keep)

    def answering(self, message_type: str) -> Client | DirectClient:
        """Returns the client that answers messages of a type; raises RunFailed if none does."""
        _, _, action = message_type.partition(".")
        if not action or isinstance(self.client, DirectClient):
            return self.client
        if message_type not in self._actions:
            client = self.client.action(action)
            if client is None:
                raise RunFailed(
                    f"client {type(self.client).__name__} does not answer {message_type!r} messages"
                )
            self._actions[message_type] = client
        return self._actions[message_type]

    def plans(
        self, client: Client, order: Order, partitions: Sequence[int] | Integers
    ) -> list[Plan]:
        """Returns each client's plan; clients of one size share it.

        Raises RunFailed with what the client misses or raises.
        """
        stream = order.stream(self.seed)
        sizes = self.shards.sizes[np.asarray(partitions, np.int64)].tolist()
        by_size = self._plans_for(client, order)
        try:
            for n in set(sizes) - by_size.keys():
                by_size[n] = client.plan(n, order.config)
        except FedsimError as error:
            raise RunFailed(str(error)) from error
        except KeyError as error:
            raise RunFailed(
                f"client {type(client).__name__} needs the setting {error}, which the strategy"
                f" does not send with {stream.message_type}"
            ) from error
        except Exception as error:  # whatever the user's client raises
            raise RunFailed(_blame(client, "plan", stream, error)) from error
        return [by_size[n] for n in sizes]

    def lane_bytes(self, client: Client, order: Order, plan: Plan, partition: int) -> int:
        """Returns the most bytes that a client and one of its chains take at once.

        It is counted once for each form of plan and each size of minibatch.
        """
        rows = int(self.shards.sizes[partition]) if plan.batching.kind == "full" else 0
        key = (order.message_type, form_of(plan), min(plan.steps, 1), rows)
        if key not in self._lanes:
            chains = plan.chains
            records = tree_map(lambda t: t.to(self.shards.device), order.records)
            like = _shapes(records, bool(chains))
            chain = 0 if chains else None
            stream = order.stream(self.seed)
            block = Block([first_step(plan)], [partition], self.shards, stream, like, chain)
            state = self._initial(chains)
            if chains:
                records, state = at(records, 0), at(state, 0)
            try:
                self._lanes[key] = lane_bytes(client, block, records, state)
            except Exception as error:  # of a user's client; it would fail mapped, too
                raise RunFailed(_blame(client, "train", stream, error)) from error
        return self._lanes[key]

    def _plans_for(self, client: Client, order: Order) -> dict[int, Plan]:
        """Returns the message's plans so far, by the client's size; a cohort asks twice."""
        known_client, config, plans = self._planned
        if client is not known_client or order.config is not config:
            plans = {}
            self._planned = client, order.config, plans
        return plans

    # Mapped: one call computes a block of clients

    def _mapped(
        self,
        client: Client,
        order: Order,
        records: dict[str, Arrays],
        shares: Sequence[Share],
        states: ClientStates,
        keep: Keep,
    ) -> tuple[list[CohortResult], MeanTree]:
        stream, tree = order.stream(self.seed), MeanTree(order.leaves)
        reduction = order.reduction

        def work(share: Share) -> tuple[CohortResult | Numbers, list[int], Arrays]:
            plans = self.plans(client, order, share.partitions)
            reply, kept = self._block(client, stream, records, plans, share.partitions, states)
            done = CohortResult(list(share.members), reply.records, plain(reply.metrics))
            if reduction is not None:
                done = reduced(done, share.partitions, reduction, tree, share.leaf)
            if reduction is None or len(shares) == 1:
                return done, done.good, kept
            numbers = Numbers()
            numbers.add(done)
            return numbers, done.good, kept

        try:
            if order.together:
                outs = []
                for share in shares:
                    # more threads than clients would divide a client's sums
                    with intra_op_threads(min(self.execution.threads, len(share.members))):
                        outs.append(work(share))
            else:
                outs = list(self._pool.map(work, shares))
        except RunFailed:
            raise
        except Exception as error:
            hint = "\n(engine.path: one_by_one tells which client)"
            raise RunFailed(_blame(client, "train", stream, error) + hint) from error
        parts: list[CohortResult] = []
        for share, (done, taken, kept) in zip(shares, outs, strict=True):
            parts += done.results() if isinstance(done, Numbers) else [done]
            good = set(taken)  # who was rejected goes on from what it kept before
            if kept:
                keep_some(keep, share.partitions, kept, [m in good for m in share.members])
        return parts, tree

    def _block(
        self,
        client: Client,
        stream: Stream,
        records: dict[str, Arrays],
        plans: Sequence[Plan],
        partitions: Sequence[int],
        states: ClientStates,
    ) -> tuple[Reply, Arrays]:
        """Computes clients by one call; in two halves where they do not fit into the memory."""
        like = _shapes(records, bool(plans[0].chains))
        try:
            block = Block(plans, partitions, self.shards, stream, like)
            own = self._stacked_states(states, partitions, block.chains)
            return run_mapped(client, block, records, own, self.cache)
        except torch.OutOfMemoryError:
            if len(partitions) == 1:
                raise
        self.halved[len(partitions)] += 1
        if self.shards.device.type == "cuda":
            torch.cuda.empty_cache()
        half = -(-len(partitions) // 2)
        parts = [
            self._block(client, stream, records, plans[cut], partitions[cut], states)
            for cut in (slice(0, half), slice(half, None))
        ]
        return tree_map(lambda *t: torch.cat(t), *parts)  # type: ignore[no-any-return]

    def _stacked_states(
        self, states: ClientStates, partitions: Sequence[int], chains: int
    ) -> Arrays:
        """Returns the partitions' states (clients, …), with a chain axis if there are chains."""
        initial = self._initial(chains)
        return states.gather(partitions, initial) if initial or len(states) else {}

    def _initial(self, chains: int = 0) -> Arrays:
        """Returns the state of a client that was never asked, with a chain axis for chains."""
        state = {k: v.to(self.shards.device) for k, v in self.client.initial_client_state().items()}
        return {k: v.expand(chains, *v.shape) for k, v in state.items()} if chains else state

    def _state_of(self, states: ClientStates, partition: int, chains: int = 0) -> Arrays:
        """Returns the state that the partition keeps between messages."""
        if partition not in states:
            return self._initial(chains)
        return {k: v.to(self.shards.device) for k, v in states[partition].items()}

    # One by one: threads of one intra-op thread each

    def _one_by_one(
        self,
        client: Client,
        order: Order,
        records: dict[str, Arrays],
        shares: Sequence[Share],
        states: ClientStates,
        keep: Keep,
    ) -> tuple[list[CohortResult], MeanTree]:
        stream = order.stream(self.seed)
        partitions = [p for share in shares for p in share.partitions]
        plans = dict(zip(partitions, self.plans(client, order, partitions), strict=True))
        chains = next(iter(plans.values())).chains
        like = _shapes(records, bool(chains))
        images = client.model.convolutional and self.shards.device.type == "cpu"
        if images:
            records = tree_map(lambda t: channels_last(t, bool(chains)), records)

        def work(lane: tuple[int, int]) -> Outcome:
            partition, q = lane
            chain = q if chains else None
            try:
                block = Block([plans[partition]], [partition], self.shards, stream, like, chain)
                state = self._state_of(states, partition, chains)
                if chains:
                    return run_one(client, block, at(records, q), at(state, q), self.cache, images)
                return run_one(client, block, records, state, self.cache, images)
            except Exception as error:  # whatever a client raises is that client's failure alone
                return self.explain(error)

        lanes = [(partition, q) for partition in partitions for q in range(max(chains, 1))]
        outs = self._in_order(work, lanes, order.deadline)
        return self._collected(order, shares, _by_client(outs, chains) if chains else outs, keep)

    def _direct(
        self,
        client: DirectClient,
        order: Order,
        records: dict[str, Arrays],
        shares: Sequence[Share],
        states: ClientStates,
        keep: Keep,
    ) -> tuple[list[CohortResult], MeanTree]:
        stream = order.stream(self.seed)

        def work(partition: int) -> Outcome:
            try:
                shard = whole(self.shards.training([partition]))
                rng = stream.generator("client", partition, 0, 0)
                state = self._state_of(states, partition)
                config = {**order.config, "partition-id": partition}
                if order.message_type == "evaluate":
                    held = whole(self.shards.evaluation([partition]))
                    found = client.score(records, config, shard, held, state, rng)
                    scores = {k: torch.tensor(v, dtype=torch.float64) for k, v in found.items()}
                    return Reply({}, {**scores, "num-examples": torch.tensor(len(held.y))}), {}
                reply, kept = client.train(order.message_type, records, config, shard, state, rng)
                metrics = {k: torch.as_tensor(v) for k, v in reply.metrics.items()}
                return Reply(reply.records, metrics), kept
            except Exception as error:
                return self.explain(error)

        partitions = [p for share in shares for p in share.partitions]
        outs = self._in_order(work, partitions, order.deadline)
        return self._collected(order, shares, outs, keep)

    def _in_order(
        self,
        work: Callable[[J], R],
        jobs: Sequence[J],
        deadline: float | None,
        clients: Callable[[J], int] = lambda job: 1,
    ) -> Iterator[R | str]:
        """Yields work's results in the order of the jobs, with few of them waiting.

        deadline: seconds that a job has for each of its `clients`, at least, once its turn has
        come; one that takes longer is given up, and the others go on in threads of their own.
        """
        waiting: deque[tuple[J, Future[R]]] = deque()

        def first() -> R | str:
            job, future = waiting.popleft()
            try:
                return future.result(None if deadline is None else deadline * clients(job))
            except TimeoutError:
                if future.done():  # just now
                    return future.result()
                self.stuck = True
                self._pool.shutdown(wait=False)
                self._pool = self._threads()
                for i, (other, queued) in enumerate(waiting):
                    if queued.cancel():
                        waiting[i] = other, self._pool.submit(work, other)
                return f"no answer within {deadline:g} s (deadline)"

        try:
            for job in jobs:
                waiting.append((job, self._pool.submit(work, job)))
                if len(waiting) > 2 * self.execution.threads:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, future in waiting:
                future.cancel()

    def _collected(
        self, order: Order, shares: Sequence[Share], outs: Iterator[Outcome], keep: Keep
    ) -> tuple[list[CohortResult], MeanTree]:
        """Returns the replies, stacked or averaged, and keeps the clients' states."""
        tree = MeanTree(order.leaves)
        collector = Collector(order.reduction, tree)
        for share in shares:
            for member, partition in zip(share.members, share.partitions, strict=True):
                out = next(outs)
                if isinstance(out, str):
                    collector.add(member, partition, out)
                elif collector.add(member, partition, out[0]) and out[1]:
                    keep([partition], {name: value[None] for name, value in out[1].items()})
            collector.end_leaf(share.leaf)
        return collector.results(), tree

    # Evaluation

    def evaluate(
        self, order: Order, partitions: Sequence[int], jobs: Sequence[Job], states: ClientStates
    ) -> list[Sums | str]:
        """Returns the sums of per-example metrics of some jobs of a cohort's evaluation.

        partitions: the whole cohort's. A job that took longer than its clients' deadlines together
        has a reason instead. Raises RunFailed with what the client raises.
        """
        client, chains = self.client, order.chains
        assert isinstance(client, Client)
        records = tree_map(lambda t: t.to(self.shards.device), order.records)
        held = self.shards.evaluation(partitions)

        def work(job: Job) -> Sums:
            own: Arrays = {}
            if job.members is not None:
                members = [partitions[i] for i in job.members]
                own = self._stacked_states(states, members, chains)
            return evaluate_job(client, held, records, chains, job, own)

        sizes = self.shards.evaluation_sizes(partitions)

        def clients(job: Job) -> int:
            return len(clients_of(job, sizes))

        try:
            return list(self._in_order(work, jobs, order.deadline, clients))
        except Exception as error:
            blamed = _blame(client, "evaluate", order.stream(self.seed), error)
            raise RunFailed(blamed) from error


def counted(halved: Counter[int]) -> dict[str, int]:
    """Returns how many blocks were halved by their clients, as JSON has it."""
    return {str(clients): count for clients, count in sorted(halved.items())}


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Lets the operations inside use `count` threads each."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def whole(held: Held) -> Batch:
    """Returns all the rows as one batch, which stands for nothing but itself."""
    rows, _ = held.flat()
    table, index = held.table, torch.from_numpy(rows)
    one = torch.ones((), dtype=table.weight.dtype)
    return Batch(table.x[index], table.y[index], table.weight[index], one)


def _by_client(outs: Iterator[Outcome], chains: int) -> Iterator[Outcome]:
    """Stacks the outcomes of each client's chains; one failed chain fails the client."""
    for first in outs:
        own = [first, *islice(outs, chains - 1)]
        failed = [out for out in own if isinstance(out, str)]
        yield failed[0] if failed else tree_map(lambda *t: torch.stack(t), *own)


def _shapes(records: dict[str, Arrays], chains: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        record: {name: tuple(t.shape[1:] if chains else t.shape) for name, t in arrays.items()}
        for record, arrays in records.items()
    }


def _blame(client: object, what: str, stream: Stream, error: Exception) -> str:
    return (
        f"{what} of client {type(client).__name__} failed in {stream.message_type} of round"
        f" {stream.server_round}: {type(error).__name__}: {error}"
    )
