"""numpyapp: the ClientApp."""

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from numpyapp.task import load_data, loss, train

app = ClientApp()


@app.query()
def count(message: Message, context: Context) -> Message:
    """Says how many rows there are, and keeps what the server tells."""
    context.state["told"] = ConfigRecord(dict(message.content["config"]))
    x, _ = load_data(context.node_config["partition-id"])
    counts = MetricRecord({"rows": len(x), "corners": [float(x.min()), float(x.max())]})
    return Message(RecordDict({"counts": counts}), reply_to=message)


@app.train()
def train_(message: Message, context: Context) -> Message:
    """Takes local steps from the received weights."""
    x, y = load_data(context.node_config["partition-id"])
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    lr, steps = context.run_config["learning-rate"], context.run_config["local-steps"]
    weights = train(weights, x, y, lr, steps)
    seen = context.state.get("seen", MetricRecord({"rounds": 0}))
    context.state["seen"] = MetricRecord({"rounds": seen["rounds"] + 1})
    metrics = {
        "num-examples": len(x),
        "train_loss": loss(weights, x, y),
        "seen": context.state["seen"]["rounds"],
        "told": context.state["told"]["number"],
        "round": message.content["config"]["server-round"],
    }
    content = {"arrays": ArrayRecord([weights]), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Reports the loss of the received weights."""
    x, y = load_data(context.node_config["partition-id"])
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": len(x), "eval_loss": loss(weights, x, y)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
