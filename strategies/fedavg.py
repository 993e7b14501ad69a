"""Federated averaging.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks
from Decentralized Data", AISTATS 2017 (arXiv 1602.05629), Algorithm 1: the new parameters are the
clients' mean, weighted by their numbers of examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from flwr.app import ArrayRecord, Message, MetricRecord

from fedsim.messages import stack, to_record
from fedsim.strategies.base import Strategy, StrategyParams, mean_metrics


class FedAvgParams(StrategyParams):
    """Federated averaging; the local work is the client's section."""

    name: Literal["fedavg"] = "fedavg"


class FedAvg(Strategy):
    """Averages what the clients send back; on a stack, without building Messages."""

    Params = FedAvgParams
    client = "sgd"
    streams = True

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the weighted mean of the parameters and of the metrics."""
        stacked = stack(replies)
        if not stacked.node_ids:
            return None, None
        mean = stacked.mean("arrays", self.weights(stacked))
        return to_record(mean), mean_metrics(stacked)
