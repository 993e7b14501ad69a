"""What an exchange costs: bytes of numbers in each direction, and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from flwr.app import ArrayRecord, Message

from fedsim.messages import Broadcast, Replies


def bytes_sent(messages: Sequence[Message]) -> int:
    """Returns the bytes of the arrays in some messages."""
    if isinstance(messages, Broadcast):
        return record_bytes(messages.content.array_records.values()) * len(messages)
    return sum(record_bytes(message.content.array_records.values()) for message in messages)


def bytes_received(replies: Iterable[Message]) -> int:
    """Returns the bytes of the arrays in the replies, averaged or not."""
    if isinstance(replies, Replies):
        tensors = [t for arrays in replies.arrays.values() for t in arrays.values()]
        return replies.bytes_up + sum(t.numel() * t.element_size() for t in tensors)
    contents = [message.content for message in replies if message.has_content()]
    return sum(record_bytes(content.array_records.values()) for content in contents)


def record_bytes(records: Iterable[ArrayRecord]) -> int:
    """Returns the bytes of the arrays' numbers, without any serialisation's overhead."""
    total = 0
    for record in records:
        for array in record.values():
            item: int = getattr(torch, array.dtype, torch.float32).itemsize
            total += item * math.prod(array.shape)
    return total


def gradients_of(replies: Sequence[Message]) -> float:
    """Returns the sum of the metric "gradients", 0 where it is not reported."""
    if isinstance(replies, Replies):
        return float(replies.metrics["gradients"].sum()) if "gradients" in replies.metrics else 0.0
    found = [
        record["gradients"]
        for message in replies
        for record in message.content.metric_records.values()
        if "gradients" in record
    ]
    return float(sum(value for value in found if isinstance(value, (int, float))))
