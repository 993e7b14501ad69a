"""Replies averaged as they come: the same means, checks and counts as with every reply at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.clients.base import Batching, Client, Inputs, Plan, Reply
from fedsim.errors import Params, RunFailed
from fedsim.grids.collect import CohortResult, Numbers, joined
from fedsim.grids.execution import LEAVES
from fedsim.means import weighted_mean
from fedsim.messages import Arrays, Reduction, Replies, to_record
from fedsim.models import build_task
from fedsim.models.tasks import ClassificationParams
from fedsim.server.check import check_stack
from fedsim.strategies.base import ReplySchema, Strategy, shapes_of
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.strategies.sghmc import SGHMC
from tests.engines.toys import cohorts, distance, federation, functional
from tests.engines.toys import sgd as make_sgd

SIZES = (7, 1, 30, 12, 3, 9, 9, 0, 14)


class Poisoned(Client):
    """Adds its id to what it gets; client 2 replies with NaN, client 5 with a negative weight."""

    def plan(self, n_examples: int, config: Any) -> Plan:
        """Needs no data."""
        return Plan(steps=0, batching=Batching("none"))

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> Any:
        """Returns the arrays and the weight."""
        identity, n = inputs.scalars["partition-id"], inputs.scalars["num-examples"]
        arrays = {k: v + identity for k, v in records["arrays"].items()}
        arrays = {k: torch.where(identity == 2, torch.nan, v) for k, v in arrays.items()}
        return arrays, torch.where(identity == 5, -n, n)

    def finish(self, state: Any) -> tuple[Reply, Arrays]:
        """Sends them."""
        arrays, n = state
        return Reply({"arrays": arrays}, {"num-examples": n}), {}


def reduction(arrays: Arrays, strategy: Strategy | None = None) -> Reduction:
    """Returns what the round loop would give the engine."""
    record = to_record(arrays)
    schema = ReplySchema({"arrays": shapes_of(record)})
    weights = (strategy or FedAvg(FedAvgParams())).weights
    return Reduction(lambda replies, all_: check_stack(replies, schema, record, all_), weights)


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_streamed_is_the_mean_of_all(path: str, chunk: int) -> None:
    client = make_sgd(functional(), batch_size=4)
    arrays = client.model.initial()
    config = {"server-round": 1}
    ids = range(len(SIZES))
    made = cohorts(client, federation(SIZES), path=path, chunk=chunk, threads=2)
    kept = made.run("train", {"arrays": arrays}, config, ids)
    streamed = made.run("train", {"arrays": arrays}, config, ids, reduction(arrays))
    assert not kept.reduced
    assert streamed.reduced
    assert streamed.records == {}
    assert streamed.good == kept.good == list(ids)
    for name, values in kept.metrics.items():
        assert torch.equal(streamed.metrics[name], values)
    expected = weighted_mean(kept.records["arrays"], kept.metrics["num-examples"])
    assert streamed.means is not None
    assert distance(streamed.means["arrays"], expected) <= 1e-13
    numbers = sum(t.numel() * t.element_size() for t in kept.records["arrays"].values())
    assert streamed.bytes_up == numbers


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_bad_replies_stay_out_of_the_mean(path: str) -> None:
    client = Poisoned(Params(), functional(), build_task(ClassificationParams()))
    arrays = client.model.initial()
    made = cohorts(client, federation(SIZES), path=path, chunk=2)
    streamed = made.run("train", {"arrays": arrays}, {}, range(9), reduction(arrays))
    assert streamed.good == [0, 1, 3, 4, 6, 7, 8]
    assert streamed.errors[2].startswith("NaN or Inf in array arrays/")
    assert "negative" in streamed.errors[5]
    good = [(i, SIZES[i]) for i in streamed.good]
    shift = sum(i * n for i, n in good) / sum(n for _, n in good)
    assert streamed.means is not None
    moved = {k: v + shift for k, v in arrays.items()}
    assert distance(streamed.means["arrays"], moved) <= 1e-13


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_bits_do_not_depend_on_threads(path: str) -> None:
    client = make_sgd(functional(), batch_size=4)
    arrays = client.model.initial()
    found = []
    for threads in (1, 2, 5):
        made = cohorts(client, federation(SIZES), path=path, chunk=2, threads=threads)
        done = made.run(
            "train", {"arrays": arrays}, {"server-round": 1}, range(9), reduction(arrays)
        )
        assert done.means is not None
        found.append(done.means["arrays"])
    for other in found[1:]:
        assert all(torch.equal(other[k], v) for k, v in found[0].items())


def test_no_weight_at_all_is_said() -> None:
    client = make_sgd(functional(), batch_size=4)
    arrays = client.model.initial()
    made = cohorts(client, federation((3, 0)))
    done = made.run("train", {"arrays": arrays}, {"server-round": 1}, [1], reduction(arrays))
    assert done.reduced
    assert done.means is None
    replies = Replies((3,), {}, done.metrics, reduced=True)
    with pytest.raises(RunFailed, match="every reply has weight 0"):
        replies.mean("arrays", done.metrics["num-examples"])
    with pytest.raises(TypeError, match="none of them was kept"):
        replies[0]


def test_more_clients_than_leaves_one_by_one() -> None:
    count = 2 * LEAVES + 3
    client = Poisoned(Params(), functional(), build_task(ClassificationParams()))
    arrays = client.model.initial()
    made = cohorts(client, federation((1,) * count), path="one_by_one")
    done = made.run("train", {"arrays": arrays}, {}, range(count), reduction(arrays))
    good = [i for i in range(count) if i not in (2, 5)]
    assert done.good == good
    assert done.means is not None
    moved = {k: v + sum(good) / len(good) for k, v in arrays.items()}
    assert distance(done.means["arrays"], moved) <= 1e-12


def test_a_strategy_with_an_aggregate_of_its_own_sees_every_reply() -> None:
    class Own(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return super().aggregate_train(server_round, replies)

    class Still(Own):
        pass

    class Streams(FedAvg):
        streams = True

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return super().aggregate_train(server_round, replies)

    class Weighs(FedAvg):
        def weights(self, replies: Replies) -> torch.Tensor:
            n = super().weights(replies)
            return n.clamp_max(n.median())  # which no part of the cohort tells

    class Mixin:
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return None, None

    class Mixed(Mixin, FedAvg):
        pass

    def asks(kind: type[FedAvg]) -> bool:
        (exchange,) = kind(FedAvgParams()).exchanges(1)
        return exchange.weights is not None

    assert asks(FedAvg)
    assert asks(Streams)
    assert not asks(Own)
    assert not asks(Still)
    assert not asks(Mixed)
    assert not asks(Weighs)
    assert SGHMC.streams


def test_numbers_are_those_that_were_taken() -> None:
    numbers = Numbers()
    loss = torch.tensor([0.1, 0.2], dtype=torch.float64)
    numbers.add(CohortResult([4, 2], {}, {"loss": loss}, {3: "NaN"}, bytes_up=8))
    numbers.add(CohortResult([0], {}, {"loss": loss[:1]}, bytes_up=4))
    numbers.add(CohortResult([1], {}, {"loss": loss[1:], "extra": loss[:1]}))
    done = joined(numbers.results(), averaged=True)
    assert done.good == [0, 1, 2, 4]
    assert done.metrics.keys() == {"loss"}
    assert done.metrics["loss"].tolist() == [0.1, 0.2, 0.2, 0.1]
    assert (done.errors, done.bytes_up) == ({3: "NaN"}, 12)
