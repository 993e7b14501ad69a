"""Evaluates a client on the rows of a cohort: flat where it has no state, else client by client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

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
Job = tuple[Integers, Integers, Arrays | None]
"""Rows of the table (n,) or (clients, n), whose they are, and the states; −1 pads."""


def evaluate(
    client: Client,
    held: Held,
    records: dict[str, Arrays],
    chains: int,
    states: Callable[[Sequence[int]], Arrays],
    run: Callable[[Callable[[Job], Values], Sequence[Job]], list[Values]],
    mapped: bool,
) -> Values:
    """Returns (clients,) float64 means of the client's per-example metrics, weighted by example.

    records: with a leading chain axis if chains > 0; values are averaged over it. states: of some
    of the clients, stacked. run: computes jobs, maybe in threads. mapped: compute many clients
    with state by one call. A client without rows gets 0.
    """
    count = len(held.sizes)
    if not client.personalised:
        jobs = _flat_jobs(held)
    elif mapped:
        jobs = _padded_jobs(held, states)
    else:
        rows, owner = held.flat()
        ends = np.cumsum(held.sizes)
        cuts = [slice(e - n, e) for e, n in zip(ends, held.sizes, strict=True)]
        jobs = [(rows[c], owner[c], at(states([i]), 0)) for i, c in enumerate(cuts)]

    def work(job: Job) -> Values:
        rows, _, state = job
        with torch.no_grad():
            if rows.ndim == 1:
                batch = _batch(held, rows)
                return _over_chains(client, records, state or {}, batch, chains)

            def single(own: Arrays, *parts: Tensor) -> Values:
                return _over_chains(client, records, own, Batch(*parts), chains)

            return vmap(single)(state or {}, *_batch(held, rows))

    sums: dict[str, NDArray[np.float64]] = {}
    totals = np.zeros(count)
    for (rows, owner, _), values in zip(jobs, run(work, jobs), strict=True):
        there = rows >= 0
        who = np.broadcast_to(owner.reshape(-1, *(1,) * (rows.ndim - 1)), rows.shape)[there]
        index = torch.from_numpy(rows[there]).to(held.table.weight.device)
        weight = held.table.weight[index].cpu().double().numpy()
        totals += np.bincount(who, weight, count)
        for name, value in values.items():
            own = value.cpu().double().numpy()[there]
            sums[name] = sums.get(name, np.zeros(count)) + np.bincount(who, weight * own, count)
    metrics = {n: torch.from_numpy(total / np.maximum(totals, 1e-300)) for n, total in sums.items()}
    metrics["num-examples"] = torch.from_numpy(held.sizes.astype(np.float64))
    return metrics


def _flat_jobs(held: Held) -> list[Job]:
    rows, owner = held.flat()
    cuts = [slice(s, s + EVALUATION_ROWS) for s in range(0, len(rows), EVALUATION_ROWS)]
    return [(rows[cut], owner[cut], None) for cut in cuts]


def _padded_jobs(held: Held, states: Callable[[Sequence[int]], Arrays]) -> list[Job]:
    """Divides the clients into blocks of similar size."""
    order = np.argsort(-held.sizes, kind="stable")
    order = order[held.sizes[order] > 0]
    jobs: list[Job] = []
    start = 0
    while start < len(order):
        fit = max(EVALUATION_ROWS // int(held.sizes[order[start]]), 1)
        members = order[start : start + min(fit, LANES)]
        own = replace(
            held,
            partitions=held.partitions[members],
            starts=held.starts[members],
            sizes=held.sizes[members],
        )
        jobs.append((own.whole(), members, states(members.tolist())))
        start += len(members)
    return jobs


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
    outs: list[Any] = [client.evaluate(at(records, q), at(state, q), batch) for q in range(chains)]
    return {name: torch.stack([out[name] for out in outs]).mean(0) for name in outs[0]}
