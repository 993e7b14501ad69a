"""pfl-research's simulation: WORKLOAD, then `orders`. Under torchrun, rank 0 takes the orders."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.orders import Orders
from tests.benchmarks.workloads import SEED, WORKLOADS, Workload

FOREVER = 10**9


class Model(nn.Module):
    """The workload's model with the two methods that pfl asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the mean loss of a batch."""
        return F.cross_entropy(self.model(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Returns nothing of interest; pfl evaluates in its very first round."""
        return {"examples": Weighted(len(x), len(x))}


class Echo(FederatedAveraging):  # type: ignore[misc]
    """Each user returns the parameters plus its id."""

    def train_one_user(
        self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any
    ) -> Any:
        """Adds the id."""
        with torch.no_grad():
            for parameter in model.variable_map.values():
                parameter += int(user_dataset.user_id)
        return model.get_model_difference(initial_model_state), Metrics()


class Waiting(TrainingProcessCallback):  # type: ignore[misc]
    """Holds the training between rounds until more are ordered."""

    def __init__(self, workload: Workload, orders: Orders | None) -> None:
        self.workload, self.orders = workload, orders
        self.left = 0

    def on_train_begin(self, *, model: Any) -> Metrics:
        """Waits for the first order."""
        if not self._once_more(model):
            raise SystemExit
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Stops the training when there are no more orders."""
        return not self._once_more(model), Metrics()

    def _once_more(self, model: Any) -> bool:
        if not self.left:
            self.left = self._take(model)
        self.left -= 1
        return self.left >= 0

    def _take(self, model: Any) -> int:
        """Returns the next number of rounds, which rank 0 tells the others."""
        rounds = 0
        if self.orders is not None:
            tensors = list(model.pytorch_model.model.state_dict().values())
            rounds = self.orders.take(lambda: [self.workload.result(tensors)])
        if distributed.world_size > 1:
            told = torch.tensor(rounds)
            torch.distributed.broadcast(told, 0)
            rounds = int(told)
        return rounds


def users(workload: Workload) -> FederatedDataset:
    """Returns the clients' data; every user is drawn once before any is drawn again."""
    x, y = workload.data if workload.lr else (torch.zeros(1, 1, 1), torch.zeros(1, 1))

    def user(i: int) -> PyTorchTensorDataset:
        return PyTorchTensorDataset((x[i % len(x)], y[i % len(x)]), user_id=str(i))

    return FederatedDataset(user, get_user_sampler("minimize_reuse", range(workload.clients)))


def main() -> None:
    """Obeys until its input ends."""
    orders = Orders() if distributed.global_rank == 0 else None
    workload = WORKLOADS[sys.argv[1]]
    # A second thread helps with images in one process, and slows down everything else.
    images = len(workload.input_shape) == 3
    torch.set_num_threads(2 if images and distributed.world_size == 1 else 1)
    np.random.seed(SEED)  # noqa: NPY002 - pfl draws from it, the same on every rank
    module = Model(workload.model())
    model = PyTorchModel(
        model=module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    algorithm = FederatedAveraging() if workload.lr else Echo()
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=FOREVER,
            evaluation_frequency=FOREVER,
            train_cohort_size=workload.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=users(workload), val_data=None),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=workload.lr,
            local_batch_size=workload.batch,
        ),
        callbacks=[Waiting(workload, orders)],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    main()
