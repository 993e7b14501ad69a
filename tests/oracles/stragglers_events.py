"""Synchronous rounds with stragglers as a plain event simulation of scalars: a heap of arrivals.

Client i minimises ½ (w − m_i)² by Q gradient steps of length η, which end at
m_i + (1 − η)^Q (w − m_i). The server closes a round with the `wait`-th good reply, when everybody
has replied, or at the deadline. Nothing here is of fedsim.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Round(NamedTuple):
    """A round: parameter and time at its end, and the clients by what became of them."""

    w: float
    seconds: float
    used: list[int]
    failed: list[int]
    late: list[int]


def simulate(
    *,
    means: Sequence[float],
    weights: Sequence[float],
    duration: Callable[[int, int], float],
    asked: Callable[[int], Sequence[int]],
    wait: int,
    bad: Callable[[int, int], bool],
    deadline: float,
    lr: float,
    steps: int,
    rounds: int,
    w: float = 0.0,
) -> list[Round]:
    """Returns the rounds 1 to `rounds`.

    duration(client, round); asked(round): its clients; bad(client, round): whether the reply is
    unusable.
    """
    history = []
    for r in range(1, rounds + 1):
        under_way = [(duration(i, r), i) for i in asked(r)]
        heapq.heapify(under_way)
        now, used, failed, late = 0.0, list[int](), list[int](), list[int]()
        while under_way:
            time, i = heapq.heappop(under_way)
            if time > deadline:
                now = deadline
                failed += [i, *(j for _, j in under_way)]
                break
            now = time
            (failed if bad(i, r) else used).append(i)
            if len(used) == wait:
                late = [j for _, j in under_way]
                break
        total = sum(weights[i] for i in used)
        w = sum(weights[i] * (means[i] + (1 - lr) ** steps * (w - means[i])) for i in used) / total
        history.append(Round(w, now, sorted(used), sorted(failed), sorted(late)))
    return history
