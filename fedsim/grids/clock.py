"""A simulated clock: how long clients take for a message, and who is done next.

Nothing waits in reality. A client's time for one message is

    latency + 2 · bytes / bandwidth + (seconds + seconds_per_example · examples) / speed

where `examples` counts those in the minibatches that it plans. Its speed is a fixed property of
(seed, partition), log-normal with median 1, times a log-normal factor of each message if there is
jitter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedsim.clients.base import Plan
from fedsim.messages import trains
from fedsim.random import generator

Id = TypeVar("Id")

Work = Callable[[str, Mapping[str, Any], int], float]
"""(message type, config, partition) → the examples that the client processes on that message."""


@dataclass
class SimulatedClock:
    """Returns how long clients take.

    seconds, seconds_per_example: of compute at speed 1, for each message and each example. latency:
    seconds on the way, there and back together. bandwidth: bytes a second in each direction; None:
    unlimited. A reply is taken to be as large as its message. sigma, jitter: standard deviations of
    the logarithms of the clients' speeds and of a message's factor; 0 makes all equal. deadline:
    seconds after which a synchronous round waits for no reply; None: for all.
    """

    seed: int
    work: Work
    seconds: float = 0.0
    seconds_per_example: float = 0.0
    latency: float = 0.0
    bandwidth: float | None = None
    sigma: float = 0.0
    jitter: float = 0.0
    deadline: float | None = None
    _speeds: dict[int, float] = field(default_factory=dict, init=False, repr=False)

    def speed(self, partition: int) -> float:
        """Returns the client's speed: how much faster it computes than the median client."""
        if partition not in self._speeds:
            z = generator(self.seed, "clock/speed", partition).standard_normal()
            self._speeds[partition] = math.exp(self.sigma * float(z))
        return self._speeds[partition]

    def duration(
        self, message_type: str, config: Mapping[str, Any], partition: int, size: int
    ) -> float:
        """Returns the seconds from sending a message of `size` bytes to receiving its reply.

        A message that asks nothing to be computed (`query`) takes the network's time alone.
        """
        network = self.latency + (2 * size / self.bandwidth if self.bandwidth else 0.0)
        if not trains(message_type):
            return network
        examples = self.work(message_type, config, partition)
        speed = self.speed(partition) * self._factor(message_type, config, partition)
        return network + (self.seconds + self.seconds_per_example * examples) / speed

    def _factor(self, message_type: str, config: Mapping[str, Any], partition: int) -> float:
        """Returns the message's own factor, which belongs to its round and dispatch."""
        if not self.jitter:
            return 1.0
        ids = (int(config.get("server-round", 0)), int(config.get("dispatch", 0)), partition)
        z = generator(self.seed, f"clock/jitter/{message_type}", *ids).standard_normal()
        return math.exp(self.jitter * float(z))


def first_done(finishes: Mapping[Id, float], most: int) -> tuple[float, list[Id]]:
    """Returns the earliest of some instants, and what is done then, in the order of the mapping.

    most: how many of them are returned, ≥ 1. Raises ValueError if nothing is under way.
    """
    if not finishes:
        raise ValueError("nothing is under way")
    now = min(finishes.values())
    return now, [i for i, finish in finishes.items() if finish == now][:most]


def examples_of(plan: Plan, n_examples: int) -> int:
    """Returns the examples in all minibatches of a plan, for a client of `n_examples` rows."""
    batching = plan.batching
    count = plan.init_minibatches + plan.steps * plan.minibatches_per_step
    if batching.kind == "none" or not n_examples:
        return 0
    if batching.kind == "full":
        return count * n_examples
    if batching.kind == "sampled":
        return count * min(batching.size, n_examples)
    per_pass = -(-n_examples // batching.size)
    passes, rest = divmod(count, per_pass)
    return passes * n_examples + rest * batching.size  # the smaller one comes last in a pass
