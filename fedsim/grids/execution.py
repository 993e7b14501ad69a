"""How clients are computed: a deterministic function of the model's shapes and the scenario."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedsim.clients.base import Plan
from fedsim.models import FunctionalModel

LANES = 64
"""Clients × chains in one mapped call of a thread, unless they are small."""

BLOCK_FLOATS = 2**22
"""Floats of state and data that one mapped block may hold."""

REPLIES_FLOATS = 5 * 2**20
"""Floats that one block may hold of replies alone, where clients have no steps: the larger it is,
the fewer means are merged, and the more memory is left in pieces: with 7 a peak grows by half."""

SMALL_LANE = 2**16
"""Floats of a client and chain up to which blocks are computed in turn, by all threads together.

Python's threads would spend more on taking turns than such operations last; the threads of each
operation share its clients out instead. They divide no client's sums, so the bits stay the same,
as long as there are no more threads than clients.
"""

ONE_BY_ONE_PARAMETERS = 1_000_000
"""Models above this many parameters gain nothing from mapping."""

LEAVES = 64
"""Parts of a cohort, at most, that clients computed one by one are averaged in."""

Path = Literal["mapped", "one_by_one"]


@dataclass(frozen=True)
class Execution:
    """How clients are computed; kept in the run.

    memory: bytes of the device that are this process's, from which the size of blocks follows; 0
    for a device that has none of its own.
    """

    path: Path
    chunk: int
    threads: int
    dtype: str
    device: str
    trace: bool
    why: str = ""
    memory: int = 0


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


def chunk_clients(n: int, chains: int, floats_per_lane: int, fit: int | None = None) -> int:
    """Returns how many of n clients go into one mapped block, in blocks of equal size.

    fit: how many clients a block may hold; None where that is a matter of a processor's cache.
    """
    if fit is not None:
        return -(-n // -(-n // fit))
    small = floats_per_lane <= SMALL_LANE
    lanes = BLOCK_FLOATS // max(floats_per_lane, 1)
    fit = max(1, (lanes if small else min(LANES, lanes)) // max(chains, 1))
    blocks = -(-n // fit)
    if n > 1 and not small:
        blocks += blocks % 2  # so that two threads have as much work
    return -(-n // blocks)


def form_of(plan: Plan) -> object:
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


def divide(
    plans: Sequence[Plan],
    sizes: Sequence[int],
    chunk: int | None,
    floats_per_lane: int,
    fit: int | None = None,
) -> list[list[int]]:
    """Returns the blocks of a cohort, as positions in it.

    plans, sizes: of each client. chunk: clients of a block; None for `chunk_clients`. Only clients
    whose plans have one form share a block. In each, those with most steps come first, so that
    those who finish early leave it from its end; then the largest, so that whole shards are padded
    little.
    """
    forms: dict[object, list[int]] = {}
    by_plan: dict[int, list[int]] = {}  # clients of one size share a plan
    if len({*map(id, plans)}) == 1:
        by_plan[id(plans[0])] = [*range(len(plans))]
    else:
        for i, plan in enumerate(plans):
            by_plan.setdefault(id(plan), []).append(i)
    for same in by_plan.values():
        forms.setdefault(form_of(plans[same[0]]), []).extend(same)
    blocks: list[list[int]] = []
    for members in forms.values():
        plan = plans[members[0]]
        if len(by_plan) > 1:
            members.sort(key=lambda i: (-plans[i].steps, -sizes[i], i))
        size = chunk or chunk_clients(len(members), plan.chains, floats_per_lane, fit)
        if plan.batching.kind == "full":  # neighbours in size are padded least
            blocks += [members[i : i + size] for i in range(0, len(members), size)]
        else:  # each thread gets long and short clients
            count = -(-len(members) // size)
            blocks += [members[i::count] for i in range(count)]
    return blocks
