"""Flower's own simulation (flwr[simulation], Ray), one client a CPU: WORKLOAD, then `orders`."""

from __future__ import annotations

import os
import sys

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from tests.benchmarks.orders import Orders
from tests.benchmarks.peers import flower_app
from tests.benchmarks.workloads import WORKLOADS, Workload

OBJECT_STORE_BYTES = 10**9


def server(workload: Workload, orders: Orders) -> ServerApp:
    """Returns a ServerApp whose rounds, those of `Strategy.start`, wait for orders."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=workload.cohort / workload.clients,
            fraction_evaluate=0.0,
            min_train_nodes=workload.cohort,
            min_available_nodes=workload.clients,
        )
        arrays = ArrayRecord(workload.model().state_dict())
        config = ConfigRecord({"workload": workload.name})

        def result() -> list[float]:
            return [workload.result(list(arrays.to_torch_state_dict().values()))]

        server_round = 0
        while orders.once_more(result):
            server_round += 1
            messages = strategy.configure_train(server_round, arrays, config, grid)
            replies = grid.send_and_receive(messages)
            mean, _ = strategy.aggregate_train(server_round, replies)
            if mean is None:
                raise RuntimeError(f"round {server_round}: no client replied")
            arrays = mean

    return app


def main() -> None:
    """Obeys until its input ends."""
    orders = Orders()
    workload = WORKLOADS[sys.argv[1]]
    run_simulation(
        server_app=server(workload, orders),
        client_app=flower_app.app,
        num_supernodes=workload.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "num_cpus": os.cpu_count() or 1,
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": False,
            },
        },
    )


if __name__ == "__main__":
    main()
