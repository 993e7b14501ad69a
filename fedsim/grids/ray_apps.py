"""Runs Flower ClientApps on the workers of a Ray cluster.

The nodes' Contexts stay with the driver and travel with the messages, as the states of our own
clients do: a worker that dies takes nothing with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedsim._flower import ErrorCode, set_identity
from fedsim.grids.actor import Place, place_of, where_the_log_is
from fedsim.grids.apps import LOGGER, AppNodes, Visit, handle
from fedsim.grids.connection import links, room_for
from fedsim.grids.pool import GRACE, Late, Pool
from fedsim.grids.ray_cohorts import divided, stored
from fedsim.scenario.sections import ClientResources


@dataclass(frozen=True)
class Answered:
    """Replies, and the nodes' Contexts after them."""

    replies: list[Message]
    contexts: dict[int, Context]


class AppActor:
    """An actor that holds the ClientApp; its standard error is its log."""

    def __init__(self, app: ClientApp, seed: int, run_id: int, device: str) -> None:
        torch.set_num_threads(1)
        set_identity(run_id)
        logger = logging.getLogger(LOGGER)  # the tracebacks of what the app raises
        logger.setLevel(logging.DEBUG)
        logger.addHandler(logging.StreamHandler())
        self._app, self._seed, self._device = app, seed, device

    def place(self) -> Place:
        """Returns where the actor is, once it is ready."""
        return place_of(torch.device(self._device))

    def answer(self, visits: Sequence[Visit]) -> Answered:
        """Returns the replies to messages, handled in the order given."""
        contexts: dict[int, Context] = {}
        own = []
        for visit in visits:  # a node that is asked twice goes on from its first answer
            node_id = visit.message.metadata.dst_node_id
            own.append(replace(visit, context=contexts.setdefault(node_id, visit.context)))
        replies = handle(self._app, own, self._seed)
        log = where_the_log_is()
        for reply in replies:
            if reply.has_error() and log:
                reply.error = Error(reply.error.code, f"{reply.error.reason}{log}")
        return Answered(replies, contexts)


class RayAppNodes(AppNodes):
    """The nodes of a ClientApp, whose messages are handled by workers in other processes."""

    def __init__(
        self,
        app: ClientApp,
        num_nodes: int,
        seed: int,
        workers: int,
        needs: ClientResources,
        deadline: float | None = None,
        run_id: int = 1,
        run_config: Mapping[str, Any] | None = None,
        node_config: Callable[[int], Mapping[str, Any]] | None = None,
        grows: bool = False,
    ) -> None:
        """needs: of a worker. deadline: seconds that a message may take; those of a worker are
        timed together. grows: as in RayCohorts."""
        import ray

        super().__init__(app, num_nodes, seed, run_id, run_config, node_config)
        self._deadline = deadline
        device = "cuda" if needs.gpus else "cpu"
        made = stored(app)
        kind = ray.remote(AppActor).options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0
        )
        self._pool = Pool(
            lambda: kind.remote(made, seed, run_id, device),
            workers,
            partial(room_for, needs) if grows else None,
        )

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()

    def record(self) -> dict[str, Any]:
        """Returns who computed."""
        return {
            "workers": [vars(place) for place in self._pool.places],
            "workers_lost": self._pool.lost,
            **links(),
        }

    def _handle(self, visits: Sequence[Visit]) -> list[Message]:
        by_node: dict[int, list[int]] = {}
        for position, visit in enumerate(visits):
            by_node.setdefault(visit.message.metadata.dst_node_id, []).append(position)
        ranges = divided(list(by_node.values()), len(self._pool), len)
        groups = [[position for node in mine for position in node] for mine in ranges]

        def call(group: Sequence[int]) -> Callable[[Any], Any]:
            mine = [visits[position] for position in group]
            return lambda handle: handle.answer.remote(mine)

        most = max(map(len, groups), default=0)
        patience = None if self._deadline is None else most * self._deadline + GRACE
        outs = self._pool.run([call(group) for group in groups], patience)
        replies: dict[int, Message] = {}
        for group, out in zip(groups, outs, strict=True):
            if isinstance(out, Late):
                reason = f"its worker gave no answer within {patience:g} s (deadline)"
                error = Error(ErrorCode.NODE_UNAVAILABLE, reason)
                replies |= {i: Message(error, reply_to=visits[i].message) for i in group}
                continue
            replies |= dict(zip(group, out.replies, strict=True))
            self._contexts |= out.contexts
        return [replies[position] for position in range(len(visits))]
