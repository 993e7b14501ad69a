"""sklearnapp: the ServerApp."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sklearnapp.task import get_parameters, make_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Averages the nodes' models; may be told to crash."""
    crash = context.run_config["crash-in-round"]

    class Crashing(FedAvg):
        """FedAvg that fails in a round."""

        def aggregate_train(self, server_round, replies):
            if server_round == crash:
                raise RuntimeError(f"no round {crash}\nfor anybody")
            return super().aggregate_train(server_round, replies)

    Crashing(fraction_train=1.0, fraction_evaluate=1.0).start(
        grid=grid,
        initial_arrays=ArrayRecord(get_parameters(make_model(1))),
        num_rounds=context.run_config["num-server-rounds"],
    )
