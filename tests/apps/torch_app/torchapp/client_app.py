"""torchapp: the ClientApp."""

from collections.abc import Iterator

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod
from flwr.clientapp.typing import ClientAppCallable

from torchapp.task import Net, load_data
from torchapp.task import test as test_fn
from torchapp.task import train as train_fn


def stamp_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Changes what comes in and what goes out."""
    message.content["config"]["stamped"] = True
    reply = call_next(message, context)
    reply.content["metrics"]["stamp"] = 1.0
    return reply


app = ClientApp(mods=[stamp_mod])


@app.lifespan()
def lifespan(context: Context) -> Iterator[None]:
    """Counts the messages that the node has handled."""
    count = context.state.get("count", MetricRecord({"messages": 0}))
    yield
    context.state["count"] = MetricRecord({"messages": count["messages"] + 1})


@app.train(mods=[arrays_size_mod])
def train(message: Message, context: Context) -> Message:
    """Trains the received model on the node's rows."""
    assert message.content["config"]["stamped"]
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    part, parts = context.node_config["partition-id"], context.node_config["num-partitions"]
    batches, _ = load_data(part, parts)
    loss = train_fn(net, batches, context.run_config["local-epochs"], context.run_config["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(batches.dataset)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.train("warm_up")
def warm_up(message: Message, context: Context) -> Message:
    """Answers an action of its own with a number drawn from a global generator."""
    metrics = MetricRecord({"drawn": torch.rand(1).item()})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Tests the received model on the node's rows."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    part, parts = context.node_config["partition-id"], context.node_config["num-partitions"]
    _, batches = load_data(part, parts)
    loss, accuracy = test_fn(net, batches)
    metrics = {"loss": loss, "accuracy": accuracy, "num-examples": len(batches.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
