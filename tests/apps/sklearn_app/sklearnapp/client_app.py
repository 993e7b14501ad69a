"""sklearnapp: the ClientApp."""

import warnings

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.metrics import log_loss

from sklearnapp.task import get_parameters, load_data, make_model, set_parameters

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fits from the received parameters; one partition may be told to fail."""
    part, parts = context.node_config["partition-id"], context.node_config["num-partitions"]
    context.state["tried"] = MetricRecord({"fit": 1})
    if part == context.run_config["failing-partition"]:
        raise ValueError(f"partition {part} has no labels")
    model = make_model(context.run_config["model.local-epochs"])
    set_parameters(model, message.content["arrays"].to_numpy_ndarrays())
    x, y, _, _ = load_data(part, parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x, y)
    metrics = MetricRecord(
        {
            "num-examples": len(x),
            "train_logloss": log_loss(y, model.predict_proba(x), labels=[0, 1]),
        }
    )
    arrays = ArrayRecord(get_parameters(model))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Tests the received parameters; a node that failed has kept nothing of it."""
    part, parts = context.node_config["partition-id"], context.node_config["num-partitions"]
    assert ("tried" in context.state) == (part != context.run_config["failing-partition"])
    model = make_model(1)
    set_parameters(model, message.content["arrays"].to_numpy_ndarrays())
    _, _, x, y = load_data(part, parts)
    metrics = MetricRecord(
        {
            "num-examples": len(x),
            "accuracy": float(model.score(x, y)),
            "logloss": log_loss(y, model.predict_proba(x), labels=[0, 1]),
        }
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
