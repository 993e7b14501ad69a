"""FA-HMC and FA-LD: posterior sampling by averaging the clients' Hamiltonian trajectories.

Liang, Zhang, Deng, Song, Lin, "Bayesian Federated Learning with Hamiltonian Monte Carlo: Algorithm
and Theory" (arXiv 2407.06935); FA-LD: Deng et al. (arXiv 2112.05120). The client part, and what of
the algorithm is reconstructed, is described in fedsim.clients.fahmc. The control variates follow
the idea of SCAFFOLD and SVRG; they remove the bias of client drift and may diverge where plain
FA-HMC does not, so a growing chain stops the run with a sentence that says so.

With partial participation the average is taken with renormalised weights. Where the clients'
weights differ, this leaves a bias that does not vanish with the step size, because E[w_c / W_S] is
not proportional to w_c; with equal weights it falls as η².
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from pydantic import Field

from fedsim.errors import RunFailed
from fedsim.messages import Arrays, Broadcast, make_content, stack, to_tensors
from fedsim.strategies.base import Exchange, ReplySchema, shapes_of
from fedsim.strategies.sampler import Sampler, SamplerParams


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


_SENDS = Sampler.sends | {"leapfrog-steps", "trajectories", "control-variate"}


class FAHMC(Sampler):
    """FA-HMC; with control_variate FA-HMC-CV."""

    Params = FAHMCParams
    client = "fa-hmc"
    sends = _SENDS
    params: FAHMCParams

    def __init__(self, params: FAHMCParams) -> None:
        super().__init__(params)
        self._global_gradient: Arrays = {}
        self.cure = "a smaller step_size or fewer leapfrog_steps"
        if params.control_variate:
            self.cure += ", or control_variate: false,"

    def kernel(self) -> dict[str, Any]:
        """Returns K, T and whether control variates are used."""
        p = self.params
        return {
            "leapfrog-steps": p.leapfrog_steps,
            "trajectories": p.trajectories_per_round,
            "control-variate": p.control_variate,
        }

    def beside(self, arrays: Arrays) -> dict[str, Arrays]:
        """Returns the global gradient, for control variates."""
        return {"gradient": self._global_gradient} if self.params.control_variate else {}

    def exchanges(self, server_round: int) -> Sequence[Exchange]:
        """Returns the sampler's, with the one for the global gradient before the trajectories."""
        *first, train = super().exchanges(server_round)
        if not self.params.control_variate:
            return [*first, train]
        gradient = Exchange(
            "train.gradient",
            self._configure_gradient,
            self._aggregate_gradient,
            lambda arrays: ReplySchema({"gradient": shapes_of(arrays)}),
            self.streamed_weights(),
        )
        return [*first, gradient, train]

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
        self._global_gradient = stacked.mean("gradient", self.weights(stacked))
        return None, None


class FALD(Sampler):
    """FA-LD: K = 1, and `steps_per_round` trajectories of it."""

    Params = FALDParams
    client = "fa-hmc"
    sends = _SENDS
    params: FALDParams

    def kernel(self) -> dict[str, Any]:
        """Returns one leapfrog step, the local steps, and no control variates."""
        return {
            "leapfrog-steps": 1,
            "trajectories": self.params.steps_per_round,
            "control-variate": False,
        }
