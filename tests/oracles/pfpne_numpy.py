"""Fed-PNE, PF-PNE and single-client PNE in plain loops over boxes, written from the formulas alone.

Nothing is shared with the package: a cell is a tuple of intervals, sets are Python's, and every
client, cell and pull is a turn of a loop. Noise comes from outside, so that a run can be compared
number by number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Cell = tuple[tuple[float, float], ...]
Function = Callable[[np.ndarray], float]
Noise = Callable[[int, int, int], np.ndarray]
"""(round, client, count) → the noise of that client's pulls in that round, in order."""


@dataclass
class Problem:
    """functions, maxima: of each client. box: intervals. The other names are the method's."""

    functions: list[Function]
    maxima: list[float]
    box: Cell
    noise: Noise
    budget: int
    delta: float = 0.0
    nu1: float = 1.0
    rho: float = 0.5
    c: float = 0.1
    failure: float = 0.01
    kappa: float = 1.0
    min_pulls: int = 2
    arity: int = 2


@dataclass
class Outcome:
    """phases: the cells and survivors of every phase of all clients. spent: pulls of a client in
    them. regrets, points: of each client, at the end. curves: regrets after every round."""

    phases: list[tuple[list[Cell], set[Cell]]] = field(default_factory=list)
    regrets: list[float] = field(default_factory=list)
    points: list[np.ndarray] = field(default_factory=list)
    curves: list[list[float]] = field(default_factory=list)
    lost: int = 0


def centre(cell: Cell) -> np.ndarray:
    return np.array([(low + high) / 2 for low, high in cell])


def halves(cell: Cell, depth: int, arity: int) -> list[Cell]:
    axis = depth % len(cell)
    low, high = cell[axis]
    cuts = [low + (high - low) * j / arity for j in range(arity + 1)]
    return [(*cell[:axis], (cuts[j], cuts[j + 1]), *cell[axis + 1 :]) for j in range(arity)]


def holds(cell: Cell, point: np.ndarray) -> bool:
    return all(low <= x <= high for (low, high), x in zip(cell, point, strict=True))


def pulls_of(p: Problem, depth: int, clients: int, clients_in_log: int) -> int:
    log_term = math.log(p.budget * clients_in_log / p.failure)
    tau = math.ceil(p.c**2 * log_term / (p.nu1 * p.rho**depth) ** 2)
    return max(math.ceil(tau / clients), p.min_pulls)


def pull(
    p: Problem, number: int, client: int, cells: list[Cell], pulls: int, left: int
) -> tuple[dict[Cell, float], float, int]:
    """Returns the means by cell, the regret and how many pulls there were."""
    total = min(pulls * len(cells), left)
    noise, used, regret = p.noise(number, client, total), 0, 0.0
    means = {}
    for i, cell in enumerate(cells):
        count = total // len(cells) + (1 if i < total % len(cells) else 0)
        value = p.functions[client](centre(cell))
        rewards = [value + float(noise[used + j]) for j in range(count)]
        used += count
        regret += count * (p.maxima[client] - value)
        means[cell] = float(np.mean(rewards)) if rewards else math.nan
    return means, regret, total


def run(p: Problem, method: str, optima: list[np.ndarray] | None = None) -> Outcome:
    """method: fed-pne, pf-pne or pne. optima: where given, optimal cells that are lost count."""
    m = len(p.functions)
    alone = method == "pne"
    delta = 0.0 if method == "fed-pne" else math.inf if alone else p.delta
    in_log = 1 if alone else m
    log_term = math.log(p.budget * in_log / p.failure)

    def b(n: int) -> float:
        return p.c * math.sqrt(log_term / n)

    out = Outcome(regrets=[0.0] * m, points=[centre(p.box)] * m)
    cells, depth, spent, number = [p.box], 0, 0, 0
    own: list[set[Cell]] = [{p.box} for _ in range(m)]
    while p.nu1 * p.rho**depth >= p.kappa * delta:  # all clients together
        number += 1
        t = pulls_of(p, depth, m, in_log)
        enough = spent + t * len(cells) <= p.budget
        found = [pull(p, number, i, cells, t, p.budget - spent) for i in range(m)]
        for i, (_, regret, _) in enumerate(found):
            out.regrets[i] += regret
        out.curves.append(list(out.regrets))
        spent += found[0][2]
        if not enough:
            return out
        g = {cell: float(np.mean([means[cell] for means, _, _ in found])) for cell in cells}
        slack, wide = p.nu1 * p.rho**depth, b(m * t)
        floor = max(g.values()) - wide
        if method == "fed-pne":
            kept = {cell for cell in cells if not g[cell] + wide + slack < floor}
            best = max(cells, key=g.__getitem__)
            out.points = [centre(best)] * m
            own = [set(kept) for _ in range(m)]
        else:
            possible = {cell for cell in cells if not g[cell] + wide + slack + 2 * delta < floor}
            for i, (means, _, _) in enumerate(found):
                narrow = b(t)
                mine = own[i] & possible or own[i]
                upper = {c: min(g[c] + wide + delta, means[c] + narrow) for c in mine}
                lower = {c: max(g[c] - wide - delta, means[c] - narrow) for c in mine}
                best = max((c for c in cells if c in mine), key=lambda c: upper[c] + lower[c])
                left = {c for c in mine if not upper[c] + slack < max(lower.values())}
                own[i] = left or {best}
                out.points[i] = centre(best)
            kept = set().union(*own)
        out.phases.append((cells, kept))
        if optima is not None:
            for i in range(m):
                before = [c for c in cells if holds(c, optima[i])]
                if any(c not in own[i] for c in before):
                    out.lost += 1
                    optima[i] = np.full(len(p.box), math.inf)  # counted once
        cells = [child for cell in cells if cell in kept for child in halves(cell, depth, p.arity)]
        own = [{child for cell in mine for child in halves(cell, depth, p.arity)} for mine in own]
        depth += 1
    # each client alone
    state = [(depth, [c for c in cells if c in own[i]], spent) for i in range(m)]
    while any(done < p.budget for _, _, done in state):
        number += 1
        for i, (deep, mine, done) in enumerate(state):
            t = pulls_of(p, deep, 1, in_log)
            enough = done + t * len(mine) <= p.budget
            means, regret, count = pull(p, number, i, mine, t, p.budget - done)
            out.regrets[i] += regret
            if not enough:
                state[i] = (deep, mine, done + count)
                continue
            slack, narrow = p.nu1 * p.rho**deep, b(t)
            best = max(mine, key=means.__getitem__)
            out.points[i] = centre(best)
            left = [c for c in mine if not means[c] + narrow + slack < means[best] - narrow]
            state[i] = (
                deep + 1,
                [child for c in left for child in halves(c, deep, p.arity)],
                done + count,
            )
        out.curves.append(list(out.regrets))
    return out
