"""Every import from inside Flower that is not its public API, in one place.

tests/contract/test_flower.py checks each of them against the installed flwr version.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
from flwr.serverapp import ServerApp
from flwr.supercore.constant import DEFAULT_SIMULATION_CONFIG
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "DEFAULT_NODES",
    "SUPERLINK_NODE_ID",
    "ErrorCode",
    "Run",
    "SType",
    "TaskIdentity",
    "has_main",
    "is_legacy_client",
    "is_legacy_server",
    "logs_to",
    "quiet",
    "set_identity",
    "set_message_id",
]

DEFAULT_NODES = int(DEFAULT_SIMULATION_CONFIG.num_supernodes or 2)
"""Nodes of a simulation for which nobody says how many."""


def set_identity(run_id: int) -> None:
    """Makes this process the ServerApp of `run_id`: Message() reads it from process globals."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    TaskIdentity.task_id = 0


def set_message_id(message: object, message_id: str) -> None:
    """Gives a message its id, which in Flower only the SuperLink does."""
    message.metadata._message_id = message_id  # type: ignore[attr-defined]


def is_legacy_client(app: ClientApp) -> bool:
    """Says whether the app was built from a client_fn."""
    return app._call is not None


def is_legacy_server(app: ServerApp) -> bool:
    """Says whether the app was built from a server_fn, a config or a strategy of flwr.server."""
    given = (app._server_fn, app._server, app._config, app._strategy, app._client_manager)
    return any(each is not None for each in given)


def has_main(app: ServerApp) -> bool:
    """Says whether the app has a function under @app.main()."""
    return app._main is not None


def quiet() -> None:
    """Silences Flower's own log lines: the run's progress and events say the same, better."""
    logging.getLogger("flwr").setLevel(logging.ERROR)


@contextmanager
def logs_to(path: Path, *others: str) -> Iterator[None]:
    """Sends the lines of Flower's logger to a file instead of the terminal, and all of `others`.

    others: names of further loggers, from DEBUG on.
    """
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    levels = {"flwr": logging.INFO, **dict.fromkeys(others, logging.DEBUG)}
    before = []
    for name, level in levels.items():
        logger = logging.getLogger(name)
        before.append((logger, logger.level, logger.handlers[:], logger.propagate))
        logger.setLevel(level)
        logger.handlers[:], logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, level, handlers, propagate in before:
            logger.setLevel(level)
            logger.handlers[:], logger.propagate = handlers, propagate
        handler.close()
