"""Every import from inside Flower that is not its public API, in one place.

tests/contract/test_flower.py checks each of them against the installed flwr version.
"""

from __future__ import annotations

import logging

from flwr.common.constant import SUPERLINK_NODE_ID, SType
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "SUPERLINK_NODE_ID",
    "Run",
    "SType",
    "TaskIdentity",
    "quiet",
    "set_identity",
    "set_message_id",
]


def set_identity(run_id: int) -> None:
    """Makes this process the ServerApp of `run_id`: Message() reads it from process globals."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    TaskIdentity.task_id = 0


def set_message_id(message: object, message_id: str) -> None:
    """Gives a message its id, which in Flower only the SuperLink does."""
    message.metadata._message_id = message_id  # type: ignore[attr-defined]


def quiet() -> None:
    """Silences Flower's own log lines: the run's progress and events say the same, better."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
