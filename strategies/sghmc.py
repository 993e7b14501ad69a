"""Federated stochastic gradient Hamiltonian Monte Carlo, in full or low precision.

The method, its sources and what of it is this project's own are described in fedsim.clients.sghmc:
the server averages the clients' positions and velocities, and a chain's position after a round is
one draw. A toy: two clients whose potentials are ½(θ − 1)² and ½(θ + 1)² sample N(0, 1).

    data: {name: gaussian_clients, means: [1, -1], sds: [1, 1]}
    strategy: {name: sghmc, step_size: 0.1, prior: flat}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from pydantic import Field

from fedsim.messages import Arrays, Replies
from fedsim.strategies.base import ReplySchema, shapes_of
from fedsim.strategies.sampler import Sampler, SamplerParams


class SGHMCParams(SamplerParams):
    """Stochastic gradient HMC with friction, averaged over the clients."""

    name: Literal["sghmc"] = "sghmc"
    step_size: float = Field(gt=0, description="Step size η in units of time, > 0.")
    shared_variance: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share ρ of the noise's variance that all clients draw in common, in [0, 1]."
        " Variance-corrected rounding takes its errors out of the private share: at 1 it has none.",
    )
    friction: float = Field(3.0, gt=0, description="Friction γ, per unit of time, > 0.")
    inverse_mass: float = Field(
        2.0, gt=0, description="Inverse mass u, > 0: the velocity's variance at temperature 1."
    )
    steps_per_round: int = Field(
        1, ge=1, description="Steps between two averages, ≥ 1; client drift grows with it."
    )


class SGHMC(Sampler):
    """Averages positions and velocities; the velocities stay here between the rounds.

    Metrics: kinetic (mean squared averaged velocity over u τ; near 1 in equilibrium).
    """

    Params = SGHMCParams
    client = "sghmc"
    streams = True
    sends = Sampler.sends | {"friction", "inverse-mass", "steps"}
    params: SGHMCParams

    def __init__(self, params: SGHMCParams) -> None:
        super().__init__(params)
        self.cure = "a smaller step_size or more friction"
        self._velocity: Arrays = {}

    def kernel(self) -> dict[str, Any]:
        """Returns γ, u and the local steps."""
        p = self.params
        return {
            "friction": p.friction,
            "inverse-mass": p.inverse_mass,
            "steps": p.steps_per_round,
        }

    def beside(self, arrays: Arrays) -> dict[str, Arrays]:
        """Returns the velocities: of the last round's average, at rest in the first."""
        if not self._velocity:
            self._velocity = {name: torch.zeros_like(x) for name, x in arrays.items()}
        return {"velocity": self._velocity}

    def reply_schema(self, arrays: ArrayRecord) -> ReplySchema:
        """Returns what a reply must hold: positions and velocities."""
        shapes = shapes_of(arrays)
        return ReplySchema({"arrays": shapes, "velocity": shapes})

    def absorb(self, replies: Replies) -> None:
        """Averages the velocities."""
        self._velocity = replies.mean("velocity", self.weights(replies))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the average of the positions, and the metrics with the kinetic energy.

        Raises RunFailed if a chain has diverged.
        """
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is not None:
            flat = torch.cat([v.reshape(-1) for v in self._velocity.values()])
            squares = flat.cpu().double().square()
            scale = self.params.inverse_mass * self.params.temperature
            metrics["kinetic"] = float(squares.mean()) / scale
        return arrays, metrics

    def state_dict(self) -> dict[str, Any]:
        """Returns the sampler's state and the velocities."""
        return {**super().state_dict(), "velocity": dict(self._velocity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores them."""
        super().load_state_dict(state)
        self._velocity = dict(state["velocity"])
