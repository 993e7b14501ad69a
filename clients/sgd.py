"""Local SGD: what a client does under FedAvg, FedProx, FedAdam and the like.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017 (arXiv 1602.05629), Algorithm 1, ClientUpdate. The proximal term is that of FedProx
(Li et al., arXiv 1812.06127, equation 2): it is used when the strategy sends `proximal-mu`.

Batch norm layers stay with each client under `batch_norm: local`, as in FedBN (Li, Jiang, Zhang,
Kamp, Dou, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021,
arXiv 2102.07623): affine parameters and running statistics, unlike SiloBN, which averages the
former.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor
from torch.func import grad_and_value

from fedsim import errors
from fedsim.clients import optim
from fedsim.clients.base import (
    Batch,
    Batching,
    Client,
    Config,
    Inputs,
    Noise,
    Plan,
    Reply,
    State,
    weighted_mean_loss,
)
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel, Task


class SGDParams(errors.Params):
    """Local training with minibatches."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0, description="Learning rate η, > 0.")
    epochs: int = Field(1, ge=1, description="Passes over the client's data each round, E ≥ 1.")
    steps: int | None = Field(
        None, ge=1, description="Local steps each round instead of epochs, ≥ 1."
    )
    batch_size: int | None = Field(
        32, ge=1, description="Examples in a minibatch, B ≥ 1; null for all of them."
    )
    optimizer: Annotated[optim.SGDOptimizer | optim.AdamOptimizer, Field(discriminator="name")] = (
        Field(
            optim.SGDOptimizer(),
            description="The local optimizer; its state starts anew each round.",
        )
    )
    clip_norm: float | None = Field(
        None, gt=0, description="Clip each minibatch gradient to this 2-norm, > 0."
    )
    schedule: optim.Schedule | None = Field(None, description="Learning-rate schedule.")
    batch_norm: Literal["averaged", "local"] = Field(
        "averaged",
        description="Batch norm layers: averaged with everything else, running statistics included;"
        " or local (FedBN): they stay with each client, which alone can evaluate then.",
    )

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGDParams:
        o = self.optimizer
        if isinstance(o, optim.SGDOptimizer) and o.nesterov and (not o.momentum or o.dampening):
            raise ValueError("optimizer.nesterov needs momentum > 0 and no dampening")
        return self


class SGD(Client):
    """Minibatch SGD (or Adam) from the received parameters; replies with the result.

    Metrics: train_loss (mean over the steps, nats), gradients (per-example gradients computed).
    """

    Params = SGDParams
    honours = frozenset({"proximal-mu"})
    metrics = frozenset({"train_loss", "gradients"})
    trains_batch_norm = True
    params: SGDParams

    def __init__(self, params: errors.Params, model: FunctionalModel, task: Task) -> None:
        super().__init__(params, model, task)
        if self.params.batch_norm == "local":
            self.local = model.of_batch_norms()
        self.personalised = bool(self.local) or model.by_batch
        self._start = {k: v for k, v in model.initial().items() if k in self.local}

    def initial_client_state(self) -> Arrays:
        """Returns the arrays that stay here, as the model starts."""
        return self._start

    def plan(self, n_examples: int, config: Config) -> Plan:
        """One minibatch a step; the config may hold proximal-mu and must hold server-round."""
        p = self.params
        size = p.batch_size or n_examples
        per_epoch = -(-n_examples // max(size, 1))
        steps = p.steps or p.epochs * per_epoch
        kind = Batching("full") if p.batch_size is None else Batching("epochs", size)
        noise = {}
        if self.model.dropouts:
            noise["dropout"] = Noise(
                dict(self.model.dropouts), distribution="uniform", per_example=True
            )
        return Plan(
            steps=steps,
            batching=kind,
            noise=noise,
            scalars={
                "lr": optim.learning_rates(p.lr, p.schedule, int(config["server-round"]), steps),
                "proximal-mu": float(config.get("proximal-mu", 0.0)),
                "steps": float(max(steps, 1)),
            },
            static={"proximal": "proximal-mu" in config},
            chains=int(config.get("chains", 0)),
        )

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> State:
        """Starts at the received parameters, which are kept for the proximal term."""
        received = records["arrays"]
        own = {k: v for k, v in client_state.items() if k in self.local}
        params, statistics = self._split({**received, **own})
        zero = inputs.scalars["lr"] * 0
        return {
            "params": params,
            "statistics": statistics,
            "anchor": self._split(received)[0] if inputs.static["proximal"] else {},
            "optimizer": optim.init(params, self.params.optimizer),
            "loss": zero,
            "gradients": zero,
            "num-examples": inputs.scalars["num-examples"],
            "client": {k: v for k, v in client_state.items() if k not in self.local},
        }

    def _split(self, arrays: Arrays) -> tuple[Arrays, Arrays]:
        """Returns what is trained, and the running statistics."""
        known = self.model.statistics
        return (
            {k: v for k, v in arrays.items() if k not in known},
            {k: v for k, v in arrays.items() if k in known},
        )

    def step(self, state: State, inputs: Inputs) -> State:
        """Takes one minibatch step."""
        (batch,) = inputs.batches
        uniforms = {name: u[0] for name, u in inputs.noise.get("dropout", {}).items()}

        def objective(params: Arrays) -> tuple[Tensor, Arrays]:
            outputs, statistics = self.model.apply_train(
                params, state["statistics"], batch.x, batch.weight, uniforms
            )
            return weighted_mean_loss(self.task.loss(outputs, batch.y), batch.weight), statistics

        grads, (loss, statistics) = grad_and_value(objective, has_aux=True)(state["params"])
        if inputs.static["proximal"]:
            mu, w, anchor = inputs.scalars["proximal-mu"], state["params"], state["anchor"]
            pulls = {k: mu * (w[k] - a) for k, a in anchor.items()}
            grads = {k: g + pulls[k] if k in pulls else g for k, g in grads.items()}
        if self.params.clip_norm is not None:
            grads = optim.clip(grads, self.params.clip_norm)
        params, optimizer = optim.update(
            state["params"], grads, state["optimizer"], inputs.scalars["lr"], self.params.optimizer
        )
        return state | {
            "params": params,
            "statistics": statistics,
            "optimizer": optimizer,
            "loss": state["loss"] + loss / inputs.scalars["steps"],
            "gradients": state["gradients"] + (batch.weight != 0).sum(),
        }

    def finish(self, state: State) -> tuple[Reply, Arrays]:
        """Sends the trained parameters and the running statistics, but for what stays here."""
        metrics = {
            "num-examples": state["num-examples"],
            "train_loss": state["loss"],
            "gradients": state["gradients"],
        }
        arrays = {**state["params"], **state["statistics"]}
        kept = {k: v for k, v in arrays.items() if k in self.local}
        sent = {k: v for k, v in arrays.items() if k not in self.local}
        return Reply({"arrays": sent}, metrics), {**state["client"], **kept}

    def evaluate(
        self, records: dict[str, Arrays], client_state: Arrays, batch: Batch
    ) -> dict[str, Tensor]:
        """Returns the loss and the task's metrics, (n,) each, with what stays here put in."""
        own = {k: v for k, v in client_state.items() if k in self.local}
        arrays = {**records["arrays"], **own}
        return super().evaluate({**records, "arrays": arrays}, client_state, batch)
