"""The contract of a client: pure functions of one client, one chain, written once.

An engine computes many clients (and chains) by one call, or one after the other, or in another
process; the client does not know. A step is pure: minibatches, noise and everything that may change
between rounds come in as tensors.

    plan(n_examples, config)                      -> Plan: how many steps, and what each needs
    init(records, client_state, inputs)           -> state (any pytree of tensors)
    step(state, inputs)                           -> state
    finish(state)                                 -> (Reply, client_state)
    evaluate(records, client_state, batch)        -> per-example metrics

The shape is FedJAX's for_each_client (client_init, client_step, client_final), plus a plan and
state that stays with the client. A toy client that sends back the mean of its rows:

    class Mean(Client):
        def plan(self, n_examples, config):
            return Plan(steps=0, batching=Batching("full"), init_minibatches=1)
        def init(self, records, client_state, inputs):
            return {"mean": inputs.batches[0].x.mean(0), "n": inputs.scalars["num-examples"]}
        def finish(self, state):
            return Reply({"arrays": {"mean": state["mean"]}}, {"num-examples": state["n"]}), {}
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim import errors
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel, Task

State = Any
"""Any pytree of tensors; a client chooses its own."""

Config = Mapping[str, Any]
"""The scalars of a message's ConfigRecord."""


class Batch(NamedTuple):
    """Examples of one client.

    x (n, *shape), y (n, ...); weight (n,) is padding mask, importance and coreset weight at once:
    a row of weight 0 is not there. scale (): the client's number of examples over the batch's, so
    that scale · Σ weight · loss estimates the sum over the client's examples without bias.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    scale: Tensor


class Inputs(NamedTuple):
    """What a step gets: its minibatches, its noise, and scalars that may change, as 0-d tensors.

    scalars always holds "num-examples", "partition-id" and "step", of the data's dtype but for the
    id, which is int64: float32 has no whole numbers of its own beyond 2^24. static is the plan's:
    plain values that may steer Python's control flow.
    """

    batches: tuple[Batch, ...]
    noise: dict[str, Arrays]
    scalars: dict[str, Tensor]
    static: Mapping[str, Hashable] = MappingProxyType({})


class Reply(NamedTuple):
    """What is sent back: named records of arrays, and 0-d metrics.

    Chains are averaged in the metrics and kept in the arrays.
    """

    records: dict[str, Arrays]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Noise:
    """Random numbers of a step.

    shapes: by name; `like` takes the names and shapes of that received record instead.
    shared: the same numbers for all clients of the round (they differ between chains).
    every: drawn anew at steps 0, every, 2·every, …; the same numbers in between.
    per_example: shapes are of one example; what comes in is (minibatches, batch size, *shape).
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    like: str | None = None
    distribution: Literal["normal", "uniform"] = "normal"
    shared: bool = False
    every: int = 1
    per_example: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be meant."""
        if self.shared and self.per_example:
            raise ValueError("noise per example cannot be shared: clients differ in their examples")
        if self.every < 1:
            raise ValueError(f"noise is drawn every {self.every} steps; it must be ≥ 1")


@dataclass(frozen=True)
class Batching:
    """How minibatches are drawn.

    epochs: a keyed shuffle for each pass over the data, in batches of `size`, the last one smaller.
    sampled: `size` rows without replacement, drawn anew for each minibatch.
    full: every row, always. none: no data at all.
    """

    kind: Literal["epochs", "sampled", "full", "none"]
    size: int = 0


@dataclass(frozen=True)
class Plan:
    """What a client will do on one message: a deterministic function of n_examples and the config.

    scalars: a number, or an array of shape (steps,), each given to the step as a 0-d tensor.
    static: what steers the step's control flow; a traced graph is kept for each value, so nothing
    that changes from round to round belongs here.
    chains: the leading axis of every received array; 0 if there is none.
    """

    steps: int
    batching: Batching
    minibatches_per_step: int = 1
    init_minibatches: int = 0
    noise: Mapping[str, Noise] = field(default_factory=dict)
    scalars: Mapping[str, float | np.ndarray[Any, Any]] = field(default_factory=dict)
    static: Mapping[str, Hashable] = field(default_factory=dict)
    chains: int = 0


class _Declared(ABC):
    """What a client says of itself, beside what it does.

    Params: the client's section of a scenario. honours: the message settings it obeys, so that a
    strategy that sends others is refused; requires: those it cannot do without, so that a strategy
    that does not send them is refused. metrics: what its replies report beside "num-examples".
    """

    Params: ClassVar[type[errors.Params]]
    honours: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    metrics: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: errors.Params, model: FunctionalModel, task: Task) -> None:
        self.params = params
        self.model = model
        self.task = task

    def initial_client_state(self) -> Arrays:
        """Returns the state of a client that was never asked before."""
        return {}


class Client(_Declared):
    """What one client does on a message. Subclasses are stateless: all state is passed in and out.

    personalised: whether evaluation depends on the client's own state, or on the other rows of the
    batch. local: the names of the model's arrays that stay with the client, as its state.
    trains_batch_norm: whether training keeps the running statistics that come with the parameters
    (FunctionalModel.apply_train); a model that has them is refused otherwise.
    """

    personalised: bool = False
    local: frozenset[str] = frozenset()
    trains_batch_norm: ClassVar[bool] = False

    def plan(self, n_examples: int, config: Config) -> Plan:
        """Returns the work that a message with this config asks of a client of n_examples rows."""
        return Plan(steps=0, batching=Batching("none"))

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> State:
        """Returns the state before the first step.

        records: the received arrays. client_state: what the last `finish` here returned, or
        `initial_client_state`. inputs.batches: `Plan.init_minibatches` minibatches; noise is empty.
        """
        raise NotImplementedError

    def step(self, state: State, inputs: Inputs) -> State:
        """Returns the state after one more step."""
        raise NotImplementedError

    def finish(self, state: State) -> tuple[Reply, Arrays]:
        """Returns what is sent back and what stays here."""
        raise NotImplementedError

    def evaluate(
        self, records: dict[str, Arrays], client_state: Arrays, batch: Batch
    ) -> dict[str, Tensor]:
        """Returns metrics of shape (n,) per example; the engine takes their weighted means."""
        outputs = self.model.apply(records["arrays"], batch.x, weight=batch.weight)
        values = {"loss": self.task.loss(outputs, batch.y)}
        for name, metric in self.task.metrics.items():
            values[name] = metric(outputs, batch.y)
        return values

    def action(self, name: str) -> Client | None:
        """Returns the client that answers messages of type train.<name> or query.<name>."""
        return None


def weighted_mean_loss(losses: Tensor, weight: Tensor) -> Tensor:
    """Returns Σ weight · loss / Σ weight, and 0 for a batch without any row."""
    return (losses * weight).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)


class DirectClient(_Declared):
    """A client that is no gradient loop (a bandit's pull, a histogram): computed one by one."""

    def train(
        self,
        message_type: str,
        records: dict[str, Arrays],
        config: Config,
        shard: Batch,
        client_state: Arrays,
        rng: np.random.Generator,
    ) -> tuple[Reply, Arrays]:
        """Returns the reply to one message and the state to keep; `rng` is keyed to it.

        config: the message's settings, and "partition-id", the client's own number.
        """
        raise NotImplementedError

    def score(
        self,
        records: dict[str, Arrays],
        config: Config,
        shard: Batch,
        held: Batch,
        client_state: Arrays,
        rng: np.random.Generator,
    ) -> dict[str, float]:
        """Returns the metrics of what the client has found, on the rows `held` out for it.

        shard: the rows that it trains on. A client that does not have this is not evaluated.
        """
        raise NotImplementedError
