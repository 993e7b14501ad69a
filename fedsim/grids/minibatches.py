"""Which rows make up which minibatch, for many clients by a few array operations.

A shuffle is the order of random sort keys. The keys are counter-based: SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) started at a key of the client
and chain, its output taken at (pass over the data, row). So they do not depend on who else is
computed, and no generator is set up for each client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsim.clients.base import Batching

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's increment."""

SORT_KEYS = 2**20
"""Keys drawn at once; more clients are divided."""

ARGSORT_LIMIT = 4096
"""Rows up to which sorting keys beats drawing without replacement one batch at a time."""


def mix(z: Words) -> Words:
    """Returns SplitMix64's output for states z (64-bit, any shape)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream_keys(root: int, partitions: Integers, chains: Sequence[int]) -> Words:
    """Returns (clients, chains) keys of the streams below a 64-bit root."""
    own: Words = mix(np.uint64(root) + GOLDEN * (partitions.astype(np.uint64) + np.uint64(1)))
    chain = GOLDEN * (np.asarray(chains, np.uint64) + np.uint64(1))
    return mix(own[:, None] + chain)


def positions(
    batching: Batching,
    sizes: Integers,
    counts: Integers,
    keys: Words,
    generator: Callable[[int, int], np.random.Generator],
) -> Integers:
    """Returns (clients, chains, minibatches, batch size) positions in each client's shard; −1 pads.

    sizes (clients,): rows of each client. counts (clients,): its minibatches; the axis is as long
    as the largest. keys (clients, chains): of `stream_keys`. generator(client, chain): for large
    shards, a generator of the same stream.
    """
    clients, chains = keys.shape
    shape = (clients, chains, int(counts.max(initial=0)), batching.size)
    if 0 in shape:
        return np.full(shape, -1, np.int64)
    widest = int(sizes.max())
    passes = -(-counts // np.maximum(-(-sizes // batching.size), 1))
    draws = int(passes.max()) if batching.kind == "epochs" else shape[2]
    if clients > 1 and clients * chains * draws * widest > SORT_KEYS:
        half = clients // 2
        out = np.full(shape, -1, np.int64)
        for part, first in ((slice(half), 0), (slice(half, None), half)):

            def own(client: int, chain: int, first: int = first) -> np.random.Generator:
                return generator(first + client, chain)

            found = positions(batching, sizes[part], counts[part], keys[part], own)
            out[part, :, : found.shape[2]] = found
        return out
    if batching.kind == "epochs":
        return _epochs(batching.size, sizes, counts, keys, draws)
    return _sampled(batching.size, sizes, counts, keys, generator)


def _sort_keys(keys: Words, draws: int, sizes: Integers) -> Words:
    """Returns (clients, chains, draws, rows) random words, the largest of all where no row is."""
    widest = int(sizes.max())
    first = (np.arange(draws, dtype=np.uint64) << np.uint64(32))[:, None]
    counter: Words = first + np.arange(1, widest + 1).astype(np.uint64)
    words = mix(keys[:, :, None, None] + GOLDEN * counter)
    if int(sizes.min()) < widest:
        beyond = np.arange(widest) >= sizes[:, None]
        words[np.broadcast_to(beyond[:, None, None], words.shape)] = np.uint64(2**64 - 1)
    return words


def _epochs(size: int, sizes: Integers, counts: Integers, keys: Words, passes: int) -> Integers:
    widest = int(sizes.max())
    if widest == 0:
        return np.full((*keys.shape, int(counts.max()), size), -1, np.int64)
    order = _sort_keys(keys, passes, sizes).argsort(-1)
    per_pass = np.maximum(-(-sizes // size), 1)
    first, count = int(per_pass[0]), int(counts.max())
    if (sizes == widest).all() and (counts == count).all():
        if first * size > widest:
            padding = np.full((*order.shape[:-1], first * size - widest), -1, np.int64)
            order = np.concatenate((order, padding), axis=-1)
        return order.reshape(*keys.shape, passes * first, size)[:, :, :count]
    batch = np.arange(count)
    within = batch % per_pass[:, None]
    at = within[..., None] * size + np.arange(size)  # (clients, minibatches, size)
    there = (at < sizes[:, None, None]) & (batch < counts[:, None])[..., None]
    client = np.arange(len(sizes))[:, None, None]
    pass_ = np.minimum(batch // per_pass[:, None], passes - 1)[..., None]
    taken = order[client, :, pass_, np.minimum(at, widest - 1)]  # chains come last
    return np.where(there[..., None], taken, -1).transpose(0, 3, 1, 2)


def _sampled(
    size: int,
    sizes: Integers,
    counts: Integers,
    keys: Words,
    generator: Callable[[int, int], np.random.Generator],
) -> Integers:
    count = int(counts.max())
    out = np.full((*keys.shape, count, size), -1, np.int64)
    small, large = sizes <= size, sizes > ARGSORT_LIMIT
    middle = ~(small | large)
    for client in np.flatnonzero(small):
        out[client, :, :, : sizes[client]] = np.arange(sizes[client])
    for client in np.flatnonzero(large):
        for chain in range(keys.shape[1]):
            rng = generator(int(client), chain)
            for row in out[client, chain, : counts[client]]:
                row[:] = rng.choice(int(sizes[client]), size, replace=False, shuffle=False)
    if middle.any():
        words = _sort_keys(keys[middle], count, sizes[middle])
        # in which order argpartition puts them depends on the processor and on the padding
        out[middle] = np.sort(words.argpartition(size, axis=-1)[..., :size], axis=-1)
    out[np.broadcast_to((np.arange(count) >= counts[:, None])[:, None], out.shape[:3])] = -1
    return out
