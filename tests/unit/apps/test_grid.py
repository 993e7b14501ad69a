"""What reaches the nodes of an app and what comes back: copies, bytes, random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim.apps.grid import AppGrid
from fedsim.errors import RunFailed
from fedsim.grids.apps import NumpyArray, copy_content
from fedsim.messages import TensorArray

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(3, np.int64),
    np.zeros((0, 4), np.float16),
    np.array([True, False]),
    np.arange(4, dtype=">i4"),
    np.arange(3) + 1j,
    np.array(["a", "bc"]),
    np.arange(12, dtype=np.uint8).reshape(3, 4)[:, ::2],
]


@pytest.mark.parametrize("values", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_arrays_are_read_as_numpy_reads_them(values: np.ndarray) -> None:
    plain = Array(values)
    quick = NumpyArray(plain)
    found = quick.numpy()
    assert found.dtype == plain.numpy().dtype
    assert found.shape == values.shape
    np.testing.assert_array_equal(found, values)
    assert found.flags.writeable
    found[...] = found[::-1].copy() if found.ndim else 0
    np.testing.assert_array_equal(quick.numpy(), values)
    assert quick == plain
    assert plain == quick
    assert NumpyArray(plain) != Array(np.zeros(7))


def test_bytes_that_are_no_numpy_file_are_refused_as_flower_does() -> None:
    broken = Array("float32", (2,), "numpy.ndarray", b"12345678")
    with pytest.raises(ValueError, match=r"pickle|magic|allow"):
        NumpyArray(broken).numpy()
    with pytest.raises(TypeError, match="serialization type"):
        NumpyArray(Array("float32", (2,), "other", b"12345678")).numpy()


def test_a_copy_shares_bytes_and_nothing_that_can_change() -> None:
    tensor = ArrayRecord()
    tensor["t"] = TensorArray(torch.ones(2))
    content = RecordDict({
        "a": ArrayRecord({"x": Array(np.ones(2))}),
        "t": tensor,
        "c": ConfigRecord({"list": [1, 2], "raw": b"\x00"}),
        "m": MetricRecord({"loss": 0.5}),
    })  # fmt: skip
    copied = copy_content(content)
    assert list(copied) == list(content)
    assert copied["a"]["x"].data is content["a"]["x"].data
    assert isinstance(copied["t"]["t"], TensorArray)
    copied["c"]["list"].append(3)
    copied["m"]["loss"] = 1.0
    del copied["a"]["x"]
    assert dict(content["c"]) == {"list": [1, 2], "raw": b"\x00"}
    assert dict(content["m"]) == {"loss": 0.5}
    assert "x" in content["a"]


def drawing_app() -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        drawn = [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002
        metrics = MetricRecord({"drawn": drawn})
        if message.content["config"].get("stray"):
            other = Message(RecordDict(), message.metadata.src_node_id, "query")
            return other
        return Message(RecordDict({"m": metrics}), reply_to=message)

    return app


def grid_of(app: ClientApp, seed: int = 0, seen: list[Any] | None = None) -> AppGrid:
    told = [] if seen is None else seen
    return AppGrid(
        app, 4, seed=seed, run_id=9, run_config={},
        on_exchange=lambda messages, replies: told.append((list(messages), list(replies))),
    )  # fmt: skip


def ask(grid: AppGrid, nodes: list[int], **config: Any) -> dict[int, Any]:
    content = RecordDict({"config": ConfigRecord(config)})
    replies = grid.send_and_receive([Message(content, node, "query") for node in nodes])
    return {reply.metadata.src_node_id: reply for reply in replies}


def test_random_numbers_belong_to_seed_node_and_message_not_to_the_order() -> None:
    def draws(seed: int, *orders: list[int]) -> list[list[float]]:
        grid = grid_of(drawing_app(), seed)
        found = []
        for order in orders:
            replies = ask(grid, order)
            found += [list(replies[node].content["m"]["drawn"]) for node in sorted(order)]
        return found

    torch.manual_seed(1)
    first = draws(0, [2, 3, 4], [2, 3, 4])
    torch.manual_seed(2)
    random.seed(3)
    assert draws(0, [4, 2, 3], [3, 4, 2]) == first
    assert draws(1, [2, 3, 4], [2, 3, 4]) != first
    assert len({tuple(each) for each in first}) == 6


def test_clients_leave_the_servers_generators_alone() -> None:
    expected = []
    for asking in (False, True):
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)
        if asking:
            ask(grid_of(drawing_app()), [2, 3])
        expected.append([random.random(), np.random.rand(), torch.rand(1).item()])  # noqa: NPY002
    assert expected[0] == expected[1]


def test_a_reply_must_answer_its_message() -> None:
    replies = ask(grid_of(drawing_app()), [2], stray=True)
    assert "give it reply_to=message" in replies[2].error.reason


def test_each_push_is_told_with_its_replies_in_order() -> None:
    seen: list[Any] = []
    grid = grid_of(drawing_app(), seen=seen)
    ask(grid, [5, 2])
    ask(grid, [])
    ((messages, replies),) = seen
    assert [m.metadata.dst_node_id for m in messages] == [5, 2]
    assert [r.metadata.reply_to_message_id for r in replies] == [
        m.metadata.message_id for m in messages
    ]
    assert grid.get_node_ids() == [2, 3, 4, 5]


@pytest.mark.parametrize("work", [False, True])
def test_only_who_does_nothing_else_waits_for_more_nodes(
    monkeypatch: pytest.MonkeyPatch, work: bool
) -> None:
    now = busy = 0.0
    monkeypatch.setattr("fedsim.apps.grid.time.monotonic", lambda: now)
    monkeypatch.setattr("fedsim.apps.grid.time.thread_time", lambda: busy)
    grid = grid_of(drawing_app())
    for _ in range(9):  # a second apart: eight seconds, within its patience
        grid.get_node_ids()
        now, busy = now + 1.0, busy + (0.9 if work else 0.001)
    now += 3.0
    if work:
        assert grid.get_node_ids() == [2, 3, 4, 5]
        return
    with pytest.raises(RunFailed, match=r"for the nodes 10 times in 12 s .* than the 4"):
        grid.get_node_ids()


def test_who_sends_messages_may_ask_as_often_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.apps.grid.PATIENCE_SECONDS", 0.0)
    grid = grid_of(drawing_app())
    for _ in range(20):
        ask(grid, list(grid.get_node_ids()))
