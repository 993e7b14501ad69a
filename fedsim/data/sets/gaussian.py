"""Data set `gaussian_clients`: each client's potential is the quadratic of one Gaussian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fedsim.data.base import DataParams, Dtype, Source
from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.random import generator

DRAWN = frozenset({"clients", "dimension", "condition_number", "spread"})
"""The fields that describe random clients."""


class GaussianClients(DataParams):
    """Client c has the potential f_c(θ) = ½ (θ − μ_c)ᵀ P_c (θ − μ_c), P_c = Σ_c⁻¹, in R^d.

    There is one row per client; use it with `partition: {name: given}`. The row's x, of d + d²
    numbers, is μ_c followed by P_c row by row; y is 0 and means nothing. The truth is the
    Gaussian ∝ exp(−Σ_c weight_c f_c): `mean` (d,) and `cov` (d, d).

    Either write `means` with `covariances` or `sds`, or let `clients` random ones be drawn.
    """

    name: Literal["gaussian_clients"] = "gaussian_clients"
    dtype: Dtype = Field("float64", description="Floating-point type of the rows.")
    means: list[float | list[float]] | None = Field(
        None, description="Means μ_c: N lists of d numbers, or N numbers where d = 1."
    )
    covariances: list[list[list[float]]] | None = Field(
        None, description="Covariances Σ_c: N symmetric positive definite d × d matrices."
    )
    sds: list[float | list[float]] | None = Field(
        None,
        description="Standard deviations > 0 instead of covariances: for each client one number "
        "for all coordinates, or d numbers.",
    )
    potential: Literal["mean", "sum"] = Field(
        "mean",
        description="mean: each row's weight is 1/N, so that the target is exp(−mean of the "
        "potentials) (FA-HMC's f = Σ w_c f_c). sum: weight 1, the product of the densities.",
    )
    clients: int = Field(10, ge=1, description="Number of random clients N, at least 1.")
    dimension: int = Field(5, ge=1, le=1000, description="Dimension d of random clients.")
    condition_number: float = Field(
        10.0,
        ge=1.0,
        description="Largest over smallest eigenvalue (1) of each random precision P_c, at least "
        "1; eigenvectors are uniformly random, so clients differ.",
    )
    spread: float = Field(
        1.0, ge=0.0, description="Standard deviation ≥ 0 of the random means' coordinates."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.means is None:
            if self.covariances is not None or self.sds is not None:
                raise ValueError("covariances and sds need means: write one mean per client")
            return self
        if (self.covariances is None) == (self.sds is None):
            raise ValueError("means need either covariances or sds, exactly one of them")
        if drawn := DRAWN & self.model_fields_set:
            raise ValueError(f"{sorted(drawn)} describe random clients: leave them out with means")
        self.parameters(0)
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what says nothing beside means, so that what is dumped can be read again."""
        fields: dict[str, Any] = handler(self)
        unused = DRAWN if self.means is not None else frozenset()
        return {name: value for name, value in fields.items() if name not in unused}

    def parameters(self, seed: int) -> tuple[Array, Array]:
        """Returns means (N, d) and precisions (N, d, d), float64; ValueError if they disagree."""
        if self.means is None:
            return self._random(seed)
        widths = {len(m) if isinstance(m, list) else 1 for m in self.means}
        if len(widths) != 1 or 0 in widths:
            raise ValueError(f"means must all have the same length; they have {sorted(widths)}")
        means = np.array(self.means, dtype=np.float64).reshape(len(self.means), -1)
        covariances = self._covariances(*means.shape)
        if not np.allclose(covariances, covariances.transpose(0, 2, 1), rtol=1e-10, atol=0.0):
            raise ValueError("covariances must be symmetric")
        for client, covariance in enumerate(covariances):
            if np.linalg.eigvalsh(covariance)[0] <= 0:
                raise ValueError(f"covariance of client {client} is not positive definite")
        return means, np.linalg.inv(covariances)

    def _covariances(self, n: int, d: int) -> Array:
        if self.sds is not None:
            sides = [s if isinstance(s, list) else [s] * d for s in self.sds]
            if len(sides) != n or any(len(s) != d for s in sides):
                raise ValueError(f"sds must be {n} numbers or {n} lists of {d} numbers")
            deviations = np.array(sides, dtype=np.float64)
            if (deviations <= 0).any():
                raise ValueError("sds must be above 0")
            return deviations[:, :, None] ** 2 * np.eye(d)
        matrices = self.covariances or []
        if len(matrices) != n or any(
            len(m) != d or any(len(row) != d for row in m) for m in matrices
        ):
            raise ValueError(f"covariances must be {n} matrices of {d} × {d} numbers")
        return np.array(matrices, dtype=np.float64)

    def _random(self, seed: int) -> tuple[Array, Array]:
        n, d = self.clients, self.dimension
        rng = generator(seed, "data.gaussian_clients")
        means = self.spread * rng.standard_normal((n, d))
        q, r = np.linalg.qr(rng.standard_normal((n, d, d)))
        q = q * np.sign(np.einsum("nii->ni", r))[:, None, :]  # makes q uniform (Haar)
        exponents = rng.random((n, d))
        exponents[:, 0], exponents[:, -1] = 0.0, 1.0
        eigenvalues = self.condition_number**exponents
        precisions = np.einsum("nij,nj,nkj->nik", q, eigenvalues, q)
        return means, (precisions + precisions.transpose(0, 2, 1)) / 2

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        means, precisions = self.parameters(seed)
        n, d = means.shape
        rows = np.concatenate([means, precisions.reshape(n, d * d)], axis=1)
        weight = np.full(n, 1.0 / n if self.potential == "mean" else 1.0)
        names = [f"mean[{i}]" for i in range(d)]
        names += [f"precision[{i},{j}]" for i in range(d) for j in range(d)]
        examples = Examples(
            rows.astype(self.dtype),
            np.zeros(n, dtype=self.dtype),
            weight,
            {"client": np.arange(n, dtype=np.int64)},
        )
        info = DataInfo(self.name, (d + d * d,), None, "none", tuple(names))
        return Source(info, examples, truth=lambda used: target(used, d))


def target(rows: Examples, d: int) -> Mapping[str, Array]:
    """Returns mean and cov of the density ∝ exp(−Σ weight · potential), and the clients' own."""
    means = rows.x[:, :d].astype(np.float64)
    precisions = rows.x[:, d:].astype(np.float64).reshape(-1, d, d)
    weighted = rows.weights()[:, None, None] * precisions
    cov = np.linalg.inv(weighted.sum(axis=0))
    mean = cov @ np.einsum("nij,nj->i", weighted, means)
    return {"mean": mean, "cov": cov, "client_means": means, "client_precisions": precisions}
