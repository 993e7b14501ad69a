"""Gaussian laws: distance between two, the target of a mixture of potentials, test problems."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """A normal law: `mean` (d,), `cov` (d, d)."""

    mean: Array
    cov: Array


@dataclass(frozen=True)
class GaussianClients:
    """Clients with potentials f_c = ½ (θ − μ_c)ᵀ P_c (θ − μ_c) and weights w_c that sum to 1.

    `precision` (C, d, d) symmetric positive definite, `mean` (C, d), `weight` (C,).
    """

    precision: Array
    mean: Array
    weight: Array

    @property
    def smoothness(self) -> float:
        """L_max, the largest eigenvalue of any client's precision; a = η sqrt(L_max)."""
        return float(np.linalg.eigvalsh(self.precision).max())

    @property
    def force(self) -> Array:
        """h_c = P_c μ_c, shape (C, d), so that ∇f_c(θ) = P_c θ − h_c."""
        return np.asarray(np.einsum("cij,cj->ci", self.precision, self.mean))

    def target(self) -> Gaussian:
        """The law ∝ exp(−Σ_c w_c f_c): precision Σ w_c P_c, mean P̄⁻¹ Σ w_c P_c μ_c."""
        precision = np.einsum("c,cij->ij", self.weight, self.precision)
        cov = np.linalg.inv(precision)
        return Gaussian(cov @ (self.weight @ self.force), (cov + cov.T) / 2)


def square_root(matrix: Array) -> Array:
    """Symmetric square root of a positive semi-definite matrix (tiny negative eigenvalues cut)."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T)


def wasserstein2(a: Gaussian, b: Gaussian) -> float:
    """W2 of two normal laws: sqrt(|m_a − m_b|² + tr(A + B − 2 (A^½ B A^½)^½)) (Bures).

    The trace term is evaluated as ‖A^½ − B^½ U‖², U the orthogonal polar factor of B^½ A^½, which
    keeps its digits where A ≈ B and the difference of traces would cancel.
    """
    root_a, root_b = square_root(a.cov), square_root(b.cov)
    left, _, right = np.linalg.svd(root_b @ root_a)
    bures = root_a - root_b @ (left @ right)
    return float(np.sqrt(np.sum((a.mean - b.mean) ** 2) + np.sum(bures**2)))


@dataclass(frozen=True)
class Errors:
    """How far a law is from the target, in the units of the method's documentation."""

    mean: float  # |m − m*| / sqrt(tr Σ*)
    cov: float  # ‖Σ − Σ*‖_F / ‖Σ*‖_F
    w2: float  # W2 / sqrt(tr Σ*)


def errors(law: Gaussian, target: Gaussian) -> Errors:
    """Scaled distances of `law` from `target`."""
    scale = float(np.sqrt(np.trace(target.cov)))
    return Errors(
        mean=float(np.linalg.norm(law.mean - target.mean)) / scale,
        cov=float(np.linalg.norm(law.cov - target.cov) / np.linalg.norm(target.cov)),
        w2=wasserstein2(law, target) / scale,
    )


def random_clients(
    seed: int,
    clients: int = 10,
    dim: int = 5,
    condition: float = 6.0,
    heterogeneity: float = 100.0,
    spread: float = 1.0,
    equal_weights: bool = False,
) -> GaussianClients:
    """A heterogeneous problem P_c = D^½ S_c D^½ whose clients disagree in shape and in place.

    D is diagonal, log-spaced from 1 to `condition`: the stiff and slack directions all clients
    have roughly in common. S_c is Haar-rotated with log-uniform eigenvalues in
    [1/sqrt(heterogeneity), sqrt(heterogeneity)].

    Args:
        seed: of the problem.
        clients: C ≥ 1.
        dim: d ≥ 1.
        condition: ratio of the common scales, ≥ 1.
        heterogeneity: ratio of the largest to the smallest eigenvalue of S_c, ≥ 1.
        spread: standard deviation of the client means, in units of D^−½.
        equal_weights: else Dirichlet(5).
    """
    rng = np.random.default_rng(seed)
    scale = np.sqrt(np.geomspace(1.0, condition, dim))
    precision = np.empty((clients, dim, dim))
    for c in range(clients):
        rotation, upper = np.linalg.qr(rng.normal(size=(dim, dim)))
        rotation = rotation * np.sign(np.diag(upper))
        values = heterogeneity ** rng.uniform(-0.5, 0.5, size=dim)
        precision[c] = scale[:, None] * ((rotation * values) @ rotation.T) * scale
    mean = spread * rng.normal(size=(clients, dim)) / scale
    weight = np.full(clients, 1 / clients) if equal_weights else rng.dirichlet(np.full(clients, 5))
    return GaussianClients(precision, mean, weight)


def two_groups() -> GaussianClients:
    """Ten scalar clients, five N(20, 1) and five N(1, 4), equal weights: target N(16.2, 1.6)."""
    precision = np.repeat([1.0, 0.25], 5).reshape(10, 1, 1)
    mean = np.repeat([20.0, 1.0], 5).reshape(10, 1)
    return GaussianClients(precision, mean, np.full(10, 0.1))
