"""What every strategy must do on every engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim import registry
from fedsim.clients.base import Client, DirectClient
from fedsim.messages import Arrays, to_tensors
from fedsim.models import FunctionalModel
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig, LoopState
from fedsim.strategies.base import Exchange, Strategy
from fedsim.strategies.flower import DEFAULT_CLIENT, weight_key
from fedsim.testing.engines import ENGINES, POISONS, Engine, EveryReply, Serialised, poison
from fedsim.testing.federation import (
    classification,
    distance,
    federation,
    functional,
    network,
    same_bits,
    start,
)
from fedsim.testing.memory import Memory

Wrap = Callable[[Grid], Grid]
Aggregated = tuple[ArrayRecord | None, MetricRecord | None]

CLOCK = frozenset({"seconds", "total_seconds", "clients_per_second"})
"""Metrics that time decides."""

PATHS = 1e-9
"""Relative distance of two float64 runs that compute the same by other operations."""

POISONED = 4
"""The node whose replies are spoiled."""


class StrategyContract:
    """A test class to derive from; pytest runs each of its tests on each of `engines`.

    engines: by name. sizes: rows of each client. identity: whether the only client's reply is the
    result of a round; False for a strategy that does something with it (a server's step, noise).
    """

    engines: ClassVar[Mapping[str, Engine]] = ENGINES
    sizes: ClassVar[Sequence[int]] = (7, 5, 30, 12, 9)
    rounds: ClassVar[int] = 4
    identity: bool = True

    # What a suite says of its strategy

    def make(self) -> FlowerStrategy:
        """Returns a new strategy, the same each time."""
        raise NotImplementedError("say which strategy is tested: def make(self): return Mine(…)")

    def make_single(self) -> FlowerStrategy:
        """Returns the strategy for a federation of one client."""
        return self.make()

    def make_client(
        self, strategy: FlowerStrategy, model: FunctionalModel
    ) -> Client | DirectClient:
        """Returns the client, by default the one that the strategy names."""
        kind = registry.load("clients", getattr(strategy, "client", DEFAULT_CLIENT))
        return kind(kind.Params(), model, classification())  # type: ignore[no-any-return]

    # How a run is made

    def run(
        self,
        engine: str,
        strategy: FlowerStrategy | None = None,
        *,
        dtype: str = "float32",
        wrap: Wrap = lambda grid: grid,
        workers: int = 1,
        sizes: Sequence[int] | None = None,
        rounds: int | None = None,
        resume: tuple[Mapping[str, torch.Tensor], Any] | None = None,
    ) -> tuple[LoopState, Memory]:
        """Returns the final state of a run, and what it wrote.

        wrap: what stands between the loop and the engine. resume: a checkpoint to go on from.
        """
        strategy = self.make() if strategy is None else strategy
        model = functional(network(), getattr(torch, dtype))
        data = federation(self.sizes if sizes is None else sizes)
        grid = self.engines[engine].make(self.make_client(strategy, model), data, dtype, workers)
        memory = Memory()
        config = LoopConfig(rounds or self.rounds, seed=0, server_every=0, checkpoint_rounds=1)
        loop = RoundLoop(strategy, wrap(grid), start(model, strategy), config, memory)
        try:
            if resume is not None:
                loop.load(*resume)
            return loop.run(), memory
        finally:
            close = getattr(grid, "close", None)
            if close is not None:
                close()

    # The tests

    def test_the_same_seed_is_the_same_run(self, engine: str) -> None:
        """Determinism, whatever the number of workers; and a run moves the parameters at all."""
        state, memory = self.run(engine)
        again, other = self.run(engine, workers=2)
        _assert_same_bits(again.arrays, state.arrays, "two runs of one seed differ")
        assert _numbers(other) == _numbers(memory), "two runs of one seed differ in their metrics"
        begin = start(functional(network(), torch.float32), self.make())
        assert distance(state.arrays, begin) > 1e-4, "the parameters stay where they were"

    def test_global_generators_neither_matter_nor_change(self, engine: str) -> None:
        """Random numbers come from fedsim.random, or from generators that the loop has seeded."""
        results = []
        for noise in (1, 2):
            _seed_globals(noise)
            before = _drawn_from_globals()
            _seed_globals(noise)
            results.append(self.run(engine, rounds=2)[0].arrays)
            assert _drawn_from_globals() == before, "a global generator was used up"
        _assert_same_bits(
            results[0], results[1], "the result depends on a global generator's state"
        )

    def test_parameters_keep_their_dtype_and_shape(self, engine: str) -> None:
        """The parameters come out as they went in, in either precision."""
        for dtype in ("float32", "float64"):
            arrays = self.run(engine, dtype=dtype, rounds=2)[0].arrays
            begin = start(functional(network(), getattr(torch, dtype)), self.make())
            form = {name: (value.shape, value.dtype) for name, value in arrays.items()}
            assert form == {name: (value.shape, value.dtype) for name, value in begin.items()}

    def test_the_order_of_clients_does_not_matter(self, engine: str) -> None:
        """Permutation invariance: an aggregate treats all clients alike."""

        def run(order: Callable[[list[Message]], list[Message]]) -> Arrays:
            return self.run(engine, reordered(self.make(), order), dtype="float64")[0].arrays

        straight = run(list)
        for order in (_reverse, _rotate):
            apart = distance(run(order), straight)
            assert apart <= PATHS, f"replies in another order give another result ({apart:.1e})"

    def test_a_single_clients_reply_is_the_result(self, engine: str) -> None:
        """Single-client identity, for strategies that say `identity`."""
        if not self.identity:
            import pytest

            pytest.skip("this strategy does more than to combine replies")
        seen: list[Arrays] = []

        def listen(message: Message) -> Message:
            records = message.content.array_records
            if "arrays" in records:
                seen.append(to_tensors(records["arrays"]))
            return message

        state, _ = self.run(
            engine,
            self.make_single(),
            sizes=(9,),
            rounds=1,
            wrap=lambda grid: EveryReply(grid, listen),
        )
        assert seen, "no reply has a record 'arrays'; set identity = False"
        apart = distance(state.arrays, seen[-1])
        assert apart <= 1e-7, f"the only reply is not the result ({apart:.1e})"

    def test_what_travels_as_bytes_is_the_same(self, engine: str) -> None:
        """Serialisation: parameters and replies may be bytes, and replies single messages."""
        lazy, _ = self.run(engine)
        single, _ = self.run(engine, wrap=EveryReply)
        travelled, _ = self.run(engine, wrap=Serialised)
        _assert_same_bits(
            travelled.arrays, single.arrays, "arrays that were sent as bytes give another result"
        )
        apart = distance(single.arrays, lazy.arrays)
        assert apart <= 1e-6, f"single replies give another result than a stack ({apart:.1e})"
        for name in ("bytes_up", "bytes_down", "gradients"):
            assert getattr(single.totals, name) == getattr(lazy.totals, name), f"other {name}"

    def test_a_resumed_run_ends_in_the_same_bits(self, engine: str) -> None:
        """Checkpoints hold all there is; on engines of the same bits a run may go on, too."""
        whole, memory = self.run(engine)
        others = [engine, self.engines[engine].same_bits_as]
        for name in filter(None, others):
            for at in (1, self.rounds - 1):
                state, rest = self.run(name, resume=memory.checkpoints[at])
                where = f"resumed after round {at} on {name}"
                _assert_same_bits(state.arrays, whole.arrays, f"{where}: another result")
                later = {place: v for place, v in _numbers(memory).items() if place[0] > at}
                assert _numbers(rest) == later, f"{where}: other metrics"

    def test_the_numbers_are_those_of_other_engines(self, engine: str) -> None:
        """Equal to the bit where the engine says so; within 1e-9 in float64 of the first one."""
        reference, exact = next(iter(self.engines)), self.engines[engine].same_bits_as
        expected, _ = self.run(reference, dtype="float64")
        found, _ = self.run(engine, dtype="float64")
        apart = distance(found.arrays, expected.arrays)
        assert apart <= PATHS, f"{engine} is {apart:.1e} away from {reference}"
        if exact is not None:
            for workers in (1, 2):
                state, memory = self.run(engine, workers=workers)
                other, told = self.run(exact)
                _assert_same_bits(state.arrays, other.arrays, f"other bits than on {exact}")
                assert _numbers(memory) == _numbers(told), f"other metrics than on {exact}"

    def test_poisoned_replies_are_refused(self, engine: str) -> None:
        """A spoiled reply is counted, and the rest is as if it had never come."""
        weight = weight_key(self.make())

        def spoiled(kinds: Mapping[int, str]) -> Callable[[Message], Message | None]:
            asked: dict[str, int] = {}

            def change(message: Message) -> Message | None:
                if message.metadata.src_node_id != POISONED or not message.has_content():
                    return message
                if not message.content.array_records:
                    return message
                kind = message.metadata.message_type
                asked[kind] = asked.get(kind, 0) + 1
                bad = kinds[asked[kind]]
                if bad == "lost" or (bad.endswith("weight") and not _has(message, weight)):
                    return None
                return poison(message, bad, weight)

            return change

        rounds = len(POISONS)
        bad = dict(enumerate(POISONS, 1))
        runs = []
        for kinds in (bad, dict.fromkeys(bad, "lost")):
            change = spoiled(kinds)
            runs.append(
                self.run(engine, rounds=rounds, wrap=lambda grid, c=change: EveryReply(grid, c))  # type: ignore[misc]
            )
        (state, memory), (clean, _) = runs
        for kind, server_round, fields in memory.events:
            assert (kind, list(fields["nodes"])) == ("bad_replies", [str(POISONED)])
            assert server_round is not None
        refused = {server_round for _, server_round, _ in memory.events}
        missed = [kind for at, kind in bad.items() if at not in refused]
        assert not missed, f"replies with {', '.join(missed)} were taken for good ones"
        assert state.totals.dropped == clean.totals.dropped
        _assert_same_bits(state.arrays, clean.arrays, "a refused reply has changed the result")

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Has pytest run every test on every engine."""
        if "engine" in metafunc.fixturenames:
            metafunc.parametrize("engine", list(self.engines))


def reordered(
    strategy: FlowerStrategy, order: Callable[[list[Message]], list[Message]]
) -> FlowerStrategy:
    """Returns the strategy, changed: its aggregations get single replies in another order.

    The round loop sorts replies, so that another order of arrival would show nothing.
    """
    if isinstance(strategy, Strategy):
        exchanges = strategy.exchanges

        def single(exchange: Exchange) -> Exchange:
            def aggregate(server_round: int, replies: Iterable[Message]) -> Aggregated:
                return exchange.aggregate(server_round, order(list(replies)))

            return replace(exchange, aggregate=aggregate, weights=None)

        strategy.exchanges = lambda server_round: [*map(single, exchanges(server_round))]  # type: ignore[method-assign]
        return strategy
    given = strategy.aggregate_train

    def aggregate_train(server_round: int, replies: Iterable[Message]) -> Aggregated:
        return given(server_round, order(list(replies)))

    strategy.aggregate_train = aggregate_train  # type: ignore[method-assign]
    return strategy


def _reverse(messages: list[Message]) -> list[Message]:
    return messages[::-1]


def _rotate(messages: list[Message]) -> list[Message]:
    return messages[2:] + messages[:2]


def _has(message: Message, metric: str) -> bool:
    return any(metric in record for record in message.content.metric_records.values())


def _numbers(memory: Memory) -> dict[tuple[int, str], dict[str, float]]:
    """Returns the metrics by (round, split), without those that time decides."""
    return {
        place: {name: value for name, value in values.items() if name not in CLOCK}
        for place, values in memory.metrics.items()
    }


def _assert_same_bits(found: Arrays, expected: Arrays, otherwise: str) -> None:
    if not same_bits(found, expected):
        raise AssertionError(f"{otherwise} ({distance(found, expected):.1e} apart)")


def _seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _drawn_from_globals() -> tuple[float, float, float]:
    return random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002
