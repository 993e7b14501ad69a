"""Computes one message for a cohort of our own clients: plans, blocks, threads, replies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedsim.clients.base import Batch, Client, DirectClient, Plan, Reply
from fedsim.errors import FedsimError, RunFailed
from fedsim.grids.evaluate import evaluate
from fedsim.grids.execute import at, channels_last, run_mapped, run_one
from fedsim.grids.execution import LEAVES, Execution, divide
from fedsim.grids.lanes import Block, Stream
from fedsim.grids.nodes import node_of
from fedsim.grids.shards import Held, Shards
from fedsim.grids.states import BUDGET, ClientStates
from fedsim.grids.trace import TraceCache
from fedsim.means import Leaf, MeanTree, stack_means, surely_finite
from fedsim.messages import Arrays, Reduction, Replies

J = TypeVar("J")
R = TypeVar("R")

Outcome = tuple[Reply, Arrays] | str
"""A client's reply and the state it keeps, or why there is none."""


@dataclass
class CohortResult:
    """The replies of a cohort.

    good: positions in the cohort of those who replied, ascending. records: their stacked arrays;
    empty if they were averaged into `means` (None: all weights are 0). metrics: (good,) each.
    errors: why the others did not reply, or were rejected. bytes_up: of replies not kept.
    """

    good: list[int]
    records: dict[str, Arrays]
    metrics: dict[str, Tensor]
    errors: dict[int, str] = field(default_factory=dict)
    reduced: bool = False
    means: dict[str, Arrays] | None = None
    bytes_up: int = 0


class Cohorts:
    """Computes cohorts of one client class over resident shards; keeps the clients' own state."""

    def __init__(
        self,
        client: Client | DirectClient,
        shards: Shards,
        execution: Execution,
        seed: int,
        state_budget: int = BUDGET,
    ) -> None:
        """state_budget: bytes of the clients' states in memory; what is beyond goes to disk."""
        self.client, self.shards, self.execution, self.seed = client, shards, execution, seed
        client.model.place(shards.device)
        self.cache = TraceCache(execution.trace)
        self.states = ClientStates(state_budget)
        self.bounds: dict[str, list[int]] = {}  # clients of each block, in the first round
        self._actions: dict[str, Client | DirectClient] = {}
        self._pool = ThreadPoolExecutor(
            execution.threads, "fedsim", initializer=torch.set_num_threads, initargs=(1,)
        )

    def close(self) -> None:
        """Ends the worker threads and forgets the clients' states."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.states.close()

    def run(
        self,
        message_type: str,
        records: dict[str, Arrays],
        config: dict[str, Any],
        partitions: Sequence[int],
        reduction: Reduction | None = None,
    ) -> CohortResult:
        """Returns the replies of `partitions` to one message; with `reduction` only their means."""
        stream = Stream(self.seed, int(config.get("server-round", 0)), message_type)
        records = tree_map(lambda t: t.to(self.shards.device), records)
        category, _, action = message_type.partition(".")
        if message_type == "query.num_examples":  # what every node can say without its client
            sizes = torch.from_numpy(self.shards.sizes[np.asarray(partitions, np.int64)])
            return CohortResult([*range(len(partitions))], {}, {"num-examples": sizes.double()})
        if category == "evaluate":
            return self._evaluate(stream, records, config, partitions)
        client = self._client(message_type, action)
        if isinstance(client, DirectClient):
            work = self._direct(client, stream, records, config)
            return self._collected(partitions, self._in_order(work, partitions), reduction)
        plans = self._plans(client, stream, config, partitions)
        if self.execution.path == "one_by_one":
            return self._one_by_one(client, stream, records, plans, partitions, reduction)
        return self._mapped(client, stream, records, plans, partitions, reduction)

    def _plans(
        self, client: Client, stream: Stream, config: dict[str, Any], partitions: Sequence[int]
    ) -> list[Plan]:
        """Returns each client's plan; clients of one size share it."""
        sizes = self.shards.sizes[np.asarray(partitions, np.int64)].tolist()
        try:
            by_size = {n: client.plan(n, config) for n in set(sizes)}
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

    def _client(self, message_type: str, action: str) -> Client | DirectClient:
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

    # Mapped: one call computes a block of clients

    def _mapped(
        self,
        client: Client,
        stream: Stream,
        records: dict[str, Arrays],
        plans: Sequence[Plan],
        partitions: Sequence[int],
        reduction: Reduction | None,
    ) -> CohortResult:
        sizes = self.shards.sizes[np.asarray(partitions, np.int64)].tolist()
        floats = self._floats(plans[0], records, max(sizes))
        blocks = divide(plans, sizes, self.execution.chunk or None, floats)
        self.bounds.setdefault(stream.message_type, [len(members) for members in blocks])
        like = _shapes(records, bool(plans[0].chains))
        tree = MeanTree(len(blocks))

        def work(job: tuple[int, list[int]]) -> tuple[CohortResult, Arrays]:
            leaf, members = job
            mine = [partitions[i] for i in members]
            block = Block([plans[i] for i in members], mine, self.shards, stream, like)
            states = self._stacked_states(mine, block.chains)
            reply, kept = run_mapped(client, block, records, states, self.cache)
            done = CohortResult(members, reply.records, _metrics(reply.metrics))
            if reduction is not None:
                done = _reduced(done, partitions, reduction, tree, leaf)
            return done, kept

        try:
            if len(blocks) == 1:
                with intra_op_threads(self.execution.threads):
                    outs = [work((0, blocks[0]))]
            else:
                outs = list(self._pool.map(work, enumerate(blocks)))
        except Exception as error:
            hint = "\n(engine.path: one_by_one tells which client)"
            raise RunFailed(_blame(client, "train", stream, error) + hint) from error
        for members, (_, kept) in zip(blocks, outs, strict=True):
            self._keep([partitions[i] for i in members], kept)
        result = _joined([done for done, _ in outs])
        result.reduced = reduction is not None
        result.means = tree.result() if result.reduced else None
        return result

    def _floats(self, plan: Plan, records: dict[str, Arrays], rows: int) -> int:
        """Returns roughly how many floats of state and data one client and chain takes."""
        parameters = sum(t.numel() for r in records.values() for t in r.values())
        parameters //= max(plan.chains, 1)
        features = self.shards.sample.x[:1].numel()
        copies = 4 if plan.steps else 1  # gradients and intermediate values
        return copies * parameters + 2 * (plan.batching.size or rows) * features

    def _stacked_states(self, partitions: Sequence[int], chains: int) -> Arrays:
        """Returns the partitions' states (clients, …), with a chain axis if there are chains."""
        initial = self._initial(chains)
        return self.states.gather(partitions, initial) if initial or len(self.states) else {}

    def _keep(self, partitions: Sequence[int], kept: Arrays) -> None:
        if kept:
            self.states.scatter(partitions, kept)

    def _initial(self, chains: int = 0) -> Arrays:
        """Returns the state of a client that was never asked, with a chain axis for chains."""
        state = {k: v.to(self.shards.device) for k, v in self.client.initial_client_state().items()}
        return {k: v.expand(chains, *v.shape) for k, v in state.items()} if chains else state

    def _state_of(self, partition: int, chains: int = 0) -> Arrays:
        """Returns the state that the partition keeps between messages."""
        if partition not in self.states:
            return self._initial(chains)
        return {k: v.to(self.shards.device) for k, v in self.states[partition].items()}

    # One by one: threads of one intra-op thread each

    def _one_by_one(
        self,
        client: Client,
        stream: Stream,
        records: dict[str, Arrays],
        plans: Sequence[Plan],
        partitions: Sequence[int],
        reduction: Reduction | None,
    ) -> CohortResult:
        chains = plans[0].chains
        like = _shapes(records, bool(chains))
        images = client.model.convolutional and self.shards.device.type == "cpu"
        if images:
            records = tree_map(lambda t: channels_last(t, bool(chains)), records)

        def work(lane: tuple[int, int]) -> Outcome:
            i, q = lane
            chain = q if chains else None
            try:
                block = Block([plans[i]], [partitions[i]], self.shards, stream, like, chain)
                state = self._state_of(partitions[i], chains)
                if chains:
                    return run_one(client, block, at(records, q), at(state, q), self.cache, images)
                return run_one(client, block, records, state, self.cache, images)
            except Exception as error:  # whatever a client raises is that client's failure alone
                return f"{type(error).__name__}: {error}"

        lanes = [(i, q) for i in range(len(partitions)) for q in range(max(chains, 1))]
        outs = self._in_order(work, lanes)
        if chains:
            outs = _by_client(outs, chains)
        return self._collected(partitions, outs, reduction)

    def _direct(
        self, client: DirectClient, stream: Stream, records: dict[str, Arrays], config: Any
    ) -> Callable[[int], Outcome]:
        def work(partition: int) -> Outcome:
            try:
                shard = whole(self.shards.training([partition]))
                rng = stream.generator("client", partition, 0, 0)
                own = {**config, "partition-id": partition}
                reply, kept = client.train(
                    stream.message_type, records, own, shard, self._state_of(partition), rng
                )
                metrics = {k: torch.as_tensor(v) for k, v in reply.metrics.items()}
                return Reply(reply.records, metrics), kept
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        return work

    def _scored(
        self, client: DirectClient, stream: Stream, records: dict[str, Arrays], config: Any
    ) -> Callable[[int], Outcome]:
        def work(partition: int) -> Outcome:
            try:
                shard = whole(self.shards.training([partition]))
                held = whole(self.shards.evaluation([partition]))
                rng = stream.generator("client", partition, 0, 0)
                own = {**config, "partition-id": partition}
                state = self._state_of(partition)
                found = client.score(records, own, shard, held, state, rng)
                metrics = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in found.items()}
                metrics["num-examples"] = torch.tensor(float(len(held.y)))
                return Reply({}, metrics), {}
            except NotImplementedError as error:
                raise RunFailed(str(error)) from error
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        return work

    def _in_order(self, work: Callable[[J], R], jobs: Sequence[J]) -> Iterator[R]:
        """Yields work's results in the order of the jobs, with few of them waiting."""
        waiting: deque[Future[R]] = deque()
        try:
            for job in jobs:
                waiting.append(self._pool.submit(work, job))
                if len(waiting) > 2 * self.execution.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _collected(
        self, partitions: Sequence[int], outs: Iterable[Outcome], reduction: Reduction | None
    ) -> CohortResult:
        """Returns the replies, stacked or averaged, and keeps the clients' states."""
        collector = _Collector(partitions, reduction)
        for i, out in enumerate(outs):
            if isinstance(out, str):
                collector.add(i, out)
            elif collector.add(i, out[0]) and out[1]:
                self.states[partitions[i]] = out[1]
        return collector.result()

    def _evaluate(
        self,
        stream: Stream,
        records: dict[str, Arrays],
        config: dict[str, Any],
        partitions: Sequence[int],
    ) -> CohortResult:
        """Returns weighted means of the client's per-example metrics over each one's rows."""
        client = self.client
        if isinstance(client, DirectClient):
            work = self._scored(client, stream, records, config)
            return self._collected(partitions, self._in_order(work, partitions), None)
        held = self.shards.evaluation(partitions)
        chains = int(config.get("chains", 0))
        try:
            metrics = evaluate(
                client,
                held,
                records,
                chains,
                lambda members: self._stacked_states([partitions[i] for i in members], chains),
                lambda work, jobs: list(self._pool.map(work, jobs)),
                mapped=self.execution.path == "mapped",
            )
        except Exception as error:
            raise RunFailed(_blame(client, "evaluate", stream, error)) from error
        return CohortResult(list(range(len(partitions))), {}, metrics)


class _Collector:
    """Takes replies one by one in the cohort's order; stacks them, or averages and forgets them."""

    def __init__(self, partitions: Sequence[int], reduction: Reduction | None) -> None:
        self._partitions, self._reduction = partitions, reduction
        self._size = max(-(-len(partitions) // LEAVES), 1)
        self._tree = MeanTree(-(-len(partitions) // self._size))
        self._leaf = Leaf()
        self._form: object = None
        self._arrays: list[dict[str, Arrays]] = []
        self._metrics: list[dict[str, Tensor]] = []
        self._good: list[int] = []
        self._bytes = 0
        self._errors: dict[int, str] = {}

    def add(self, position: int, out: Reply | str) -> bool:
        """Takes the next client's reply, or why there is none; returns whether it is good."""
        problem = out if isinstance(out, str) else self._take(position, out)
        if problem is not None:
            self._errors[position] = problem
        last = position + 1 == len(self._partitions)
        if self._reduction is not None and (last or (position + 1) % self._size == 0):
            leaf = self._leaf
            self._tree.add(position // self._size, leaf.means, leaf.weight, owned=True)
            self._leaf = Leaf()
        return problem is None

    def _take(self, position: int, reply: Reply) -> str | None:
        self._form = self._form or _form(reply)
        if _form(reply) != self._form:
            return "its records differ from the other replies'"
        metrics = {name: value[None] for name, value in reply.metrics.items()}
        if self._reduction is None:
            self._arrays.append(reply.records)
        else:
            self._bytes += _bytes(reply.records)
            node = (node_of(self._partitions[position]),)
            single = Replies(node, tree_map(lambda t: t[None], reply.records), _metrics(metrics))
            checked = self._reduction.check(single, True)
            if checked.failures:
                return checked.failures[0].reason
            self._tree.like(reply.records)
            self._leaf.add(reply.records, float(self._reduction.weights(checked)[0]))
        self._metrics.append(metrics)
        self._good.append(position)
        return None

    def result(self) -> CohortResult:
        """Returns what has been collected."""
        metrics = {
            name: torch.cat([one[name] for one in self._metrics])
            for name in (self._metrics[0] if self._metrics else {})
        }
        done = CohortResult(self._good, {}, _metrics(metrics), self._errors)
        if self._reduction is not None:
            done.reduced, done.means, done.bytes_up = True, self._tree.result(), self._bytes
        elif self._arrays:
            done.records = tree_map(lambda *t: torch.stack(t), *self._arrays)
        return done


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


def _reduced(
    done: CohortResult, partitions: Sequence[int], reduction: Reduction, tree: MeanTree, leaf: int
) -> CohortResult:
    """Averages a block's good replies into a leaf of the tree; returns the rest."""
    nodes = [node_of(partitions[i]) for i in done.good]
    replies = Replies(tuple(nodes), done.records, done.metrics)
    # the numbers are read once, by the mean: a NaN or Inf of any client is in it
    checked = reduction.check(replies, False)
    means, weight = stack_means(checked.arrays, reduction.weights(checked))
    if not all(map(surely_finite, means.values())):
        checked = reduction.check(replies, True)
        means, weight = stack_means(checked.arrays, reduction.weights(checked))
    tree.like(done.records)
    tree.add(leaf, means, weight, owned=len(checked.node_ids) > 1)
    position = dict(zip(nodes, done.good, strict=True))
    good = [position[node] for node in checked.node_ids] if checked.failures else done.good
    errors = {position[failure.node_id]: failure.reason for failure in checked.failures}
    return CohortResult(good, {}, checked.metrics, errors, bytes_up=_bytes(done.records))


def _joined(parts: Sequence[CohortResult]) -> CohortResult:
    """Returns the blocks' results as one, in the order of the cohort."""
    good = [i for part in parts for i in part.good]
    errors = {i: reason for part in parts for i, reason in part.errors.items()}
    size = sum(part.bytes_up for part in parts)
    first = parts[0]
    if len(parts) == 1:
        records, metrics = first.records, first.metrics
    else:
        metrics = {k: torch.cat([part.metrics[k] for part in parts]) for k in first.metrics}
        records = {
            r: {k: torch.cat([part.records[r][k] for part in parts]) for k in arrays}
            for r, arrays in first.records.items()
        }
    order = sorted(range(len(good)), key=good.__getitem__)
    if good != sorted(good):
        back = torch.tensor(order)
        records, metrics = tree_map(lambda t: t[back], (records, metrics))
    return CohortResult(sorted(good), records, metrics, errors, bytes_up=size)


def _shapes(records: dict[str, Arrays], chains: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        record: {name: tuple(t.shape[1:] if chains else t.shape) for name, t in arrays.items()}
        for record, arrays in records.items()
    }


def _metrics(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns (clients,) float64 metrics, averaged over chains."""
    # to the CPU first: Apple's GPUs have no float64
    plain = {k: v.cpu().double() for k, v in metrics.items()}
    return {k: v if v.ndim == 1 else v.reshape(len(v), -1).mean(1) for k, v in plain.items()}


def _bytes(records: dict[str, Arrays]) -> int:
    return sum(t.numel() * t.element_size() for a in records.values() for t in a.values())


def _form(reply: Reply) -> object:
    """Returns what two replies must share to be stacked."""
    return (
        {
            record: {name: (t.shape, t.dtype) for name, t in arrays.items()}
            for record, arrays in reply.records.items()
        },
        {name: t.shape for name, t in reply.metrics.items()},
    )


def _blame(client: object, what: str, stream: Stream, error: Exception) -> str:
    return (
        f"{what} of client {type(client).__name__} failed in {stream.message_type} of round"
        f" {stream.server_round}: {type(error).__name__}: {error}"
    )
