"""FedBuff: an event simulation, FedAvg where nothing is stale, resume, failures, a real clock."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from torch import Tensor

from fedsim.clients.base import Batching, Client, Config, Inputs, Plan, Reply, State
from fedsim.clients.sgd import SGDParams
from fedsim.errors import RunFailed
from fedsim.grids.clock import SimulatedClock
from fedsim.grids.inline import InlineGrid
from fedsim.grids.nodes import partition_of
from fedsim.messages import Arrays, Received, Sent, make_content, to_tensors
from fedsim.random import generator
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig
from fedsim.strategies.base import Strategy
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.strategies.fedbuff import FedBuff, FedBuffParams, pick
from tests.engines.toys import (
    Memory,
    classification,
    cohorts,
    distance,
    federation,
    functional,
    network,
    same_bits,
    sgd,
)
from tests.oracles import fedbuff_events

SIZES = (7, 1, 30, 12, 3, 20, 5, 9)
LR, STEPS = 0.15, 3


def clock(**fields: Any) -> SimulatedClock:
    """Returns a clock of log-normal speeds, on which a client takes as long as it has rows."""
    given = {"seconds": 0.5, "seconds_per_example": 0.1, "sigma": 1.0} | fields
    return SimulatedClock(0, lambda kind, config, p: SIZES[p], **given)


EQUAL = {"seconds": 1.0, "seconds_per_example": 0.0, "sigma": 0.0}


class Quadratic(Client):
    """Goes STEPS gradient steps down ½ (w − mean of the first feature)², and counts its calls."""

    def initial_client_state(self) -> Arrays:
        return {"calls": torch.zeros((), dtype=torch.float64)}

    def plan(self, n_examples: int, config: Config) -> Plan:
        return Plan(steps=STEPS, batching=Batching("full"))

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> State:
        n = inputs.scalars["num-examples"]
        return records["arrays"]["w"], client_state["calls"] + 1, n

    def step(self, state: State, inputs: Inputs) -> State:
        w, calls, n = state
        (batch,) = inputs.batches
        mean = (batch.x[:, 0] * batch.weight).sum() / batch.weight.sum()
        return w - LR * (w - mean), calls, n

    def finish(self, state: State) -> tuple[Reply, Arrays]:
        w, calls, n = state
        return Reply({"arrays": {"w": w}}, {"num-examples": n, "calls": calls}), {"calls": calls}


QUADRATIC = Quadratic(SGDParams(), functional(), classification())
START = {"w": torch.zeros((), dtype=torch.float64)}


def make(
    strategy: Strategy,
    *,
    client: Client = QUADRATIC,
    arrays: Arrays | None = None,
    grid: type[InlineGrid] = InlineGrid,
    on: SimulatedClock | None = None,
    **config: Any,
) -> tuple[RoundLoop, Memory]:
    memory = Memory()
    settings = {"rounds": 12, "seed": 0, "server_every": 0, "checkpoint_rounds": 1} | config
    engine = cohorts(client, federation(SIZES))
    if arrays is None:
        arrays = START if client is QUADRATIC else client.model.initial()
    loop = RoundLoop(
        strategy,
        grid(engine, len(SIZES)),
        arrays,
        LoopConfig(**settings, clock=on),
        memory,
    )
    return loop, memory


def fedbuff(**params: Any) -> FedBuff:
    return FedBuff(FedBuffParams(**params))


# Oracles


@pytest.mark.parametrize(
    ("params", "fields"),
    [
        ({"buffer_size": 3, "concurrency": 5}, {}),
        ({"buffer_size": 1, "concurrency": 8, "server_lr": 0.4}, {}),
        ({"buffer_size": 3, "concurrency": 6, "staleness_exponent": 2.0}, {"jitter": 0.5}),
        ({"buffer_size": 9, "concurrency": 3, "weighted_by": "examples"}, {}),
        ({"buffer_size": 3, "concurrency": 5}, EQUAL),
        ({"buffer_size": 2, "concurrency": 8, "weighted_by": "examples"}, EQUAL),
    ],
)
def test_an_event_simulation(params: dict[str, Any], fields: dict[str, Any]) -> None:
    strategy, own = fedbuff(**params), clock(**fields)
    loop, memory = make(strategy, on=own, rounds=25)
    seen: list[float] = []
    loop.on_round = lambda *_: seen.append(float(loop.state.arrays["w"]))
    loop.run()

    data = federation(SIZES)
    p = strategy.params

    def duration(i: int, version: int, turn: int) -> float:
        speed = own.speed(i)
        if own.jitter:
            ids = (version + 1, turn, i)
            speed *= np.exp(own.jitter * generator(0, "clock/jitter/train", *ids).standard_normal())
        return float((own.seconds + own.seconds_per_example * SIZES[i]) / speed)

    def sample(version: int, turn: int, idle: list[int], count: int) -> list[int]:
        if count == len(idle):
            return idle
        rng = generator(0, "sample", version + 1, *([turn] if turn else []))
        return sorted(idle[i] for i in rng.choice(len(idle), count, replace=False))

    expected = fedbuff_events.simulate(
        means=[float(data.train.x[rows, 0].mean()) for rows in data.shards],
        weights=[1.0] * len(SIZES) if p.weighted_by == "uniform" else [float(n) for n in SIZES],
        duration=duration,
        sample=sample,
        concurrency=params["concurrency"],
        buffer_size=p.buffer_size,
        lr=LR,
        steps=STEPS,
        server_lr=p.server_lr,
        exponent=p.staleness_exponent,
        updates=25,
    )
    assert seen == pytest.approx([update.w for update in expected], rel=1e-12, abs=1e-12)
    for server_round, update in enumerate(expected, 1):
        system, train = (memory.metrics[server_round, s] for s in ("system", "train"))
        assert system["total_simulated_seconds"] == pytest.approx(update.time, rel=1e-12)
        assert train["staleness_max"] == max(update.staleness)
        assert train["staleness_mean"] == pytest.approx(np.mean(update.staleness), rel=1e-12)
    staleness = [tau for update in expected for tau in update.staleness]
    assert max(staleness) > 0 or p.buffer_size >= params["concurrency"]


@pytest.mark.parametrize("weighted_by", ["uniform", "examples"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_without_staleness_it_is_fedavg(weighted_by: Any, fraction: float) -> None:
    """η_g = 1, K = concurrency = cohort, equal durations: the same clients, noise and mean."""
    client = sgd(functional(network(dropout=0.3)), batch_size=4, lr=0.2, epochs=2)
    common = {"weighted_by": weighted_by, "fraction_train": fraction}
    cohort = round(fraction * len(SIZES))
    buffered = fedbuff(buffer_size=cohort, **common)
    results = []
    for strategy in (buffered, FedAvg(FedAvgParams(**common))):
        loop, memory = make(strategy, client=client, on=clock(**EQUAL), rounds=5)
        results.append((loop.run(), memory))
    (ours, buffer), (theirs, plain) = results
    assert distance(ours.arrays, theirs.arrays) <= 1e-12
    for r in range(1, 6):
        own = dict(buffer.metrics[r, "train"])
        assert own.pop("staleness_mean") == own.pop("staleness_max") == 0
        assert own == pytest.approx(plain.metrics[r, "train"], rel=1e-12)
        for name in ("bytes_up", "bytes_down", "gradients", "simulated_seconds", "dropped"):
            assert buffer.metrics[r, "system"][name] == plain.metrics[r, "system"][name]
    assert ours.totals.simulated_seconds == 5.0


def test_a_synchronous_round_lasts_as_long_as_its_slowest_client() -> None:
    own = clock()
    loop, memory = make(FedAvg(FedAvgParams(fraction_train=0.4)), on=own, rounds=4)
    asked: list[tuple[int, ...]] = []

    def send(messages: Any, *, timeout: float | None = None) -> Sequence[Message]:
        asked.append(messages.node_ids)
        return InlineGrid.send_and_receive(loop.grid, messages)  # type: ignore[arg-type]

    loop.grid.send_and_receive = send  # type: ignore[method-assign]
    loop.run()
    total = 0.0
    for r, nodes in enumerate(asked, 1):
        slowest = max(own.duration("train", {}, partition_of(n), 8) for n in nodes)
        total += slowest
        system = memory.metrics[r, "system"]
        assert system["simulated_seconds"] == pytest.approx(slowest, rel=1e-12)
        assert system["total_simulated_seconds"] == pytest.approx(total, rel=1e-12)


def test_without_a_clock_no_time_is_simulated() -> None:
    loop, memory = make(FedAvg(FedAvgParams()), rounds=1)
    loop.run()
    assert not [name for name in memory.metrics[1, "system"] if "simulated" in name]


# One update


def received(strategy: FedBuff, at: float, replies: Mapping[int, tuple[int, float, float]]) -> Any:
    """Returns the parameter after an update of round 9 at `at`.

    replies: by node, the round of what it received, that, and what it replied.
    """
    from flwr.app import MetricRecord

    pairs = []
    for number, (node, (sent_in, begin, end)) in enumerate(replies.items()):
        content = make_content({"arrays": {"w": torch.tensor(begin)}}, {})
        reply = make_content({"arrays": {"w": torch.tensor(end)}}, {})
        reply["metrics"] = MetricRecord({"num-examples": 10 * node})
        answer = Message(reply, reply_to=Message(RecordDict(), node, "train"))
        pairs.append((Sent(node, "train", sent_in, number, content), answer))
    strategy._current = {"w": torch.tensor(at)}
    record, metrics = strategy.aggregate_train(9, Received(pairs))
    assert record is not None
    return float(to_tensors(record)["w"]), metrics


def test_an_update_by_hand(grid: InlineGrid) -> None:
    replies = {2: (9, 1.0, 3.0), 3: (6, 0.0, 8.0)}  # Δ = 2 fresh, 8 three updates late
    w, metrics = received(fedbuff(server_lr=0.5), 1.0, replies)
    assert w == 1.0 + 0.5 * (2 + 8 / 2) / 2
    assert (metrics["staleness_mean"], metrics["staleness_max"]) == (1.5, 3)
    w, _ = received(fedbuff(staleness_exponent=0.0), 1.0, replies)
    assert w == 1.0 + (2 + 8) / 2
    w, _ = received(fedbuff(staleness_exponent=1.0, weighted_by="examples"), 1.0, replies)
    assert w == pytest.approx(1.0 + (20 * 2 + 30 * 8 / 4) / 50, rel=1e-6)


def test_a_reply_that_answers_nothing_known_is_refused(grid: InlineGrid) -> None:
    with pytest.raises(TypeError, match="fedsim's round loop"):
        fedbuff().aggregate_train(1, [])


@pytest.fixture
def grid() -> InlineGrid:
    """An engine, which sets the identity that Messages need."""
    return InlineGrid(cohorts(QUADRATIC, federation(SIZES)), len(SIZES))


# Sampling


def test_idle_nodes_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        nodes = range(2, 2 + int(rng.integers(1, 12)))
        busy = {n for n in (*nodes, 99) if rng.random() < 0.4}
        idle = [n for n in nodes if n not in busy]
        count = int(rng.integers(0, 13))
        for given in (nodes, list(nodes)):
            own = pick(given, busy, count, generator(0, "test", count))
            assert len(own) == min(count, len(idle))
            assert own == sorted(set(own) & set(idle))
        if 0 < count < len(idle):
            chosen = generator(0, "test", count).choice(len(idle), count, replace=False)
            assert own == sorted(idle[i] for i in chosen)


def test_so_many_are_always_at_work_and_nobody_twice() -> None:
    class Watching(InlineGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            pushed = super().push_messages(messages)
            nodes = [m.metadata.dst_node_id for m in self._pending.values()]
            assert len(nodes) == len(set(nodes)) == 5
            return pushed

    loop, _ = make(fedbuff(buffer_size=3, concurrency=5), grid=Watching, on=clock())
    assert loop.run().round == 12
    assert len(loop.waiting.busy) <= 5


def test_two_dispatches_of_a_client_at_one_version_differ() -> None:
    """One client and a buffer of two: it is asked twice with the same parameters."""
    ends: list[Tensor] = []

    class Listening(FedBuff):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            assert isinstance(replies, Received)
            records = [reply.content.array_records["arrays"] for reply in replies]
            ends.extend(to_tensors(record)["0.weight"] for record in records)
            assert len({id(sent.content) for sent in replies.sent}) == 2
            assert {sent.server_round for sent in replies.sent} == {server_round}
            return super().aggregate_train(server_round, replies)

    client = sgd(functional(), batch_size=2, lr=0.2)
    engine = cohorts(client, federation((9,)))
    loop = RoundLoop(
        Listening(FedBuffParams(buffer_size=2)),
        InlineGrid(engine, 1),
        client.model.initial(),
        LoopConfig(rounds=1, seed=0, server_every=0, clock=clock()),
        Memory(),
    )
    loop.run()
    first, second = ends
    assert not torch.equal(first, second)


# Resume


@pytest.mark.parametrize("fields", [{}, {"jitter": 0.4}, EQUAL])
def test_a_resumed_run_ends_in_the_same_bits(fields: dict[str, Any]) -> None:
    client = sgd(functional(network(dropout=0.3)), batch_size=4, lr=0.2)

    def new() -> tuple[RoundLoop, Memory]:
        strategy = fedbuff(buffer_size=3, concurrency=6)
        return make(strategy, client=client, on=clock(**fields), rounds=8)

    whole, memory = new()
    expected = whole.run()
    versions = 0
    for at in (1, 2, 5):
        resumed, rest = new()
        resumed.load(*memory.checkpoints[at])
        assert 3 <= len(resumed.waiting.busy) <= 5  # who has replied is replaced in the next round
        versions = max(versions, len(memory.checkpoints[at][1]["waiting"]["contents"]))
        state = resumed.run()
        assert same_bits(state.arrays, expected.arrays)
        assert state.totals.simulated_seconds == expected.totals.simulated_seconds
        for r in range(at + 1, 9):
            assert rest.metrics[r, "train"] == memory.metrics[r, "train"]
            for name in ("simulated_seconds", "bytes_up", "bytes_down", "gradients"):
                assert rest.metrics[r, "system"][name] == memory.metrics[r, "system"][name]
    assert versions > 1 or fields is EQUAL  # what was under way had been sent in different rounds


def test_clients_keep_their_state_across_a_resume() -> None:
    whole, memory = make(fedbuff(buffer_size=3, concurrency=6), on=clock())
    whole.run()
    resumed, rest = make(fedbuff(buffer_size=3, concurrency=6), on=clock())
    resumed.load(*memory.checkpoints[5])
    resumed.run()
    assert [rest.metrics[r, "train"]["calls"] for r in range(6, 13)] == [
        memory.metrics[r, "train"]["calls"] for r in range(6, 13)
    ]


# Failures


class Failing(InlineGrid):
    """The replies of some nodes hold a NaN."""

    bad: frozenset[int] = frozenset()

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.metadata.src_node_id in self.bad:
                to_tensors(reply.content.array_records["arrays"])["w"].fill_(float("nan"))
        return replies


def failing(*bad: int) -> type[InlineGrid]:
    return type("Some", (Failing,), {"bad": frozenset(bad)})


def test_a_failing_clients_reply_is_dropped_and_its_place_filled() -> None:
    loop, memory = make(fedbuff(buffer_size=4, concurrency=6), grid=failing(3, 7), on=clock())
    state = loop.run()
    assert state.round == 12
    assert state.totals.dropped > 0
    assert state.arrays["w"].isfinite()
    assert {n for _, _, fields in memory.events for n in fields["nodes"]} <= {"3", "7"}
    dropped = sum(memory.metrics[r, "system"]["dropped"] for r in range(1, 13))
    assert dropped == state.totals.dropped == sum(f["count"] for _, _, f in memory.events)
    assert state.totals.bytes_up == 8 * (12 * 4 + state.totals.dropped)


@pytest.mark.parametrize(("quorum", "count"), [(0.5, 5), (1.0, 1), (0.8, 2)])
def test_where_everybody_fails_the_run_ends(quorum: float, count: int) -> None:
    grid = failing(*range(2, 10))
    loop, memory = make(fedbuff(buffer_size=4), grid=grid, on=clock(), quorum=quorum)
    with pytest.raises(RunFailed, match=rf"round 1, train: 0 of {count} replies were good.*quorum"):
        loop.run()
    assert memory.events[0][2]["count"] == count


def test_one_bad_reply_may_fail_the_run() -> None:
    loop, _ = make(fedbuff(buffer_size=4), grid=failing(5), on=clock(), on_bad_reply="fail")
    with pytest.raises(RunFailed, match=r"node 5.*NaN or Inf.*on_bad_reply: fail"):
        loop.run()


def test_a_quorum_of_nothing_does_not_wait_forever() -> None:
    loop, _ = make(
        fedbuff(buffer_size=1), grid=failing(*range(2, 10)), on=clock(), quorum=0.0, rounds=1
    )
    assert same_bits(loop.run().arrays, START)


def test_the_clients_that_fail_are_waited_for_as_long_as_the_quorum_allows() -> None:
    """Half of the clients fail: of about as many good replies as bad ones, 0.3 are good enough."""
    loop, _ = make(
        fedbuff(buffer_size=4), grid=failing(2, 3, 4, 5), on=clock(), quorum=0.2, rounds=6
    )
    assert loop.run().round == 6


# Other engines


class Slow(InlineGrid):
    """Answers what it likes of what it is asked: nothing, or some, in any order."""

    turns = itertools.count()

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        rng = generator(0, "slow", next(self.turns))
        ids = list(message_ids)
        some = [ids[i] for i in rng.permutation(len(ids))[: rng.integers(0, 3)]]
        return list(super().pull_messages(some))


def test_a_simulated_clock_is_the_same_run_on_an_engine_that_takes_its_time() -> None:
    runs = []
    for grid in (InlineGrid, Slow):
        loop, memory = make(fedbuff(buffer_size=3, concurrency=5), grid=grid, on=clock())
        runs.append((loop.run(), memory))
    (expected, theirs), (state, ours) = runs
    assert same_bits(state.arrays, expected.arrays)
    for r in range(1, 13):
        assert ours.metrics[r, "train"] == theirs.metrics[r, "train"]


def test_a_real_clock_takes_what_the_engine_has_finished() -> None:
    strategy = fedbuff(buffer_size=3, concurrency=5)
    loop, memory = make(strategy, grid=Slow, on=None)
    state = loop.run()
    assert state.round == 12
    assert state.totals.bytes_up == 8 * 12 * 3
    assert max(memory.metrics[r, "train"]["staleness_max"] for r in range(1, 13)) > 0
    assert abs(float(state.arrays["w"])) > 0.05
    resumed, _ = make(strategy, grid=Slow, on=None)  # ends, though not in the same bits
    resumed.load(*memory.checkpoints[6])
    assert resumed.run().round == 12
