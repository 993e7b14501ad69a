"""A worker computes leaves: who else does, and with how many threads, changes nothing."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.clients.base import Batch, Batching, Client, Config, DirectClient, Inputs, Plan, Reply
from fedsim.clients.sgd import SGD, SGDParams
from fedsim.errors import Params
from fedsim.grids import evaluate as evaluate_module
from fedsim.grids import worker as worker_module
from fedsim.grids.ray_cohorts import divided
from fedsim.means import MeanTree, as_new
from fedsim.messages import Arrays, Reduction, Replies, to_record
from fedsim.runs import exact
from fedsim.server.check import StackCheck
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from tests.engines.toys import (
    classification,
    cohorts,
    distance,
    federation,
    functional,
    run,
    same_bits,
    sgd,
)


def reduction(arrays: Arrays) -> Reduction:
    strategy = FedAvg(FedAvgParams())
    weights = strategy.streamed_weights()
    assert weights is not None
    return Reduction(StackCheck(strategy.reply_schema(to_record(arrays)), None), weights)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("sizes", [(600,), (150, 140), (7, 1, 30, 12, 3), (40,) * 70])
@pytest.mark.parametrize("batch_size", [None, 16])
def test_threads_change_no_bit(sizes: Sequence[int], batch_size: int | None, trace: bool) -> None:
    client = sgd(functional(dtype=torch.float32), batch_size=batch_size, lr=0.1)
    one, two = (
        run(client, federation(sizes), 2, threads=threads, dtype="float32", trace=trace).arrays
        for threads in (1, 2)
    )
    assert same_bits(one, two)


@pytest.mark.parametrize("chunk", [0, 3])
def test_a_block_that_does_not_fit_is_halved(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    client = sgd(functional(), batch_size=4)
    expected = run(client, federation(), 2, chunk=chunk).arrays
    computed = worker_module.run_mapped

    def small(client: Any, block: Any, *rest: Any) -> Any:
        if len(block.plans) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return computed(client, block, *rest)

    monkeypatch.setattr(worker_module, "run_mapped", small)
    made = cohorts(client, federation(), chunk=chunk)
    state = made.run("train", {"arrays": client.model.initial()}, {"server-round": 1}, range(5))
    assert state.good == [0, 1, 2, 3, 4]
    assert made.record()["halved"] == ({"3": 1, "5": 1} if not chunk else {"3": 1})
    exact.dumps(made.record())  # as a run's folder has it
    assert distance(run(client, federation(), 2, chunk=chunk).arrays, expected) <= 1e-12

    def never(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker_module, "run_mapped", never)
    with pytest.raises(Exception, match="OutOfMemoryError: CUDA out of memory"):
        made.run("train", {"arrays": client.model.initial()}, {"server-round": 1}, range(5))


class Counting(Client):
    """Keeps how often it was asked; the second client's second reply is NaN."""

    Params = Params

    def initial_client_state(self) -> Arrays:
        return {"asked": torch.zeros((), dtype=torch.float64)}

    def plan(self, n_examples: int, config: Config) -> Plan:
        return Plan(0, Batching("none"))

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> Any:
        asked = client_state["asked"] + 1
        bad = (inputs.scalars["partition-id"] == 1) & (asked == 2)
        w = torch.where(bad, torch.nan, records["arrays"]["w"] + asked)
        return w, asked, inputs.scalars["num-examples"]

    def finish(self, state: Any) -> tuple[Reply, Arrays]:
        w, asked, n = state
        return Reply({"arrays": {"w": w}}, {"num-examples": n}), {"asked": asked}


@pytest.mark.parametrize("path", ["mapped", "one_by_one"])
def test_who_is_rejected_keeps_what_it_kept_before(path: str) -> None:
    made = cohorts(Counting(Params(), functional(), None), federation(), path=path)  # type: ignore[arg-type]
    arrays = {"w": torch.zeros(2, dtype=torch.float64)}
    for server_round in (1, 2):
        config = {"server-round": server_round}
        result = made.run("train", {"arrays": arrays}, config, range(5), reduction(arrays))
    assert list(result.errors) == [1]
    assert [float(made.states[i]["asked"]) for i in range(5)] == [2, 1, 2, 2, 2]


class Shaped(DirectClient):
    """Replies with an array as long as its partition says."""

    Params = Params
    lengths: Sequence[int] = (3, 2, 2, 2, 2)

    def train(
        self, message_type: str, records: Any, config: Any, shard: Batch, state: Any, rng: Any
    ) -> tuple[Reply, Arrays]:
        length = self.lengths[len(shard.x) % 5]
        w = torch.ones(length, dtype=torch.float64)
        return Reply({"arrays": {"w": w}}, {"num-examples": 1.0}), {}  # type: ignore[dict-item]


def test_a_bad_first_reply_is_the_only_one_rejected() -> None:
    made = cohorts(Shaped(Params(), functional(), None), federation((5, 6, 7, 8, 9)))  # type: ignore[arg-type]
    arrays = {"w": torch.zeros(2, dtype=torch.float64)}
    result = made.run("train", {"arrays": arrays}, {}, range(5), reduction(arrays))
    assert result.good == [1, 2, 3, 4]
    assert "shape" in result.errors[0]
    assert result.means is not None
    assert torch.equal(result.means["arrays"]["w"], torch.ones(2, dtype=torch.float64))


def test_what_workers_are_told_of_a_reduction_is_data() -> None:
    arrays = {"w": torch.arange(3.0)}
    sent = pickle.loads(pickle.dumps(reduction(arrays)))
    stacked = {"arrays": {"w": torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 0, 0]])}}
    replies = Replies((2, 3), stacked, {"num-examples": torch.tensor([4.0, 5.0]).double()})
    checked = sent.check(replies, True)
    assert checked.node_ids == (2,)
    assert sent.weights(checked).tolist() == [4.0]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=33),
    st.lists(st.integers(0, 33), max_size=4),
)
def test_trees_of_parts_make_the_whole_tree(weights: list[int], cuts: list[int]) -> None:
    rng = np.random.default_rng(len(weights))
    leaves = [torch.from_numpy(rng.standard_normal(5).astype(np.float32)) for _ in weights]
    whole = MeanTree(len(leaves))
    for i, (leaf, weight) in enumerate(zip(leaves, weights, strict=True)):
        whole.add(i, {"a": {"w": leaf}}, float(weight))
    joined = MeanTree(len(leaves))
    edges = sorted({0, len(leaves), *(min(cut, len(leaves)) for cut in cuts)})
    for start, stop in reversed(list(pairwise(edges))):
        part = MeanTree(len(leaves))
        part.like({"a": {"w": leaves[0]}})
        for i in range(start, stop):
            part.add(i, {"a": {"w": leaves[i].clone()}}, float(weights[i]))
        joined.graft(part.parts())
    expected, found = whole.result(), joined.result()
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert torch.equal(found["a"]["w"], expected["a"]["w"])


def test_tensors_are_laid_out_as_new_ones() -> None:
    odd = torch.empty_strided((4, 1, 3, 3), (9, 1, 3, 1)).normal_()
    assert odd.is_contiguous()  # an axis of length 1 may have any stride
    assert as_new(odd).stride() == torch.empty(4, 1, 3, 3).stride()
    assert torch.equal(as_new(odd), odd)
    plain = torch.randn(2, 3)
    assert as_new(plain) is plain
    assert as_new(plain.T).stride() == (2, 1)


@given(st.permutations([7, 20, 33, 41]))
def test_replies_come_in_the_order_of_the_cohort(sizes: list[int]) -> None:
    client = sgd(functional(), batch_size=16, lr=0.1)
    made = cohorts(client, federation(tuple(sizes)))
    result = made.run("train", {"arrays": client.model.initial()}, {"server-round": 1}, range(4))
    assert result.good == [0, 1, 2, 3]
    assert result.metrics["num-examples"].tolist() == sizes


class Just(Future[str]):
    """Is done at the very moment when the patience with it ends."""

    def result(self, timeout: float | None = None) -> str:
        if timeout is not None:
            self.set_result("a reply")
            raise TimeoutError
        return super().result()


def test_a_reply_that_comes_with_the_deadline_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = cohorts(sgd(functional(), lr=0.1), federation()).worker
    monkeypatch.setattr(worker._pool, "submit", lambda work, job: Just())
    assert list(worker._in_order(str, [1], 1.0)) == ["a reply"]
    assert not worker.stuck


class Odd(DirectClient):
    """Partition 3 sends another metric beside, partition 0 an array of another shape if asked."""

    Params = Params

    def train(
        self, message_type: str, records: Any, config: Config, shard: Batch, state: Any, rng: Any
    ) -> tuple[Reply, Arrays]:
        partition = len(shard.x) - 5
        w = torch.full((3 if partition == 0 and "odd" in config else 2,), float(partition))
        metrics: dict[str, Any] = {"num-examples": 1.0, "twice": 2.0 * partition}
        if partition == 3:
            metrics["more"] = 1.0
        return Reply({"arrays": {"w": w.double()}}, metrics), {}


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("config", [{}, {"odd": 1}])
def test_which_replies_are_taken_does_not_depend_on_who_computed_them(
    averaged: bool, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"w": torch.zeros(2, dtype=torch.float64)}
    wanted = reduction(arrays) if averaged else None

    def computed(workers: int) -> Any:
        made = cohorts(Odd(Params(), functional(), None), federation((5, 6, 7, 8, 9, 10)))  # type: ignore[arg-type]
        train = made.worker.train

        def spread(order: Any, shares: Any, *rest: Any) -> Any:
            outs = [train(order, mine, *rest) for mine in divided(shares, workers, lambda s: 1)]
            tree = MeanTree(order.leaves)
            for _, part in outs:
                tree.graft(part.parts())
            return [part for parts, _ in outs for part in parts], tree

        monkeypatch.setattr(made.worker, "train", spread)
        return made.run("train", {"arrays": arrays}, config, range(6), wanted)

    one = computed(1)
    for workers in (2, 3, 4, 6):
        other = computed(workers)
        assert (other.good, other.errors) == (one.good, one.errors)
        assert {k: v.tolist() for k, v in other.metrics.items()} == {
            k: v.tolist() for k, v in one.metrics.items()
        }
        if averaged:
            assert torch.equal(other.means["arrays"]["w"], one.means["arrays"]["w"])
    rejected = {0} if averaged and config else {1, 2, 3, 4, 5} if config else {3}
    assert set(one.errors) == (rejected if config or not averaged else set())
    assert one.metrics["twice"].tolist() == [2.0 * i for i in one.good]


class Hung(SGD):
    """Evaluates the marked rows for ever; of each client by itself."""

    hung = threading.Event()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.personalised = True

    def evaluate(self, records: dict[str, Arrays], client_state: Arrays, batch: Batch) -> Any:
        if bool((batch.y == 7).any()):
            self.hung.wait(30)
        return {"first": batch.x[:, 0]}


class HungTogether(Hung):
    """Evaluates rows of many clients by one call."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.personalised = False


@pytest.mark.parametrize(
    ("kind", "late", "deadline"), [(Hung, {2}, 3.0), (HungTogether, {0, 1, 2, 3, 4}, 0.6)]
)
def test_who_is_late_with_an_evaluation_fails_alone(
    kind: type[Hung], late: set[int], deadline: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, or with those whose rows are evaluated by the same call."""
    data = federation((3, 4, 5, 6, 7, 8))
    table = data.train
    table.y[data.shards[2][:1]] = 7
    monkeypatch.setattr(evaluate_module, "EVALUATION_ROWS", 24)
    client = kind(SGDParams(), functional(), classification())
    made = cohorts(client, data, path="one_by_one", threads=1)
    monkeypatch.setattr(made, "_evaluated", lambda order, *rest: made.worker.evaluate(
        replace(order, deadline=deadline), *rest, made.states))  # fmt: skip
    kind.hung.clear()
    found = made.run("evaluate", {"arrays": client.model.initial()}, {"server-round": 1}, range(6))
    kind.hung.set()
    assert found.errors == dict.fromkeys(late, f"no answer within {deadline:g} s (deadline)")
    assert found.good == [i for i in range(6) if i not in late]
    assert made.worker.stuck
    expected = [table.x[data.shards[i], 0].mean() for i in found.good]
    np.testing.assert_allclose(found.metrics["first"], expected, rtol=1e-12)
    assert found.metrics["num-examples"].tolist() == [i + 3 for i in found.good]
