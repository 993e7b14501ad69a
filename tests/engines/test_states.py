"""Clients' states: a plain dict of tensors is the oracle, whatever the budget."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.errors import RunFailed
from fedsim.grids import states as states_module
from fedsim.grids.states import ClientStates
from fedsim.messages import Arrays

FORMS: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [
    {"w": ((3, 2), torch.float32), "step": ((), torch.int64)},
    {"w": ((3, 2), torch.float32), "step": ((), torch.int64), "mask": ((5,), torch.bool)},
    {"half": ((7,), torch.bfloat16)},
    {"empty": ((0, 4), torch.float64)},
    {},
]


def made(form: int, number: int, lead: tuple[int, ...] = ()) -> Arrays:
    """Returns a state of this form, or several of them stacked, whose values tell `number`."""
    drawn = np.random.default_rng(number)
    return {
        name: torch.from_numpy(drawn.integers(0, 2**7, (*lead, *shape))).to(dtype)
        for name, (shape, dtype) in FORMS[form].items()
    }


def at(stacked: Arrays, row: int) -> Arrays:
    return {name: tensor[row] for name, tensor in stacked.items()}


def same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


PARTITIONS = st.lists(st.integers(0, 40), max_size=12)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["set", "scatter", "gather", "get", "reload"]),
        PARTITIONS,
        st.integers(0, len(FORMS) - 1),
    ),
    max_size=30,
)


@settings(max_examples=150)
@given(operations=OPERATIONS, budget=st.sampled_from([0, 1, 33, 100, 400, 10**6]))
def test_a_dict_is_the_oracle(operations: list[Any], budget: int) -> None:
    states, oracle = ClientStates(budget), dict[int, Arrays]()
    for number, (operation, partitions, form) in enumerate(operations):
        if operation == "set":
            for partition in partitions:
                states[partition] = oracle[partition] = made(form, number + partition)
        elif operation == "scatter":
            stacked = made(form, number, (len(partitions),))
            states.scatter(partitions, stacked)
            oracle |= {partition: at(stacked, i) for i, partition in enumerate(partitions)}
        elif operation == "gather":
            initial = made(form, number)
            kept = [oracle.get(p) for p in partitions]
            if all(k is None or shapes(k) == shapes(initial) for k in kept):
                found = states.gather(partitions, initial)
                for i, expected in enumerate(kept):
                    assert same(at(found, i), initial if expected is None else expected)
            else:
                with pytest.raises(RunFailed, match="names and shapes must stay the same"):
                    states.gather(partitions, initial)
        elif operation == "get":
            for partition in partitions:
                assert (partition in states) == (partition in oracle)
                assert same(states.get(partition, {}), oracle.get(partition, {}))
        else:
            tensors = states.state_dict()
            states.close()
            states = ClientStates(budget)
            states.load_state_dict(tensors)
            oracle = {p: state for p, state in oracle.items() if state}  # {} has no tensors
        assert list(states) == sorted(oracle)
        assert len(states) == len(oracle)
    assert all(same(state, oracle[partition]) for partition, state in states.items())
    states.close()
    assert not states


def shapes(state: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_budget_holds_and_the_most_recent_stay() -> None:
    record = 4 * 10
    states = ClientStates(budget=8 * record)
    for partition in range(20):
        states[partition] = {"w": torch.full((10,), float(partition))}
    states.gather([12, 13], {"w": torch.zeros(10)})  # read, so that others are older
    for partition in range(20, 24):
        states[partition] = {"w": torch.full((10,), float(partition))}
    assert states.memory <= 8 * record
    assert states.spilled == 24 - 8
    (pool,) = states._pools.values()
    assert {12, 13, 20, 21, 22, 23} <= set(pool.owner.tolist())
    found = states.gather(range(24), {"w": torch.zeros(10)})["w"]
    assert torch.equal(found, torch.arange(24.0)[:, None].expand(24, 10))


def test_the_file_does_not_grow_when_states_come_and_go() -> None:
    states = ClientStates(budget=100 * 8)
    for number in range(30):
        ids = np.random.default_rng(number).choice(200, 50, replace=False)
        states.scatter(ids, {"w": torch.from_numpy(ids).double()})
    (pool,) = states._pools.values()
    assert pool.records <= 200
    everyone = states.gather(range(200), {"w": torch.tensor(-1.0, dtype=torch.float64)})["w"]
    expected = [float(p) if p in states else -1.0 for p in range(200)]
    assert everyone.tolist() == expected


def test_nothing_remains_on_disk(tmp_path: Path) -> None:
    states = ClientStates(budget=1, folder=tmp_path)
    states.scatter(range(100), {"w": torch.rand(100, 50)})
    assert states.spilled == 99
    (pool,) = states._pools.values()
    assert pool.file is not None
    assert os.fstat(pool.file.fileno()).st_size == 99 * pool.size
    if os.name == "posix":  # no name, so that a process that is killed leaves nothing
        assert list(tmp_path.iterdir()) == []
    states.close()
    assert pool.file is None
    assert list(tmp_path.iterdir()) == []


def test_many_shapes_share_the_budget_and_few_files() -> None:
    states = ClientStates(budget=50_000)
    for partition in range(1, 400):
        states[partition] = {"points": torch.full((partition,), float(partition))}
    assert len(states._pools) < 100
    assert states.memory <= 50_000 + max(states._pools) * len(states._pools)
    for partition in range(1, 400):
        assert torch.equal(states[partition]["points"], torch.full((partition,), float(partition)))


def test_a_disk_that_cannot_be_written_fails_the_run(tmp_path: Path) -> None:
    states = ClientStates(budget=1, folder=tmp_path / "nowhere")
    with pytest.raises(RunFailed, match=r"engine\.state_budget_mb into .*nowhere"):
        states.scatter([0, 1], {"w": torch.zeros(2)})


def test_what_is_returned_and_given_is_not_shared() -> None:
    states = ClientStates()
    given_ = {"w": torch.zeros(2, 3)}
    states.scatter([4, 5], given_)
    given_["w"].fill_(7.0)
    states[4]["w"].fill_(8.0)
    states.gather([4, 5], {"w": torch.zeros(3)})["w"].fill_(9.0)
    initial = {"w": torch.zeros(3)}
    states.gather([6], initial)["w"].fill_(9.0)
    assert not torch.cat([states[4]["w"], states[5]["w"], initial["w"]]).any()


def test_kept_and_initial_dtypes_are_promoted_as_by_stack() -> None:
    states = ClientStates()
    states[0] = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    found = states.gather([0, 1], {"w": torch.zeros(2, dtype=torch.float32)})["w"]
    assert found.dtype == torch.float64
    assert found.tolist() == [[1.0, 2.0], [0.0, 0.0]]


def test_the_checkpoint_is_named_by_partition_and_tensor() -> None:
    states = ClientStates(budget=1)
    states[3] = {"a/b": torch.ones(2), "c": torch.tensor(4)}
    states[10**6] = {"a/b": torch.zeros(2), "c": torch.tensor(5)}
    tensors = states.state_dict()
    assert set(tensors) == {"3/a/b", "3/c", "1000000/a/b", "1000000/c"}
    storages = {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert len(storages) == 4  # safetensors writes no tensors that share memory


def test_threads_read_and_write_their_own() -> None:
    states = ClientStates(budget=40 * 8)
    errors: list[str] = []

    def work(who: int) -> None:
        own = np.arange(who, 400, 4)
        for turn in range(20):
            value: Tensor = torch.from_numpy(own).double() + turn
            states.scatter(own, {"w": value})
            if not torch.equal(states.gather(own, {"w": torch.zeros((), dtype=value.dtype)})["w"],
                               value):  # fmt: skip
                errors.append(f"thread {who}, turn {turn}")

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_an_open_file_goes_with_its_states() -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    states = ClientStates(budget=1)
    states.scatter(range(10), {"w": torch.zeros(10, 10)})
    states.close()
    del states
    gc.collect()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


def test_partitions_start_at_zero() -> None:
    states = ClientStates()
    with pytest.raises(ValueError, match="numbered from 0"):
        states.scatter([-1], {"w": torch.zeros(1)})
    assert -1 not in states
    with pytest.raises(KeyError):
        states[0]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4000, 4096, 10**6 + 1])
def test_padding_is_an_eighth_at_most(size: int) -> None:
    assert size <= states_module._padded(size) <= size * 1.125
