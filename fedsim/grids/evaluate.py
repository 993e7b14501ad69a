"""Evaluates a client on the rows of a cohort: flat where it has no state, else client by client.

The cohort's rows are divided into jobs by the clients' sizes alone, and the jobs' sums are added in
the jobs' order: whoever computes which of them, the bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedsim.clients.base import Batch, Client
from fedsim.grids.execute import at
from fedsim.grids.execution import LANES
from fedsim.grids.shards import Held, Integers
from fedsim.messages import Arrays

EVALUATION_ROWS = 4096
"""Rows evaluated by one call."""

Values = dict[str, Tensor]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """Rows that one call evaluates.

    members: positions in the cohort of the clients whose state is needed, padded to one length; or
    rows: which of all the cohort's rows, client after client, where there is no state.
    """

    members: Integers | None = None
    rows: slice | None = None


@dataclass(frozen=True)
class Sums:
    """A job's weights and weighted values, summed for each of its clients.

    owners: positions in the cohort. weights, values: (owners,) float64.
    """

    owners: Integers
    weights: Floats
    values: Mapping[str, Floats]


def evaluation_jobs(client: Client, sizes: Integers, mapped: bool) -> list[Job]:
    """Returns what is evaluated by one call each. sizes (clients,): rows of each client.

    mapped: whether many clients with state go into one call.
    """
    if not client.personalised:
        total = int(sizes.sum())
        starts = range(0, total, EVALUATION_ROWS)
        return [Job(rows=slice(s, min(s + EVALUATION_ROWS, total))) for s in starts]
    if not mapped:
        return [Job(members=np.array([i])) for i in range(len(sizes))]
    order = np.argsort(-sizes, kind="stable")  # neighbours are padded least
    order = order[sizes[order] > 0]
    jobs: list[Job] = []
    start = 0
    while start < len(order):
        fit = max(EVALUATION_ROWS // int(sizes[order[start]]), 1)
        jobs.append(Job(members=order[start : start + min(fit, LANES)]))
        start = start + min(fit, LANES)
    return jobs


def clients_of(job: Job, sizes: Integers) -> Integers:
    """Returns the positions in the cohort of the clients that have rows in a job.

    sizes (clients,): rows of each client of the cohort.
    """
    if job.members is not None:
        return job.members
    assert job.rows is not None
    ends = np.cumsum(sizes)
    return np.flatnonzero((ends > job.rows.start) & (ends - sizes < job.rows.stop) & (sizes > 0))


def evaluate_job(
    client: Client, held: Held, records: dict[str, Arrays], chains: int, job: Job, states: Arrays
) -> Sums:
    """Returns the sums of the client's per-example metrics over a job's rows.

    held: of the whole cohort. records: with a leading chain axis if chains > 0; values are averaged
    over it. states: of the job's members, stacked.
    """
    if job.members is None:
        rows, owner = (part[job.rows] for part in held.flat())
    else:
        own = replace(
            held,
            partitions=held.partitions[job.members],
            starts=held.starts[job.members],
            sizes=held.sizes[job.members],
        )
        rows = own.whole()
        owner = np.broadcast_to(job.members[:, None], rows.shape)
    with torch.no_grad():
        batch = _batch(held, rows)
        if job.members is None:
            values = _over_chains(client, records, {}, batch, chains)
        elif len(job.members) == 1:
            single = _over_chains(client, records, at(states, 0), at(batch, 0), chains)
            values = {name: value[None] for name, value in single.items()}
        else:

            def one(state: Arrays, *parts: Tensor) -> Values:
                return _over_chains(client, records, state, Batch(*parts), chains)

            values = vmap(one)(states, *batch)
    there = rows >= 0
    owners, who = np.unique(owner[there], return_inverse=True)
    index = torch.from_numpy(rows[there]).to(held.table.weight.device)
    weight = held.table.weight[index].cpu().double().numpy()

    def summed(of_rows: Floats) -> Floats:
        return np.bincount(who, of_rows, len(owners)).astype(np.float64, copy=False)

    sums = {
        name: summed(weight * value.cpu().double().numpy()[there]) for name, value in values.items()
    }
    return Sums(owners, summed(weight), sums)


def evaluation_means(sizes: Integers, jobs: Iterable[Sums]) -> Values:
    """Returns (clients,) float64 means of each metric, weighted by example, and "num-examples".

    A client without rows gets 0, and so does one whose jobs are missing.
    """
    count = len(sizes)
    totals = np.zeros(count)
    sums: dict[str, Floats] = {}
    for job in jobs:
        totals[job.owners] += job.weights
        for name, value in job.values.items():
            sums.setdefault(name, np.zeros(count))[job.owners] += value
    metrics = {n: torch.from_numpy(total / np.maximum(totals, 1e-300)) for n, total in sums.items()}
    metrics["num-examples"] = torch.from_numpy(sizes.astype(np.float64))
    return metrics


def _batch(held: Held, rows: Integers) -> Batch:
    """Returns the rows as a batch, which stands for nothing but itself; padding has weight 0."""
    table = held.table
    index = torch.from_numpy(rows).to(table.weight.device)
    # a row of the same client stands where there is none: another's loss may be infinite here
    safe = torch.where(index >= 0, index, index[..., :1])
    return Batch(
        table.x[safe],
        table.y[safe],
        table.weight[safe] * (index >= 0),
        table.weight.new_ones(rows.shape[:-1]),
    )


def _over_chains(
    client: Client, records: dict[str, Arrays], state: Arrays, batch: Batch, chains: int
) -> Values:
    """Returns the client's per-example values, averaged over chains."""
    if not chains:
        return client.evaluate(records, state, batch)
    outs = [client.evaluate(at(records, q), at(state, q), batch) for q in range(chains)]
    return {name: torch.stack([out[name] for out in outs]).mean(0) for name in outs[0]}
