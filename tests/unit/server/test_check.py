"""Replies that would poison an aggregate are rejected, each with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim._flower import set_identity
from fedsim.messages import Failure, Replies, to_record
from fedsim.server.check import Checked, check_replies, finite
from fedsim.strategies.base import ReplySchema

PARAMETERS = to_record({"w": torch.zeros(2, 2), "b": torch.zeros(2)})
SCHEMA = ReplySchema(
    {"arrays": {"w": ((2, 2), torch.float32), "b": ((2,), torch.float32)}},
    frozenset({"num-examples", "loss"}),
)


@pytest.fixture(autouse=True)
def identity() -> None:
    set_identity(1)


def good() -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    return {"arrays": {"w": torch.ones(2, 2), "b": torch.ones(2)}}, {"num-examples": 3, "loss": 0.5}


def message(node: int, records: dict[str, dict[str, Tensor]], metrics: dict[str, Any]) -> Message:
    content = RecordDict()
    for name, arrays in records.items():
        content[name] = ArrayRecord({k: Array(v) for k, v in arrays.items()})
    content["metrics"] = MetricRecord(metrics)
    return Message(content, reply_to=Message(RecordDict(), node, "train"))


def stacked(*replies: tuple[dict[str, dict[str, Tensor]], dict[str, Any]]) -> Replies:
    records = {
        record: {name: torch.stack([r[0][record][name] for r in replies]) for name in arrays}
        for record, arrays in replies[0][0].items()
    }
    metrics = {
        name: torch.tensor([r[1][name] for r in replies], dtype=torch.float64)
        for name in replies[0][1]
    }
    return Replies(tuple(range(2, 2 + len(replies))), records, metrics, [],
                   lambda node: Message(RecordDict(), node, "train"))  # fmt: skip


def checked(form: str, *replies: Any, asked: Any = None, schema: ReplySchema = SCHEMA) -> Checked:
    nodes = range(2, 2 + len(replies)) if asked is None else asked
    if form == "stack":
        return check_replies(stacked(*replies), nodes, schema, PARAMETERS)
    plain = [message(node, *reply) for node, reply in enumerate(replies, 2)]
    return check_replies(reversed(plain), nodes, schema, PARAMETERS)


def with_value(value: float, where: str) -> Any:
    records, metrics = good()
    if where in metrics:
        metrics[where] = value
    else:
        records["arrays"][where].view(-1)[0] = value
    return records, metrics


FORMS = pytest.mark.parametrize("form", ["stack", "messages"])


@FORMS
def test_good_replies_pass_in_order(form: str) -> None:
    result = checked(form, good(), good(), good())
    assert (result.good, result.failures) == (3, [])
    assert [m.metadata.src_node_id for m in result.replies] == [2, 3, 4]


@FORMS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["w", "b", "loss"])
def test_one_that_is_not_finite_is_rejected_alone(form: str, value: float, where: str) -> None:
    result = checked(form, good(), with_value(value, where), good())
    what = f"metric {where}" if where == "loss" else f"array arrays/{where}"
    assert result.failures == [Failure(3, f"NaN or Inf in {what}")]
    assert [m.metadata.src_node_id for m in result.replies] == [2, 4]
    assert result.good == 2


@FORMS
def test_large_numbers_whose_sum_overflows_are_good(form: str) -> None:
    huge = good()
    huge[0]["arrays"]["w"].fill_(3e38)
    assert float(huge[0]["arrays"]["w"].sum()) == float("inf")
    assert checked(form, huge, good()).failures == []


@FORMS
@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_weight_must_be_a_weight(form: str, weight: float) -> None:
    result = checked(form, good(), with_value(weight, "num-examples"))
    assert [f.node_id for f in result.failures] == [3]
    assert "num-examples" in result.failures[0].reason
    assert checked(form, good(), with_value(0.0, "num-examples")).failures == []


def wrong(change: str) -> Any:
    records, metrics = good()
    arrays = records["arrays"]
    if change == "shape":
        arrays["w"] = torch.ones(2, 3)
    elif change == "dtype":
        arrays["w"] = arrays["w"].double()
    elif change == "missing array":
        del arrays["b"]
    elif change == "extra array":
        arrays["c"] = torch.ones(1)
    elif change == "record name":
        records["parameters"] = records.pop("arrays")
    elif change == "extra record":
        records["more"] = {"x": torch.ones(1)}
    elif change == "missing metric":
        del metrics["loss"]
    elif change == "missing weight":
        del metrics["num-examples"]
    elif change == "weight is a list":
        metrics["num-examples"] = [3.0, 3.0]
    return records, metrics


WRONG = {
    "shape": "array 'w' has shape (2, 3), expected (2, 2)",
    "dtype": "array 'w' is torch.float64, expected torch.float32",
    "missing array": "arrays are missing or not expected: b",
    "extra array": "arrays are missing or not expected: c",
    "record name": "array records ['parameters'] instead of ['arrays']",
    "extra record": "array records ['arrays', 'more'] instead of ['arrays']",
    "missing metric": "metric 'loss' is missing",
    "missing weight": "metric 'num-examples' is missing",
    "weight is a list": "metric 'num-examples' is a list of 2, not one number",
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_layout_is_rejected_with_its_reason(change: str) -> None:
    alone = checked("messages", good(), wrong(change))
    assert [f.node_id for f in alone.failures] == [3]
    assert alone.failures[0].reason.endswith(WRONG[change])
    everyone = checked("stack", wrong(change), wrong(change))
    assert everyone.good == 0
    assert len(everyone.replies) == 0
    assert [f.reason for f in everyone.failures] == [alone.failures[0].reason] * 2


@FORMS
def test_flowers_strategies_take_any_one_record(form: str) -> None:
    schema = ReplySchema(None)
    assert checked(form, wrong("record name"), schema=schema).failures == []
    two = checked(form, wrong("extra record"), schema=schema)
    assert [f.reason for f in two.failures] == ["2 array records instead of one"]
    assert checked(form, wrong("shape"), schema=schema).failures[0].reason.endswith("(2, 2)")


@FORMS
def test_silence_is_a_failure(form: str) -> None:
    result = checked(form, good(), good(), asked=[2, 3, 8, 7])
    assert result.failures == [Failure(7, "no reply"), Failure(8, "no reply")]
    assert result.good == 2


def test_errors_keep_their_reason() -> None:
    failed = Message(Error(1, "ValueError: oh"), reply_to=Message(RecordDict(), 5, "train"))
    silent = Message(Error(1), reply_to=Message(RecordDict(), 6, "train"))
    result = check_replies([failed, message(2, *good()), silent], [2, 5, 6], SCHEMA, PARAMETERS)
    assert result.failures == [Failure(5, "ValueError: oh"), Failure(6, "error")]
    stack = stacked(good())
    stack.failures = [Failure(5, "ValueError: oh")]
    result = check_replies(stack, [2, 5], SCHEMA, PARAMETERS)
    assert result.failures == [Failure(5, "ValueError: oh")]
    assert len(result.replies) == 1
    assert stack.failures == [Failure(5, "ValueError: oh")]


def test_nobody_votes_twice_or_unasked() -> None:
    twice = [message(2, *good()), message(2, *good()), message(3, *good())]
    result = check_replies(twice, [2], SCHEMA, PARAMETERS)
    assert result.good == 1
    assert [f.node_id for f in result.failures] == [2, 3]
    reason = "answered without being asked, or more than once"
    assert {f.reason for f in result.failures} == {reason}
    assert check_replies(twice[:2], [2, 2], SCHEMA, PARAMETERS).good == 2


def test_arrays_that_lie_about_themselves() -> None:
    data, kind = Array(torch.ones(2, 2)).data, Array(torch.ones(2, 2)).stype
    three, double = Array(torch.ones(3)).data, Array(torch.ones(2, 2).double()).data
    lies = {
        "its bytes have shape (3,)": Array("float32", (2, 2), kind, three),
        "its bytes are torch.float64": Array("float32", (2, 2), kind, double),
        "unknown dtype": Array("float31", (2, 2), kind, data),
        "cannot be read: ValueError": Array("float32", (2, 2), kind, b"\x80\x04."),
        "cannot be read: EOFError": Array("float32", (2, 2), kind, b""),
        "cannot be read: TypeError": Array("float32", (2, 2), "pickle", data),
    }
    for reason, array in lies.items():
        reply = message(2, *good())
        reply.content.array_records["arrays"]["w"] = array
        result = check_replies([reply], [2], SCHEMA, PARAMETERS)
        assert reason in result.failures[0].reason


def test_finite_by_entry() -> None:
    nan = float("nan")
    rows = torch.tensor([[1.0, 2.0], [nan, 1.0], [float("inf"), -float("inf")]])
    assert finite(rows).tolist() == [True, False, False]
    assert finite(torch.tensor([1.0, nan])).tolist() == [True, False]
    assert finite(torch.tensor([1, 2])).tolist() == [True, True]
    assert finite(torch.zeros(2, 0)).tolist() == [True, True]
    assert finite(torch.zeros(0, 3)).tolist() == []
    assert finite(torch.tensor([[6e4, 6e4], [nan, 0]]).half()).tolist() == [True, False]
    assert finite(torch.tensor([[3e38, 3e38], [nan, 0]]).bfloat16()).tolist() == [True, False]
