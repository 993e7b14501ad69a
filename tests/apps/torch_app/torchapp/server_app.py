"""torchapp: the ServerApp."""

from collections.abc import Iterable, Iterator
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg

from torchapp.task import Net, digits
from torchapp.task import test as test_fn

app = ServerApp()


class Decaying(FedAvg):
    """FedAvg that tells the nodes a learning rate, and runs a start of its own."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["lr-factor"] = 0.9**server_round
        return super().configure_train(server_round, arrays, config, grid)

    def start(self, grid: Grid, initial_arrays: ArrayRecord, **kwargs: Any) -> Any:
        """Warms the nodes up, then starts as Flower does."""
        content = RecordDict({"config": ConfigRecord()})
        nodes = grid.get_node_ids()
        ids = grid.push_messages([Message(content, node, "train.warm_up") for node in nodes])
        assert len(list(grid.pull_messages(ids))) == len(list(nodes))
        return super().start(grid, initial_arrays, **kwargs)


@app.lifespan()
def lifespan(context: Context) -> Iterator[None]:
    """Leaves a mark before and after."""
    context.state["opened"] = ConfigRecord({"yes": True})
    yield


def central(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Tests the model on all digits."""
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    x, y = digits()
    loss, accuracy = test_fn(net, [(x, y)])
    return MetricRecord({"loss": loss, "accuracy": accuracy})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains with one strategy, then goes on with another."""
    assert context.state["opened"]["yes"]
    rounds = context.run_config["num-server-rounds"]
    strategy = Decaying(fraction_train=context.run_config["fraction-train"])
    arrays = ArrayRecord(Net().state_dict())
    result = strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=central)
    floats = {k: v for k, v in result.arrays.items() if v.dtype == "float32"}
    assert set(floats) < set(result.arrays)
    FedAdam(eta=0.001).start(grid, result.arrays, num_rounds=1)
