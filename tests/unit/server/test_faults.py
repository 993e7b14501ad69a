"""Faults on purpose: who is struck, by what, how often, and the same however a run is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedsim.errors import RunFailed
from fedsim.grids.inline import InlineGrid
from fedsim.grids.nodes import node_of
from fedsim.messages import Arrays, Broadcast, make_content, to_tensors
from fedsim.random import generator
from fedsim.scenario.sections import Corrupt, Fault, FaultsParams, SignFlip
from fedsim.server.faults import FaultyGrid, changed, chosen, objections
from fedsim.server.loop import RoundLoop
from fedsim.server.state import LoopConfig, LoopState
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.strategies.flower import build_flower, parse_flower
from tests.engines.toys import Memory, cohorts, federation, functional, same_bits, sgd, start

CLIENTS = 10
MODEL = functional()
BEGIN = MODEL.initial()
COUNTS = {
    "drop": "faults_dropped", "delay": "faults_late", "corrupt": "faults_corrupted",
    "nan": "faults_nan", "sign_flip": "faults_flipped",
}  # fmt: skip


def faulty(
    memory: Memory | None = None, *, seed: int = 0, clients: int = CLIENTS, **faults: Any
) -> FaultyGrid:
    engine = cohorts(sgd(MODEL, batch_size=8), federation([6] * clients))
    params = FaultsParams(**faults)
    return FaultyGrid(InlineGrid(engine, clients), params, clients, seed, memory or Memory())


def asked(grid: FaultyGrid, server_round: int = 1, kind: str = "train") -> dict[int, Arrays]:
    """Returns what arrives of one question to all nodes, by partition."""
    config = {"seed": 0, "server-round": server_round}
    messages = Broadcast(make_content({"arrays": BEGIN}, config), kind, grid.get_node_ids())
    return read(grid.send_and_receive(messages))


def read(replies: Sequence[Message]) -> dict[int, Arrays]:
    found = {}
    for reply in replies:
        records = reply.content.array_records
        arrays = to_tensors(records["arrays"]) if "arrays" in records else {}
        found[reply.metadata.src_node_id - node_of(0)] = arrays
    return found


CLEAN = asked(faulty(drop=Fault(clients=(99,))))


# Who is struck


@pytest.mark.parametrize("kind", COUNTS)
def test_clients_that_are_named_are_struck_in_every_round(kind: str) -> None:
    memory = Memory()
    made = {"corrupt": Corrupt, "sign_flip": SignFlip}.get(kind, Fault)(clients=(2, 7))
    grid = faulty(memory, **{kind: made})
    for server_round in (1, 2):
        found = asked(grid, server_round)
        gone = kind in ("drop", "delay")
        assert set(range(CLIENTS)) - set(found) == ({2, 7} if gone else set())
        if server_round == 1:
            others = [client for client in found if client not in (2, 7)]
            assert all(same_bits(found[c], CLEAN[c]) for c in others)
            assert gone or not any(same_bits(found[c], CLEAN[c]) for c in (2, 7))
    assert grid.take_counts() == {COUNTS[kind]: 4.0}
    assert grid.take_counts() == {COUNTS[kind]: 0.0}
    assert memory.events == [
        ("faults", r, {"message_type": "train", "clients": {kind: [2, 7]}}) for r in (1, 2)
    ]


def test_a_rate_strikes_each_reply_with_that_probability() -> None:
    """200 clients, 20 rounds: 4000 trials at 0.3, five standard deviations of 0.00725."""
    grid = faulty(clients=200, drop=Fault(rate=0.3))
    missing = [200 - len(asked(grid, r)) for r in range(1, 21)]
    assert abs(sum(missing) / 4000 - 0.3) < 5 * 0.00725
    assert len(set(missing)) > 5, "not the same clients in every round"


def test_a_fraction_is_drawn_once() -> None:
    grid = faulty(drop=Fault(fraction=0.3))
    gone = [frozenset(range(CLIENTS)) - set(asked(grid, r)) for r in (1, 2, 3)]
    assert len(gone[0]) == 3
    assert len(set(gone)) == 1
    sets = {chosen("drop", Fault(fraction=0.3), CLIENTS, seed) for seed in range(20)}
    assert len(sets) > 10
    assert chosen("nan", Fault(fraction=0.3), 1000, 0) != chosen(
        "drop", Fault(fraction=0.3), 1000, 0
    )


def test_the_seed_decides_and_nothing_else() -> None:
    def struck(rounds: Sequence[int], **more: Any) -> list[set[int]]:
        grid = faulty(drop=Fault(rate=0.4), **more)
        return [set(asked(grid, r)) for r in rounds]

    first = struck([1, 2, 3])
    assert struck([3, 1, 2]) == [first[2], first[0], first[1]]
    assert struck([1, 2, 3], seed=5) != first
    grid = FaultyGrid(
        faulty(drop=Fault(rate=0.4)).inner, FaultsParams(seed=0, drop=Fault(rate=0.4)), CLIENTS, 9,
        Memory(),
    )  # fmt: skip
    assert [set(asked(grid, r)) for r in (1, 2, 3)] == first


def test_who_is_asked_beside_it_makes_no_difference() -> None:
    grid = faulty(drop=Fault(rate=0.5))
    everyone = set(asked(grid))
    content = make_content({"arrays": BEGIN}, {"seed": 0, "server-round": 1})
    alone = {
        client
        for client in range(CLIENTS)
        if read(grid.send_and_receive([Message(content, node_of(client), "train")]))
    }
    assert alone == everyone


def test_pushed_and_pulled_is_the_same() -> None:
    content = make_content({"arrays": BEGIN}, {"seed": 0, "server-round": 1})
    faults = {"drop": Fault(rate=0.3), "sign_flip": SignFlip(clients=(4,))}
    direct, grid = asked(faulty(**faults)), faulty(**faults)
    ids = grid.push_messages([Message(content, n, "train") for n in grid.get_node_ids()])
    replies = grid.pull_messages(ids)
    pulled = read([reply for reply in replies if reply.has_content()])
    assert pulled.keys() == direct.keys()
    assert {r.error.reason for r in replies if r.has_error()} == {"no reply"}
    assert len(replies) == CLIENTS
    assert all(same_bits(pulled[client], direct[client]) for client in pulled)


def test_only_training_goes_wrong() -> None:
    grid = faulty(drop=Fault(rate=1.0))
    assert asked(grid) == {}
    assert set(asked(grid, kind="evaluate")) == set(range(CLIENTS))
    assert set(asked(grid, kind="query.num_examples")) == set(range(CLIENTS))


def test_what_is_lost_is_not_late_or_wrong_as_well() -> None:
    grid = faulty(
        drop=Fault(clients=(1,)), delay=Fault(clients=(1, 2)), nan=Fault(clients=(1, 2, 3)),
        sign_flip=SignFlip(clients=(3,)),
    )  # fmt: skip
    assert set(asked(grid)) == set(range(CLIENTS)) - {1, 2}
    assert grid.take_counts() == {
        "faults_dropped": 1, "faults_late": 1, "faults_nan": 1, "faults_flipped": 1,
    }  # fmt: skip


# What it does


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_byzantine_client_turns_its_update_round(scale: float) -> None:
    found = asked(faulty(sign_flip=SignFlip(clients=(3,), scale=scale)))[3]
    for name, value in CLEAN[3].items():
        expected = BEGIN[name] - scale * (value - BEGIN[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-13, atol=1e-13)
        assert not torch.equal(found[name], value)


def test_what_answers_nothing_alike_is_negated() -> None:
    flip, rng = SignFlip(rate=1.0, scale=2.0), generator(0, "test")
    arrays = {"g": torch.tensor([1.0, -3.0]), "n": torch.tensor([2])}
    for received in (None, {}, {"g": torch.zeros(3)}):
        found = changed(flip, arrays, received, rng)
        assert found["g"].tolist() == [-2.0, 6.0]
        assert found["n"].tolist() == [2]


def test_a_nan_reply_is_nan_everywhere() -> None:
    found = changed(Fault(rate=1.0), CLEAN[0], None, generator(0, "test"))
    assert all(value.isnan().all() for value in found.values())


def test_a_reply_of_another_shape_lacks_one_number() -> None:
    found = changed(Corrupt(rate=1.0), CLEAN[0], None, generator(0, "test"))
    first, *rest = CLEAN[0]
    assert found[first].shape == (CLEAN[0][first].numel() - 1,)
    assert all(found[name] is CLEAN[0][name] for name in rest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_are_flipped_one_a_number(dtype: torch.dtype) -> None:
    value = torch.linspace(-3, 3, 20_000).to(dtype)
    flips = Corrupt(rate=1.0, how="bits", share=0.1)
    found = changed(flips, {"w": value}, None, generator(1, "test"))["w"]
    assert found.dtype == dtype

    def bits(tensor: torch.Tensor) -> Any:
        raw = tensor.view(torch.uint8).numpy().reshape(len(value), -1)
        return np.unpackbits(raw, axis=1)

    per_number = (bits(found) != bits(value)).sum(1)
    assert set(per_number.tolist()) == {0, 1}
    assert abs(per_number.mean() - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    hit = (bits(found) != bits(value)).sum(0)
    assert (hit > 0).all(), "every bit is flipped somewhere"


# Whole runs


def finish(strategy: Any = None, memory: Memory | None = None, **faults: Any) -> LoopState:
    strategy = strategy or FedAvg(FedAvgParams())
    memory = memory or Memory()
    config = LoopConfig(rounds=4, seed=0, server_every=0, checkpoint_rounds=2, quorum=0.3)
    grid = faulty(memory, **faults)
    return RoundLoop(strategy, grid, start(MODEL, strategy), config, memory).run()


MIX = {
    "drop": Fault(rate=0.1), "delay": Fault(rate=0.1), "corrupt": Corrupt(rate=0.1),
    "nan": Fault(clients=(5,)), "sign_flip": SignFlip(fraction=0.2),
}  # fmt: skip


def test_what_goes_wrong_is_counted_in_metrics_and_events() -> None:
    memory = Memory()
    state = finish(memory=memory, **MIX)
    system = [memory.metrics[r, "system"] for r in (1, 2, 3, 4)]
    events = [fields["clients"] for kind, _, fields in memory.events if kind == "faults"]
    for kind, name in COUNTS.items():
        total = sum(each[name] for each in system)
        assert total == sum(len(hit.get(kind, [])) for hit in events) > 0
    refused = sum(
        each[name] for each in system for name in ("faults_dropped", "faults_late")
    ) + sum(len({*hit.get("nan", []), *hit.get("corrupt", [])}) for hit in events)
    assert state.totals.dropped == refused
    assert all(value.isfinite().all() for value in state.arrays.values())


@pytest.mark.parametrize("name", ["ours", "FedAdam", "FedMedian"])
def test_a_resumed_run_has_the_same_faults(name: str) -> None:
    def strategy() -> Any:
        return FedAvg(FedAvgParams()) if name == "ours" else build_flower(parse_flower(name))

    whole, memory = finish(strategy(), memory := Memory(), **MIX), memory
    rest = Memory()
    made = strategy()
    config = LoopConfig(rounds=4, seed=0, server_every=0, checkpoint_rounds=2, quorum=0.3)
    loop = RoundLoop(made, faulty(rest, **MIX), start(MODEL, made), config, rest)
    loop.load(*memory.checkpoints[2])
    assert same_bits(loop.run().arrays, whole.arrays)
    assert rest.events == [event for event in memory.events if (event[1] or 0) > 2]


def test_faults_may_fail_the_quorum() -> None:
    with pytest.raises(RunFailed, match=r"fewer than the quorum of 0\.3"):
        finish(drop=Fault(fraction=0.8))


def test_flipped_signs_reach_the_aggregate() -> None:
    plain, turned = finish(), finish(sign_flip=SignFlip(fraction=0.2, scale=3.0))
    assert plain.totals.dropped == turned.totals.dropped == 0
    assert not same_bits(plain.arrays, turned.arrays)


# What may be asked for


@pytest.mark.parametrize(
    "given", [{}, {"rate": 0.1, "fraction": 0.1}, {"rate": 0.1, "clients": (1,)}]
)
def test_one_way_to_choose_and_no_more(given: Any) -> None:
    with pytest.raises(ValueError, match="takes exactly one of rate, fraction and clients"):
        Fault(**given)


def test_clients_that_there_are_not_are_named() -> None:
    params = FaultsParams(nan=Fault(clients=(3, 12)), drop=Fault(fraction=0.01))
    assert {str(problem) for problem in objections(params, 10)} == {
        "faults.drop.fraction: is none of 10 clients (got 0.01)",
        "faults.nan.clients: there are 10 clients, numbered from 0 (got 12)",
    }
    assert objections(FaultsParams(nan=Fault(clients=(9,)), drop=Fault(fraction=0.1)), 10) == []
