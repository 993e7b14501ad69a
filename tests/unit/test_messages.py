"""Tensors in Flower's messages: lazy, equal to what Flower makes, stacked without Messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim._flower import set_identity
from fedsim.messages import (
    BFLOAT16,
    Broadcast,
    Failure,
    Replies,
    TensorArray,
    config_of,
    make_content,
    stack,
    to_record,
    to_tensor,
    to_tensors,
)
from tests.engines.toys import same_bits


@pytest.fixture(autouse=True)
def identity() -> None:
    set_identity(1)


TENSORS = {
    "float32": torch.randn(3, 4),
    "float64": torch.randn(2, dtype=torch.float64),
    "float16": torch.randn(2, 2).half(),
    "int64": torch.arange(5),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.randn(3, 4).T,
    "needs gradient": torch.randn(3, requires_grad=True),
}


@pytest.mark.parametrize("name", TENSORS)
def test_array_is_what_flower_would_make(name: str) -> None:
    tensor = TENSORS[name]
    ours, flowers = TensorArray(tensor), Array(tensor)
    assert (ours.dtype, ours.shape, ours.stype) == (flowers.dtype, flowers.shape, flowers.stype)
    assert ours.data == flowers.data
    np.testing.assert_array_equal(ours.numpy(), flowers.numpy())
    assert torch.equal(to_tensor(flowers), tensor.detach())
    assert to_tensor(ours).data_ptr() == tensor.data_ptr()


def test_array_serialises_when_asked_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    save = np.save
    monkeypatch.setattr(np, "save", lambda *a, **k: (calls.append(1), save(*a, **k)))
    record = to_record({"w": torch.ones(3)})
    content = RecordDict({"arrays": record})
    assert content.array_records["arrays"]["w"].shape == (3,)
    assert calls == []
    assert record["w"].data == record["w"].data
    assert calls == [1]


def test_numpy_is_a_private_copy() -> None:
    tensor = torch.ones(3)
    array = TensorArray(tensor)
    array.numpy()[:] = 7
    assert tensor.tolist() == [1, 1, 1]
    assert array.numpy().tolist() == [1, 1, 1]


def test_flower_rebuilds_the_same_array_from_bytes() -> None:
    array = TensorArray(torch.randn(2, 3))
    copy = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data)
    np.testing.assert_array_equal(copy.numpy(), array.numpy())


def test_bfloat16_has_its_own_type_and_survives() -> None:
    tensor = torch.randn(2, 3).bfloat16()
    array = TensorArray(tensor)
    assert array.stype == BFLOAT16
    assert len(array.data) == 2 * 6
    received = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data)
    assert torch.equal(to_tensor(received), tensor)
    assert to_tensor(received).dtype == torch.bfloat16


def test_bfloat16_is_refused_where_numpy_is_needed() -> None:
    with pytest.raises(TypeError, match="no bfloat16"):
        TensorArray(torch.ones(2).bfloat16()).numpy()


def test_record_round_trip_keeps_order_and_tensors() -> None:
    arrays = {"b": torch.ones(2), "a": torch.zeros(1)}
    assert list(to_tensors(to_record(arrays))) == ["b", "a"]
    assert same_bits(to_tensors(to_record(arrays)), arrays)


def test_a_broadcast_is_a_sequence_of_messages() -> None:
    content = make_content({"arrays": {"w": torch.ones(2)}}, {"lr": 0.1, "seed": 3})
    broadcast = Broadcast(content, "train", [4, 2])
    assert len(broadcast) == 2
    assert [m.metadata.dst_node_id for m in broadcast] == [4, 2]
    assert {m.metadata.message_type for m in broadcast} == {"train"}
    assert broadcast[-1].metadata.dst_node_id == 2
    assert [m.metadata.dst_node_id for m in broadcast[:1]] == [4]
    assert broadcast[0].content is content
    with pytest.raises(IndexError):
        broadcast[2]
    assert config_of(broadcast[0].content) == {"lr": 0.1, "seed": 3}


def replies(count: int = 3) -> Replies:
    return Replies(
        tuple(range(2, 2 + count)),
        {"arrays": {"w": torch.arange(2.0 * count).reshape(count, 2)}},
        {
            "num-examples": torch.arange(1, count + 1).double(),
            "loss": torch.arange(count).double() / 3,
            "bins": torch.arange(2.0 * count).reshape(count, 2).double(),
        },
        [Failure(9, "no reply")],
        lambda node: Message(RecordDict(), node, "train"),
    )


def plain(node: int, w: Tensor, **metrics: float | list[float]) -> Message:
    """Returns a reply as Flower's own code would build it."""
    content = RecordDict({"arrays": ArrayRecord({"w": Array(w)})})
    content["metrics"] = MetricRecord(metrics)  # type: ignore[arg-type]
    return Message(content, reply_to=Message(RecordDict(), node, "train"))


def test_replies_are_a_sequence_of_messages() -> None:
    messages = list(replies())
    assert len(replies()) == len(messages) == 4
    assert [m.metadata.src_node_id for m in messages] == [2, 3, 4, 9]
    assert [m.has_error() for m in messages] == [False, False, False, True]
    assert messages[3].error.reason == "no reply"
    second = messages[1].content
    np.testing.assert_array_equal(second.array_records["arrays"]["w"].numpy(), [2.0, 3.0])
    found = second.metric_records["metrics"]
    assert found["num-examples"] == 2
    assert isinstance(found["num-examples"], int)
    assert found["loss"] == 1 / 3
    assert found["bins"] == [2.0, 3.0]
    assert [m.metadata.src_node_id for m in replies()[1:]] == [3, 4, 9]
    with pytest.raises(IndexError):
        replies()[4]


def test_a_reply_without_a_request_is_refused() -> None:
    with pytest.raises(TypeError, match="answer no messages"):
        Replies((2,), {}, {})[0]


def test_stack_of_plain_messages_is_the_stacked_form() -> None:
    expected = replies()
    stacked = stack(list(expected))
    assert stacked.node_ids == expected.node_ids
    assert same_bits(stacked.arrays["arrays"], expected.arrays["arrays"])
    assert same_bits(stacked.metrics, expected.metrics)
    assert stacked.failures == expected.failures
    assert [m.metadata.src_node_id for m in stacked] == [2, 3, 4, 9]


def test_stack_is_in_the_order_of_nodes_whatever_the_order_of_arrival() -> None:
    messages = list(replies())
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        stacked = stack([messages[i] for i in order])
        assert stacked.node_ids == (2, 3, 4)
        assert same_bits(stacked.arrays["arrays"], replies().arrays["arrays"])
    shuffled = replies().select([2, 0, 1], [])
    assert shuffled.node_ids == (4, 2, 3)
    again = stack(shuffled)
    assert again.node_ids == (2, 3, 4)
    assert same_bits(again.arrays["arrays"], replies().arrays["arrays"])
    assert same_bits(again.metrics, replies().metrics)


def test_stacking_a_stack_in_order_costs_nothing() -> None:
    ordered = replies()
    assert stack(ordered) is ordered


def test_replies_that_differ_from_the_first_become_failures() -> None:
    good = plain(2, torch.ones(2), loss=1.0)
    odd = [
        plain(3, torch.ones(3), loss=1.0),
        plain(4, torch.ones(2).double(), loss=1.0),
        plain(5, torch.ones(2), other=1.0),
        plain(6, torch.ones(2), loss=[1.0]),
    ]
    stacked = stack([*odd, good])
    assert stacked.node_ids == (2,)
    assert [f.node_id for f in stacked.failures] == [3, 4, 5, 6]
    assert {f.reason for f in stacked.failures} == {"its records differ from the other replies'"}


def test_stack_of_nothing_and_of_errors() -> None:
    assert stack([]).node_ids == ()
    request = Message(RecordDict(), 5, "train")
    failed = stack([Message(Error(1, "lost"), reply_to=request)])
    assert failed.node_ids == ()
    assert failed.failures == [Failure(5, "lost")]
    assert failed[0].error.reason == "lost"


def test_select_keeps_some_and_adds_failures() -> None:
    chosen = replies().select([2, 0], [Failure(3, "NaN")])
    assert chosen.node_ids == (4, 2)
    assert chosen.arrays["arrays"]["w"].tolist() == [[4, 5], [0, 1]]
    assert chosen.metrics["num-examples"].tolist() == [3, 1]
    assert [f.node_id for f in chosen.failures] == [9, 3]
    assert replies().select([], []).arrays["arrays"]["w"].shape == (0, 2)


def test_config_records_are_merged() -> None:
    content = RecordDict({"a": ConfigRecord({"x": 1}), "b": ConfigRecord({"y": "z"})})
    assert config_of(content) == {"x": 1, "y": "z"}
