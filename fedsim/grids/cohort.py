"""Computes one message for a cohort of our own clients: plans, blocks, threads, stacked replies."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fedsim.clients.base import Batch, Client, CountExamples, DirectClient, Plan, Reply
from fedsim.errors import FedsimError, RunFailed
from fedsim.grids.execute import at, run_mapped, run_one
from fedsim.grids.lanes import Block, Stream
from fedsim.grids.shards import Shards
from fedsim.grids.trace import TraceCache
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel

LANES = 64
"""Clients × chains in one mapped call: large enough to hide Python, small enough for the cache."""

BLOCK_FLOATS = 2**24
"""Floats of state and data that one mapped block may hold."""

ONE_BY_ONE_PARAMETERS = 1_000_000
"""Models above this many parameters gain nothing from mapping."""

PARALLEL_FLOATS = 2**20
"""Floats of a cohort from which it is divided although it would fit into one block."""

EVALUATION_ROWS = 4096

Path = Literal["mapped", "one_by_one"]


@dataclass(frozen=True)
class Execution:
    """How clients are computed: a deterministic function of model and scenario, kept in the run."""

    path: Path
    chunk: int
    threads: int
    dtype: str
    device: str
    trace: bool
    why: str = ""


def choose_path(
    model: FunctionalModel, device: torch.device, asked: Path | Literal["auto"]
) -> tuple[Path, str]:
    """Returns the path and the reason for it."""
    if asked != "auto":
        return asked, "asked for by the scenario"
    if model.convolutional and device.type == "cpu":
        return "one_by_one", "convolutions on a CPU gain nothing from mapping"
    if model.num_parameters > ONE_BY_ONE_PARAMETERS:
        return "one_by_one", f"more than {ONE_BY_ONE_PARAMETERS:,} parameters"
    return "mapped", "a small model without convolutions"


def chunk_clients(lanes: int, n: int, chains: int, floats_per_lane: int) -> int:
    """Returns how many of n clients go into one mapped block, in blocks of equal size."""
    fit = max(1, min(lanes, BLOCK_FLOATS // max(floats_per_lane, 1)) // max(chains, 1))
    blocks = -(-n // fit)
    if n > 1 and n * floats_per_lane >= PARALLEL_FLOATS:
        blocks = max(blocks, 2)  # so that two threads have work
    return -(-n // blocks)


@dataclass
class CohortResult:
    """Stacked replies in the order asked for, and the clients that raised."""

    good: list[int]
    records: dict[str, Arrays]
    metrics: dict[str, Tensor]
    errors: dict[int, str] = field(default_factory=dict)


class Cohorts:
    """Computes cohorts of one client class over resident shards; keeps the clients' own state."""

    def __init__(
        self,
        client: Client | DirectClient,
        shards: Shards,
        execution: Execution,
        seed: int,
    ) -> None:
        self.client, self.shards, self.execution, self.seed = client, shards, execution, seed
        client.model.place(shards.device)
        self.cache = TraceCache(execution.trace)
        self.states: dict[int, Arrays] = {}
        self.bounds: dict[str, list[int]] = {}  # clients of each block, in the first round
        self._actions: dict[str, Client | DirectClient] = {}
        self._pool = ThreadPoolExecutor(
            execution.threads, "fedsim", initializer=torch.set_num_threads, initargs=(1,)
        )

    def close(self) -> None:
        """Ends the worker threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def run(
        self,
        message_type: str,
        records: dict[str, Arrays],
        config: dict[str, Any],
        partitions: Sequence[int],
    ) -> CohortResult:
        """Returns the replies of `partitions` to one message."""
        stream = Stream(self.seed, int(config.get("server-round", 0)), message_type)
        records = tree_map(lambda t: t.to(self.shards.device), records)
        category, _, action = message_type.partition(".")
        if category == "evaluate":
            return self._evaluate(stream, records, config, partitions)
        client = self._client(message_type, action)
        if isinstance(client, DirectClient):
            return self._direct(client, stream, records, config, partitions)
        by_size = self._plans(client, stream, config, partitions)
        plans = [by_size[self.shards.n_examples(p)] for p in partitions]
        one = self.execution.path == "one_by_one" and not isinstance(client, CountExamples)
        if not one and len({_form_of(plan) for plan in by_size.values()}) > 1:
            raise RunFailed(
                f"client {type(client).__name__} plans other batch sizes, noise or static values"
                " for clients of other sizes, which only engine.path: one_by_one can compute"
            )
        compute = self._one_by_one if one else self._mapped
        return compute(client, stream, records, plans, partitions)

    def _plans(
        self, client: Client, stream: Stream, config: dict[str, Any], partitions: Sequence[int]
    ) -> dict[int, Plan]:
        """Returns the plan for each number of examples."""
        sizes = {*map(self.shards.n_examples, partitions)}
        try:
            return {n: client.plan(n, config) for n in sizes}
        except FedsimError as error:
            raise RunFailed(str(error)) from error
        except KeyError as error:
            raise RunFailed(
                f"client {type(client).__name__} needs the setting {error}, which the strategy"
                f" does not send with {stream.message_type}"
            ) from error
        except Exception as error:  # whatever the user's client raises
            raise RunFailed(_blame(client, "plan", stream, error)) from error

    def _client(self, message_type: str, action: str) -> Client | DirectClient:
        if message_type == "query.num_examples":
            return self._actions.setdefault(
                message_type, CountExamples(self.client.params, self.client.model, self.client.task)
            )
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

    def state_of(self, partition: int) -> Arrays:
        """Returns the state that the partition keeps between messages."""
        found = self.states.get(partition)
        found = self.client.initial_client_state() if found is None else found
        return {name: tensor.to(self.shards.device) for name, tensor in found.items()}

    def _mapped(
        self,
        client: Client,
        stream: Stream,
        records: dict[str, Arrays],
        plans: Sequence[Plan],
        partitions: Sequence[int],
    ) -> CohortResult:
        # most steps first, so that those who finish early leave the block from its end; then the
        # largest, so that whole shards are padded little
        efforts = [
            (-plans[i].steps, -self.shards.n_examples(p), i) for i, p in enumerate(partitions)
        ]
        order = [i for _, _, i in sorted(efforts)]
        chunk = self._chunk(plans, records, partitions)
        blocks = -(-len(order) // chunk)
        if plans[0].batching.kind == "full":
            chunks = [order[i : i + chunk] for i in range(0, len(order), chunk)]
        else:  # each thread gets long and short clients
            chunks = [order[i::blocks] for i in range(blocks)]
        self.bounds.setdefault(stream.message_type, [len(members) for members in chunks])
        order = [i for members in chunks for i in members]
        like = _shapes(records, bool(plans[0].chains))

        def work(members: list[int]) -> tuple[Reply, Arrays]:
            mine = [partitions[i] for i in members]
            block = Block([plans[i] for i in members], mine, self.shards, stream, like)
            kept = [self._chained(p, block.chains) for p in mine]
            states = {name: torch.stack([one[name] for one in kept]) for name in kept[0]}
            return run_mapped(client, block, records, states, self.cache)

        try:
            outs = list(self._pool.map(work, chunks))
        except Exception as error:
            hint = "\n(engine.path: one_by_one tells which client)"
            raise RunFailed(_blame(client, "train", stream, error) + hint) from error
        reply, kept = outs[0] if len(outs) == 1 else tree_map(lambda *t: torch.cat(t), *outs)
        if order != sorted(order):
            back = torch.tensor(np.argsort(order))
            reply, kept = tree_map(lambda t: t[back], (reply, kept))
        if kept:
            for i, partition in enumerate(partitions):
                self.states[partition] = {k: v[i].clone() for k, v in kept.items()}
        return CohortResult(list(range(len(partitions))), reply.records, _metrics(reply.metrics))

    def _chunk(
        self, plans: Sequence[Plan], records: dict[str, Arrays], partitions: Sequence[int]
    ) -> int:
        plan = plans[0]
        parameters = sum(t.numel() for r in records.values() for t in r.values())
        parameters //= max(plan.chains, 1)
        rows = plan.batching.size or max(map(self.shards.n_examples, partitions))
        per_lane = 4 * parameters + 2 * rows * self.shards.table.x[0].numel()
        if self.execution.chunk:
            return min(self.execution.chunk, len(partitions))
        return chunk_clients(LANES, len(partitions), plan.chains, per_lane)

    def _chained(self, partition: int, chains: int) -> Arrays:
        """Returns the partition's state, with a chain axis if it has none yet."""
        state = self.state_of(partition)
        if partition in self.states or not chains:
            return state
        return {k: v.expand(chains, *v.shape) for k, v in state.items()}

    def _one_by_one(
        self,
        client: Client,
        stream: Stream,
        records: dict[str, Arrays],
        plans: Sequence[Plan],
        partitions: Sequence[int],
    ) -> CohortResult:
        chains = plans[0].chains
        like = _shapes(records, bool(chains))

        def work(lane: tuple[int, int]) -> tuple[Reply, Arrays] | str:
            i, q = lane
            chain = q if chains else None
            try:
                block = Block([plans[i]], [partitions[i]], self.shards, stream, like, chain)
                state = self._chained(partitions[i], chains)
                if chains:
                    return run_one(client, block, at(records, q), at(state, q), self.cache)
                return run_one(client, block, records, state, self.cache)
            except Exception as error:  # whatever a client raises is that client's failure alone
                return f"{type(error).__name__}: {error}"

        lanes = [(i, q) for i in range(len(partitions)) for q in range(max(chains, 1))]
        outs = list(self._pool.map(work, lanes))
        if not chains:
            return self._stacked(outs, partitions)
        grouped: list[tuple[Reply, Arrays] | str] = []
        for i in range(0, len(outs), chains):
            own = outs[i : i + chains]
            failed = [out for out in own if isinstance(out, str)]
            grouped.append(failed[0] if failed else tree_map(lambda *t: torch.stack(t), *own))
        return self._stacked(grouped, partitions)

    def _stacked(
        self, outs: Sequence[tuple[Reply, Arrays] | str], partitions: Sequence[int]
    ) -> CohortResult:
        """Stacks the replies and keeps the clients' states; a string says why there is no reply."""
        replies: dict[int, Reply] = {}
        errors: dict[int, str] = {}
        form: object = None
        for i, out in enumerate(outs):
            if isinstance(out, str):
                errors[i] = out
                continue
            reply, kept = out
            form = form or _form(reply)
            if _form(reply) != form:
                errors[i] = "its records differ from the other replies'"
                continue
            replies[i] = reply
            if kept:
                self.states[partitions[i]] = kept
        if not replies:
            return CohortResult([], {}, {}, errors)
        stacked = tree_map(lambda *t: torch.stack(t), *replies.values())
        return CohortResult(list(replies), stacked.records, _metrics(stacked.metrics), errors)

    def _whole(self, rows: np.ndarray[Any, Any]) -> Batch:
        """Returns these rows of the table as one batch, which stands for nothing but itself."""
        table, index = self.shards.table, torch.from_numpy(rows)
        one = torch.ones((), dtype=table.weight.dtype)
        return Batch(table.x[index], table.y[index], table.weight[index], one)

    def _direct(
        self,
        client: DirectClient,
        stream: Stream,
        records: dict[str, Arrays],
        config: dict[str, Any],
        partitions: Sequence[int],
    ) -> CohortResult:
        def work(partition: int) -> tuple[Reply, Arrays] | str:
            shard = self._whole(self.shards.rows(partition))
            rng = stream.generator("client", partition, 0, 0)
            try:
                reply, kept = client.train(
                    stream.message_type, records, config, shard, self.state_of(partition), rng
                )
                metrics = {k: torch.as_tensor(v) for k, v in reply.metrics.items()}
                return Reply(reply.records, metrics), kept
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        return self._stacked(list(self._pool.map(work, partitions)), partitions)

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
            raise RunFailed(
                f"client {type(client).__name__} does not evaluate; set evaluate.clients_every: 0"
            )
        chains = int(config.get("chains", 0))
        rows = [self.shards.evaluation_rows(p) for p in partitions]
        owner = np.repeat(np.arange(len(partitions)), [len(r) for r in rows])
        jobs: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Arrays]] = []
        if client.personalised:
            jobs = [
                (r, np.full(len(r), i), self._chained(partitions[i], chains))
                for i, r in enumerate(rows)
            ]
        else:
            flat = np.concatenate(rows) if rows else np.empty(0, np.int64)
            for start in range(0, len(flat), EVALUATION_ROWS):
                cut = slice(start, start + EVALUATION_ROWS)
                jobs.append((flat[cut], owner[cut], {}))

        def work(
            job: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Arrays],
        ) -> list[dict[str, Tensor]]:
            index, _, state = job
            batch = self._whole(index)
            with torch.no_grad():
                if not chains:
                    return [client.evaluate(records, state, batch)]
                return [client.evaluate(at(records, q), at(state, q), batch) for q in range(chains)]

        sums: dict[str, np.ndarray[Any, Any]] = {}
        weight_sums = np.zeros(len(partitions))
        try:
            done = list(self._pool.map(work, jobs))
        except Exception as error:
            raise RunFailed(_blame(client, "evaluate", stream, error)) from error
        for (index, who, _), outs in zip(jobs, done, strict=True):
            weight = self.shards.table.weight[torch.from_numpy(index)].cpu().double().numpy()
            weight_sums += np.bincount(who, weight, len(partitions))
            for name in outs[0]:
                value = torch.stack([out[name] for out in outs]).cpu().double().mean(0).numpy()
                total = sums.setdefault(name, np.zeros(len(partitions)))
                total += np.bincount(who, weight * value, len(partitions))
        metrics = {
            name: torch.from_numpy(total / np.maximum(weight_sums, 1e-300))
            for name, total in sums.items()
        }
        metrics["num-examples"] = torch.tensor([float(len(r)) for r in rows], dtype=torch.float64)
        return CohortResult(list(range(len(partitions))), {}, metrics)


def _form_of(plan: Plan) -> object:
    """Returns everything of a plan that the clients of one block must have in common."""
    noise = tuple(
        (n, tuple(s.shapes.items()), s.like, s.distribution, s.shared, s.every, s.per_example)
        for n, s in plan.noise.items()
    )
    return (
        plan.batching,
        plan.minibatches_per_step,
        plan.init_minibatches,
        noise,
        tuple(plan.scalars),
        tuple(plan.static.items()),
        plan.chains,
    )


def _shapes(records: dict[str, Arrays], chains: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        record: {name: tuple(t.shape[1:] if chains else t.shape) for name, t in arrays.items()}
        for record, arrays in records.items()
    }


def _metrics(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns (clients,) float64 metrics, averaged over chains."""
    # to the CPU first: Apple's GPUs have no float64
    return {k: v.cpu().double().reshape(len(v), -1).mean(1) for k, v in metrics.items()}


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
