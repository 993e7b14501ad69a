"""FA-HMC and FA-LD: posterior sampling by averaging the clients' Hamiltonian trajectories.

Liang, Zhang, Deng, Song, Lin, "Bayesian Federated Learning with Hamiltonian Monte Carlo: Algorithm
and Theory" (arXiv 2407.06935); FA-LD: Deng et al. (arXiv 2112.05120). The client part, and what of
the algorithm is reconstructed, is described in fedsim.clients.fahmc. The control variates follow
the idea of SCAFFOLD and SVRG; they remove the bias of client drift and may diverge where plain
FA-HMC does not, so a growing chain stops the run with a sentence that says so.

With partial participation the average is taken with renormalised weights: this leaves a bias that
does not vanish with the step size.
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
    shapes_of,
    weighted_mean,
)

DIVERGED = 1e6
"""Root mean square of a chain, in units of its start and of 1, from which it has diverged."""


class SamplerParams(StrategyParams):
    """What FA-HMC and FA-LD have in common."""

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


class FAHMCParams(SamplerParams):
    """Federated averaging stochastic Hamiltonian Monte Carlo."""

    name: Literal["fa-hmc"] = "fa-hmc"
    leapfrog_steps: int = Field(10, ge=1, description="Leapfrog steps K of a trajectory, ≥ 1.")
    trajectories_per_round: int = Field(
        1, ge=1, description="Trajectories T between two averages, ≥ 1; client drift grows with it."
    )
    control_variate: bool = Field(
        False,
        description="Correct the clients' gradients by a global gradient at the start of the round"
        " (FA-HMC-CV): one more exchange a round, no drift bias, may diverge.",
    )


class FALDParams(SamplerParams):
    """Federated averaging Langevin dynamics: FA-HMC with one leapfrog step a trajectory."""

    name: Literal["fa-ld"] = "fa-ld"
    steps_per_round: int = Field(
        1, ge=1, description="Langevin steps between two averages, ≥ 1 (step h = η²/2 each)."
    )


class _Sampler(Strategy):
    """The server side of both samplers; the parameters after a round are one draw a chain."""

    client = "fa-hmc"
    samples = True
    params: SamplerParams

    def __init__(self, params: SamplerParams) -> None:
        super().__init__(params)
        self.params = params
        self._examples: dict[int, int] = {}
        self._global_gradient: Arrays | None = None
        self._start_rms = 1.0

    def leapfrog(self) -> tuple[int, int, bool]:
        """Returns K, T and whether control variates are used."""
        raise NotImplementedError

    def exchanges(self, server_round: int) -> Sequence[Exchange]:
        """The client sizes first, once; with control variates a global gradient; the trajectories.
        """
        train = Exchange("train", self.configure_train, self.aggregate_train, self.reply_schema)
        listed = [train]
        if self.leapfrog()[2]:
            listed.insert(
                0,
                Exchange(
                    "train.gradient",
                    self._configure_gradient,
                    self._aggregate_gradient,
                    lambda arrays: ReplySchema({"gradient": shapes_of(arrays)}),
                ),
            )
        if not self._examples:
            listed.insert(
                0,
                Exchange(
                    "query.num_examples",
                    self._configure_count,
                    self._aggregate_count,
                    lambda arrays: ReplySchema({}),
                ),
            )
        return listed

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
        leapfrogs, trajectories, control = self.leapfrog()
        return {
            "chains": p.chains,
            "step-size": p.step_size,
            "leapfrog-steps": leapfrogs,
            "trajectories": trajectories,
            "shared-variance": p.shared_variance,
            "temperature": 0.0 if server_round <= p.warm_up else p.temperature,
            "prior": p.prior,
            "prior-precision": p.prior_precision,
            "prior-df": p.prior_df,
            "weighted-by": p.weighted_by,
            "total-examples": sum(self._examples.values()),
            "num-clients": len(self._examples),
            "control-variate": control,
        }

    def _configure_count(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return Broadcast(make_content({}, config), "query.num_examples", list(grid.get_node_ids()))

    def _aggregate_count(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[None, None]:
        stacked = stack(replies)
        counts = stacked.metrics["num-examples"].tolist()
        self._examples = {n: int(c) for n, c in zip(stacked.node_ids, counts, strict=True)}
        return None, None

    def _weight_of(self, nodes: Sequence[int]) -> float:
        """Returns the summed weight of the nodes, in (0, 1]."""
        if self.params.weighted_by == "uniform":
            return len(nodes) / len(self._examples)
        total = sum(self._examples.values())
        return sum(self._examples.get(n, 0) for n in nodes) / total

    def _configure_gradient(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        nodes = self.sample(config, grid, self.params.fraction_train)
        content = make_content(
            {"arrays": to_tensors(arrays)}, {**config, **self.settings(server_round)}
        )
        return Broadcast(content, "train.gradient", nodes)

    def _aggregate_gradient(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[None, None]:
        stacked = stack(replies)
        if not stacked.node_ids:
            raise RunFailed(f"round {server_round}: no client sent a gradient to correct with")
        self._global_gradient = weighted_mean(stacked.arrays["gradient"], self.weights(stacked))
        return None, None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sends the chains' positions, the settings and, for control variates, the gradient."""
        nodes = self.sample(config, grid, self.params.fraction_train)
        settings = {**config, **self.settings(server_round)}
        settings["participating-weight"] = self._weight_of(nodes)
        records = {"arrays": to_tensors(arrays)}
        if self._global_gradient is not None:
            records["gradient"] = self._global_gradient
        if server_round == 1:
            self._start_rms = float(_rms(records["arrays"]).max())
        return Broadcast(make_content(records, settings), "train", nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the weighted mean of the end points: one draw a chain.

        Raises RunFailed if a chain has diverged.
        """
        stacked: Replies = stack(replies)
        if not stacked.node_ids:
            return None, None
        mean = weighted_mean(stacked.arrays["arrays"], self.weights(stacked))
        rms = _rms(mean)
        worst = int(rms.argmax())
        if not float(rms[worst]) < DIVERGED * max(self._start_rms, 1.0):
            cure = "a smaller step_size or fewer leapfrog_steps"
            if self.leapfrog()[2]:
                cure += ", or control_variate: false,"
            raise RunFailed(
                f"round {server_round}: chain {worst} has diverged (its root mean square is"
                f" {float(rms[worst]):.3g}); {cure} would keep it stable"
            )
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
    return flat.double().square().mean(1).sqrt()


class FAHMC(_Sampler):
    """FA-HMC; with control_variate FA-HMC-CV."""

    Params = FAHMCParams
    params: FAHMCParams

    def leapfrog(self) -> tuple[int, int, bool]:
        """Returns K, T and whether control variates are used."""
        p = self.params
        return p.leapfrog_steps, p.trajectories_per_round, p.control_variate


class FALD(_Sampler):
    """FA-LD: K = 1, and `steps_per_round` trajectories of it."""

    Params = FALDParams
    params: FALDParams

    def leapfrog(self) -> tuple[int, int, bool]:
        """Returns 1, the local steps, and no control variates."""
        return 1, self.params.steps_per_round, False
