"""The exact law of the FA-HMC and FA-LD server chains for Gaussian clients, without Monte Carlo.

With noise-free gradients ∇f_c(q) = P_c q − h_c every leapfrog is linear, so a client's position
after one trajectory of K leapfrogs is

    q' = α q + β p + γ h,        α, β, γ (d, d) functions of P_c, η, K

and after T trajectories with fresh momenta, started at the server's x,

    q_T = α^T x + Σ_{s<T} α^s γ h + Σ_t α^(T−t) β p_t .

The weighted average of these is one affine map x' = A x + b + noise of covariance Q a round. The
momenta are p_{c,t} = sqrt(τ) (sqrt(ρ) ξ_t + sqrt((1−ρ)/w_c) ξ_{c,t}): ξ_t enters all clients.

Control variates add Σ_j w_j g_j(x) − g_c(x) to every gradient of the round, x being the server's
state at the start of the round; the force h_c then is (P_c − P̄) x + h̄.

Partial participation with renormalised weights: a subset S with probability π_S uses w_c / W_S,
W_S = Σ_S w_c, in the average and (equivalently: private noise times sqrt(W_S)) in the momenta. The
chain's law is then a mixture, not normal; its first two moments obey a linear recursion, solved
exactly here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from tests.oracles.gaussian import Array, Gaussian, GaussianClients


@dataclass(frozen=True)
class Sampler:
    """Settings of the chain, in the method's symbols.

    `kind` "fa-hmc" takes leapfrogs of size η = `step_size`; "fa-ld" takes Langevin steps
    θ − h ∇f + sqrt(2h) ξ of h = `step_size` (no leapfrogs). The two agree at K = 1, h = η²/2.
    """

    step_size: float
    leapfrog_steps: int = 10  # K
    trajectories: int = 1  # T
    shared_variance: float = 1.0  # ρ
    temperature: float = 1.0  # τ
    control_variates: bool = False
    kind: Literal["fa-hmc", "fa-ld"] = "fa-hmc"


@dataclass(frozen=True)
class Recursion:
    """x' = A_s x + b_s + N(0, Q_s) with probability π_s, independently each round.

    `probability` (S,), `A` (S, d, d), `b` (S, d), `Q` (S, d, d). S = 1 with full participation.
    """

    probability: Array
    A: Array
    b: Array
    Q: Array

    @property
    def mean_map(self) -> Array:
        """E A, shape (d, d)."""
        return np.asarray(np.einsum("s,sij->ij", self.probability, self.A))

    @property
    def spectral_radius(self) -> float:
        """Growth of the root mean square a round; the chain has a second moment iff it is < 1.

        The square root of the spectral radius of E[A ⊗ A]; for S = 1 it is that of A itself.
        """
        if len(self.A) == 1:
            return float(np.abs(np.linalg.eigvals(self.A[0])).max())
        return float(np.sqrt(np.abs(np.linalg.eigvals(self._second_moment_map())).max()))

    def step(self, law: Gaussian) -> Gaussian:
        """Mean and covariance after one more round."""
        centre = np.einsum("sij,j->si", self.A, law.mean) + self.b
        mean = self.probability @ centre
        away = centre - mean
        cov = np.einsum("s,sij,jk,slk->il", self.probability, self.A, law.cov, self.A)
        cov += np.einsum("s,sij->ij", self.probability, self.Q)
        cov += np.einsum("s,si,sj->ij", self.probability, away, away)
        return Gaussian(mean, cov)

    def after(self, rounds: int, start: Gaussian) -> Gaussian:
        """Mean and covariance of the server state after `rounds` rounds from `start`."""
        law = start
        for _ in range(rounds):
            law = self.step(law)
        return law

    def stationary(self) -> Gaussian:
        """Mean and covariance in the long run.

        Raises:
            ValueError: the chain diverges (spectral radius ≥ 1).
        """
        radius = self.spectral_radius
        if radius >= 1:
            raise ValueError(f"the chain diverges: spectral radius {radius:.4g}")
        dim = self.b.shape[1]
        solved = np.linalg.solve(np.eye(dim) - self.mean_map, self.probability @ self.b)
        mean = np.asarray(solved, dtype=np.float64)
        # With a point mass at the stationary mean, one round gives the covariance that is added.
        added = self.step(Gaussian(mean, np.zeros((dim, dim)))).cov
        solved = np.linalg.solve(np.eye(dim**2) - self._second_moment_map(), added.ravel())
        cov = np.asarray(solved, dtype=np.float64).reshape(dim, dim)
        return Gaussian(mean, (cov + cov.T) / 2)

    def _second_moment_map(self) -> Array:
        """E[A ⊗ A], which maps vec(Σ) to vec(E[A Σ Aᵀ]); shape (d², d²)."""
        dim = self.b.shape[1]
        products = np.einsum("s,sij,skl->ikjl", self.probability, self.A, self.A)
        return np.asarray(products.reshape(dim**2, dim**2))


def round_recursion(
    clients: GaussianClients,
    sampler: Sampler,
    cohorts: Iterable[tuple[float, tuple[int, ...]]] | None = None,
) -> Recursion:
    """The affine map of one round.

    Args:
        clients: the problem.
        sampler: the chain.
        cohorts: (probability, client numbers) of every possible cohort; None: all, always. Control
            variates average over the cohort, with its renormalised weights.
    """
    everyone = tuple(range(len(clients.weight)))
    chosen = list(cohorts) if cohorts is not None else [(1.0, everyone)]
    maps = [_cohort_map(clients, sampler, list(members)) for _, members in chosen]
    return Recursion(
        probability=np.array([probability for probability, _ in chosen]),
        A=np.stack([A for A, _, _ in maps]),
        b=np.stack([b for _, b, _ in maps]),
        Q=np.stack([Q for _, _, Q in maps]),
    )


def all_cohorts(clients: int, size: int) -> list[tuple[float, tuple[int, ...]]]:
    """Every subset of `size` of the clients, equally likely."""
    subsets = list(combinations(range(clients), size))
    return [(1 / len(subsets), subset) for subset in subsets]


def _cohort_map(
    clients: GaussianClients, sampler: Sampler, members: list[int]
) -> tuple[Array, Array, Array]:
    """(A, b, Q) of a round with these members."""
    precision, force = clients.precision[members], clients.force[members]
    weight = clients.weight[members] / clients.weight[members].sum()
    mean_precision = np.einsum("c,cij->ij", weight, precision)
    mean_force = weight @ force
    count, dim = force.shape
    steps, rho = sampler.trajectories, sampler.shared_variance

    A, b = np.zeros((dim, dim)), np.zeros(dim)
    loads = np.empty((count, steps, dim, dim))  # of trajectory t's momentum on the position q_T
    for c in range(count):
        alpha, beta, gamma = trajectory_map(precision[c], sampler)
        powers = [np.linalg.matrix_power(alpha, s) for s in range(steps + 1)]
        drift = sum(powers[:steps], np.zeros((dim, dim))) @ gamma
        loads[c] = [powers[steps - 1 - t] @ beta for t in range(steps)]
        if sampler.control_variates:
            A += weight[c] * (powers[steps] + drift @ (precision[c] - mean_precision))
            b += weight[c] * drift @ mean_force
        else:
            A += weight[c] * powers[steps]
            b += weight[c] * drift @ force[c]

    shared = np.einsum("c,ctij->tij", weight, loads)
    Q = rho * np.einsum("tij,tkj->ik", shared, shared)
    # The weight enters squared by averaging and divides once by the private noise's scale.
    Q += (1 - rho) * np.einsum("c,ctij,ctkj->ik", weight, loads, loads)
    return A, b, sampler.temperature * Q


def trajectory_map(precision: Array, sampler: Sampler) -> tuple[Array, Array, Array]:
    """(α, β, γ) of one trajectory under ∇f = P q − h: q' = α q + β p + γ h, each (d, d)."""
    dim = len(precision)
    eye = np.eye(dim)
    if sampler.kind == "fa-ld":
        h = sampler.step_size
        return eye - h * precision, np.sqrt(2 * h) * eye, h * eye
    eta = sampler.step_size
    zero = np.zeros((dim, dim))
    # One leapfrog on (q, p, h): gradients g = P q − h and g' = P q' − h.
    position = np.hstack([eye - eta**2 / 2 * precision, eta * eye, eta**2 / 2 * eye])
    gradient = np.hstack([precision, zero, -eye])
    momentum = np.hstack([zero, eye, zero]) - eta / 2 * (
        gradient + precision @ position + np.hstack([zero, zero, -eye])
    )
    leapfrog = np.vstack([position, momentum, np.hstack([zero, zero, eye])])
    end = np.linalg.matrix_power(leapfrog, sampler.leapfrog_steps)[:dim]
    return end[:, :dim], end[:, dim : 2 * dim], end[:, 2 * dim :]
