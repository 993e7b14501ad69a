"""What every strategy must do, ours and Flower's alike: one suite over all of them."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from pydantic import ValidationError

from fedsim import registry
from fedsim.clients.base import Client
from fedsim.errors import UserError
from fedsim.grids.clock import SimulatedClock
from fedsim.grids.inline import InlineGrid
from fedsim.messages import Arrays, to_tensors
from fedsim.models import FunctionalModel
from fedsim.scenario.components import declared
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig, LoopState
from fedsim.setup import asynchronous
from fedsim.strategies.base import Strategy
from fedsim.strategies.flower import (
    build_flower,
    flower_classes,
    flower_params,
    objections,
    parse_flower,
    resumable,
)
from fedsim.testing import StrategyContract
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
    start,
)

ROUNDS = 4

EQUAL_SPEEDS = SimulatedClock(0, work=lambda kind, config, partition: 1.0, seconds=1.0)

REFUSED = {
    "FedXgbBagging", "FedXgbCyclic", "QFedAvg", "DifferentialPrivacyClientSideFixedClipping",
    "DifferentialPrivacyClientSideAdaptiveClipping",
}  # fmt: skip

DP = {"noise_multiplier": 0.1, "num_sampled_clients": 5}
SECTIONS: dict[str, dict[str, Any]] = {
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.5},
    "FedProx": {"proximal_mu": 0.3},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "QFedAvg": {"client_learning_rate": 0.1},
    "DifferentialPrivacyServerSideFixedClipping": {"strategy": "FedAvg", "clipping_norm": 0.5} | DP,
    "DifferentialPrivacyServerSideAdaptiveClipping": {"strategy": {"name": "FedAdam"}} | DP,
    "DifferentialPrivacyClientSideFixedClipping": {"strategy": "FedAvg", "clipping_norm": 1.0} | DP,
    "DifferentialPrivacyClientSideAdaptiveClipping": {"strategy": "FedAvg"} | DP,
}


def flowers(name: str, **more: Any) -> Any:
    """Returns a strategy of Flower's, through the parameters that a scenario gives."""
    return build_flower(flower_params()[name](name=name, **SECTIONS.get(name, {}) | more))


def ours(name: str, **more: Any) -> Strategy:
    """Returns a strategy of ours with what it needs: few small steps, a buffer soon full.

    Five clients of equal speed are at work, so that one of a buffer of four is always late.
    """
    kind = registry.load("strategies", name)
    defaults = {"step_size": 0.01, "leapfrog_steps": 2, "steps_per_round": 2, "buffer_size": 4}
    given = {k: v for k, v in defaults.items() if k in kind.Params.model_fields}
    return kind(kind.Params(**given | more))  # type: ignore[no-any-return]


# Those that train a model; what bandits must do is tested in tests/methods.
OURS = [n for n in registry.names("strategies") if declared(registry.params_of("strategies")[n],
        "needs_model", True)]  # fmt: skip
FLOWERS = [name for name in flower_classes() if name not in REFUSED]
ALL = [*OURS, *FLOWERS]
EVERY = pytest.mark.parametrize("name", ALL)
# Their messages stay under way over rounds, which the suite for third parties does not follow.
LATE = [name for name in OURS if asynchronous(ours(name))]
EVERY_LATE = pytest.mark.parametrize("name", LATE)


def build(name: str, **more: Any) -> Any:
    return ours(name, **more) if name in OURS else flowers(name, **more)


def client_for(strategy: Any, model: FunctionalModel) -> Client:
    if not isinstance(strategy, Strategy):
        return sgd(model, batch_size=8, lr=0.2)
    kind = registry.load("clients", strategy.client)
    return kind(kind.Params(), model, classification())  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's Bulyan collects garbage once for every reply: 0.2 s each under pytest."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


class Shuffling(InlineGrid):
    """Returns plain Messages in an order of its own, some of them poisoned."""

    order: Callable[[list[Message]], list[Message]] = staticmethod(lambda messages: messages)
    poisoned: int | None = None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Sequence[Message]:
        return self.pull_messages(self.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.metadata.src_node_id == self.poisoned:
                for arrays in reply.content.array_records.values():
                    next(iter(to_tensors(arrays).values())).fill_(float("nan"))
        return self.order(replies)


def make(
    strategy: Any,
    *,
    rounds: int = ROUNDS,
    sizes: Sequence[int] = (7, 5, 30, 12, 9),
    dtype: str = "float32",
    grid: type[InlineGrid] = InlineGrid,
    **config: Any,
) -> tuple[RoundLoop, Memory]:
    model = functional(network(), getattr(torch, dtype))
    data = federation(sizes)
    engine = cohorts(client_for(strategy, model), data, dtype=dtype)
    memory = Memory()
    settings = LoopConfig(**{"rounds": rounds, "seed": 0, "server_every": 0,
                             "checkpoint_rounds": 1, "clock": EQUAL_SPEEDS} | config)  # fmt: skip
    arrays = start(model, strategy)
    return RoundLoop(strategy, grid(engine, len(sizes)), arrays, settings, memory), memory


def finish(strategy: Any, **settings: Any) -> LoopState:
    return make(strategy, **settings)[0].run()


def test_every_class_of_flower_is_sorted_into_served_or_refused() -> None:
    assert set(flower_classes()) >= REFUSED
    assert set(SECTIONS) <= set(flower_classes())
    assert set(flower_params()) == set(flower_classes())


# A single reply is the result of these. (Bulyan asks for three replies or more.)
AVERAGES = [*OURS, "FedAvg", "FedMedian", "FedProx", "FedTrimmedAvg", "Krum", "MultiKrum"]


OF_ENGINES = {
    "test_the_numbers_are_those_of_other_engines", "test_a_resumed_run_ends_in_the_same_bits",
}  # fmt: skip


class TestEveryStrategy(StrategyContract):
    """The suite that third parties run, over all strategies."""

    name: str

    @pytest.fixture(autouse=True, params=[name for name in ALL if name not in LATE])
    def named(self, request: pytest.FixtureRequest) -> None:
        self.name = request.param
        self.identity = self.name in AVERAGES

    def make(self) -> Any:
        return build(self.name)

    def make_single(self) -> Any:
        if self.name in OURS:
            return build(self.name)
        few = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
        if self.name == "MultiKrum":
            few |= {"num_malicious_nodes": 0, "num_nodes_to_select": 1}
        return build(self.name, **few)

    def make_client(self, strategy: Any, model: FunctionalModel) -> Client:
        return client_for(strategy, model)

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """On the first engine all of it; on the others what they differ in, the rest if slow."""
        if "engine" not in metafunc.fixturenames:
            return
        first, *others = self.engines
        if metafunc.function.__name__ not in OF_ENGINES:
            others = [pytest.param(name, marks=pytest.mark.slow) for name in others]
        metafunc.parametrize("engine", [first, *others])

    def test_its_state_can_be_saved(self) -> None:
        assert resumable(self.make())


# Asynchronous strategies


@EVERY_LATE
def test_the_same_seed_is_the_same_run(name: str) -> None:
    first, again = finish(build(name)), finish(build(name))
    assert same_bits(first.arrays, again.arrays)
    begin = start(functional(network(), torch.float32), build(name))
    assert distance(first.arrays, begin) > 1e-4


@EVERY_LATE
def test_parameters_keep_their_dtype_and_shape(name: str) -> None:
    for dtype in ("float32", "float64"):
        arrays = finish(build(name), dtype=dtype, rounds=2).arrays
        assert {str(v.dtype) for v in arrays.values()} == {f"torch.{dtype}"}
        assert {k: v.shape for k, v in arrays.items()} == {
            k: v.shape for k, v in start(functional(network(), torch.float32), build(name)).items()
        }


@EVERY
def test_the_order_of_replies_does_not_matter(name: str) -> None:
    class Reversed(Shuffling):
        order = staticmethod(lambda messages: messages[::-1])

    class Rotated(Shuffling):
        order = staticmethod(lambda messages: messages[2:] + messages[:2])

    expected = finish(build(name), grid=Shuffling, rounds=2).arrays
    assert same_bits(finish(build(name), grid=Reversed, rounds=2).arrays, expected)
    assert same_bits(finish(build(name), grid=Rotated, rounds=2).arrays, expected)


@EVERY_LATE
def test_a_stack_is_aggregated_as_its_messages_are(name: str) -> None:
    stacked, plain = finish(build(name)), finish(build(name), grid=Shuffling)
    assert distance(stacked.arrays, plain.arrays) <= 1e-6
    assert stacked.totals.bytes_up == plain.totals.bytes_up
    assert stacked.totals.bytes_down == plain.totals.bytes_down
    assert stacked.totals.gradients == plain.totals.gradients > 0


@EVERY_LATE
def test_a_single_clients_reply_is_the_result(name: str) -> None:
    few = {"buffer_size": 1}
    seen: list[Arrays] = []

    class Listening(Shuffling):
        def pull_messages(self, message_ids: Iterable[str]) -> Sequence[Message]:
            replies = super().pull_messages(message_ids)
            for reply in replies:
                if "arrays" in reply.content.array_records:
                    seen.append(to_tensors(reply.content.array_records["arrays"]))
            return replies

    state = finish(build(name, **few), rounds=1, sizes=(9,), grid=Listening)
    assert distance(state.arrays, seen[-1]) <= 1e-7


@EVERY_LATE
@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_run_ends_in_the_same_bits(name: str, at: int) -> None:
    whole, memory = make(build(name))
    expected = whole.run().arrays
    resumed, rest = make(build(name))
    resumed.load(*memory.checkpoints[at])
    assert same_bits(resumed.run().arrays, expected)
    assert rest.metrics[ROUNDS, "train"] == memory.metrics[ROUNDS, "train"]
    assert resumable(whole.strategy)


@EVERY_LATE
def test_a_poisoned_reply_is_dropped(name: str) -> None:
    class Poisoned(Shuffling):
        poisoned = 4

    loop, memory = make(build(name), grid=Poisoned, rounds=2)
    state = loop.run()
    assert all(v.isfinite().all() for v in state.arrays.values())
    assert state.totals.dropped >= 2
    assert all(kind == "bad_replies" for kind, _, _ in memory.events)
    assert {node for _, _, fields in memory.events for node in fields["nodes"]} == {"4"}


@EVERY_LATE
def test_global_generators_neither_matter_nor_change(name: str) -> None:
    results = []
    for noise in (1, 2):
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        expected = (random.random(), np.random.random())  # noqa: NPY002
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        results.append(finish(build(name, **few(name)), rounds=2).arrays)
        assert (random.random(), np.random.random()) == expected  # noqa: NPY002
    assert same_bits(*results)


def few(name: str) -> dict[str, Any]:
    """Returns what makes a strategy sample some of the nodes."""
    return {} if name.startswith("Differential") else {"fraction_train": 0.6}


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", *OURS])
def test_samples_differ_between_rounds_and_seeds(name: str) -> None:
    def samples(seed: int) -> list[tuple[int, ...]]:
        asked: list[tuple[int, ...]] = []

        class Listening(Shuffling):
            def push_messages(self, messages: Iterable[Message]) -> list[str]:
                messages = list(messages)
                asked.append(tuple(sorted(m.metadata.dst_node_id for m in messages)))
                return super().push_messages(messages)

        finish(build(name, fraction_train=0.4), rounds=6, seed=seed, grid=Listening)
        return asked[-6:]

    first = samples(0)
    assert all(len(nodes) == 2 for nodes in first)
    assert len(set(first)) > 1
    assert samples(0) == first
    assert samples(1) != first


# Which client serves which strategy


SGD_HONOURS = registry.load("clients", "sgd").honours | registry.load("clients", "sgd").metrics


@pytest.mark.parametrize("name", FLOWERS)
def test_flowers_strategies_are_served_by_sgd(name: str) -> None:
    assert objections(flowers(name), SGD_HONOURS, 5) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FedXgbBagging", "XGBoost trees as bytes"),
        ("FedXgbCyclic", "XGBoost trees as bytes"),
        ("QFedAvg", "loss at the received parameters"),
        ("DifferentialPrivacyClientSideFixedClipping", "fixedclipping_mod"),
        ("DifferentialPrivacyClientSideAdaptiveClipping", "adaptiveclipping_mod"),
    ],
)
def test_strategies_that_nobody_serves_are_refused_with_the_reason(name: str, reason: str) -> None:
    (found,) = objections(flowers(name), SGD_HONOURS, 5)
    assert found.startswith(name)
    assert reason in found


def test_a_wrapped_strategy_is_looked_at_too() -> None:
    wrapped = flowers("DifferentialPrivacyServerSideFixedClipping", strategy={
        "name": "FedProx", "proximal_mu": 0.1,
    })  # fmt: skip
    assert objections(wrapped, SGD_HONOURS, 5) == []
    (found,) = objections(wrapped, frozenset(), 5)
    assert found.startswith("FedProx only sends proximal-mu")


def test_fedprox_needs_a_client_that_adds_its_term() -> None:
    (found,) = objections(flowers("FedProx"), frozenset(), 5)
    assert "the client must add the proximal term" in found


def test_the_proximal_term_acts() -> None:
    begin = functional(network(), torch.float32).initial()
    moved = [
        distance(finish(flowers("FedProx", proximal_mu=mu), rounds=1).arrays, begin)
        for mu in (0.0, 1.0, 5.0)
    ]
    plain = distance(finish(flowers("FedAvg"), rounds=1).arrays, begin)
    assert moved[0] == plain
    assert moved[0] > moved[1] > moved[2] > 0


def test_more_nodes_than_there_are_would_wait_forever() -> None:
    (found,) = objections(flowers("FedAvg", min_available_nodes=9), SGD_HONOURS, 5)
    assert "waits for 9 nodes" in found
    assert "there are 5 clients" in found


@pytest.mark.parametrize("name", [n for n in OURS if ours(n).client != "sgd"])
def test_a_sampler_needs_its_own_client(name: str) -> None:
    (found,) = objections(ours(name), SGD_HONOURS, 5)
    assert found.startswith("the client does not honour")
    assert "step-size" in found
    own = registry.load("clients", ours(name).client)
    assert objections(ours(name), own.honours | own.metrics, 5, own.requires) == []
    for other in (ours("fedavg"), flowers("FedAvg")):
        (found,) = objections(other, own.honours, 5, own.requires)
        assert "FedAvg does not send" in found
        assert "step-size" in found


# Parameters


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("FedAdam", {"eta": "0.1"}),
        ("FedAdam", {"etta": 0.1}),
        ("FedAvg", {"train_metrics_aggr_fn": 3}),
        ("DifferentialPrivacyServerSideFixedClipping", {"strategy": "FedAverage"}),
        ("DifferentialPrivacyServerSideFixedClipping", {"strategy": {"name": "FedAvg", "x": 1}}),
        ("DifferentialPrivacyServerSideFixedClipping", {"strategy": 3}),
    ],
)
def test_parameters_that_flower_does_not_know_are_refused(name: str, section: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        flower_params()[name](name=name, **SECTIONS.get(name, {}) | section)
    (mistake,) = refused.value.errors()
    assert mistake["loc"][0] in section


def test_what_flowers_constructor_refuses_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"strategy FedTrimmedAvg: .*beta"):
        flowers("FedTrimmedAvg", beta=0.7)
    with pytest.raises(UserError, match="clipping norm should be a positive"):
        flowers("DifferentialPrivacyServerSideFixedClipping", clipping_norm=-1.0)


def test_nested_strategies_by_name_or_section() -> None:
    assert parse_flower("FedAdam") == parse_flower({"name": "FedAdam"})
    built = build_flower(parse_flower({"name": "FedAdam", "eta": 0.5}))
    assert built.eta == 0.5  # type: ignore[attr-defined]


# State


class Anonymous(flower_classes()["FedAvg"]):  # type: ignore[misc]
    """A user's strategy of which nobody knows what it remembers."""


def test_a_strategy_of_unknown_state_runs_but_is_not_resumed() -> None:
    loop, memory = make(Anonymous())
    loop.run()
    resumed, _ = make(Anonymous())
    with pytest.raises(UserError, match="strategy Anonymous cannot be resumed"):
        resumed.load(*memory.checkpoints[2])


def test_state_of_a_scalar_parameter() -> None:
    """NumPy turns results of 0-d arrays into scalars, which are state as well."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    from fedsim.strategies.flower import load_strategy_state, strategy_state

    made = flowers("FedAdam")
    grid = make(made)[0].grid
    record = ArrayRecord({"x": Array(np.array(2.0, np.float32))})
    requests = list(made.configure_train(1, record, ConfigRecord(), grid))
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.array(3.0, np.float32))}),
                          "metrics": MetricRecord({"num-examples": 1})})  # fmt: skip
    made.aggregate_train(1, [Message(content, reply_to=request) for request in requests])
    again = flowers("FedAdam")
    load_strategy_state(again, *strategy_state(made))
    assert again.m_t["x"] == made.m_t["x"]
    assert again.v_t["x"] == made.v_t["x"]


def test_a_weight_that_the_client_does_not_report_is_refused() -> None:
    (reason,) = objections(flowers("FedAvg", weighted_by_key="tokens"), SGD_HONOURS, 5)
    assert "tokens" in reason
