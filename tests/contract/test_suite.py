"""The contract suite: each of its checks passes what is sound, and fails something broken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord

from fedsim.clients.sgd import SGD, SGDParams
from fedsim.errors import RunFailed
from fedsim.grids.inline import InlineGrid
from fedsim.messages import Arrays, Replies, stack, to_record, to_tensors
from fedsim.strategies.base import ReplySchema, mean_metrics
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.testing import ENGINES, Engine, StrategyContract, inline
from fedsim.testing.federation import classification
from tests.engines.toys import cohorts

MAPPED = next(iter(ENGINES))
Aggregated = tuple[ArrayRecord | None, MetricRecord | None]
CALLS = count()


class Altered(FedAvg):
    """FedAvg whose mean is altered on its way out."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        mean = to_tensors(arrays)
        return to_record({k: self.alter(v, server_round) for k, v in mean.items()}), metrics

    def alter(self, mean: torch.Tensor, server_round: int) -> torch.Tensor:
        return mean


class Unrepeatable(Altered):
    """Another result each time."""

    def alter(self, mean: torch.Tensor, server_round: int) -> torch.Tensor:
        return mean + 1e-6 * next(CALLS)


class GlobalNumPy(Altered):
    """Noise from NumPy's global generator."""

    def alter(self, mean: torch.Tensor, server_round: int) -> torch.Tensor:
        return mean + 1e-3 * float(np.random.standard_normal())  # noqa: NPY002


class GlobalTorch(Altered):
    """Noise from torch's global generator."""

    def alter(self, mean: torch.Tensor, server_round: int) -> torch.Tensor:
        return mean + 1e-3 * torch.randn(())


class Wasteful(Altered):
    """Uses a global generator up, and nothing of what it gives."""

    def alter(self, mean: torch.Tensor, server_round: int) -> torch.Tensor:
        torch.randn(())
        return mean


class Shrinking(Altered):
    """No identity for one client."""

    def alter(self, mean: torch.Tensor, server_round: int) -> torch.Tensor:
        return 0.99 * mean


class Forgetful(Altered):
    """Remembers what it does not save."""

    before = 0.0

    def alter(self, mean: torch.Tensor, server_round: int) -> torch.Tensor:
        self.before = 0.5 * self.before + 0.01
        return mean + self.before


class Lazy(Altered):
    """Trains nobody."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        return None, None


class FirstCome(FedAvg):
    """Takes whoever stands first."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        first = next(iter(replies))
        return first.content.array_records["arrays"], None


class NeedsStack(FedAvg):
    """Adds something where replies are not a stack."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        bonus = 0.0 if isinstance(replies, Replies) else 0.1
        stacked = stack(replies)
        mean = stacked.mean("arrays", self.weights(stacked))
        return to_record({k: v + bonus for k, v in mean.items()}), mean_metrics(stacked)


class NeedsTensors(FedAvg):
    """Adds something where arrays are bytes."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        replies = list(replies)
        first = replies[0].content.array_records["arrays"]
        bonus = 0.0 if all(hasattr(a, "tensor") for a in first.values()) else 0.1
        stacked = stack(replies)
        mean = stacked.mean("arrays", self.weights(stacked))
        return to_record({k: v + bonus for k, v in mean.items()}), mean_metrics(stacked)


class Trusting(FedAvg):
    """Asks for no weight, and goes on without it."""

    def reply_schema(self, arrays: ArrayRecord) -> ReplySchema:
        strict = super().reply_schema(arrays)
        return ReplySchema(strict.records, frozenset(), "nothing")

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        stacked = stack(replies)
        ones = torch.ones(len(stacked.node_ids), dtype=torch.float64)
        return to_record(stacked.mean("arrays", ones)), None


class Flat(Altered):
    """Returns other shapes."""

    def alter(self, mean: torch.Tensor, server_round: int) -> torch.Tensor:
        return mean.flatten()


class Drifting(SGD):
    """A client that remembers how often it was asked, and starts the further away."""

    def initial_client_state(self) -> Arrays:
        return {"drift": torch.zeros((), dtype=next(iter(self.model.initial().values())).dtype)}

    def init(self, records: Any, client_state: Arrays, inputs: Any) -> Any:
        state = super().init(records, client_state, inputs)
        moved = {k: v + client_state["drift"] for k, v in state["params"].items()}
        return state | {"params": moved}

    def finish(self, state: Any) -> Any:
        reply, kept = super().finish(state)
        return reply, {"drift": kept["drift"] + 0.01}


def suite(
    strategy: type[FedAvg] = FedAvg,
    engines: Mapping[str, Engine] = ENGINES,
    client: type[SGD] = SGD,
) -> StrategyContract:
    class Suite(StrategyContract):
        def make(self) -> FedAvg:
            return strategy(FedAvgParams())

        def make_client(self, strategy: Any, model: Any) -> Any:
            return client(SGDParams(batch_size=8, lr=0.2), model, classification())

    Suite.engines = engines
    return Suite()


CHECKS = [name for name in vars(StrategyContract) if name.startswith("test_")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("check", CHECKS)
def test_what_is_sound_passes(check: str, engine: str) -> None:
    getattr(suite(), check)(engine)


# What is broken, the check that finds it, and what that says
BROKEN: list[tuple[type[FedAvg], str, str]] = [
    (Unrepeatable, "test_the_same_seed_is_the_same_run", "two runs of one seed differ"),
    (Lazy, "test_the_same_seed_is_the_same_run", "the parameters stay where they were"),
    (GlobalNumPy, "test_global_generators_neither_matter_nor_change", "global generator"),
    (GlobalTorch, "test_global_generators_neither_matter_nor_change", "global generator"),
    (Wasteful, "test_global_generators_neither_matter_nor_change", "was used up"),
    (FirstCome, "test_the_order_of_clients_does_not_matter", "another order give another"),
    (Shrinking, "test_a_single_clients_reply_is_the_result", "only reply is not the result"),
    (NeedsStack, "test_what_travels_as_bytes_is_the_same", "another result than a stack"),
    (NeedsTensors, "test_what_travels_as_bytes_is_the_same", "sent as bytes give another"),
    (Forgetful, "test_a_resumed_run_ends_in_the_same_bits", "resumed after round 1 on inline"),
    (Flat, "test_parameters_keep_their_dtype_and_shape", "arrays of other shapes"),
    (Trusting, "test_poisoned_replies_are_refused", "no weight, negative weight were taken"),
]


@pytest.mark.parametrize(("strategy", "check", "words"), BROKEN)
def test_what_is_broken_fails(strategy: type[FedAvg], check: str, words: str) -> None:
    with pytest.raises((AssertionError, RunFailed), match=words):
        getattr(suite(strategy), check)(MAPPED)


def test_every_check_is_able_to_fail() -> None:
    of_engines = {"test_the_numbers_are_those_of_other_engines"}
    assert {check for _, check, _ in BROKEN} | of_engines == set(CHECKS)


def seeded(seed: int) -> Engine:
    """An engine that numbers its streams by another seed: other minibatches."""

    def make(client: Any, data: Any, dtype: str, workers: int) -> InlineGrid:
        engine = cohorts(client, data, dtype=dtype, threads=workers, seed=seed)
        return InlineGrid(engine, len(data.shards))

    return Engine(make)


def by_workers() -> Engine:
    """An engine whose results depend on the number of workers."""

    def make(client: Any, data: Any, dtype: str, workers: int) -> InlineGrid:
        return seeded(workers - 1).make(client, data, dtype, workers)  # type: ignore[return-value]

    return Engine(make)


def losing_states() -> Engine:
    """An engine that saves nothing of its clients."""

    class Forgets(InlineGrid):
        def state_dict(self) -> Any:
            return {}, {}

    def make(client: Any, data: Any, dtype: str, workers: int) -> InlineGrid:
        return Forgets(cohorts(client, data, dtype=dtype), len(data.shards))

    return Engine(make)


@pytest.mark.parametrize("engine", ENGINES)
def test_clients_that_remember_go_on_where_they_were(engine: str) -> None:
    suite(client=Drifting).test_a_resumed_run_ends_in_the_same_bits(engine)
    with pytest.raises(AssertionError, match="resumed after round 1 on a: another result"):
        suite(
            engines={"a": losing_states()}, client=Drifting
        ).test_a_resumed_run_ends_in_the_same_bits("a")


@pytest.mark.parametrize(
    ("engines", "check", "words"),
    [
        ({"a": inline("mapped"), "b": seeded(1)}, "test_the_numbers_are_those_of_other_engines",
         "b is .* away from a"),
        ({"b": by_workers()}, "test_the_same_seed_is_the_same_run", "two runs of one seed differ"),
        ({"a": inline("mapped"), "b": Engine(inline("one_by_one").make, same_bits_as="a")},
         "test_the_numbers_are_those_of_other_engines", "other bits than on a"),
    ],
)  # fmt: skip
def test_an_engine_that_is_broken_fails(
    engines: Mapping[str, Engine], check: str, words: str
) -> None:
    with pytest.raises(AssertionError, match=words):
        getattr(suite(engines=engines), check)("b")


def test_an_engine_of_the_same_bits_passes() -> None:
    engines = {"a": inline("mapped"), "b": Engine(inline("mapped").make, same_bits_as="a")}
    for check in CHECKS:
        getattr(suite(engines=engines), check)("b")


def test_pytest_runs_it_for_a_plug_in(tmp_path: Path) -> None:
    (tmp_path / "test_plug_in.py").write_text(
        """\
from fedsim.strategies.fedavg import FedAvg, FedAvgParams
from fedsim.testing import StrategyContract, inline

StrategyContract.engines = {"only": inline("mapped")}

class Half(FedAvg):
    def aggregate_train(self, server_round, replies):
        return None, None

class TestSound(StrategyContract):
    def make(self):
        return FedAvg(FedAvgParams())

class TestBroken(StrategyContract):
    identity = False
    def make(self):
        return Half(FedAvgParams())

class TestForgotten(StrategyContract):
    sizes = (3, 3)
"""
    )
    chosen = "TestSound or same_seed or single_client"  # of the others, one of each kind
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-rA",
            "-k",
            chosen,
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    lines = done.stdout.splitlines()
    passed = [line for line in lines if line.startswith("PASSED")]
    assert sum("TestSound" in line for line in passed) == len(CHECKS)
    assert any("the parameters stay where they were" in line for line in lines)
    assert any("say which strategy is tested" in line for line in lines)
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    assert any("more than to combine replies" in line for line in skipped)
    assert done.returncode == 1


def test_fedsim_does_not_import_pytest() -> None:
    code = "import sys, fedsim.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
