"""Blocks follow from a device's memory; the device is made up, and what they take is measured."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedsim import Scenario, resume, run
from fedsim.clients.base import Client
from fedsim.data import FederatedData
from fedsim.grids.actor import Place
from fedsim.grids.cohort import Cohorts
from fedsim.grids.execute import run_mapped
from fedsim.grids.execution import Execution
from fedsim.grids.lanes import GATHER_FLOATS, Block, Stream
from fedsim.grids.ray_cohorts import least_memory
from fedsim.grids.record import PlainMode, record
from fedsim.grids.room import USABLE, fitting, peak_bytes
from fedsim.grids.shards import Shards
from fedsim.grids.trace import TraceCache
from fedsim.grids.worker import Order
from fedsim.models import FunctionalModel
from fedsim.runs import RunWriter
from tests.e2e.scenarios import SMALL
from tests.e2e.scenarios import same_bits as same_run
from tests.engines.toys import FEATURES, cohorts, federation, functional, same_bits, sgd

BYTES = 8
"""Of a float64."""


def peak(function: Any, *inputs: Tensor) -> int:
    return peak_bytes(record(lambda *given: [function(*given)], inputs).graph)


def test_bytes_alive_at_once_by_hand() -> None:
    x = torch.zeros(100, dtype=torch.float64)
    assert peak(lambda x: x + 1, x) == 100 * BYTES
    assert peak(lambda x: ((x + 1) * 2 - 1).exp(), x) == 200 * BYTES  # the one before is needed
    assert peak(lambda x: (x + 1) * (x + 2) * (x + 3), x) == 300 * BYTES
    assert peak(lambda x: (x + 1).view(10, 10).t(), x) == 100 * BYTES  # views
    assert peak(lambda x: (x + 1).sort()[0] + 1, x) == 300 * BYTES  # values and int64 positions


def order_of(client: Client) -> Order:
    return Order("train", {"arrays": client.model.initial()}, {"server-round": 1})


def lane_of(client: Client, data: FederatedData, partition: int = 2) -> int:
    worker = cohorts(client, data).worker
    order = order_of(client)
    (plan,) = worker.plans(client, order, [partition])
    return worker.lane_bytes(client, order, plan, partition)


def wide(hidden: int = 200) -> FunctionalModel:
    layers = nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, 3))
    return FunctionalModel(layers.double(), torch.zeros(1, FEATURES, dtype=torch.float64))


def test_a_client_takes_what_its_model_optimizer_and_minibatch_take() -> None:
    model, data = wide(), federation((200,) * 3)
    parameters = BYTES * model.num_parameters
    plain = lane_of(sgd(model, batch_size=1), data)
    assert plain >= 2 * parameters  # where it is and where it goes
    momentum = {"name": "sgd", "momentum": 0.9}
    assert lane_of(sgd(model, batch_size=1, optimizer=momentum), data) >= plain + parameters
    adam = lane_of(sgd(model, batch_size=1, optimizer={"name": "adam"}), data)
    assert adam >= plain + 2 * parameters
    # activations of both layers, at least, of each example
    assert lane_of(sgd(model, batch_size=150), data) >= plain + 100 * 203 * BYTES
    # all of a client's rows are its minibatch
    of_few, of_many = (
        lane_of(sgd(model, batch_size=None), federation((n,) * 3)) for n in (10, 200)
    )
    assert of_many > of_few + 100 * 203 * BYTES
    # a pass that is longer takes no more
    assert lane_of(sgd(model, batch_size=1, epochs=9), data) == plain


class Live(PlainMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of the tensors that are made and not freed: what is really taken."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: Any = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if self.known.get(id(storage)) is not storage:
                self.known[id(storage)] = storage
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, count: int) -> None:
        self.now -= count


@pytest.mark.parametrize(
    "params",
    [
        {"batch_size": 20},
        {"batch_size": 20, "optimizer": {"name": "adam"}},
        {"batch_size": None, "steps": 3},
    ],
    ids=["sgd", "adam", "full"],
)
def test_a_block_takes_about_what_was_counted(params: Any) -> None:
    """Less than twice of it, which is what `USABLE` leaves room for; and not much less."""
    clients = 12
    data = federation((60,) * clients)
    client = sgd(wide(), **params)
    engine = cohorts(client, data)
    order = order_of(client)
    plans = engine.worker.plans(client, order, range(clients))
    like = {"arrays": {name: tuple(t.shape) for name, t in order.records["arrays"].items()}}
    with Live() as live:
        block = Block(plans, range(clients), engine.shards, Stream(0, 1, "train"), like)
        run_mapped(client, block, order.records, {}, TraceCache(False))
    counted = clients * lane_of(client, data)
    assert 0.4 * counted < live.peak < counted / USABLE


def test_what_fits_follows_from_memory_and_share() -> None:
    gathered = 4 * GATHER_FLOATS
    half = int(USABLE * 10**9)
    assert fitting(10**9, 0, 10**6, 0, 4) == (half - gathered) // 10**6
    assert fitting(10**9, 10**8, 10**6, 4, 4) == (half - gathered - 10**8) // (4 * 10**6)
    assert fitting(10**6, 0, 10**6, 0, 4) == 1  # it is tried; halving can do no more
    places = [Place("a", 1, "n", "cuda (X)", 8 * 10**9), Place("b", 2, "m", "cuda (Y)", 6 * 10**9)]
    assert least_memory(places, 0.25) == 1_500_000_000  # all workers have the same blocks
    assert least_memory(places, 2.0) == 6_000_000_000
    assert least_memory([*places, Place("c", 3, "o", "cpu")], 0.0) == 0


def memory_for(client: Client, data: FederatedData, clients: int) -> int:
    """Returns the memory of a device on which so many clients fit into a block."""
    table = Shards(data, torch.float64).sample.bytes
    fixed = table + client.model.bytes + BYTES * GATHER_FLOATS
    return int((fixed + clients * lane_of(client, data)) / USABLE) + 1


def on_device(client: Client, data: FederatedData, memory: int, chunk: int = 0) -> Cohorts:
    execution = Execution("mapped", chunk, 2, "float64", "cpu", False, memory=memory)
    return Cohorts(client, Shards(data, torch.float64), execution, 0)


@pytest.mark.parametrize(("fit", "blocks"), [(3, [3, 2]), (2, [2, 2, 1]), (5, [5]), (1, [1] * 5)])
def test_blocks_are_as_large_as_fits(fit: int, blocks: list[int]) -> None:
    client, data = sgd(functional(), batch_size=4), federation()
    made = on_device(client, data, memory_for(client, data, fit))
    order = order_of(client)
    found = made.run("train", order.records, order.config, range(5))
    facts = made.record()
    assert facts["blocks"] == {"train": blocks}
    assert facts["lane_bytes"] == {"train": lane_of(client, data)}
    # the blocks are all that it changes
    same = cohorts(client, data, chunk=blocks[0])
    expected = same.run("train", order.records, order.config, range(5))
    assert same_bits(found.records["arrays"], expected.records["arrays"])
    # and what the scenario says comes first
    told = on_device(client, data, memory_for(client, data, fit), chunk=4)
    told.run("train", order.records, order.config, range(5))
    assert told.record()["blocks"] == {"train": [3, 2]}


def test_a_run_records_the_memory_and_keeps_it_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    scenario = Scenario.load(tmp_path / "small.yaml", ["rounds=4"])
    memory = [400 * 10**6]
    monkeypatch.setattr("fedsim.setup.device_memory", lambda device: memory[0])
    whole = run(scenario, out=tmp_path / "whole")
    assert whole.engine["memory"] == memory[0]
    assert whole.engine["lane_bytes"]["train"] > 0
    ends = RunWriter.end_round

    def interrupt(self: RunWriter, round: int) -> None:
        ends(self, round)
        if round == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunWriter, "end_round", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(scenario, out=tmp_path / "cut")
    memory[0] = 2 * 4 * GATHER_FLOATS  # of another GPU, which has room for one client in a block
    found = resume("latest", out=tmp_path / "cut")
    assert found.engine["memory"] == 400 * 10**6
    assert found.engine["blocks"] == whole.engine["blocks"]
    same_run(found, whole)
    other = run(scenario, out=tmp_path / "other")
    assert other.engine["blocks"] == {"train": [1] * 4}
