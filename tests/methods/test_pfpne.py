"""Fed-PNE, PF-PNE and the searches alone: against an oracle, and what they promise exactly."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.bandits.functions import Tilted
from fedsim.bandits.objectives import Synthetic
from fedsim.clients.pfpne import Site
from fedsim.errors import RunFailed
from fedsim.grids.nodes import node_of
from fedsim.messages import Broadcast, Failure
from tests.methods.bandits import (
    HEARD,
    LOCAL,
    Listening,
    Played,
    audit,
    play,
    problem,
    setup_of,
)
from tests.oracles import pfpne_numpy as oracle

PF = {"name": "pf-pne", "budget": 3000}
FED = {"name": "fed-pne", "budget": 3000}
PNE = {**LOCAL, "method": "pne", "budget": 3000}


@pytest.fixture(autouse=True)
def forget() -> None:
    HEARD.clear()


def same_search(a: Played, b: Played) -> None:
    """Asserts that all clients pulled the same points and got the same rewards."""
    assert np.array_equal(a.of_clients("pulls"), b.of_clients("pulls"))
    assert np.array_equal(a.of_clients("regret"), b.of_clients("regret"))


# Exact special cases


@pytest.mark.parametrize("seed", range(3))
def test_without_heterogeneity_it_is_fed_pne(seed: int) -> None:
    ours = play({**PF, "delta": 0.0}, {"clients": 10}, seed)
    fed = play(FED, {"clients": 10}, seed)
    same_search(ours, fed)
    assert len(ours.strategy.history) == len(fed.strategy.history) > 5
    for a, b in zip(ours.strategy.history, fed.strategy.history, strict=True):
        assert np.array_equal(a["cells"], b["cells"])
        assert np.array_equal(a["mean"], b["mean"])
        assert np.array_equal(a["kept"], b["kept"])


def test_beyond_the_smoothness_nothing_is_sent() -> None:
    """Δ > ν1: each client is single-client PNE, with its share δ / M of the failure probability."""
    ours = play({**PF, "delta": 1.01}, {"clients": 4, "delta": 0.3}, grid=Listening)
    found = audit()
    assert (found.up.floats, found.up.ids, found.up.bytes) == (0, 0, 0)
    assert (found.down.floats, found.down.ids, found.down.bytes) == (0, 0, 0)
    assert ours.state.totals.bytes_up == ours.state.totals.bytes_down == 0
    alone = play({**PNE, "failure": 0.01 / 4}, {"clients": 4, "delta": 0.3})
    same_search(ours, alone)
    assert np.array_equal(ours.of_clients("simple_regret"), alone.of_clients("simple_regret"))


def test_one_client_is_single_client_pne() -> None:
    ours, alone = play({**PF, "delta": 0.0}, {"clients": 1}), play(PNE, {"clients": 1})
    same_search(ours, alone)
    assert ours.simple_regret == alone.simple_regret


# An oracle in plain loops


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("fed-pne", {}, {}),
    ("pf-pne", {"delta": 0.05}, {}),
    ("pf-pne", {"delta": 0.05, "kappa": 2.0}, {"arity": 3}),
    ("pf-pne", {"delta": 0.0}, {"c": 0.15, "failure": 0.1}),
    ("pf-pne", {"delta": 2.0}, {}),
    ("pne", {}, {"min_pulls": 1, "rho": 0.6}),
]


@pytest.mark.parametrize(("method", "own", "common"), CASES)
def test_the_run_is_the_oracles(method: str, own: dict[str, Any], common: dict[str, Any]) -> None:
    section = LOCAL | {"method": "pne"} if method == "pne" else {"name": method}
    ours = play({**section, "budget": 2500, **own, **common}, {"delta": 0.05}, seed=3)
    expected = oracle.run(problem(ours.setup, budget=2500, **own, **common), method)
    np.testing.assert_allclose(ours.of_clients("regret"), expected.curves, rtol=1e-9, atol=1e-9)
    history = ours.strategy.history
    assert len(history) == len(expected.phases)
    for mine, (cells, kept) in zip(history, expected.phases, strict=True):
        centres = ours.strategy.tree.centres(mine["depth"], mine["cells"])
        np.testing.assert_allclose(centres, [oracle.centre(c) for c in cells], atol=1e-12)
        assert mine["kept"].tolist() == [c in kept for c in cells]
    points = [ours.kept[f"{i}/learner/best"].numpy() for i in range(5)]
    np.testing.assert_allclose(points, expected.points, atol=1e-12)


def test_budgets_are_spent_to_the_last_pull() -> None:
    for section in (PF | {"delta": 0.05}, PF | {"delta": None}, FED, PNE,
                    {**LOCAL, "budget": 301, "method": "hct"},
                    {**LOCAL, "budget": 301, "method": "random", "repeats": 7}):  # fmt: skip
        played = play(section, {"delta": 0.05})
        assert set(played.of_clients("pulls")[-1]) == {float(section["budget"])}
        assert played.strategy.finished()


# No client loses its optimum with the right Δ, and some do with a wrong one


def lost(delta: float, seed: int) -> int:
    """Returns how many clients lose the cell of their optimum."""
    setup = setup_of({**PF, "delta": delta}, {"clients": 10, "delta": 0.158}, seed)
    optima = [np.array(row[2:4]) for row in setup.data.train.x]
    return oracle.run(problem(setup, budget=10_000, delta=delta, c=0.15), "pf-pne", optima).lost


def test_the_right_heterogeneity_loses_no_optimum_and_a_wrong_one_does() -> None:
    assert lost(0.158, seed=0) == 0
    assert lost(0.0, seed=0) > 0


# What is sent


def test_what_is_sent_is_counted() -> None:
    played = play({**PF, "delta": 0.05}, {"clients": 6, "delta": 0.05}, grid=Listening)
    found, clients = audit(), 6
    cells = [len(phase["cells"]) for phase in played.strategy.history]
    assert found.up.floats == clients * sum(cells)  # M Σ |K^p|: the means, and no other number
    assert found.up.ids == clients * 2 * sum(cells)  # numbers of good pulls, and survivors
    assert found.down.floats == clients * sum(cells)  # g
    last = played.metric("floats_up")[-1]
    assert last == 0  # alone
    assert found.down.ids == clients * sum(cells)
    for way, counted in (("up", found.up), ("down", found.down)):
        assert sum(played.metric(f"floats_{way}")) == counted.floats
        assert sum(played.metric(f"ids_{way}")) == counted.ids
        assert played.metric(f"total_floats_{way}")[-1] == counted.floats
        assert getattr(played.state.totals, f"bytes_{way}") == counted.bytes
    assert found.up.bytes == clients * sum(cells) * (8 + 4 + 1)


def test_no_raw_reward_leaves_a_client() -> None:
    """Replies hold means of at least min_pulls pulls; the metrics hold no reward at all."""
    play({**PF, "delta": 0.05}, {"clients": 6, "delta": 0.05}, grid=Listening)
    assert {heard.message_type for heard in HEARD} == {"train.pull", "train.eliminate"}
    for heard in HEARD:
        assert heard.metrics == {"pulls", "failed", "cells", "regret", "simple_regret"}
        for name, array in heard.up.get("means", {}).items():
            assert array.shape[1:] == heard.down["cells"]["cells"].shape
            if name == "good":
                assert int(array.min()) >= 2
        assert all(isinstance(v, int | float | str | bool) for v in heard.config.values())


def test_regret_is_told_only_where_the_maximum_is_known() -> None:
    played = play(
        {"name": "pf-pne", "budget": 200, "delta": 0.1},
        client={"name": "bandit", "objective": FUNCTION},
    )
    assert {"pulls", "failed", "cells"} <= set(played.memory.metrics[1, "train"])
    assert not {"regret", "simple_regret"} & set(played.memory.metrics[1, "train"])


# Resuming


SEARCHES: dict[str, dict[str, Any]] = {
    "pf-pne": {**PF, "delta": 0.1},
    "pf-pne with a pilot": {**PF, "delta": None},
    "fed-pne": FED,
    "pne": PNE,
    "hct": {**LOCAL, "method": "hct", "budget": 150, "pulls_per_round": 31},
    "random": {**LOCAL, "method": "random", "budget": 150, "repeats": 4},
    "tpe": {**LOCAL, "method": "tpe", "budget": 60, "pulls_per_round": 9, "repeats": 2},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_resumed_run_ends_in_the_same_bits(name: str) -> None:
    if name == "tpe":
        pytest.importorskip("optuna")
    section, data = SEARCHES[name], {"clients": 3, "delta": 0.1}
    whole = play(section, data)
    rounds = whole.state.round
    assert rounds >= 3
    for at in {1, rounds // 2, rounds - 1}:
        again = play(section, data, resume=copy.deepcopy(whole.memory.checkpoints[at]))
        assert again.state.round == rounds
        assert again.kept.keys() == whole.kept.keys()
        assert all(torch.equal(again.kept[key], whole.kept[key]) for key in whole.kept)
        assert again.memory.metrics[rounds, "train"] == whole.memory.metrics[rounds, "train"]
        assert len(again.strategy.history) == len(whole.strategy.history)


# Failures


def hole(point: dict[str, float], shard: Any, rng: np.random.Generator) -> float:
    """Fails on a quarter of the line, in two ways; best at 0.8."""
    if point["x"] < 0.125:
        raise ZeroDivisionError("no value here")
    if point["x"] < 0.25:
        return float("nan")
    return 1 - abs(point["x"] - 0.8) + 0.01 * float(rng.standard_normal())


CALLS: list[float] = []


def shaky(point: dict[str, float], shard: Any, rng: np.random.Generator) -> float:
    """Fails the first time."""
    CALLS.append(point["x"])
    if len(CALLS) == 1:
        raise OSError("try again")
    return point["x"]


def hopeless(point: dict[str, float], shard: Any) -> float:
    raise ValueError("the pump is off")


LINE = [{"name": "x", "low": 0.0, "high": 1.0}]
FUNCTION = {"name": "function", "path": f"{__name__}:hole", "axes": LINE}


def test_cells_that_fail_are_not_eliminated_and_others_are_judged() -> None:
    played = play(
        {"name": "pf-pne", "budget": 2000, "delta": 0.0, "c": 0.05},
        client={"name": "bandit", "objective": FUNCTION, "retries": 0},
    )
    for phase in played.strategy.history:
        centres = played.strategy.tree.centres(phase["depth"], phase["cells"])[:, 0]
        failing = centres < 0.25
        assert phase["kept"][failing].all()
        assert np.isnan(phase["mean"][failing]).all()
        assert np.isfinite(phase["mean"][~failing]).all()
    deepest = played.strategy.history[-1]
    assert not deepest["kept"].all()
    assert played.metric("failed")[-1] > 0
    best = [played.kept[f"{i}/learner/best"].item() for i in range(5)]
    assert np.abs(np.array(best) - 0.8).max() < 0.05


@pytest.mark.parametrize("method", ["pne", "hct", "random", "tpe"])
def test_searches_alone_get_over_failures(method: str) -> None:
    if method == "tpe":
        pytest.importorskip("optuna")
    played = play(
        {**LOCAL, "method": method, "budget": 100, "c": 0.05},
        {"clients": 2},
        client={"name": "bandit", "objective": FUNCTION},
    )
    best = [played.kept[f"{i}/learner/best"].item() for i in range(2)]
    assert np.abs(np.array(best) - 0.8).max() < 0.2
    assert 0 < played.metric("failed")[-1] < 100


def test_a_failed_pull_is_repeated() -> None:
    CALLS.clear()
    played = play(
        {"name": "fed-pne", "budget": 50},
        {"clients": 1},
        client={"name": "bandit", "retries": 1,
                "objective": {**FUNCTION, "path": f"{__name__}:shaky"}},
    )  # fmt: skip
    assert played.metric("failed")[-1] == 0
    assert played.metric("pulls")[-1] == 50
    assert len(CALLS) == 51


def test_a_client_that_only_fails_ends_the_run_with_its_reason() -> None:
    with pytest.raises(RunFailed, match=r"all \d+ pulls so far have failed; last: ValueError: the"):
        play(
            {"name": "fed-pne", "budget": 500},
            client={"name": "bandit", "objective": {**FUNCTION, "path": f"{__name__}:hopeless"}},
        )


def test_a_mean_of_fewer_good_pulls_than_min_pulls_is_not_sent() -> None:
    """A cell with one good pull would send that reward itself."""
    played = play(
        {"name": "pf-pne", "budget": 2000, "delta": 0.1, "min_pulls": 2},
        grid=Listening,
        client={"name": "bandit", "retries": 0,
                "objective": {**FUNCTION, "path": f"{__name__}:flaky"}},
    )  # fmt: skip
    assert played.metric("failed")[-1] > 0
    sent = [heard.up["means"] for heard in HEARD if "means" in heard.up]
    good = np.concatenate([each["good"].numpy().ravel() for each in sent])
    mean = np.concatenate([each["mean"].numpy().ravel() for each in sent])
    assert (good == 0).any()
    assert not (good == 1).any()
    assert not mean[good == 0].any()


def flaky(point: dict[str, float], shard: Any, rng: np.random.Generator) -> float:
    """Fails every other time."""
    return 1 - abs(point["x"] - 0.8) if rng.random() < 0.5 else float("nan")


def test_a_client_whose_cells_are_all_gone_takes_those_of_the_phase() -> None:
    config = {
        "arity": 2, "log-term": 10.0, "nu1": 1.0, "rho": 0.5, "c": 0.1, "budget": 100, "depth": 1,
        "pulls": 2, "reports": True, "min-pulls": 2, "width": 0.1, "delta": 0.0,
    }  # fmt: skip
    state = {"learner/depth": torch.tensor(1), "learner/cells": torch.tensor([0])}
    objective = Synthetic(Tilted("rastrigin", np.zeros(1)), 0.1, np.zeros(1))
    site = Site(objective, state, config)
    site.pull_cells(np.array([1]), 0, np.random.default_rng(0))
    assert site.active == 1
    site.eliminate(np.array([0.5]))
    assert site.learned["cells"].tolist() == [2, 3]


class Deaf(Listening):
    """Keeps the third and fourth exchange, a whole phase, from one client."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        if len(HEARD) not in (2, 3):
            return super().send_and_receive(messages, timeout=timeout)
        others = [n for n in messages.node_ids if n != node_of(2)]
        fewer = Broadcast(messages.content, messages.message_type, others)
        replies = super().send_and_receive(fewer, timeout=timeout)
        replies.failures.append(Failure(node_of(2), "unplugged"))
        return replies


def test_a_client_that_misses_a_phase_comes_back() -> None:
    played = play({**PF, "delta": 0.05}, {"delta": 0.05}, grid=Deaf)
    assert played.state.totals.dropped == 2
    assert played.strategy.finished()
    assert played.simple_regret < 0.05
    _, clients, last = played.memory.client_metrics[-1]
    assert clients == [0, 1, 2, 3, 4]
    assert set(last["pulls"]) == {3000.0}


def slope(point: dict[str, float], shard: Any) -> float:
    """Falls steeply for one client, and rises a little for the other: |f − mean f| ≤ 0.2."""
    tilt = float(shard.x[0, 3])
    return 0.3 + 0.38 * (1 - point["x"]) + tilt * (1 - 2 * point["x"])


class Absent(Listening):
    """Keeps some exchanges from a client, or its replies from the server."""

    client = 0
    unasked: frozenset[int] = frozenset()
    unheard: frozenset[int] = frozenset()

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        now, out = len(HEARD), node_of(self.client)
        if now in self.unasked:
            others = [n for n in messages.node_ids if n != out]
            messages = Broadcast(messages.content, messages.message_type, others)
        replies = super().send_and_receive(messages, timeout=timeout)
        if now in self.unheard:
            others = [i for i, n in enumerate(replies.node_ids) if n != out]
            return replies.select(others, [Failure(out, "unplugged")])
        if now in self.unasked:
            replies.failures.append(Failure(out, "unplugged"))
        return replies


@pytest.mark.parametrize(
    ("unasked", "unheard"),
    [({8, 9}, ()), ((), {8, 9}), ((), {8}), ((), {9}), ({9}, ()), ({6, 7, 8, 9}, ())],
)
def test_a_client_keeps_its_optimum_while_it_is_not_heard(
    unasked: Any, unheard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other client alone has dropped these cells, and its mean is 2Δ from this one's."""
    data = {"base": "rastrigin", "dimension": 1, "clients": 2, "delta": 0.2}
    rows = setup_of({**PF, "delta": 0.2}, data).data.train.x
    client = int(np.argmin(rows[:, 3]))
    monkeypatch.setattr(Absent, "client", client)
    monkeypatch.setattr(Absent, "unasked", frozenset(unasked))
    monkeypatch.setattr(Absent, "unheard", frozenset(unheard))
    played = play(
        {"name": "pf-pne", "budget": 1000, "delta": 0.2, "c": 0.001, "kappa": 0.1},
        data,
        grid=Absent,
        client={"name": "bandit", "objective": {**FUNCTION, "path": f"{__name__}:slope"}},
    )
    assert played.state.totals.dropped == len(unasked) + len(unheard)
    depth = int(played.kept[f"{client}/learner/depth"])
    cells = played.kept[f"{client}/learner/cells"].numpy()
    assert len(cells)
    assert played.strategy.tree.bounds(depth, cells)[1].max() == 1.0
    assert played.kept[f"{client}/learner/best"].item() > 0.9
