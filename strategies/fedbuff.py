"""Buffered asynchronous aggregation (FedBuff).

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba, "Federated Learning with Buffered Asynchronous
Aggregation", AISTATS 2022 (arXiv 2106.06639), Algorithm 1. A number of clients is always at work.
Whose reply has come is replaced at once by a client sampled from those that are idle, who gets the
parameters of this moment, and the K-th reply in the buffer makes the update

    x ← x + η_g · Σ_i s(τ_i) w_i Δ_i / Σ_i w_i,        s(τ) = (1 + τ)^(−a)

Δ_i is what client i has changed of the parameters that it received, τ_i, its staleness, the number
of updates that the server has made since. With equal weights, as in the paper, Σ w_i is K.
Staleness shortens the step: the sum is divided by Σ w_i, not by Σ s(τ_i) w_i. s is the polynomial
of FedAsync (Xie, Koyejo, Gupta, "Asynchronous Federated Optimization", arXiv 1903.03934).

A round of the run is one update. Where all clients take equally long, and as many are at work as
the buffer holds, no update is stale, and with η_g = 1 this is FedAvg with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from pydantic import Field

from fedsim.errors import RunFailed
from fedsim.grids.nodes import pick
from fedsim.means import mean_dtype
from fedsim.messages import (
    Arrays,
    Broadcast,
    Received,
    Replies,
    make_content,
    to_record,
    to_tensors,
)
from fedsim.random import generator
from fedsim.strategies.base import Exchange, Strategy, StrategyParams, mean_metrics


class FedBuffParams(StrategyParams):
    """Buffered asynchronous aggregation; the local work is the client's section."""

    name: Literal["fedbuff"] = "fedbuff"
    buffer_size: int = Field(
        10, ge=1, description="Replies K that make an update, ≥ 1; 1 is fully asynchronous."
    )
    concurrency: int | None = Field(
        None,
        ge=1,
        description="Clients that are at work at any time, ≥ 1 and at most all of them; empty:"
        " fraction_train of the nodes.",
    )
    server_lr: float = Field(1.0, gt=0, description="Server learning rate η_g, > 0.")
    staleness_exponent: float = Field(
        0.5, ge=0, description="Exponent a of s(τ) = (1 + τ)^(−a), ≥ 0; 0: all count alike."
    )
    weighted_by: Literal["examples", "uniform"] = Field(
        "uniform", description="Client weights w_i: all equal, as in the paper, or n_i."
    )


class FedBuff(Strategy):
    """Keeps clients at work and updates the parameters with every full buffer of replies."""

    Params = FedBuffParams
    client = "sgd"

    def __init__(self, params: FedBuffParams) -> None:
        super().__init__(params)
        self.params = params
        self._current: Arrays = {}  # the parameters of the round

    def objections(self, num_nodes: int) -> list[str]:
        """Returns why the strategy cannot be served by so many nodes."""
        asked = self.params.concurrency
        if asked is None or asked <= num_nodes:
            return []
        return [f"fedbuff keeps {asked} clients at work (concurrency), but there are {num_nodes}"]

    def exchanges(self, server_round: int) -> Sequence[Exchange]:
        """Returns the one exchange of a round, which waits for K replies."""
        return [
            Exchange(
                "train",
                self.configure_train,
                self.aggregate_train,
                self.reply_schema,
                wait=self.params.buffer_size,
            )
        ]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sends the parameters to as many idle nodes as are missing at work.

        config: `in-flight` lists the nodes at work, `dispatch` counts the calls of this round.
        """
        told: dict[str, Any] = dict(config)
        busy, dispatch = set(told.pop("in-flight")), int(told["dispatch"])
        found = grid.get_node_ids()
        nodes = found if isinstance(found, range) else sorted(found)
        concurrency = self.params.concurrency
        if concurrency is None:
            concurrency = max(round(self.common.fraction_train * len(nodes)), 1)
        # the first sample of a round is that of a synchronous strategy
        again = (dispatch,) if dispatch else ()
        rng = generator(int(told["seed"]), "sample", server_round, *again)
        chosen = pick(nodes, busy, concurrency - len(busy), rng)
        self._current = to_tensors(arrays)
        settings = {**told, **self.settings(server_round)}
        return Broadcast(make_content({"arrays": self._current}, settings), "train", chosen)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the updated parameters, the means of the metrics, and the staleness."""
        if not isinstance(replies, Received):
            raise TypeError("fedbuff needs to know what each reply answers: fedsim's round loop")
        if not replies:
            return None, None
        numbers = _numbers(replies)
        weights = self.weights(numbers)
        total = float(weights.sum())
        if not total > 0:
            raise RunFailed("every reply has weight 0; at least one client needs examples")
        staleness = [server_round - sent.server_round for sent in replies.sent]
        tau = torch.tensor(staleness, dtype=torch.float64)
        scale = (1 + tau) ** -self.params.staleness_exponent
        shares = (self.params.server_lr * scale * weights / total).tolist()
        new = {name: x.to(mean_dtype(x.dtype), copy=True) for name, x in self._current.items()}
        for share, reply, sent in zip(shares, replies, replies.sent, strict=True):
            end = to_tensors(reply.content.array_records["arrays"])
            begin = to_tensors(sent.content.array_records["arrays"])
            for name, x in new.items():
                x.add_(end[name].to(x) - begin[name].to(x), alpha=share)
        metrics = mean_metrics(numbers)
        assert metrics is not None
        metrics["staleness_mean"] = sum(staleness) / len(staleness)
        metrics["staleness_max"] = max(staleness)
        return to_record(new), metrics


def _numbers(replies: Received) -> Replies:
    """Returns the metrics that all replies have, (replies,) each, without the arrays."""
    found = [
        {name: v for record in m.content.metric_records.values() for name, v in record.items()}
        for m in replies
    ]
    names = [
        name for name in found[0] if all(isinstance(own.get(name), (int, float)) for own in found)
    ]
    return Replies(
        tuple(sent.node_id for sent in replies.sent),
        {},
        {name: torch.tensor([own[name] for own in found], dtype=torch.float64) for name in names},
    )
