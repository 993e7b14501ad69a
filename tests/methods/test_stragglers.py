"""Over-sampling and the deadline: an event simulation, failures, ties, resume, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedsim.errors import RunFailed
from fedsim.grids.clock import SimulatedClock
from fedsim.grids.inline import InlineGrid
from fedsim.grids.nodes import node_of, partition_of
from fedsim.messages import Broadcast, make_content, nodes_of
from fedsim.random import generator
from fedsim.scenario.sections import Fault, FaultsParams
from fedsim.server.faults import FaultyGrid
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig
from fedsim.server.stragglers import with_more
from fedsim.strategies.base import Exchange
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.strategies.fedbuff import FedBuff, FedBuffParams
from fedsim.strategies.flower import build_flower, parse_flower
from tests.engines.toys import Memory, cohorts, federation, functional, network, same_bits, sgd
from tests.methods.test_fedbuff import EQUAL, LR, QUADRATIC, SIZES, START, STEPS, clock
from tests.oracles import stragglers_events

COUNTED = ("simulated_seconds", "bytes_up", "bytes_down", "gradients", "dropped", "late")


class Watching(InlineGrid):
    """Notes who is computed, a tuple of partitions for each call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.computed: list[tuple[int, ...]] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        if not isinstance(messages, Broadcast):
            messages = list(messages)
        self.computed.append(tuple(partition_of(node) for node in nodes_of(messages)))
        return super().send_and_receive(messages, timeout=timeout)


def make(
    strategy: FlowerStrategy | None = None,
    *,
    client: Any = QUADRATIC,
    broken: Sequence[int] = (),
    faults: FaultsParams | None = None,
    on: SimulatedClock | None = None,
    **config: Any,
) -> tuple[RoundLoop, Memory, Watching]:
    """Returns a loop over eight clients; those that are `broken` have NaN among their features."""
    data, memory = federation(SIZES), Memory()
    for partition in broken:
        data.train.x[data.shards[partition][0], 0] = np.nan
    grid = Watching(cohorts(client, data), len(SIZES))
    settings = {"rounds": 12, "seed": 0, "server_every": 0, "checkpoint_rounds": 1} | config
    loop = RoundLoop(
        strategy or FedAvg(FedAvgParams(fraction_train=0.4)),
        grid if faults is None else FaultyGrid(grid, faults, len(SIZES), 0, memory),
        START if client is QUADRATIC else client.model.initial(),
        LoopConfig(**settings, clock=on or clock()),
        memory,
    )
    return loop, memory, grid


def asked_in(fraction: float, over_sampling: float) -> Callable[[int], list[int]]:
    """Returns who is asked in a round: the strategy's sample, and as many of the others."""

    def asked(server_round: int) -> list[int]:
        count = max(round(fraction * len(SIZES)), 1)
        chosen = list(range(len(SIZES)))
        if count < len(SIZES):
            rng = generator(0, "sample", server_round)
            chosen = rng.choice(len(SIZES), count, replace=False).tolist()
        others = [i for i in range(len(SIZES)) if i not in chosen]
        more = min(math.ceil(over_sampling * count) - count, len(others))
        if 0 < more < len(others):
            rng = generator(0, "over_sampling", server_round)
            others = [others[i] for i in rng.choice(len(others), more, replace=False)]
        return chosen + (others if more else [])

    return asked


@pytest.mark.parametrize("struck", ["none", "in the client", "on the way"])
@pytest.mark.parametrize(
    ("fraction", "over_sampling", "deadline", "jitter", "weighted_by"),
    [
        (0.4, 1.5, None, 0.0, "examples"),
        (0.5, 2.0, None, 0.5, "uniform"),
        (0.25, 3.5, None, 0.0, "examples"),
        (1.0, 1.0, 2.0, 0.0, "uniform"),
        (0.6, 1.0, 1.5, 0.5, "examples"),
        (0.5, 1.5, 1.5, 0.3, "examples"),
    ],
)
def test_an_event_simulation(
    fraction: float,
    over_sampling: float,
    deadline: float | None,
    jitter: float,
    weighted_by: Any,
    struck: str,
) -> None:
    own, bad = clock(jitter=jitter, deadline=deadline), {3, 5} if struck != "none" else set()
    faults = FaultsParams(nan=Fault(clients=(3, 5))) if struck == "on the way" else None
    loop, memory, grid = make(
        FedAvg(FedAvgParams(fraction_train=fraction, weighted_by=weighted_by)),
        broken=sorted(bad) if struck == "in the client" else (),
        faults=faults,
        on=own,
        over_sampling=over_sampling,
        quorum=0.01,
        rounds=20,
    )
    seen: list[float] = []
    loop.on_round = lambda *_: seen.append(float(loop.state.arrays["w"]))
    loop.run()

    def duration(i: int, r: int) -> float:
        speed = own.speed(i)
        if jitter:
            speed *= np.exp(jitter * generator(0, "clock/jitter/train", r, 0, i).standard_normal())
        return float((own.seconds + own.seconds_per_example * SIZES[i]) / speed)

    data = federation(SIZES)
    asked = asked_in(fraction, over_sampling)
    expected = stragglers_events.simulate(
        means=[float(data.train.x[rows, 0].mean()) for rows in data.shards],
        weights=[1.0] * len(SIZES) if weighted_by == "uniform" else [float(n) for n in SIZES],
        duration=duration,
        asked=asked,
        wait=max(round(fraction * len(SIZES)), 1),
        bad=lambda i, r: i in bad,
        deadline=math.inf if deadline is None else deadline,
        lr=LR,
        steps=STEPS,
        rounds=20,
    )
    assert seen == pytest.approx([each.w for each in expected], rel=1e-12, abs=1e-12)
    calls = dict.fromkeys(range(len(SIZES)), 0)
    for r, each in enumerate(expected, 1):
        system, train = memory.metrics[r, "system"], memory.metrics[r, "train"]
        refused = bad.intersection(each.failed) - slow(each, r, duration, own)
        received = len(each.used) + len(refused)
        assert system["simulated_seconds"] == pytest.approx(each.seconds, rel=1e-12)
        assert system["dropped"] == len(each.failed)
        assert system["bytes_down"] == 8 * len(asked(r))
        assert system["bytes_up"] == 8 * received
        assert ("late" in system) == (over_sampling > 1)
        assert system.get("late", 0) == len(each.late)
        for i in each.used:  # what a late client would have kept is not kept
            calls[i] += 1
        mean = sum(SIZES[i] * calls[i] for i in each.used) / sum(SIZES[i] for i in each.used)
        assert train["calls"] == pytest.approx(mean, rel=1e-12)
    # of those who are late nothing is computed
    computed = sum(map(len, grid.computed))
    assert computed * 8 == loop.state.totals.bytes_up
    assert sum(len(each.late) for each in expected) > 0 or over_sampling == 1
    assert sum(len(each.failed) for each in expected) > 0 or (deadline is None and not bad)


def slow(
    each: stragglers_events.Round,
    server_round: int,
    duration: Callable[[int, int], float],
    own: SimulatedClock,
) -> set[int]:
    """Returns who missed the deadline of a round."""
    limit = math.inf if own.deadline is None else own.deadline
    return {i for i in each.failed if duration(i, server_round) > limit}


def test_without_either_nothing_changes() -> None:
    plain, memory, _ = make()
    loop, other, grid = make(over_sampling=1.0, on=clock(deadline=1e9))
    assert same_bits(loop.run().arrays, plain.run().arrays)
    for r in range(1, 13):
        for name in ("simulated_seconds", "bytes_up", "bytes_down", "dropped"):
            assert other.metrics[r, "system"][name] == memory.metrics[r, "system"][name]
    assert "total_late" not in other.metrics[1, "system"]
    assert len(grid.computed) == 12


def test_who_missed_the_deadline_is_named_with_the_figures() -> None:
    loop, memory, grid = make(FedAvg(FedAvgParams()), on=clock(deadline=2.0), rounds=1, quorum=0.1)
    loop.run()
    own = clock()
    times = {p: own.duration("train", {}, p, 8) for p in range(len(SIZES))}
    missed = {p: time for p, time in times.items() if time > 2}
    assert 0 < len(missed) < len(SIZES)
    ((kind, _, fields),) = memory.events
    assert kind == "bad_replies"
    assert fields["nodes"] == {
        str(node_of(p)): f"its reply takes {time:.4g} s, and the deadline is 2 s"
        for p, time in missed.items()
    }
    assert grid.computed == [tuple(p for p in times if p not in missed)]
    assert memory.metrics[1, "system"]["simulated_seconds"] == 2.0


def test_too_few_before_the_deadline_fail_the_run() -> None:
    loop, _, _ = make(FedAvg(FedAvgParams()), on=clock(deadline=0.25))
    with pytest.raises(RunFailed, match=r"of 8 replies were good.*quorum.*deadline is 0.25 s"):
        loop.run()


def test_late_is_not_bad_and_bad_is() -> None:
    """`fail` minds bad replies alone, of those that are taken."""
    loop, _, _ = make(on_bad_reply="fail", over_sampling=2.0)
    state = loop.run()
    assert state.totals.late == 12 * 3
    assert state.totals.dropped == 0
    loop, _, _ = make(on_bad_reply="fail", over_sampling=2.0, broken=range(8))
    with pytest.raises(RunFailed, match=r"NaN or Inf.*on_bad_reply: fail"):
        loop.run()


def test_the_quorum_is_of_those_that_are_needed() -> None:
    """Six are asked and three needed; of eight clients five fail, so that three stay at most."""
    broken = (0, 1, 2, 3, 4)
    loop, memory, _ = make(over_sampling=2.0, broken=broken, quorum=1 / 3, rounds=8)
    loop.run()
    used = [memory.metrics[r, "system"]["bytes_up"] / 8 for r in range(1, 9)]
    good = [count - memory.metrics[r, "system"]["dropped"] for r, count in enumerate(used, 1)]
    assert 1 in good
    loop, _, _ = make(over_sampling=2.0, broken=broken, quorum=0.5, rounds=8)
    with pytest.raises(RunFailed, match=r"1 of 3 replies were good, fewer than the quorum of 0.5"):
        loop.run()


def test_ties_are_drawn() -> None:
    """Everybody takes equally long: of four, in 40 rounds, nobody is always late."""
    strategy = FedAvg(FedAvgParams(fraction_train=0.25))
    loop, _, grid = make(strategy, on=clock(**EQUAL), over_sampling=2.0, rounds=40)
    loop.run()
    assert {p for cohort in grid.computed for p in cohort} == set(range(8))
    assert all(len(cohort) == 2 for cohort in grid.computed)
    asked = asked_in(0.25, 2.0)
    places = [sorted(asked(r)).index(p) for r, c in enumerate(grid.computed, 1) for p in c]
    # each of four places is taken with probability ½ in 40 rounds: five standard deviations
    assert all(abs(places.count(place) - 20) < 5 * math.sqrt(10) for place in range(4))


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian"])
def test_flowers_strategies(name: str) -> None:
    def strategy() -> FlowerStrategy:
        return build_flower(
            parse_flower({"name": name, "fraction_train": 0.4, "min_train_nodes": 2})
        )

    client = sgd(functional(), batch_size=4, lr=0.2)

    def new() -> tuple[RoundLoop, Memory, Watching]:
        return make(strategy(), client=client, over_sampling=1.6, rounds=6)

    loop, memory, grid = new()
    expected = loop.run()
    own = clock()
    for r, cohort in enumerate(grid.computed, 1):
        assert len(cohort) == 3
        system = memory.metrics[r, "system"]
        assert system["late"] == 2
        slowest = max(own.duration("train", {}, p, 0) for p in cohort)
        assert system["simulated_seconds"] == pytest.approx(slowest, rel=1e-12)
    resumed, _, _ = new()
    resumed.load(*memory.checkpoints[3])
    assert same_bits(resumed.run().arrays, expected.arrays)


@pytest.mark.parametrize("deadline", [None, 1.2])
def test_a_resumed_run_ends_in_the_same_bits(deadline: float | None) -> None:
    client = sgd(functional(network(dropout=0.3)), batch_size=4, lr=0.2)

    def new() -> tuple[RoundLoop, Memory, Watching]:
        own = clock(jitter=0.4, deadline=deadline)
        faults = FaultsParams(drop=Fault(rate=0.2))
        return make(client=client, on=own, over_sampling=1.6, quorum=0.1, rounds=8, faults=faults)

    loop, memory, _ = new()
    expected = loop.run()
    for at in (1, 4):
        resumed, rest, _ = new()
        resumed.load(*memory.checkpoints[at])
        state = resumed.run()
        assert same_bits(state.arrays, expected.arrays)
        assert (state.totals.late, state.totals.dropped) == (
            expected.totals.late,
            expected.totals.dropped,
        )
        for r in range(at + 1, 9):
            for name in COUNTED:
                assert rest.metrics[r, "system"][name] == memory.metrics[r, "system"][name]
    assert expected.totals.late > 0
    assert expected.totals.dropped > 0


def test_questions_are_put_to_nobody_else() -> None:
    class Asking(FedAvg):
        def exchanges(self, server_round: int) -> Sequence[Exchange]:
            (train,) = super().exchanges(server_round)
            (query,) = super().exchanges(server_round)
            sizes = Exchange(
                "query.num_examples",
                lambda r, a, c, g: Broadcast(make_content({}, c), "query.num_examples", [2, 3]),
                lambda r, replies: (None, None),
                lambda arrays: type(query.schema(arrays))({}),
            )
            return [sizes, train]

    loop, _, grid = make(Asking(FedAvgParams(fraction_train=0.25)), over_sampling=1.5, rounds=2)
    loop.run()
    assert [len(cohort) for cohort in grid.computed] == [2, 2, 2, 2]
    assert grid.computed[0] == grid.computed[2] == (0, 1)
    assert loop.state.totals.late == 2


# Who is asked as well


def test_so_many_more_are_asked() -> None:
    grid = Watching(cohorts(QUADRATIC, federation(SIZES)), len(SIZES))  # Messages need an identity
    content = make_content({}, {})
    for count in range(1, 30):
        for ratio in (1.0, 1.1, 1.3, 1.5, 2.0):
            rng = generator(0, "test", count)
            more = with_more(Broadcast(content, "train", range(count)), ratio, range(100), rng)
            nodes = nodes_of(more)
            expected = -(-count * round(10 * ratio) // 10)
            assert len(set(nodes)) == len(nodes) == expected
            assert list(nodes) == sorted(nodes)
            assert set(range(count)) <= set(nodes) <= set(range(100))
    nodes = nodes_of(with_more(Broadcast(content, "train", [3, 5]), 9.0, range(6), rng))
    assert nodes == tuple(range(6))
    messages = [Message(content, node, "train") for node in (4, 2)]
    more = with_more(messages, 2.0, [9, 7, 4, 2], rng)
    assert [m.metadata.dst_node_id for m in more] == [4, 2, 7, 9]
    assert all(message.content is content for message in more)
    messages.append(Message(make_content({}, {"own": 1}), 3, "train"))
    with pytest.raises(RunFailed, match="a content of its own"):
        with_more(messages, 2.0, grid.get_node_ids(), rng)


def test_without_a_clock_it_is_refused() -> None:
    data = federation(SIZES)
    grid = InlineGrid(cohorts(QUADRATIC, data), len(SIZES))
    config = LoopConfig(rounds=1, seed=0, server_every=0, over_sampling=1.5)
    loop = RoundLoop(FedAvg(FedAvgParams(fraction_train=0.5)), grid, START, config, Memory())
    with pytest.raises(RunFailed, match="over_sampling needs a clock"):
        loop.run()


# Another engine's own clock


class Arriving(InlineGrid):
    """Has a clock of its own: the last node's reply comes first."""

    def first_come(self, messages: Sequence[Message], take: Callable[[Message], bool]) -> None:
        for message in sorted(messages, key=lambda m: -m.metadata.dst_node_id):
            (reply,) = super().send_and_receive([message])
            if not take(reply):
                return


@pytest.mark.parametrize("lost", [(), (7,), (0, 1, 2, 3, 4, 5, 6)])
def test_the_first_good_replies_on_an_engines_own_clock(lost: tuple[int, ...]) -> None:
    memory, bad = Memory(), 4
    data = federation(SIZES)
    data.train.x[data.shards[bad][0], 0] = np.nan
    grid: Any = Arriving(cohorts(QUADRATIC, data), len(SIZES))
    if lost:
        grid = FaultyGrid(grid, FaultsParams(drop=Fault(clients=lost)), len(SIZES), 0, memory)
    config = LoopConfig(rounds=5, seed=0, server_every=0, over_sampling=2.0, quorum=0.01)
    strategy = FedAvg(FedAvgParams(fraction_train=0.4))
    loop = RoundLoop(strategy, grid, START, config, memory)
    asked = asked_in(0.4, 2.0)
    for r in range(1, 6):
        loop.config = LoopConfig(**{**vars(config), "rounds": r})
        used: list[int] = []
        failed: list[int] = []
        for p in sorted(asked(r), reverse=True):
            if len(used) == 3:
                break
            (failed if p == bad or p in lost else used).append(p)
        if not used:
            with pytest.raises(RunFailed, match="0 of 3 replies were good"):
                loop.run()
            break
        loop.run()
        system = memory.metrics[r, "system"]
        assert system["dropped"] == len(failed)
        assert system["late"] == (6 - len(used) - len(failed) if len(used) == 3 else 0)
        there = len(used) + (bad in failed and bad not in lost)
        assert system["bytes_up"] == 8 * there
        told = [e for kind, at, e in memory.events if kind == "bad_replies" and at == r]
        assert [e["count"] for e in told] == ([len(failed)] if failed else [])
        reasons = {p: told[0]["nodes"][str(node_of(p))] for p in failed}
        assert all((reason == "no reply") == (p in lost) for p, reason in reasons.items())


def test_lost_replies_do_not_stop_an_asynchronous_round() -> None:
    faults = FaultsParams(drop=Fault(rate=0.3), delay=Fault(clients=(2,)))
    strategy = FedBuff(FedBuffParams(buffer_size=3, concurrency=6))
    loop, memory, _ = make(strategy, faults=faults, quorum=0.2)
    state = loop.run()
    assert state.round == 12
    lost = [
        memory.metrics[r, "system"][name]
        for r in range(1, 13)
        for name in ("faults_dropped", "faults_late")
    ]
    assert state.totals.dropped == sum(lost) > 0
    assert torch.isfinite(state.arrays["w"])


def test_flowers_client_apps() -> None:
    """Of five that are asked the first three work, and a fourth where one raises."""
    app, worked = ClientApp(), list[int]()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        worked.append(partition)
        if partition == 3:
            raise ValueError("I cannot")
        metrics = MetricRecord({"num-examples": 1})
        content = {"arrays": message.content["arrays"], "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    strategy = build_flower(parse_flower({"name": "FedAvg", "fraction_train": 0.4}))
    memory, own = Memory(), clock()
    config = LoopConfig(rounds=6, seed=0, server_every=0, clock=own, over_sampling=1.6, quorum=0.1)
    RoundLoop(strategy, InlineGrid(app, len(SIZES)), START, config, memory).run()
    counts = [memory.metrics[r, "system"] for r in range(1, 7)]
    assert worked.count(3) == sum(each["dropped"] for each in counts) > 0
    assert len(worked) == 6 * 3 + worked.count(3)
    assert sum(each["late"] for each in counts) == 6 * 2 - worked.count(3)
