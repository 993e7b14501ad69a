"""FedBuff as a plain event simulation of scalars: a heap of arrivals and Algorithm 1's lines.

Client i minimises ½ (w − m_i)² by Q gradient steps of length η, which end at
m_i + (1 − η)^Q (w − m_i). Nothing here is of fedsim.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Update(NamedTuple):
    """The state after a server update: parameter, time, and the staleness of the buffer."""

    w: float
    time: float
    staleness: list[int]


def simulate(
    *,
    means: Sequence[float],
    weights: Sequence[float],
    duration: Callable[[int, int, int], float],
    sample: Callable[[int, int, list[int], int], list[int]],
    concurrency: int,
    buffer_size: int,
    lr: float,
    steps: int,
    server_lr: float,
    exponent: float,
    updates: int,
    w: float = 0.0,
) -> list[Update]:
    """Returns the state after each of `updates` server updates.

    duration(client, version, turn), sample(version, turn, idle clients, how many): the turn counts
    how often clients were sampled at this version.
    """
    heap: list[tuple[float, int, int, int, float]] = []  # arrival, order, client, version, received
    busy: set[int] = set()
    buffer: list[tuple[int, int, float]] = []
    history: list[Update] = []
    now, order, version, turn = 0.0, 0, 0, 0
    while len(history) < updates:
        idle = [i for i in range(len(means)) if i not in busy]
        for i in sample(version, turn, idle, min(concurrency - len(busy), len(idle))):
            heapq.heappush(heap, (now + duration(i, version, turn), order, i, version, w))
            busy.add(i)
            order += 1
        turn += 1
        now = heap[0][0]
        while heap and heap[0][0] == now and len(buffer) < buffer_size:
            _, _, i, sent, received = heapq.heappop(heap)
            busy.remove(i)
            end = means[i] + (1 - lr) ** steps * (received - means[i])
            buffer.append((i, version - sent, end - received))
        if len(buffer) == buffer_size:
            total = sum(weights[i] for i, _, _ in buffer)
            step = sum((1 + tau) ** -exponent * weights[i] * delta for i, tau, delta in buffer)
            w += server_lr * step / total
            history.append(Update(w, now, [tau for _, tau, _ in buffer]))
            buffer, version, turn = [], version + 1, 0
    return history
