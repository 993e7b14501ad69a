"""The round loop: exchanges, evaluation, totals, bad replies, early stop, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.errors import RunFailed
from fedsim.grids.inline import InlineGrid
from fedsim.messages import Arrays, Broadcast, Replies, make_content, stack, to_record
from fedsim.server.evaluation import Evaluator
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig, Stopping
from fedsim.strategies.base import Exchange, ReplySchema
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from tests.engines.toys import (
    RAGGED,
    Memory,
    classification,
    cohorts,
    federation,
    functional,
    same_bits,
    sgd,
)

CLIENT = sgd(functional(), batch_size=8, lr=0.3)
BYTES = 8 * CLIENT.model.num_parameters  # float64


class Tampering(InlineGrid):
    """Changes replies on their way back, as told: (message type, round, replies) -> replies."""

    change: Callable[[str, int, Replies], Replies] = staticmethod(lambda kind, r, replies: replies)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        if isinstance(messages, Broadcast):
            messages.reduction = None  # an engine need not average: every reply can be changed
        replies = super().send_and_receive(messages, timeout=timeout)
        if not (isinstance(messages, Broadcast) and isinstance(replies, Replies)):
            return replies  # nobody was asked
        server_round = int(messages.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        return self.change(messages.message_type, server_round, replies)


def loop(
    *,
    strategy: Any = None,
    change: Callable[[str, int, Replies], Replies] | None = None,
    test: int = 20,
    arrays: Arrays | None = None,
    on_round: Any = None,
    data: Any = None,
    **config: Any,
) -> tuple[RoundLoop, Memory]:
    data = data or federation(holdout=3, test=test)
    engine = cohorts(CLIENT, data)
    grid = Tampering(engine, len(data.shards))
    if change is not None:
        grid.change = change
    memory = Memory()
    settings: dict[str, Any] = {"rounds": 3, "seed": 0, "checkpoint_rounds": 0} | config
    return RoundLoop(
        strategy or FedAvg(FedAvgParams()),
        grid,
        CLIENT.model.initial() if arrays is None else arrays,
        LoopConfig(**settings),
        memory,
        Evaluator(CLIENT.model, CLIENT.task, data, torch.float64),
        on_round,
    ), memory


# Evaluation and what is written


@pytest.mark.parametrize(
    ("every", "rounds"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (9, [0, 5]), (0, [])]
)
def test_the_server_evaluates_at_the_start_every_so_often_and_at_the_end(
    every: int, rounds: list[int]
) -> None:
    made, memory = loop(rounds=5, server_every=every)
    made.run()
    assert [r for r, split in memory.metrics if split == "test"] == rounds
    assert memory.ended == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("every", "rounds"), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4])])
def test_clients_evaluate_when_asked(every: int, rounds: list[int]) -> None:
    made, memory = loop(rounds=4, clients_every=every)
    made.run()
    assert [r for r, split in memory.metrics if split == "client"] == rounds
    assert [r for r, _, _ in memory.client_metrics] == rounds
    for server_round, partitions, metrics in memory.client_metrics:
        assert partitions == list(range(5))
        assert metrics["num-examples"] == [3.0] * 5
        mean = sum(metrics["loss"]) / 5
        assert memory.metrics[server_round, "client"]["loss"] == pytest.approx(mean, rel=1e-12)


def test_the_loss_falls() -> None:
    made, memory = loop(rounds=8)
    made.run()
    assert memory.metrics[8, "test"]["nll"] < memory.metrics[0, "test"]["nll"]


def test_on_round_hears_of_every_round() -> None:
    heard: list[tuple[int, Any, Any]] = []
    made, memory = loop(on_round=lambda *told: heard.append(told), clients_every=1)
    made.run()
    assert [told[0] for told in heard] == [1, 2, 3]
    for server_round, metrics, system in heard:
        assert metrics["test/nll"] == memory.metrics[server_round, "test"]["nll"]
        assert {"train/train_loss", "client/accuracy"} <= set(metrics)
        assert system == memory.metrics[server_round, "system"]


# Totals


def test_bytes_gradients_and_drops_add_up() -> None:
    made, memory = loop(rounds=3, clients_every=3)
    totals = made.run().totals
    evaluated = BYTES * 5  # the parameters go to all clients once more; nothing but numbers return
    assert totals.bytes_down == 3 * 5 * BYTES + evaluated
    assert totals.bytes_up == 3 * 5 * BYTES
    assert totals.gradients == 3 * sum(RAGGED)
    assert totals.dropped == totals.draws == 0
    system = [memory.metrics[r, "system"] for r in (1, 2, 3)]
    assert [s["bytes_up"] for s in system] == [5 * BYTES] * 3
    assert [s["bytes_down"] for s in system] == [5 * BYTES, 5 * BYTES, 10 * BYTES]
    assert [s["gradients"] for s in system] == [sum(RAGGED)] * 3
    assert system[-1]["total_bytes_up"] == totals.bytes_up
    assert all(s["clients_per_second"] > 0 for s in system)
    assert "gradients" not in memory.metrics[1, "train"]


def test_a_sample_of_the_clients_costs_its_share() -> None:
    made, _ = loop(strategy=FedAvg(FedAvgParams(fraction_train=0.4)), rounds=4)
    assert made.run().totals.bytes_up == 4 * 2 * BYTES


# Bad replies


def poison(nodes: Sequence[int], at_round: int = 2, value: float = float("nan")) -> Any:
    def change(kind: str, server_round: int, replies: Replies) -> Replies:
        if kind == "train" and server_round == at_round:
            for node in set(nodes) & set(replies.node_ids):
                replies.arrays["arrays"]["0.weight"][replies.node_ids.index(node)] = value
        return replies

    return change


def test_bad_replies_are_dropped_counted_and_reported() -> None:
    made, memory = loop(change=poison([3, 5]))
    state = made.run()
    assert state.totals.dropped == 2
    ((kind, server_round, fields),) = memory.events
    assert (kind, server_round, fields["count"]) == ("bad_replies", 2, 2)
    assert fields["message_type"] == "train"
    assert fields["nodes"] == dict.fromkeys(("3", "5"), "NaN or Inf in array arrays/0.weight")
    assert memory.metrics[2, "system"]["dropped"] == 2
    assert all(v.isfinite().all() for v in state.arrays.values())


def test_the_dropped_ones_have_no_part_in_the_mean() -> None:
    def only_good(kind: str, server_round: int, replies: Replies) -> Replies:
        return replies.select([0, 2, 4], []) if server_round == 2 else replies

    dropped, _ = loop(change=poison([3, 5]), rounds=2)
    absent, memory = loop(change=only_good, rounds=2)
    assert same_bits(dropped.run().arrays, absent.run().arrays)
    assert memory.events[0][2]["nodes"] == {"3": "no reply", "5": "no reply"}


def test_a_bad_reply_may_fail_the_run() -> None:
    made, memory = loop(change=poison([4]), on_bad_reply="fail", checkpoint_rounds=1)
    with pytest.raises(RunFailed, match=r"round 2, train: .*node 4.*NaN or Inf.*on_bad_reply") as e:
        made.run()
    assert "last good checkpoint: round 1" in str(e.value)
    assert list(memory.checkpoints) == [1]
    assert memory.events[0][0] == "bad_replies"


@pytest.mark.parametrize(("quorum", "fails"), [(0.6, False), (0.61, True), (1.0, True), (0, False)])
def test_the_quorum(quorum: float, fails: bool) -> None:
    made, _ = loop(change=poison([2, 6]), quorum=quorum)
    if not fails:
        assert made.run().round == 3
        return
    with pytest.raises(RunFailed, match=r"round 2, train: 3 of 5 replies .*quorum") as e:
        made.run()
    assert "no checkpoint yet" in str(e.value)


def test_a_round_without_a_good_reply_keeps_the_parameters_if_the_quorum_lets_it() -> None:
    seen: list[Arrays] = []
    made, _ = loop(change=poison(range(2, 7), at_round=2), quorum=0.0)
    made.on_round = lambda *_: seen.append(made.state.arrays)
    made.run()
    assert same_bits(seen[0], seen[1])
    assert not same_bits(seen[1], seen[2])


def test_bad_evaluations_are_dropped_too() -> None:
    def change(kind: str, server_round: int, replies: Replies) -> Replies:
        if kind == "evaluate":
            replies.metrics["loss"][0] = float("inf")
        return replies

    made, memory = loop(change=change, clients_every=1, rounds=1)
    assert made.run().totals.dropped == 1
    assert memory.events[0][2]["message_type"] == "evaluate"
    assert memory.client_metrics[0][1] == [1, 2, 3, 4]


class Broken(FedAvg):
    """Aggregates to what it is told."""

    outcome: Callable[[Arrays], Arrays]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        stacked = stack(replies)
        mean = stacked.mean("arrays", self.weights(stacked))
        return to_record(self.outcome(mean)), None


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (lambda a: {k: v / 0 for k, v in a.items()}, r"round 1: .* has NaN or Inf"),
        (lambda a: {k: v[None] for k, v in a.items()}, "arrays of other shapes"),
        (lambda a: {"x": torch.zeros(1)}, "arrays of other shapes"),
    ],
)
def test_an_aggregate_that_is_none_fails_the_run(outcome: Any, message: str) -> None:
    strategy = Broken(FedAvgParams())
    strategy.outcome = outcome
    made, _ = loop(strategy=strategy)
    with pytest.raises(RunFailed, match=message):
        made.run()


def test_parameters_keep_their_dtype() -> None:
    strategy = Broken(FedAvgParams())
    strategy.outcome = lambda arrays: {k: v.float() for k, v in arrays.items()}
    made, _ = loop(strategy=strategy)
    assert {v.dtype for v in made.run().arrays.values()} == {torch.float64}


# Early stopping


def falling(values: Mapping[int, float]) -> Any:
    """Returns an evaluator whose validation score at each round is given."""

    class Scripted(Evaluator):
        def evaluate(self, arrays: Arrays, chains: bool) -> dict[str, dict[str, float]]:
            return {"validation": {"nll": values[int(arrays["round"])]}}

    return Scripted(CLIENT.model, classification(), federation(), torch.float64)


class Counting(FedAvg):
    """Sets the parameter "round" to the round and trains nobody."""

    def exchanges(self, server_round: int) -> list[Exchange]:
        def configure(*_: object) -> list[Message]:
            return []

        def aggregate(server_round: int, replies: Iterable[Message]) -> Any:
            return to_record({"round": torch.tensor(float(server_round))}), None

        return [Exchange("train", configure, aggregate, lambda arrays: ReplySchema({}))]


def stopped(values: Sequence[float], **stopping: Any) -> tuple[Any, Memory]:
    """Returns the loop's state after at most len(values) rounds that score so."""
    settings: dict[str, Any] = {
        "split": "validation", "name": "nll", "mode": "min", "patience": 2, "min_delta": 0.0,
        "restore_best": True,
    } | stopping  # fmt: skip
    made, memory = loop(
        strategy=Counting(FedAvgParams()),
        arrays={"round": torch.tensor(0.0)},
        rounds=len(values),
        stopping=Stopping(**settings),
    )
    made.evaluator = falling({0: 99.0} | dict(enumerate(values, 1)))
    return made.run(), memory


def test_stops_when_nothing_has_improved_and_returns_the_best() -> None:
    state, memory = stopped([3.0, 2.0, 2.5, 2.0, 1.0, 0.5])
    assert state.round == 4
    assert float(state.arrays["round"]) == 2
    assert memory.events == [("early_stop", 4, {"best_round": 2})]


def test_returns_the_last_where_the_best_is_not_asked_for() -> None:
    state, _ = stopped([3.0, 2.0, 2.5, 2.2, 1.0], restore_best=False)
    assert float(state.arrays["round"]) == state.round == 4


def test_the_best_is_returned_even_without_a_stop() -> None:
    state, memory = stopped([3.0, 2.0, 2.5])
    assert state.round == 3
    assert float(state.arrays["round"]) == 2
    assert memory.events == []


def test_more_may_be_better() -> None:
    state, _ = stopped([1.0, 3.0, 2.0, 2.9], mode="max")
    assert (state.round, float(state.arrays["round"])) == (4, 2)


def test_small_changes_are_no_improvement() -> None:
    state, _ = stopped([3.0, 2.95, 2.91, 1.0], min_delta=0.1)
    assert (state.round, float(state.arrays["round"])) == (3, 1)


def test_nan_is_never_the_best() -> None:
    nan = float("nan")
    state, _ = stopped([nan, 3.0, nan, nan, 1.0], patience=2)
    assert (state.round, float(state.arrays["round"])) == (4, 2)
    state, _ = stopped([nan, nan, nan, nan], patience=2)
    assert state.round == 2
    assert float(state.arrays["round"]) == 2  # nothing was best


@pytest.mark.parametrize(("split", "name"), [("client", "loss"), ("train", "train_loss")])
def test_clients_metrics_stop_without_the_server_evaluating(split: str, name: str) -> None:
    stopping = Stopping(split, name, "max", 1, 0.0, True)  # the loss falls: no improvement
    made, memory = loop(rounds=20, server_every=0, clients_every=2, stopping=stopping)
    state = made.run()
    assert state.stopped
    assert state.round == (4 if split == "client" else 2)
    assert memory.events[-1][0] == "early_stop"


def test_patience_counts_the_rounds_that_measure() -> None:
    stopping = Stopping("test", "nll", "max", 2, 0.0, True)
    made, _ = loop(rounds=20, server_every=3, clients_every=1, stopping=stopping)
    assert made.run().round == 9


def test_a_metric_that_is_not_there_is_named() -> None:
    made, _ = loop(stopping=Stopping("test", "nlll", "min", 2, 0.0, True))
    with pytest.raises(RunFailed, match=r"watches test/nlll, but there are only .*test/nll"):
        made.run()


# Exchanges


class TwoQuestions(FedAvg):
    """Asks for row counts, sends no message at all, then trains; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__(FedAvgParams())
        self.seen: list[Any] = []

    def exchanges(self, server_round: int) -> list[Exchange]:
        (train,) = super().exchanges(server_round)

        def ask(number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
            assert dict(config) == {"seed": 0, "server-round": number}
            nodes = list(grid.get_node_ids())
            return Broadcast(make_content({}, config), "query.num_examples", nodes)

        def count(number: int, replies: Iterable[Message]) -> Any:
            self.seen.append(stack(replies).metrics["num-examples"].tolist())
            return None, MetricRecord({"rows": sum(self.seen[-1])})

        def nothing(number: int, replies: Iterable[Message]) -> Any:
            assert list(replies) == []
            self.seen.append("silence")
            return to_record({k: v * 0 for k, v in CLIENT.model.initial().items()}), None

        none = ReplySchema({})
        return [
            Exchange("query.num_examples", ask, count, lambda arrays: none),
            Exchange("train", lambda *_: [], nothing, lambda arrays: none),
            train,
        ]


def test_a_round_may_have_several_exchanges() -> None:
    strategy = TwoQuestions()
    made, memory = loop(strategy=strategy, rounds=2)
    state = made.run()
    assert strategy.seen == [[float(n) for n in RAGGED], "silence"] * 2
    assert memory.metrics[1, "train"]["rows"] == sum(RAGGED)
    assert "train_loss" in memory.metrics[1, "train"]
    # the second exchange's parameters were what the third trained from
    from_zero, _ = loop(arrays={k: v * 0 for k, v in CLIENT.model.initial().items()}, rounds=2)
    single = from_zero.run()
    assert state.totals.gradients == single.totals.gradients
    first, _ = loop(arrays={k: v * 0 for k, v in CLIENT.model.initial().items()}, rounds=1)
    assert not same_bits(state.arrays, first.run().arrays)  # other minibatches in round 2
    again, _ = loop(strategy=TwoQuestions(), rounds=1)
    only, _ = loop(arrays={k: v * 0 for k, v in CLIENT.model.initial().items()}, rounds=1)
    assert same_bits(again.run().arrays, only.run().arrays)


class Drawing(FedAvg):
    """Calls every second round a draw."""

    def is_draw(self, server_round: int) -> bool:
        return server_round % 2 == 0


def ensemble(count: int = 2) -> dict[str, Tensor]:
    return {k: torch.stack([v, v + 1][:count]) for k, v in CLIENT.model.initial().items()}


@pytest.mark.parametrize("saved", [True, False])
def test_draws_are_saved_counted_and_averaged(saved: bool) -> None:
    made, memory = loop(
        strategy=Drawing(FedAvgParams(chains=2)), arrays=ensemble(), rounds=5, save_draws=saved
    )
    state = made.run()
    assert state.totals.draws == 2
    assert list(memory.draws) == ([2, 4] if saved else [])
    assert made.evaluator is not None
    assert made.evaluator.draws == 2
    if saved:
        assert memory.draws[2]["0.weight"].shape == (2, *CLIENT.model.shapes["0.weight"])


# Checkpoints


def test_checkpoints_come_when_due_and_at_the_end() -> None:
    made, memory = loop(rounds=5, checkpoint_rounds=2)
    made.run()
    assert list(memory.checkpoints) == [2, 4, 5]
    by_clock, memory = loop(rounds=3, checkpoint_rounds=0, checkpoint_seconds=1e-9)
    by_clock.run()
    assert list(memory.checkpoints) == [1, 2, 3]
    never, memory = loop(rounds=3, checkpoint_rounds=0)
    never.run()
    assert list(memory.checkpoints) == [3]


@pytest.mark.parametrize("stopping", [None, Stopping("test", "nll", "min", 3, 0.0, True)])
def test_a_resumed_run_ends_in_the_same_bits(stopping: Stopping | None) -> None:
    def make(rounds: int) -> tuple[RoundLoop, Memory]:
        return loop(
            strategy=Drawing(FedAvgParams(chains=2, fraction_train=0.6)),
            arrays=ensemble(),
            rounds=rounds,
            checkpoint_rounds=2,
            clients_every=2,
            stopping=stopping,
            change=poison([2, 3], at_round=1),
        )

    whole, memory = make(6)
    expected = whole.run()
    for at in (2, 4):
        resumed, rest = make(6)
        resumed.load(*memory.checkpoints[at])
        state = resumed.run()
        assert same_bits(state.arrays, expected.arrays)
        assert rest.ended == list(range(at + 1, 7))
        for (server_round, split), values in rest.metrics.items():
            if split != "system":
                assert values == memory.metrics[server_round, split]
        for name in ("bytes_up", "bytes_down", "gradients", "dropped", "draws"):
            assert getattr(state.totals, name) == getattr(expected.totals, name)
        assert (state.best, state.best_round) == (expected.best, expected.best_round)
