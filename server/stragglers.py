"""Synchronous rounds that do not wait for their slowest clients: over-sampling and a deadline.

Over-sampling asks more clients than the round needs, and takes the replies that come first; the
others are late, and nothing of them is used. Bonawitz et al., "Towards Federated Learning at Scale:
System Design", MLSys 2019 (arXiv 1902.01046): 130 % of the target number are selected, to make up
for those that drop out and to let stragglers be discarded. Others call it over-selection or
overcommitment.

On a simulated clock it is known beforehand who would be in time, so that only those are computed,
and others in the place of those that fail. On an engine's own clock the order is that of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from fedsim.errors import Problem, RunFailed
from fedsim.grids.collect import common_metrics
from fedsim.grids.nodes import pick
from fedsim.means import MeanTree, mean_dtype
from fedsim.messages import Broadcast, Failure, Replies, nodes_of, trains
from fedsim.server.check import Checked
from fedsim.server.traffic import bytes_received
from fedsim.strategies.base import Strategy
from fedsim.strategies.flower import cohort_size

Check = Callable[[Iterable[Message], Sequence[int]], Checked]
"""Takes replies and the nodes that were asked for them; says which are good."""


@runtime_checkable
class FirstCome(Protocol):
    """A Grid with a clock of its own, on which clients take as long as they take."""

    def first_come(self, messages: Sequence[Message], take: Callable[[Message], bool]) -> None:
        """Hands over each reply as it comes, until `take` says that no more are needed.

        Nothing of the others is kept: neither a reply nor a client's state.
        """
        ...


@dataclass(frozen=True)
class Heard:
    """What came of the messages of a synchronous exchange.

    bytes_up: of all replies that were taken, good or not. late: clients whose replies were not
    needed any more. seconds: that the exchange took on the simulated clock.
    """

    checked: Checked
    bytes_up: int
    late: int = 0
    seconds: float = 0.0


def with_more(
    messages: Sequence[Message],
    over_sampling: float,
    nodes: Iterable[int],
    rng: np.random.Generator,
) -> Sequence[Message]:
    """Returns ⌈r·K⌉ messages for a round's K: the same to others, drawn from all that are left.

    Fewer where there are not as many nodes. Raises RunFailed if the K messages differ in content.
    """
    asked = nodes_of(messages)
    known = nodes if isinstance(nodes, range) else sorted(nodes)  # never a list of a million
    more = math.ceil(over_sampling * len(asked) - 1e-9) - len(asked)  # 1.1 · 10 is above 11
    added = pick(known, set(asked), more, rng)
    if not added:
        return messages
    if isinstance(messages, Broadcast):
        everybody = sorted([*asked, *added])
        return Broadcast(messages.content, messages.message_type, everybody, messages.reduction)
    first = messages[0]
    if any(message.content is not first.content for message in messages):
        raise RunFailed(
            "the strategy sends each client a content of its own, so that no other client can be"
            " asked as well (over_sampling)"
        )
    kind, group = first.metadata.message_type, first.metadata.group_id
    return [*messages, *(Message(first.content, n, kind, group_id=group) for n in added)]


def hear(
    grid: Grid,
    messages: Sequence[Message],
    wait: int,
    check: Check,
    *,
    durations: Sequence[float] | None,
    deadline: float | None,
    turns: Sequence[int],
    weights: Callable[[Replies], Tensor] | None,
) -> Heard:
    """Sends messages and returns the first `wait` good replies.

    durations: of each message on the simulated clock; None without one. deadline: seconds on it
    after which nobody is waited for. turns: the messages' positions in the order of those that are
    done at one instant. weights: of the means, where the engine may average.
    """
    if durations is None:
        if wait < len(messages):
            return _as_they_come(grid, messages, wait, check, turns)
        durations = [0.0] * len(messages)
    order: Sequence[int] = range(len(messages))
    if wait < len(messages) or deadline is not None:
        order = sorted(turns, key=durations.__getitem__)
    limit = math.inf if deadline is None else deadline
    in_time = [i for i in order if durations[i] <= limit]
    parts: list[Checked] = []
    size = taken = good = 0
    while not parts or (good < wait and taken < len(in_time)):
        batch = sorted(in_time[taken : taken + wait - good])
        taken += len(batch)
        some = _some(messages, batch)
        replies = grid.send_and_receive(some)
        size += bytes_received(replies)
        parts.append(check(replies, nodes_of(some)))
        good += parts[-1].good
    checked = _joined(parts, weights)
    if good >= wait:
        # all of the last batch are good, so that the round ends with the slowest of those taken
        seconds = max((durations[i] for i in in_time[:taken]), default=0.0)
        return Heard(checked, size, len(messages) - taken, seconds)
    nodes = nodes_of(messages)
    missed = [
        Failure(nodes[i], f"its reply takes {durations[i]:.4g} s, and the deadline is {limit:g} s")
        for i in order[len(in_time) :]
    ]
    checked.failures = sorted([*checked.failures, *missed], key=lambda f: f.node_id)
    return Heard(checked, size, 0, limit if missed else max(durations))


def _as_they_come(
    grid: Grid, messages: Sequence[Message], wait: int, check: Check, turns: Sequence[int]
) -> Heard:
    if not isinstance(grid, FirstCome):
        raise RunFailed("over_sampling needs a clock: the engine answers all messages at once")
    taken: list[Message] = []
    good: list[Message] = []

    def take(reply: Message) -> bool:
        taken.append(reply)
        good.extend(check([reply], [reply.metadata.src_node_id]).replies)
        return len(good) < wait

    grid.first_come([messages[i] for i in turns], take)
    enough = len(good) >= wait
    nodes = nodes_of(messages)
    checked = check(taken, [m.metadata.src_node_id for m in taken] if enough else nodes)
    return Heard(checked, bytes_received(taken), len(nodes) - len(taken) if enough else 0)


def _some(messages: Sequence[Message], positions: Sequence[int]) -> Sequence[Message]:
    """Returns the messages at some positions, as they came if those are all."""
    if len(positions) == len(messages):
        return messages
    if not isinstance(messages, Broadcast):
        return [messages[i] for i in positions]
    nodes = [messages.node_ids[i] for i in positions]
    return Broadcast(messages.content, messages.message_type, nodes, messages.reduction)


def _joined(parts: Sequence[Checked], weights: Callable[[Replies], Tensor] | None) -> Checked:
    """Returns what was asked for one after the other as if it had been asked for together."""
    good = sum(part.good for part in parts)
    failures = sorted((f for part in parts for f in part.failures), key=lambda f: f.node_id)
    some = [part.replies for part in parts if part.good] or [parts[0].replies]
    if len(some) == 1:
        return Checked(some[0], good, failures)
    averaged = [replies for replies in some if isinstance(replies, Replies) and replies.reduced]
    if weights is not None and len(averaged) == len(some):
        return Checked(_averaged(averaged, weights), good, failures)
    messages = [message for replies in some for message in replies]
    return Checked(sorted(messages, key=lambda m: m.metadata.src_node_id), good, failures)


def _averaged(parts: Sequence[Replies], weights: Callable[[Replies], Tensor]) -> Replies:
    """Returns the mean of replies that were averaged in parts, in the order of the parts."""
    tree = MeanTree(len(parts))
    for leaf, part in enumerate(parts):
        means = part.means or {}
        tree.like(means)
        wide = {r: {k: x.to(mean_dtype(x.dtype)) for k, x in a.items()} for r, a in means.items()}
        tree.add(leaf, wide, float(weights(part).sum()) if means else 0.0)
    nodes = [node for part in parts for node in part.node_ids]
    order = sorted(range(len(nodes)), key=nodes.__getitem__)
    index = torch.tensor(order)
    common = common_metrics([part.metrics for part in parts])
    return Replies(
        tuple(nodes[i] for i in order),
        {},
        {name: torch.cat([part.metrics[name] for part in parts])[index] for name in common},
        reduced=True,
        means=tree.result(),
    )


def objections(
    strategy: FlowerStrategy,
    clients: int,
    over_sampling: float,
    deadline: float | None,
    no_clock: str | None,
) -> list[Problem]:
    """Returns why over-sampling, or a deadline on the simulated clock, makes no sense here.

    no_clock: why nobody can come first; None where there is a clock.
    """
    name, found = type(strategy).__name__, []
    exchanges = strategy.exchanges(1) if isinstance(strategy, Strategy) else []
    sends = strategy.sends if isinstance(strategy, Strategy) else frozenset()
    waits_for_nobody = any(exchange.wait is not None for exchange in exchanges)
    training = [e.message_type for e in exchanges if trains(e.message_type)]

    def refuse(field: str, value: float, what: str, hint: str = "Leave it out") -> None:
        found.append(Problem(field, what, value, hint=hint))

    why = ""  # no round may end before all have replied
    if waits_for_nobody:
        why = f"is for synchronous rounds: {name} waits for nobody"
    elif "participating-weight" in sends:
        why = f"does not go with {name}, which tells its clients beforehand how much weight those"
        why += " have that will reply"
    if deadline is not None and why:
        refuse("clock.deadline", deadline, why)
    if over_sampling <= 1:
        return found
    if why:
        refuse("over_sampling", over_sampling, why)
    elif len(training) > 1:
        what = f"does not go with {name}, which asks the clients of a round more than once"
        refuse("over_sampling", over_sampling, f"{what} ({', '.join(training)})")
    elif cohort_size(strategy, clients) == clients:
        what = f"asks more clients than a round needs, and {name} needs all {clients} of them"
        refuse("over_sampling", over_sampling, what, "Set strategy.fraction_train below 1")
    elif no_clock is not None:
        what = f"takes the replies that come first, and {no_clock}"
        hint = "Write clock: {} for clients of log-normal speeds"
        refuse("over_sampling", over_sampling, what, hint)
    return found
