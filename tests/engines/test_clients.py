"""Clients of the engine's other kinds: stateful, failing, computed directly; and evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.clients.base import Batch, Batching, Client, Config, DirectClient, Inputs, Plan, Reply
from fedsim.clients.sgd import SGD, SGDParams
from fedsim.errors import Params, RunFailed
from fedsim.grids.execute import at
from fedsim.messages import Arrays, Broadcast, Replies, make_content
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from tests.engines.toys import (
    CLASSES,
    RAGGED,
    classification,
    cohorts,
    distance,
    federation,
    functional,
    grid_of,
    run,
    same_bits,
    sgd,
    start,
)


class NoParams(Params):
    """No settings."""


class Personal(Client):
    """Keeps how often it was asked and a running sum of what it received; evaluates with both."""

    Params = NoParams
    personalised = True

    def initial_client_state(self) -> Arrays:
        return {"asked": torch.zeros((), dtype=torch.float64),
                "sum": torch.zeros(2, dtype=torch.float64)}  # fmt: skip

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> Any:
        total = client_state["sum"] + records["arrays"]["w"] * (1 + inputs.scalars["partition-id"])
        return {"asked": client_state["asked"] + 1, "sum": total,
                "n": inputs.scalars["num-examples"]}  # fmt: skip

    def finish(self, state: Any) -> tuple[Reply, Arrays]:
        kept = {"asked": state["asked"], "sum": state["sum"]}
        mean = {"w": state["sum"] / state["asked"]}
        return Reply({"arrays": mean}, {"num-examples": state["n"]}), kept

    def evaluate(
        self, records: dict[str, Arrays], client_state: Arrays, batch: Batch
    ) -> dict[str, Tensor]:
        return {"asked": client_state["asked"].expand(len(batch.x))}


START = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
@pytest.mark.parametrize("chains", [0, 2])
def test_state_stays_with_the_client(path: str, chains: int) -> None:
    made = cohorts(Personal(NoParams(), functional(), classification()), federation(), path=path)
    arrays = {"w": torch.stack([START["w"], 3 * START["w"]])} if chains else START

    class Plans(Personal):
        def plan(self, n_examples: int, config: Config) -> Plan:
            return Plan(0, Batching("none"), chains=chains)

    made.client = Plans(NoParams(), made.client.model, made.client.task)
    config = {"chains": chains} if chains else {}
    made.run("query.num_examples", {}, {}, range(5))  # leaves no state
    made.run("train", {"arrays": arrays}, config, [0, 2])
    reply = made.run("train", {"arrays": arrays}, config, [2, 3])
    # client 2 received w twice, times 1 + 2; client 3 once, times 1 + 3
    assert torch.equal(reply.records["arrays"]["w"][0], 3 * arrays["w"])
    assert torch.equal(made.states[2]["sum"], 6 * arrays["w"])
    assert torch.equal(made.states[3]["sum"], 4 * arrays["w"])
    assert sorted(made.states) == [0, 2, 3]
    evaluated = made.run("evaluate", {"arrays": arrays}, config, range(5))
    assert evaluated.metrics["asked"].tolist() == [1, 0, 2, 1, 0]
    made.close()


def test_state_survives_a_checkpoint_to_the_same_bits() -> None:
    client = Personal(NoParams(), functional(), classification())
    whole, halves = grid_of(cohorts(client, federation())), grid_of(cohorts(client, federation()))
    nodes = list(whole.get_node_ids())
    message = Broadcast(make_content({"arrays": START}, {}), "train", nodes)
    whole.send_and_receive(message)
    halves.send_and_receive(message)
    resumed = grid_of(cohorts(client, federation()))
    resumed.load_state_dict(*halves.state_dict())
    other = {"w": 2 * START["w"] + 1}
    message = Broadcast(make_content({"arrays": other}, {}), "train", nodes)
    expected, got = whole.send_and_receive(message), resumed.send_and_receive(message)
    forgetful = grid_of(cohorts(client, federation())).send_and_receive(message)
    assert isinstance(expected, Replies)
    assert isinstance(got, Replies)
    assert same_bits(got.arrays["arrays"], expected.arrays["arrays"])
    assert isinstance(forgetful, Replies)
    assert not same_bits(got.arrays["arrays"], forgetful.arrays["arrays"])


class Brittle(Client):
    """Raises for shards of a certain size."""

    Params = NoParams

    def plan(self, n_examples: int, config: Config) -> Plan:
        return Plan(0, Batching("none"), static={"bad": n_examples == 1})

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> Any:
        if inputs.static["bad"]:
            raise ValueError("one row is not enough")
        return records["arrays"], inputs.scalars["num-examples"]

    def finish(self, state: Any) -> tuple[Reply, Arrays]:
        return Reply({"arrays": state[0]}, {"num-examples": state[1]}), {}


def test_a_client_that_raises_is_a_failure_with_its_reason() -> None:
    client = Brittle(NoParams(), functional(), classification())
    grid = grid_of(cohorts(client, federation(), path="one_by_one"))
    message = Broadcast(make_content({"arrays": START}, {}), "train", [2, 3, 4, 99])
    replies = grid.send_and_receive(message)
    assert isinstance(replies, Replies)
    assert replies.node_ids == (2, 4)
    reasons = {f.node_id: f.reason for f in replies.failures}
    assert reasons == {3: "ValueError: one row is not enough", 99: "no such node"}
    assert [m.has_error() for m in replies] == [False, False, True, True]
    assert {m.metadata.src_node_id for m in replies} == {2, 3, 4, 99}


def test_all_clients_raising_leaves_an_empty_cohort() -> None:
    client = Brittle(NoParams(), functional(), classification())
    made = cohorts(client, federation((1, 1)), path="one_by_one")
    result = made.run("train", {"arrays": START}, {}, [0, 1])
    assert result.good == []
    assert set(result.errors) == {0, 1}


@pytest.mark.parametrize("where", ["plan", "step", "evaluate"])
def test_code_that_fails_for_all_names_client_round_and_cause(where: str) -> None:
    client = sgd(functional())

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("oh")

    setattr(client, where, broken)
    made = cohorts(client, federation())
    kind = "evaluate" if where == "evaluate" else "train"
    with pytest.raises(RunFailed, match=rf"client SGD failed in {kind} of round 7: Zero.*oh"):
        made.run(kind, {"arrays": client.model.initial()}, {"server-round": 7}, [0, 1])


def test_a_setting_that_nobody_sends_is_named() -> None:
    made = cohorts(sgd(functional()), federation())
    with pytest.raises(RunFailed, match="needs the setting 'server-round'"):
        made.run("train", {"arrays": {}}, {}, [0])


def test_an_action_that_a_client_does_not_know_is_named() -> None:
    made = cohorts(sgd(functional()), federation())
    with pytest.raises(RunFailed, match=r"SGD does not answer 'train\.survivors'"):
        made.run("train.survivors", {"arrays": {}}, {}, [0])


def test_every_client_counts_its_rows() -> None:
    for path in ("mapped", "one_by_one"):
        made = cohorts(sgd(functional()), federation(), path=path)
        result = made.run("query.num_examples", {}, {}, range(5))
        assert result.metrics["num-examples"].tolist() == list(RAGGED)
        assert result.records == {}


def test_the_order_of_the_nodes_in_a_message_does_not_matter() -> None:
    client = sgd(functional(), batch_size=4)
    grid = grid_of(cohorts(client, federation(), chunk=2))
    content = make_content({"arrays": client.model.initial()}, {"server-round": 1})
    sorted_, shuffled = (
        grid.send_and_receive(Broadcast(content, "train", nodes))
        for nodes in ([2, 3, 4, 5, 6], [5, 2, 6, 4, 3])
    )
    assert isinstance(sorted_, Replies)
    assert isinstance(shuffled, Replies)
    assert shuffled.node_ids == sorted_.node_ids == (2, 3, 4, 5, 6)
    assert same_bits(shuffled.arrays["arrays"], sorted_.arrays["arrays"])
    assert same_bits(shuffled.metrics, sorted_.metrics)


class Histogram(DirectClient):
    """Counts its labels, a random number beside them; remembers how often; fails where told."""

    Params = NoParams

    def train(
        self,
        message_type: str,
        records: dict[str, Arrays],
        config: Config,
        shard: Batch,
        client_state: Arrays,
        rng: np.random.Generator,
    ) -> tuple[Reply, Arrays]:
        if len(shard.y) == config.get("fail-at"):
            raise KeyError("no")
        asked = client_state.get("asked", torch.zeros(())) + 1
        counts = torch.bincount(shard.y, minlength=CLASSES)
        if len(shard.y) == config.get("short-at"):
            counts = counts[:1]
        arrays = {"counts": counts, "draw": torch.tensor(rng.random())}
        metrics: Any = {"num-examples": len(shard.y), "asked": asked}  # plain numbers will do
        return Reply({"histogram": arrays}, metrics), {"asked": asked}


def histograms(**engine: Any) -> tuple[Any, Any]:
    data = federation()
    return cohorts(Histogram(NoParams(), functional(), classification()), data, **engine), data


def test_a_direct_client_replies_and_remembers() -> None:
    made, data = histograms(threads=3)
    made.run("train", {}, {"server-round": 1}, [2])
    result = made.run("train", {}, {"server-round": 2}, range(5))
    expected = [np.bincount(data.train.y[rows], minlength=CLASSES) for rows in data.shards]
    assert result.records["histogram"]["counts"].tolist() == [list(e) for e in expected]
    assert result.metrics["asked"].tolist() == [1, 1, 2, 1, 1]
    assert result.metrics["num-examples"].tolist() == list(RAGGED)


def test_a_direct_clients_random_numbers_are_keyed() -> None:
    draws = []
    for order, threads in (([0, 1, 2, 3, 4], 1), ([4, 2, 0, 3, 1], 3)):
        made, _ = histograms(threads=threads)
        result = made.run("train", {}, {"server-round": 2}, order)
        draws.append(dict(zip(order, result.records["histogram"]["draw"].tolist(), strict=True)))
    assert draws[0] == draws[1]
    assert len(set(draws[0].values())) == 5
    made, _ = histograms()
    other = made.run("train", {}, {"server-round": 3}, [0]).records["histogram"]["draw"]
    assert float(other[0]) != draws[0][0]


def test_a_direct_client_that_fails_fails_alone() -> None:
    made, _ = histograms()
    config = {"fail-at": RAGGED[1], "short-at": RAGGED[3]}
    result = made.run("train", {}, config, range(5))
    assert result.good == [0, 2, 4]
    assert result.errors[1].startswith("KeyError")
    assert "differ from the other replies" in result.errors[3]
    assert 1 not in made.states
    assert 3 not in made.states


def test_a_direct_client_does_not_evaluate() -> None:
    made, _ = histograms()
    with pytest.raises(RunFailed, match="Histogram does not evaluate"):
        made.run("evaluate", {}, {}, [0])


@pytest.mark.parametrize("chains", [0, 3])
@pytest.mark.parametrize("holdout", [0, 4])
def test_evaluation_is_brute_force(chains: int, holdout: int) -> None:
    data = federation(weighted=True, holdout=holdout)
    client = sgd(functional())
    made = cohorts(client, data, threads=2)
    strategy = FedAvg(FedAvgParams(chains=chains))
    arrays = start(client.model, strategy)
    config = {"chains": chains} if chains else {}
    result = made.run("evaluate", {"arrays": arrays}, config, [3, 0, 1])
    for i, client_id in enumerate([3, 0, 1]):
        rows = (data.holdouts or data.shards)[client_id]
        x, y = torch.from_numpy(data.train.x[rows]), torch.from_numpy(data.train.y[rows])
        weight = torch.from_numpy(data.train.weights()[rows])
        losses, hits = [], []
        for q in range(max(chains, 1)):
            member = {k: v[q] for k, v in arrays.items()} if chains else arrays
            logits = client.model.apply(member, x)
            per_row = -torch.log_softmax(logits, 1)[range(len(y)), y]
            losses.append(float((per_row * weight).sum() / weight.sum()))
            hits.append(float(((logits.argmax(1) == y) * weight).sum() / weight.sum()))
        assert float(result.metrics["loss"][i]) == pytest.approx(np.mean(losses), rel=1e-12)
        assert float(result.metrics["accuracy"][i]) == pytest.approx(np.mean(hits), rel=1e-12)
        assert float(result.metrics["num-examples"][i]) == len(rows)


def test_evaluation_is_cut_into_passes_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsim.grids import evaluate

    client = sgd(functional())
    records = {"arrays": client.model.initial()}
    whole = cohorts(client, federation()).run("evaluate", records, {}, range(5)).metrics
    monkeypatch.setattr(evaluate, "EVALUATION_ROWS", 4)
    cut = cohorts(client, federation()).run("evaluate", records, {}, range(5)).metrics
    for name, values in whole.items():
        torch.testing.assert_close(cut[name], values, rtol=1e-13, atol=0)


def test_clients_without_rows_change_nothing() -> None:
    client = sgd(functional(), batch_size=4)
    with_empty = run(client, federation((7, 0, 12)), 2).arrays
    without = run(client, federation((7, 0, 12)), 2, path="one_by_one").arrays
    assert distance(with_empty, without) <= 1e-9
    made = cohorts(client, federation((7, 0, 12)))
    result = made.run("train", {"arrays": client.model.initial()}, {"server-round": 1}, [1])
    assert distance(at(result.records["arrays"], 0), client.model.initial()) == 0
    assert result.metrics["num-examples"].tolist() == [0]


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_clients_without_rows_have_no_learning_rates_and_reply(path: str) -> None:
    schedule = {"name": "StepLR", "per": "step", "params": {"step_size": 1}}
    client = sgd(functional(), batch_size=4, schedule=schedule)
    made = cohorts(client, federation((7, 0, 12)), path=path, chunk=1)
    records = {"arrays": client.model.initial()}
    result = made.run("train", records, {"server-round": 1}, range(3))
    assert result.errors == {}
    assert distance(at(result.records["arrays"], 1), client.model.initial()) == 0


def test_gradients_are_counted() -> None:
    client = sgd(functional(), batch_size=4, epochs=3)
    made = cohorts(client, federation())
    result = made.run("train", {"arrays": client.model.initial()}, {"server-round": 1}, range(5))
    assert result.metrics["gradients"].tolist() == [3 * n for n in RAGGED]
    assert result.metrics["train_loss"].isfinite().all()


def test_clients_whose_plans_differ_in_form_are_mapped_in_blocks_of_their_own() -> None:
    class Uneven(SGD):
        def plan(self, n_examples: int, config: Any) -> Plan:
            """Small clients take all their rows at once."""
            if n_examples < 10:
                return replace(super().plan(n_examples, config), batching=Batching("full"))
            return super().plan(n_examples, config)

    client = Uneven(SGDParams(lr=0.1, batch_size=4), functional(), classification())
    mapped = cohorts(client, federation(), path="mapped")
    records = {"arrays": client.model.initial()}
    found = mapped.run("train", records, {"server-round": 1}, range(5))
    alone = cohorts(client, federation(), path="one_by_one")
    expected = alone.run("train", records, {"server-round": 1}, range(5))
    assert mapped.bounds["train"] == [3, 2]
    for i in range(5):
        assert distance(at(found.records["arrays"], i), at(expected.records["arrays"], i)) <= 1e-12
