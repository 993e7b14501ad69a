"""What our strategies add to Flower's: exchanges, a reply schema, state for checkpoints, stacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from pydantic import Field
from torch import Tensor

from fedsim import errors
from fedsim.messages import Arrays, Broadcast, Replies, make_content, stack, to_tensors
from fedsim.random import generator

if TYPE_CHECKING:
    from fedsim.data import FederatedData

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class ReplySchema:
    """What a good reply holds.

    records: the array records by name, each array with its shape and dtype; None accepts exactly
    one record, of any name, shaped like the parameters (what Flower's strategies take).
    metrics: the metrics that must be there, each one finite number.
    weight: the metric that replies are weighted by; it must not be negative.
    """

    records: Mapping[str, Shapes] | None
    metrics: frozenset[str] = frozenset({"num-examples"})
    weight: str = "num-examples"


@dataclass(frozen=True)
class Exchange:
    """One question to the clients and what is made of the answers.

    A round is an ordered list of these. `aggregate` returns new parameters, or None to keep them.
    by_client: whether the clients' metrics are logged one by one, beside what `aggregate` returns.
    weights: given if `aggregate` needs no reply's arrays, only their means with these weights
    (clients,) float64 ≥ 0, not normalised, each a function of that client's metrics alone. The
    engine then averages the replies as they come, and memory does not grow with the cohort.
    wait: the number of good replies that the exchange waits for, ≥ 1; None: one for each message.
    At most one exchange of a round has a number. With it, `configure` is called whenever replies
    have come and more are needed, what is under way stays so over rounds, and `aggregate` gets
    `Received`, which knows what each reply answers.
    """

    message_type: str
    configure: Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]
    aggregate: Callable[[int, Iterable[Message]], tuple[ArrayRecord | None, MetricRecord | None]]
    schema: Callable[[ArrayRecord], ReplySchema]
    weights: Callable[[Replies], Tensor] | None = None
    wait: int | None = None
    by_client: bool = False


class StrategyParams(errors.Params):
    """What every strategy of fedsim has.

    The class variables, which any class of a strategy's parameters may set, are for the scenario.
    needs_model: whether it must name a model and a task. default_rounds: the most rounds of one
    that names none, where the strategy ends by itself (`Strategy.finished`).
    """

    needs_model: ClassVar[bool] = True
    default_rounds: ClassVar[int | None] = None

    fraction_train: float = Field(
        1.0, gt=0, le=1, description="Fraction of the nodes sampled each round, in (0, 1]."
    )
    fraction_evaluate: float = Field(
        1.0, gt=0, le=1, description="Fraction of the nodes that evaluate when asked, in (0, 1]."
    )
    weighted_by: Literal["examples", "uniform"] = Field(
        "examples", description="Client weights w_c: n_c / n, or all equal."
    )
    chains: int = Field(
        0,
        ge=0,
        description="Independent replicates computed together, each with its own initial"
        " parameters and noise (chains of a sampler, members of an ensemble); 0 for one without"
        " an axis.",
    )


class Strategy(FlowerStrategy):
    """Base of fedsim's strategies: Flower's five methods, on stacks of tensors.

    Params: the strategy's section of a scenario. client: the client it needs by default.
    sends: the message settings that a client must honour. needs: metrics a reply must hold.
    """

    Params: ClassVar[type[errors.Params]]
    client: ClassVar[str]
    sends: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    samples: ClassVar[bool] = False
    """Whether the parameters after a round are a draw from a posterior."""
    streams: ClassVar[bool] = False
    """Whether aggregate_train needs the replies' weighted means (`Replies.mean`) alone."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class whose means or weights are not those of the one that streams sees every reply."""
        super().__init_subclass__(**kwargs)
        # the next in line may be a mixin, which knows nothing of `streams`
        own = {"aggregate_train", "weights", "streams"}
        first = next(c for c in cls.__mro__ if own & vars(c).keys())
        if "streams" not in vars(first):
            cls.streams = False

    def __init__(self, params: StrategyParams) -> None:
        self.common = params

    @property
    def chains(self) -> int:
        """The leading axis of all arrays; 0 for none."""
        return self.common.chains

    def exchanges(self, server_round: int) -> Sequence[Exchange]:
        """Returns the exchanges of a round, in order."""
        return [self.train_exchange()]

    def train_exchange(self) -> Exchange:
        """Returns the exchange of `train` messages."""
        weights = self.streamed_weights()
        return Exchange(
            "train", self.configure_train, self.aggregate_train, self.reply_schema, weights
        )

    def reply_schema(self, arrays: ArrayRecord) -> ReplySchema:
        """Returns what a train reply must hold: by default one record shaped like `arrays`."""
        return ReplySchema({"arrays": shapes_of(arrays)}, frozenset({"num-examples"}) | self.needs)

    def bind(self, client: Any, data: FederatedData) -> None:
        """Takes what the strategy has to know of the client and the data, before the run.

        Raises UserError if they do not fit. Nothing is computed or sent here.
        """

    def finished(self) -> bool:
        """Says after a round whether the run has ended, before its last round."""
        return False

    def artifacts(self, states: Callable[[], Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
        """Returns what a finished run keeps beside its metrics: by file name (.npz), arrays.

        states: returns all that the clients keep, as tensors named partition/name.
        """
        return {}

    def notes(self) -> list[str]:
        """Returns sentences on what was found, for the summary and the screen."""
        return []

    def objections(self, num_nodes: int) -> list[str]:
        """Returns why the strategy cannot be served by so many nodes."""
        return []

    def is_draw(self, server_round: int) -> bool:
        """Says whether the parameters after this round count as a draw."""
        return False

    def initial(self, arrays: Arrays, seed: int) -> Arrays:
        """Returns the parameters of round 0, given those the model starts from."""
        return arrays

    def settings(self, server_round: int) -> dict[str, Any]:
        """Returns what the message's config tells the clients beside round and seed."""
        return {"chains": self.chains} if self.chains else {}

    def sample(self, config: Mapping[str, Any], grid: Grid, fraction: float) -> list[int]:
        """Returns the nodes of this round, at least one, in the order of their ids."""
        found = grid.get_node_ids()
        nodes = found if isinstance(found, range) else sorted(found)  # never a list of a million
        size = sample_size(fraction, len(nodes))
        if size >= len(nodes):
            return list(nodes)
        rng = generator(int(config["seed"]), "sample", int(config["server-round"]))
        return sorted(nodes[i] for i in rng.choice(len(nodes), size, replace=False))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sends the parameters to the round's sample."""
        nodes = self.sample(config, grid, self.common.fraction_train)
        return Broadcast(self._content(server_round, arrays, config), "train", nodes)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sends the parameters to those who evaluate."""
        nodes = self.sample(config, grid, self.common.fraction_evaluate)
        return Broadcast(self._content(server_round, arrays, config), "evaluate", nodes)

    def _content(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> RecordDict:
        own = self.settings(server_round)
        return make_content({"arrays": to_tensors(arrays)}, {**config, **own} if own else config)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Returns the means of the clients' metrics, weighted by their examples."""
        return mean_metrics(stack(replies))

    def weights(self, replies: Replies) -> Tensor:
        """Returns w_c (clients,) float64, not normalised."""
        return client_weights(self.common.weighted_by, replies)

    def streamed_weights(self) -> Callable[[Replies], Tensor] | None:
        """Returns `weights` for an engine that averages replies; None for a class that does not.

        An engine may send it to other processes: so it is a function without the strategy's state,
        unless the class has weights of its own.
        """
        if not self.streams:
            return None
        if type(self).weights is Strategy.weights:
            return partial(client_weights, self.common.weighted_by)
        return self.weights

    def summary(self) -> None:
        """Flower calls this to log the strategy; the run folder holds all of it."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state between rounds: tensors, numbers, strings, nested dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


def sample_size(fraction: float, num_nodes: int) -> int:
    """Returns how many nodes such a fraction of them is, at least one."""
    return max(round(fraction * num_nodes), 1)


def client_weights(weighted_by: Literal["examples", "uniform"], replies: Replies) -> Tensor:
    """Returns w_c (clients,) float64, not normalised: n_c, or 1."""
    if weighted_by == "uniform":
        return torch.ones(len(replies.node_ids), dtype=torch.float64)
    return replies.metrics["num-examples"]


def shapes_of(arrays: ArrayRecord) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shape and torch dtype of each array."""
    return {
        name: (tuple(array.shape), getattr(torch, array.dtype)) for name, array in arrays.items()
    }


def mean_metrics(replies: Replies) -> MetricRecord | None:
    """Returns the replies' metrics, weighted by examples; None without replies."""
    if not replies.node_ids:
        return None
    weights = replies.metrics["num-examples"]
    total = float(weights.sum())
    return MetricRecord(
        {
            name: float((values * weights).sum() / total) if total else float(values.mean())
            for name, values in replies.metrics.items()
            if name != "num-examples" and values.ndim == 1
        }
    )
