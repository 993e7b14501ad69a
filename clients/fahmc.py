"""The client of FA-HMC: Hamiltonian trajectories on its own potential.

Liang, Zhang, Deng, Song, Lin, "Bayesian Federated Learning with Hamiltonian Monte Carlo: Algorithm
and Theory" (arXiv 2407.06935). FA-LD, its special case of one leapfrog step: Deng et al., "On
Convergence of Federated Averaging Langevin Dynamics" (arXiv 2112.05120).

Certain: the target exp(−Σ_c w_c f_c), local trajectories between averages, momentum noise partly
shared by the clients. Reconstructed from the target density and checked against closed forms
(tests/methods/test_fahmc.py), not copied from the paper's algorithm box: the two-gradient leapfrog,
the scale sqrt((1 − ρ)/w_c) of private noise, the control variates, partial participation. There is
no Metropolis correction: draws are biased at every finite step size, and by the drift of clients
between averages, which grows with trajectories × leapfrog steps × step size.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

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
)
from fedsim.clients.potential import (
    SETTINGS,
    potential_gradient,
    potential_scalars,
    prior_static,
)
from fedsim.errors import Params
from fedsim.messages import Arrays


class FAHMCClientParams(Params):
    """How the client estimates gradients; the sampler's settings come with the messages."""

    name: Literal["fa-hmc"] = "fa-hmc"
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Examples in a minibatch, drawn anew for each gradient; null for all of them"
        " (and one gradient a leapfrog step instead of two).",
    )


class FAHMC(Client):
    """Runs T trajectories of K leapfrog steps from the received parameters and sends the end point.

    Settings in the messages: step-size η, leapfrog-steps K, trajectories T, shared-variance ρ,
    temperature τ, prior, prior-precision λ, total-examples n or num-clients, participating-weight
    W_S, control-variate. The momentum is p_c = sqrt(τ) (sqrt(ρ) ξ + sqrt((1 − ρ) W_S / w_c) ξ_c):
    with the weights w_c / W_S of the average, its mean over the clients is N(0, τ I).

    Gradients a round: K·T with all rows, 2·K·T minibatch gradients otherwise (T for K = 1). With
    control variates one more, in the exchange before, and with minibatches twice as many.

    Metrics: gradients (per-example gradients computed, for each chain), kinetic (mean squared
    momentum at the last leapfrog step over its expectation at the start: near 1 in equilibrium if
    the clients agree, above it as far as they pull apart, and growing without bound when the
    trajectories diverge; for K = 1 it says nothing).
    """

    Params = FAHMCClientParams
    honours = SETTINGS | {
        "step-size",
        "leapfrog-steps",
        "trajectories",
        "shared-variance",
        "temperature",
        "participating-weight",
        "control-variate",
        "chains",
    }
    requires = frozenset(
        {"step-size", "leapfrog-steps", "trajectories", "shared-variance", "temperature",
         "prior-precision", "participating-weight"}
    )  # fmt: skip
    metrics = frozenset({"gradients", "kinetic"})
    params: FAHMCClientParams

    def action(self, name: str) -> Client | None:
        """Answers train.gradient with the full gradient of f_c, for the control variates."""
        return PotentialGradient(self.params, self.model, self.task) if name == "gradient" else None

    def plan(self, n_examples: int, config: Config) -> Plan:
        """T·K steps of two minibatches each; of one for K = 1 or with all rows."""
        leapfrogs, steps = int(config["leapfrog-steps"]), int(config["trajectories"])
        steps *= leapfrogs
        shared, temperature = float(config["shared-variance"]), float(config["temperature"])
        full = self.params.batch_size is None
        scalars = potential_scalars(n_examples, config)
        private = (1 - shared) * float(config["participating-weight"]) / scalars["client-weight"]
        noise = {}
        if shared > 0:
            noise["shared"] = Noise(like="arrays", shared=True, every=leapfrogs)
        if shared < 1:
            noise["private"] = Noise(like="arrays", every=leapfrogs)
        return Plan(
            steps=steps,
            batching=Batching("full") if full else Batching("sampled", self.params.batch_size or 0),
            minibatches_per_step=1 if full or leapfrogs == 1 else 2,
            noise=noise,
            scalars={
                **scalars,
                "step-size": float(config["step-size"]),
                "shared-scale": (temperature * shared) ** 0.5,
                "private-scale": (temperature * private) ** 0.5,
                # of the start momentum; 1 where there is none, as the metric is then 0 anyway
                "momentum-variance": temperature * (shared + private) or 1.0,
                "refresh": (np.arange(steps) % leapfrogs == 0).astype(float),
            },
            static={
                **prior_static(config),
                "control": bool(config.get("control-variate", False)),
                "full": full,
                "leapfrogs": leapfrogs,
            },
            chains=int(config.get("chains", 0)),
        )

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> State:
        """Starts at x; no gradient is taken yet."""
        x = records["arrays"]
        zeros = {name: torch.zeros_like(value) for name, value in x.items()}
        state: dict[str, State] = {
            "q": x,
            "p": zeros,
            "gradients": inputs.scalars["step-size"] * 0,
            "momentum-variance": inputs.scalars["momentum-variance"],
            "num-examples": inputs.scalars["num-examples"],
            "client": client_state,
        }
        if inputs.static["full"]:
            state["g"] = zeros
        if inputs.static["control"]:
            state["global"] = records["gradient"]
            # ∇f_c(x), which the first step computes, or x, to take it again on each minibatch
            state |= {"own": zeros} if inputs.static["full"] else {"x": x}
        return state

    def step(self, state: State, inputs: Inputs) -> State:
        """One leapfrog step; the first of a trajectory draws the momentum anew.

        With all rows the gradient g' that ends a step is the g that begins the next: the half kick
        by it is made there. The one that ends a trajectory, whose momentum is thrown away, is not.
        """
        eta = inputs.scalars["step-size"]
        full = bool(inputs.static["full"])
        g, own, count = self._gradient(state["q"], state, inputs.batches[0], inputs)
        p = state["p"]
        if full:
            p = {k: v - 0.5 * eta * (state["g"][k] + g[k]) for k, v in p.items()}
        p = self._refresh(p, inputs)
        q = {k: v + eta * p[k] - 0.5 * eta**2 * g[k] for k, v in state["q"].items()}
        new = state | {"q": q, "p": p, "gradients": count} | own
        if full:
            return new | {"g": g}
        if inputs.static["leapfrogs"] == 1:
            return new
        after, _, count = self._gradient(q, new, inputs.batches[-1], inputs)
        p = {k: v - 0.5 * eta * (g[k] + after[k]) for k, v in p.items()}
        return new | {"p": p, "gradients": count}

    def _refresh(self, p: Arrays, inputs: Inputs) -> Arrays:
        """Returns the momentum: drawn anew where a trajectory starts."""
        s = inputs.scalars
        fresh: Arrays = {k: torch.zeros_like(v) for k, v in p.items()}
        for source, scale in (("shared", "shared-scale"), ("private", "private-scale")):
            if source in inputs.noise:
                fresh = {k: v + s[scale] * inputs.noise[source][k] for k, v in fresh.items()}
        return {k: torch.where(s["refresh"] > 0, fresh[k], v) for k, v in p.items()}

    def _gradient(
        self, q: Arrays, state: State, batch: Batch, inputs: Inputs
    ) -> tuple[Arrays, dict[str, Arrays], Tensor]:
        """Returns the gradient that drives the leapfrog at q, ∇f_c(x) if it is kept, the count."""
        g = potential_gradient(self.model, self.task, q, batch, inputs)
        used = (batch.weight != 0).sum()
        if not inputs.static["control"]:
            return g, {}, state["gradients"] + used
        if inputs.static["full"]:
            first = inputs.scalars["step"] == 0
            anchor = {k: torch.where(first, g[k], v) for k, v in state["own"].items()}
        else:  # on the same minibatch, whose noise then cancels (as in SVRG)
            anchor = potential_gradient(self.model, self.task, state["x"], batch, inputs)
            used = 2 * used
        corrected = {k: v - anchor[k] + state["global"][k] for k, v in g.items()}
        kept = {"own": anchor} if inputs.static["full"] else {}
        return corrected, kept, state["gradients"] + used

    def finish(self, state: State) -> tuple[Reply, Arrays]:
        """Sends the end point of the last trajectory."""
        squares = torch.cat([p.reshape(-1) for p in state["p"].values()]).square()
        metrics = {
            "num-examples": state["num-examples"],
            "gradients": state["gradients"],
            "kinetic": squares.mean() / state["momentum-variance"],
        }
        return Reply({"arrays": state["q"]}, metrics), state["client"]


class PotentialGradient(Client):
    """Replies with ∇f_c at the received parameters, over all of the client's rows."""

    Params = FAHMCClientParams

    def plan(self, n_examples: int, config: Config) -> Plan:
        """No steps: the gradient is taken in `init`."""
        return Plan(
            steps=0,
            batching=Batching("full"),
            init_minibatches=1,
            scalars=potential_scalars(n_examples, config),
            static=prior_static(config),
            chains=int(config.get("chains", 0)),
        )

    def init(self, records: dict[str, Arrays], client_state: Arrays, inputs: Inputs) -> State:
        """Takes the gradient."""
        (batch,) = inputs.batches
        gradient = potential_gradient(self.model, self.task, records["arrays"], batch, inputs)
        used = inputs.scalars["client-weight"] * 0 + (batch.weight != 0).sum()
        return gradient, inputs.scalars["num-examples"], used, client_state

    def finish(self, state: State) -> tuple[Reply, Arrays]:
        """Sends it in the record "gradient"."""
        gradient, n, used, client_state = state
        return Reply({"gradient": gradient}, {"num-examples": n, "gradients": used}), client_state
