"""numpyapp: the ServerApp."""

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from numpyapp.task import FEATURES, TRUE

app = ServerApp()


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Returns how far the weights are from the true ones."""
    (weights,) = arrays.to_numpy_ndarrays()
    return MetricRecord({"distance": float(np.linalg.norm(weights - TRUE))})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Asks every node for its size, then trains."""
    told = RecordDict({"config": ConfigRecord({"number": 7})})
    messages = [Message(told, node, "query") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages))
    print("rows:", sum(reply.content["counts"]["rows"] for reply in replies))
    FedAvg(fraction_train=1.0, fraction_evaluate=0.5).start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(FEATURES)]),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
