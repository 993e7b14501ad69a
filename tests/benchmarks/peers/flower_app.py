"""The ClientApp that Flower's own simulation runs, as its PyTorch quickstart writes it."""

from __future__ import annotations

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional as F

from tests.benchmarks.workloads import WORKLOADS, Workload

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains on the partition's rows, or adds the partition's id where there is no learning."""
    torch.set_num_threads(1)
    workload = WORKLOADS[str(message.content.config_records["config"]["workload"])]
    model = _model(workload.name)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    partition = int(context.node_config["partition-id"])
    if workload.lr:
        _fit(model, workload, partition)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(partition)
    metrics = MetricRecord({"num-examples": workload.examples})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


def _fit(model: nn.Module, workload: Workload, partition: int) -> None:
    x, y = (tensor[partition % workload.distinct] for tensor in workload.data)
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)
    for rows in torch.split(torch.randperm(workload.examples), workload.batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@cache
def _model(name: str) -> nn.Module:
    """Returns the actor's model; each client starts by loading what the server sent."""
    return WORKLOADS[name].model()
