"""FA-HMC on a logistic posterior: fedsim's engine, and the same method written out in torch.

The scenario is scenarios/fahmc_logreg.yaml's: ten clients of unequal size, all rows in every
gradient, momentum that all clients share, no Metropolis correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from fedsim.metrics import _arviz
from fedsim.random import generator
from fedsim.scenario import Scenario
from fedsim.server.recorder import Nowhere
from fedsim.setup import prepare
from tests.benchmarks.engine import Engine
from tests.benchmarks.session import Session
from tests.benchmarks.workloads import SEED


@dataclass(frozen=True)
class Posterior:
    """Ten clinics' logistic regression with six features and an intercept.

    step_size, leapfrogs, precision: η, K and the prior's λ. descent: rounds without noise, after
    which the chains are near the mode. burn_in: rounds whose draws are then thrown away.
    tolerance: of the largest difference between two sides' marginal means in standard deviations,
    and between the logarithms of these; both are Monte Carlo estimates.
    """

    name: str = "fa-hmc"
    title: str = "FA-HMC, logistic posterior in 7 dimensions, 10 clients, 4 chains, 12 leapfrogs"
    rounds: int = 20
    warm_up: int = 300
    tolerance: float = 0.4
    chains: int = 4
    step_size: float = 0.02
    leapfrogs: int = 12
    precision: float = 3.0
    descent: int = 20
    burn_in: int = 80

    def scenario(self, path: str = "auto") -> dict[str, Any]:
        """Returns it for fedsim; path: engine.path."""
        features = ["mean texture", "mean area", "mean smoothness", "mean concavity"]
        features += ["mean symmetry", "mean fractal dimension"]
        spread = {"alpha": 3.0, "size_alpha": 5.0, "min_size": 10, "seed": 0}
        strategy: dict[str, Any] = {"name": "fa-hmc", "chains": self.chains}
        strategy |= {"step_size": self.step_size, "leapfrog_steps": self.leapfrogs}
        strategy |= {"warm_up": self.descent, "burn_in": self.burn_in}
        strategy |= {"prior_precision": self.precision}
        return {
            "name": "benchmark-fa-hmc",
            "seed": SEED,
            "rounds": 1,
            "data": {"name": "breast_cancer", "features": features, "seed": 0},
            "partition": {"name": "label_quantity", "clients": 10, **spread},
            "model": {"name": "linear", "outputs": 1},
            "task": "binary",
            "engine": {"dtype": "float64", "path": path},
            "evaluate": {"server_every": 0},
            "strategy": strategy,
        }

    @cached_property
    def shards(self) -> list[tuple[Tensor, Tensor]]:
        """Each client's x (rows, 7), the last feature being 1, and y (rows,) in {0, 1}, float64."""
        data = prepare(Scenario.from_dict(self.scenario()).expand()[0].scenario).data
        parts = [data.shard(client) for client in range(data.clients)]
        return [
            (torch.from_numpy(np.pad(p.x, ((0, 0), (0, 1)), constant_values=1.0)).double(),
             torch.from_numpy(np.asarray(p.y)).double())
            for p in parts
        ]  # fmt: skip

    @property
    def gradients(self) -> int:
        """Gradients of a client's potential in a round, over all clients and chains."""
        return len(self.shards) * self.chains * self.leapfrogs

    def disagreement(self, one: Sequence[float], other: Sequence[float]) -> float:
        """Returns the largest difference of two results, (means, standard deviations)."""
        half = len(one) // 2
        a, b = np.asarray(one), np.asarray(other)
        means = np.abs(a[:half] - b[:half]) / b[half:]
        return float(max(means.max(), np.abs(np.log(a[half:] / b[half:])).max()))


class Chains(Session):
    """Base of the sides: what they do with their draws, each (chains, 7)."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior
        self.draws: list[Tensor] = []

    def result(self) -> list[float]:
        """Returns the marginal means and standard deviations of the draws so far."""
        every = torch.stack(self.draws).flatten(0, 1)
        return [*every.mean(0).tolist(), *every.std(0).tolist()]

    def measures(self) -> dict[str, float]:
        """Returns the effective sample size of a round's draws, of the worst parameter.

        Bulk ESS over all chains (ArviZ), of everything after the burn-in.
        """
        draws = torch.stack(self.draws, dim=1)
        ess = _arviz.diagnostic_functions()(draws.numpy())["ess_bulk"]
        return {"ess a round": float(ess.min()) / draws.shape[1]}


class FedsimChains(Chains):
    """The inline engine; path: engine.path."""

    def __init__(self, posterior: Posterior, path: str = "auto") -> None:
        super().__init__(posterior)
        self._engine = Engine(posterior.scenario(path), _Draws(self.draws))

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        self._engine.advance(rounds)

    def close(self) -> None:
        """Ends the engine's threads."""
        self._engine.close()


class _Draws(Nowhere):
    """A recorder that keeps the draws alone, in memory."""

    def __init__(self, draws: list[Tensor]) -> None:
        self._draws = draws

    def save_draw(self, round: int, draw: Mapping[str, Tensor]) -> None:
        """Keeps the chains' parameters, the intercept last."""
        weight, bias = (draw[name].flatten(1) for name in sorted(draw, reverse=True))
        self._draws.append(torch.cat([weight, bias], dim=1).double())


class HMCLoop(Chains):
    """A round of FA-HMC by hand; `trajectory` is left to the two subclasses."""

    def __init__(self, posterior: Posterior) -> None:
        super().__init__(posterior)
        self.shards = posterior.shards
        sizes = torch.tensor([float(len(y)) for _, y in self.shards], dtype=torch.float64)
        self.shares = sizes / sizes.sum()
        self.q = torch.zeros(posterior.chains, self.shards[0][0].shape[1], dtype=torch.float64)
        self.round = 0

    def advance(self, rounds: int) -> None:
        """Runs that many more rounds."""
        torch.set_num_threads(1)
        for _ in range(rounds):
            draw = generator(SEED, "benchmark momentum", self.round)
            momentum = torch.from_numpy(draw.standard_normal(tuple(self.q.shape)))
            if self.round < self.posterior.descent:
                momentum.zero_()
            ends = self.trajectories(momentum)
            self.q = torch.einsum("c,cqd->qd", self.shares, ends)
            self.round += 1
            if self.round > self.posterior.descent + self.posterior.burn_in:
                self.draws.append(self.q)

    def trajectories(self, momentum: Tensor) -> Tensor:
        """Returns the end points (clients, chains, 7) of trajectories from q with this momentum."""
        raise NotImplementedError

    def potential(self, q: Tensor, x: Tensor, y: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        """Returns f_c(q) = NLL_c / w_c − log prior, 0-d, of rows that count `weight` times."""
        nll = F.binary_cross_entropy_with_logits(x @ q, y, weight, reduction="sum")
        return nll / share + 0.5 * self.posterior.precision * q.square().sum()


class SequentialHMC(HMCLoop):
    """One client, one chain, one gradient after the other."""

    def trajectories(self, momentum: Tensor) -> Tensor:
        """Loops over clients and chains."""
        ends = [
            [self._one(q, p, x, y, share) for q, p in zip(self.q, momentum, strict=True)]
            for (x, y), share in zip(self.shards, self.shares, strict=True)
        ]
        return torch.stack([torch.stack(chains) for chains in ends])

    def _one(self, q: Tensor, p: Tensor, x: Tensor, y: Tensor, share: Tensor) -> Tensor:
        eta, weight = self.posterior.step_size, torch.ones_like(y)
        g = self._gradient(q, x, y, weight, share)
        for step in range(self.posterior.leapfrogs):
            q = q + eta * p - 0.5 * eta**2 * g
            if step + 1 < self.posterior.leapfrogs:
                after = self._gradient(q, x, y, weight, share)
                p = p - 0.5 * eta * (g + after)
                g = after
        return q

    def _gradient(self, q: Tensor, *data: Tensor) -> Tensor:
        q = q.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.potential(q, *data), [q])
        return gradient


class VmapHMC(HMCLoop):
    """All clients and chains in one torch.func call; rows of weight 0 pad the shards."""

    def __init__(self, posterior: Posterior) -> None:
        super().__init__(posterior)
        rows = max(len(y) for _, y in self.shards)
        lacks = [rows - len(y) for _, y in self.shards]
        self.x = torch.stack(
            [F.pad(x, (0, 0, 0, n)) for (x, _), n in zip(self.shards, lacks, strict=True)]
        )
        self.y = torch.stack(
            [F.pad(y, (0, n)) for (_, y), n in zip(self.shards, lacks, strict=True)]
        )
        ones = [torch.ones_like(y) for _, y in self.shards]
        self.weight = torch.stack([F.pad(w, (0, n)) for w, n in zip(ones, lacks, strict=True)])
        over_chains = vmap(grad(self.potential), (0, None, None, None, None))
        self.gradients = vmap(over_chains)

    def trajectories(self, momentum: Tensor) -> Tensor:
        """One vectorised leapfrog step after the other."""
        eta, data = self.posterior.step_size, (self.x, self.y, self.weight, self.shares)
        q, p = self.q.expand(len(self.shards), *self.q.shape), momentum
        g = self.gradients(q, *data)
        for step in range(self.posterior.leapfrogs):
            q = q + eta * p - 0.5 * eta**2 * g
            if step + 1 < self.posterior.leapfrogs:
                after = self.gradients(q, *data)
                p = p - 0.5 * eta * (g + after)
                g = after
        return q
