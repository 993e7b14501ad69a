"""Runs of bandits without a run folder, and what their messages held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message

from fedsim import Scenario
from fedsim.grids.inline import InlineGrid
from fedsim.messages import Arrays, Broadcast, Replies, config_of, to_tensors
from fedsim.random import generator
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopState
from fedsim.setup import Setup, prepare
from fedsim.strategies.bandit import Bandit
from tests.engines.toys import Memory
from tests.oracles import pfpne_numpy as oracle

DATA = {"name": "bandit_objectives", "base": "himmelblau", "clients": 5, "noise": 0.1}
LOCAL = {"name": "local-search"}


def setup_of(
    strategy: Mapping[str, Any], data: Mapping[str, Any] = {}, seed: int = 0, **sections: Any
) -> Setup:
    """Returns a run's objects; `data` changes DATA, unless it has a name of its own."""
    own = dict(data) if "name" in data else {**DATA, **data}
    document = {
        "data": own, "partition": "given", "strategy": dict(strategy), "seeds": [seed],
        "checkpoint": {"every_rounds": 1}, **sections,
    }  # fmt: skip
    (spec,) = Scenario.from_dict(document).expand()
    return prepare(spec.scenario)


@dataclass
class Played:
    """A run that is over."""

    setup: Setup
    strategy: Bandit
    memory: Memory
    state: LoopState
    kept: Arrays

    def metric(self, name: str) -> list[float]:
        """Returns a train metric, round after round."""
        rounds = sorted(r for r, split in self.memory.metrics if split == "train")
        return [self.memory.metrics[r, "train"][name] for r in rounds]

    def of_clients(self, name: str) -> np.ndarray:
        """Returns a metric of the clients, (rounds, clients)."""
        return np.array([values[name] for _, _, values in self.memory.client_metrics])

    @property
    def regret(self) -> float:
        """The cumulative regret of a client at the end, mean over clients."""
        return self.metric("regret")[-1]

    @property
    def simple_regret(self) -> float:
        """The simple regret at the end, mean over clients."""
        return self.metric("simple_regret")[-1]


def play(
    strategy: Mapping[str, Any],
    data: Mapping[str, Any] = {},
    seed: int = 0,
    *,
    grid: type[InlineGrid] | None = None,
    resume: tuple[Mapping[str, Any], Any] | None = None,
    **sections: Any,
) -> Played:
    """Runs to the end. grid: another engine. resume: a checkpoint to go on from."""
    setup = setup_of(strategy, data, seed, **sections)
    engine = setup.grid()
    if grid is not None:
        engine = grid(engine._clients, len(setup.data.shards), seed=seed)
    memory = Memory()
    loop = RoundLoop(setup.strategy, engine, setup.arrays, setup.loop_config(), memory)
    if resume is not None:
        loop.load(*resume)
    try:
        state = loop.run()
        kept = engine.state_dict()[0]
    finally:
        engine.close()
    assert isinstance(setup.strategy, Bandit)
    return Played(setup, setup.strategy, memory, state, kept)


def noise_of(seed: int, sigma: float) -> oracle.Noise:
    """Returns the noise that the engine draws, for the oracle."""

    def noise(server_round: int, client: int, count: int) -> np.ndarray:
        rng = generator(seed, "train.pull/client", server_round, client, 0, 0)
        return sigma * rng.standard_normal(count)

    return noise


def himmelblau(x: np.ndarray) -> float:
    """The scaled function, written again."""
    a, b = x
    return float(1 - ((a * a + b - 11) ** 2 + (a + b * b - 7) ** 2) / 890)


def problem(setup: Setup, **given: Any) -> oracle.Problem:
    """Returns the same problem for the oracle, read from the clients' rows."""
    rows = setup.data.train.x.astype(np.float32).astype(np.float64)
    functions = [lambda x, w=row[4:6]: himmelblau(x) + float(w @ np.asarray(x)) / 5 for row in rows]
    maxima = [f(row[2:4]) for f, row in zip(functions, rows, strict=True)]
    noise = noise_of(setup.seed, float(rows[0, 1]))
    return oracle.Problem(functions, maxima, ((-5.0, 5.0), (-5.0, 5.0)), noise, **given)


@dataclass
class Heard:
    """One exchange: what went down to every client and what each sent up."""

    message_type: str
    down: dict[str, Arrays]
    config: dict[str, Any]
    up: dict[str, Arrays]
    metrics: set[str]
    clients: int


HEARD: list[Heard] = []


class Listening(InlineGrid):
    """Notes everything that is exchanged in HEARD."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        assert isinstance(messages, Broadcast)
        assert isinstance(replies, Replies)
        down = {name: to_tensors(r) for name, r in messages.content.array_records.items()}
        config = config_of(messages.content)
        HEARD.append(
            Heard(
                messages.message_type,
                down,
                config,
                replies.arrays,
                set(replies.metrics),
                len(replies.node_ids),
            )
        )
        return replies


@dataclass
class Counted:
    """Numbers in arrays, by kind."""

    floats: int = 0
    ids: int = 0
    bytes: int = 0

    def add(self, records: Mapping[str, Arrays], times: int = 1) -> None:
        """Adds what some records hold, `times` over."""
        for arrays in records.values():
            for tensor in arrays.values():
                array = tensor.numpy()
                self.bytes += times * array.nbytes
                if array.dtype.kind == "f":
                    self.floats += times * array.size
                else:
                    self.ids += times * array.size


@dataclass
class Audit:
    """Everything that a run has sent."""

    up: Counted = field(default_factory=Counted)
    down: Counted = field(default_factory=Counted)


def audit() -> Audit:
    """Returns the sums over HEARD."""
    found = Audit()
    for heard in HEARD:
        found.up.add(heard.up)
        found.down.add(heard.down, heard.clients)
    return found
