"""The client of federated stochastic gradient HMC: friction instead of fresh momenta.

Underdamped Langevin dynamics on the client's potential f_c (fedsim.clients.potential), advanced
exactly for a frozen gradient as in Cheng, Chatterji, Bartlett, Jordan (arXiv 1707.03663) and Wang,
Chen, Song, Zhang (arXiv 2310.16320), who call it SGHMC; in low precision if `low_precision` is
given, with the formulas and the corrections of fedsim.clients.low_precision.

The federation is this project's, not the papers': position and velocity both travel and are
averaged. One step from a common state (x, v) is linear in the gradient and in the noise, so with
averages after every step, all rows and full precision the average over the clients is exactly the
step of centralised SGHMC on Σ_c w_c f_c: for every ρ, as the averaged noise has unit variance.
Several steps a round drift apart as those of FA-HMC do; a velocity that was reset or kept by each
client would not average to the centralised one.

Low precision is the client's: its gradients, its weights and what it sends up lie on the number
format's grid. The server keeps averages in full precision and sends them so. There is no Metropolis
correction: draws are biased at every finite step size and gap.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.clients.base import Batching, Client, Config, Inputs, Plan, Reply, State
from fedsim.clients.base import Noise as NoiseSpec
from fedsim.clients.low_precision import (
    Coefficients,
    LowPrecision,
    Noise,
    Phase,
    coefficients,
    quantise,
    sghmc_f,
    sghmc_l,
    sghmc_vc,
)
from fedsim.clients.potential import (
    SETTINGS,
    potential_gradient,
    potential_scalars,
    prior_static,
)
from fedsim.errors import Params
from fedsim.messages import Arrays


class SGHMCClientParams(Params):
    """How the client estimates and rounds; the sampler's settings come with the messages."""

    name: Literal["sghmc"] = "sghmc"
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Examples in a minibatch, drawn anew for each step; null for all of them.",
    )
    low_precision: LowPrecision | None = Field(
        None, description="Number format and accumulator; null for full precision."
    )


class SGHMC(Client):
    """Takes `steps` steps of SGHMC from the received position and velocity and sends both back.

    Settings in the messages: step-size η, friction γ, inverse-mass u, steps, shared-variance ρ,
    temperature τ, those of the prior and the weights, participating-weight W_S. The noise of a step
    is sqrt(ρ) shared + sqrt((1 − ρ) W_S / w_c) private.

    Metrics: gradients (per-example gradients computed, for each chain).
    """

    Params = SGHMCClientParams
    honours = SETTINGS | {
        "step-size",
        "friction",
        "inverse-mass",
        "steps",
        "shared-variance",
        "temperature",
        "participating-weight",
        "chains",
    }
    requires = honours - SETTINGS - {"chains"} | {"prior-precision"}
    metrics = frozenset({"gradients"})
    params: SGHMCClientParams

    def plan(self, n_examples: int, config: Config) -> Plan:
        """One minibatch a step; random numbers for position and velocity, and for rounding them."""
        size = self.params.batch_size
        shared = float(config["shared-variance"])
        scalars = potential_scalars(n_examples, config)
        private = (1 - shared) * float(config["participating-weight"]) / scalars["client-weight"]
        normal = ["private"] * (shared < 1) + ["shared"] * (shared > 0)
        noise = {
            f"{source}-{part}": NoiseSpec(like="arrays", shared=source == "shared")
            for source in normal
            for part in ("x", "v")
        }
        noise |= {
            name: NoiseSpec(like="arrays", distribution="uniform") for name in self._uniforms()
        }
        return Plan(
            steps=int(config["steps"]),
            batching=Batching("full") if size is None else Batching("sampled", size),
            noise=noise,
            scalars={
                **scalars,
                "step-size": float(config["step-size"]),
                "friction": float(config["friction"]),
                "inverse-mass": float(config["inverse-mass"]),
                "temperature": float(config["temperature"]),
                "shared-variance": shared,
                "private-variance": private,
            },
            static=prior_static(config),
            chains=int(config.get("chains", 0)),
        )

    def _uniforms(self) -> list[str]:
        """Returns the names of the uniform numbers that rounding needs."""
        low = self.params.low_precision
        if low is None:
            return []
        names = ["weights"] + ["gradient"] * (low.gradient_format != "full")
        if low.accumulator != "full":
            names += ["rounding-x", "rounding-v"]
        if low.accumulator == "variance_corrected":
            names += ["category-x", "category-v"]
        return names

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> State:
        """Starts at the averages of the last round."""
        return {
            "x": records["arrays"],
            "v": records["velocity"],
            "gradients": inputs.scalars["step-size"] * 0,
            "num-examples": inputs.scalars["num-examples"],
            "client": client_state,
        }

    def step(self, state: State, inputs: Inputs) -> State:
        """Takes one step of every array."""
        s, (batch,) = inputs.scalars, inputs.batches
        c = coefficients(s["step-size"], s["friction"], s["inverse-mass"], s["temperature"])
        weights = {k: self._weights(x, k, inputs) for k, x in state["x"].items()}
        gradient = potential_gradient(self.model, self.task, weights, batch, inputs)
        moved = {
            k: self._advance(k, Phase(x, state["v"][k]), gradient[k], c, inputs)
            for k, x in state["x"].items()
        }
        return state | {
            "x": {k: phase.x for k, phase in moved.items()},
            "v": {k: phase.v for k, phase in moved.items()},
            "gradients": state["gradients"] + (batch.weight != 0).sum(),
        }

    def _weights(self, x: Tensor, name: str, inputs: Inputs) -> Tensor:
        """Returns Q_W(x), where the gradient is taken."""
        low = self.params.low_precision
        if low is None:
            return x
        return quantise(x, inputs.noise["weights"][name], low.format_for(x.ndim))

    def _advance(
        self, name: str, state: Phase, gradient: Tensor, c: Coefficients, inputs: Inputs
    ) -> Phase:
        """Returns (x', v') of one array."""
        low = self.params.low_precision

        def pair(kind: str) -> Phase:
            if f"{kind}-x" not in inputs.noise:  # noise of variance 0
                return Phase(torch.zeros_like(state.x), torch.zeros_like(state.v))
            return Phase(inputs.noise[f"{kind}-x"][name], inputs.noise[f"{kind}-v"][name])

        noise = Noise(
            pair("private"),
            pair("shared"),
            inputs.scalars["private-variance"],
            inputs.scalars["shared-variance"],
        )
        if low is None:
            return sghmc_f(state, gradient, c, noise)
        form = low.format_for(state.x.ndim)
        if low.gradient_format != "full":
            gradient_form = low.gradient_format_for(state.x.ndim)
            gradient = quantise(gradient, inputs.noise["gradient"][name], gradient_form)
        if low.accumulator == "full":
            return sghmc_f(state, gradient, c, noise)
        if low.accumulator == "low":
            return sghmc_l(state, gradient, c, noise, pair("rounding"), form)
        rounding, category = pair("rounding"), pair("category")
        return sghmc_vc(state, gradient, c, noise, rounding, category, form, low.corrected)

    def finish(self, state: State) -> tuple[Reply, Arrays]:
        """Sends position and velocity."""
        metrics = {"num-examples": state["num-examples"], "gradients": state["gradients"]}
        return Reply({"arrays": state["x"], "velocity": state["v"]}, metrics), state["client"]
