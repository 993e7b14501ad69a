"""What the server side of every sampler has in common: weights, draws, divergence.

The parameters after a round are one draw of each chain: the average of the clients' end points,
weighted by w_c. The clients need n = Σ n_c (for w_c = n_c / n) and W_S, the weight of the round's
cohort, to scale their potentials and their private noise, so the first exchange of a run asks for
the clients' sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from pydantic import Field
from torch import Tensor

from fedsim.errors import RunFailed
from fedsim.messages import (
    Arrays,
    Broadcast,
    Replies,
    make_content,
    stack,
    to_record,
    to_tensors,
)
from fedsim.random import generator
from fedsim.strategies.base import (
    Exchange,
    ReplySchema,
    Strategy,
    StrategyParams,
    mean_metrics,
)

DIVERGED = 1e6
"""Root mean square of a chain, in units of its start and of 1, from which it has diverged."""


class SamplerParams(StrategyParams):
    """What all samplers have in common."""

    step_size: float = Field(gt=0, description="Leapfrog step size η, > 0.")
    shared_variance: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share ρ of the momentum's variance that all clients draw in common, in"
        " [0, 1]. (Papers write ρ or ρ² for it.)",
    )
    temperature: float = Field(
        1.0, gt=0, description="Temperature τ: the target is the posterior to the power 1/τ, > 0."
    )
    prior: Literal["normal", "laplace", "student_t", "flat"] = Field(
        "normal", description="Prior of every parameter, independent and centred at 0."
    )
    prior_precision: float = Field(
        1.0, gt=0, description="Prior precision λ (for student_t: of the squared scale), > 0."
    )
    prior_df: float = Field(4.0, gt=0, description="Degrees of freedom of student_t, > 0.")
    chains: int = Field(4, ge=1, description="Independent chains, ≥ 1; R-hat needs ≥ 4.")
    init_sd: float | None = Field(
        None,
        gt=0,
        description="Start every chain at N(0, init_sd²) instead of the model's own start.",
    )
    warm_up: int = Field(
        0,
        ge=0,
        description="Rounds at temperature 0 before the burn-in: a descent towards the mode.",
    )
    burn_in: int = Field(0, ge=0, description="Rounds discarded before the first draw, ≥ 0.")
    thinning: int = Field(1, ge=1, description="Keep every thinning-th round as a draw, ≥ 1.")


class Sampler(Strategy):
    """Base of the samplers; a subclass says what its clients need beside the common settings."""

    samples = True
    streams = True
    sends = frozenset(
        {"step-size", "shared-variance", "temperature", "prior", "prior-precision",
         "participating-weight", "weighted-by"}
    )  # fmt: skip
    params: SamplerParams
    cure: str = "a smaller step_size"
    """What keeps a chain stable, for the sentence that reports a divergence."""

    def __init__(self, params: SamplerParams) -> None:
        super().__init__(params)
        self.params = params
        self._examples: dict[int, int] = {}
        self._start_rms = 1.0

    def kernel(self) -> dict[str, Any]:
        """Returns the settings of the method itself, in the messages' words."""
        raise NotImplementedError

    def beside(self, arrays: Arrays) -> dict[str, Arrays]:
        """Returns the records that are sent with the positions."""
        return {}

    def absorb(self, replies: Replies) -> None:
        """Takes what the replies hold beside the positions."""

    def exchanges(self, server_round: int) -> Sequence[Exchange]:
        """Returns the clients' sizes first, once; then the local steps."""
        train = self.train_exchange()
        if self._examples:
            return [train]
        count = Exchange(
            "query.num_examples",
            self._configure_count,
            self._aggregate_count,
            lambda arrays: ReplySchema({}),
        )
        return [count, train]

    def is_draw(self, server_round: int) -> bool:
        """Every thinning-th round after warm-up and burn-in."""
        p = self.params
        after = server_round - p.warm_up - p.burn_in
        return after > 0 and after % p.thinning == 0

    def initial(self, arrays: Arrays, seed: int) -> Arrays:
        """Draws the chains' starts where init_sd asks for it."""
        if self.params.init_sd is None:
            return arrays
        rng = generator(seed, "init")
        return {
            name: torch.from_numpy(rng.standard_normal(tuple(value.shape))).to(value.dtype)
            * self.params.init_sd
            for name, value in sorted(arrays.items())
        }

    def settings(self, server_round: int) -> dict[str, Any]:
        """Returns the sampler's settings in the messages' words."""
        p = self.params
        return {
            "chains": p.chains,
            "step-size": p.step_size,
            "shared-variance": p.shared_variance,
            "temperature": 0.0 if server_round <= p.warm_up else p.temperature,
            "prior": p.prior,
            "prior-precision": p.prior_precision,
            "prior-df": p.prior_df,
            "weighted-by": p.weighted_by,
            "total-examples": sum(self._examples.values()),
            "num-clients": len(self._examples),
            **self.kernel(),
        }

    def _configure_count(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return Broadcast(make_content({}, config), "query.num_examples", list(grid.get_node_ids()))

    def _aggregate_count(self, server_round: int, replies: Iterable[Message]) -> tuple[None, None]:
        stacked = stack(replies)
        if not stacked.node_ids or not float(stacked.metrics["num-examples"].sum()):
            raise RunFailed(f"round {server_round}: no client said that it has examples")
        counts = stacked.metrics["num-examples"].tolist()
        self._examples = {n: int(c) for n, c in zip(stacked.node_ids, counts, strict=True)}
        return None, None

    def _weight_of(self, nodes: Sequence[int]) -> float:
        """Returns the summed weight of the nodes, in (0, 1]."""
        if self.params.weighted_by == "uniform":
            return len(nodes) / len(self._examples)
        total = sum(self._examples.values())
        return sum(self._examples.get(n, 0) for n in nodes) / total

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sends the chains' positions and the settings to the round's sample."""
        nodes = self.sample(config, grid, self.params.fraction_train)
        settings = {**config, **self.settings(server_round)}
        settings["participating-weight"] = self._weight_of(nodes)
        positions = to_tensors(arrays)
        if server_round == 1:
            self._start_rms = float(_rms(positions).max())
        content = make_content({"arrays": positions, **self.beside(positions)}, settings)
        return Broadcast(content, "train", nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the weighted mean of the end points: one draw a chain.

        Raises RunFailed if a chain has diverged.
        """
        stacked = stack(replies)
        if not stacked.node_ids:
            return None, None
        mean = stacked.mean("arrays", self.weights(stacked))
        rms = _rms(mean)
        worst = int(rms.argmax())
        if not float(rms[worst]) < DIVERGED * max(self._start_rms, 1.0):
            raise RunFailed(
                f"round {server_round}: chain {worst} has diverged (its root mean square is"
                f" {float(rms[worst]):.3g}); {self.cure} would keep it stable"
            )
        self.absorb(stacked)
        return to_record(mean), mean_metrics(stacked)

    def state_dict(self) -> dict[str, Any]:
        """Returns the clients' sizes and the scale that divergence is measured by."""
        return {
            "examples": {str(n): c for n, c in self._examples.items()},
            "start_rms": self._start_rms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        self._examples = {int(n): int(c) for n, c in state["examples"].items()}
        self._start_rms = float(state["start_rms"])


def _rms(arrays: Arrays) -> Tensor:
    """Returns the root mean square of each chain's parameters, (chains,)."""
    flat = torch.cat([value.reshape(len(value), -1) for value in arrays.values()], dim=1)
    return flat.cpu().double().square().mean(1).sqrt()
