"""Data set `bandit_objectives`: each client has a noisy function of its own to maximise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from fedsim.bandits.functions import BASES, Tilted, tilts
from fedsim.data.base import DataParams, Dtype, Source
from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.random import generator

BASE_NAMES = tuple(BASES)


class BanditObjectives(DataParams):
    """Client m's pull at x returns base(x) + w_m · u(x) + σ ε with ε ~ N(0, 1).

    u scales the base's box to [−1, 1]^d; the weights w_m are random, of mean 0, and scaled so that
    max_m sup |f_m − mean f| = `delta` exactly. Values may leave [0, 1] by `delta`.

    There is one row per client; use it with `partition: given`. The row's x is the base's number,
    σ, a maximiser x*_m (d) and w_m (d); y is 0 and means nothing. The truth holds `optima` (N, d),
    `best` (N,) and `delta`.
    """

    name: Literal["bandit_objectives"] = "bandit_objectives"
    dtype: Dtype = Field("float64", description="Floating-point type of the rows.")
    base: Literal["himmelblau", "rastrigin", "garland", "double_sine"] = Field(
        "himmelblau",
        description="What the clients' functions have in common; d = 2 for himmelblau, 1 for "
        "garland and double_sine.",
    )
    dimension: int | None = Field(
        None, ge=1, le=10, description="Dimension d of rastrigin; empty: 2."
    )
    clients: int = Field(10, ge=1, le=100_000, description="Number of clients M.")
    delta: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Heterogeneity Δ = max_m sup |f_m − mean f|, in [0, 1]; 0: all are the same.",
    )
    noise: float = Field(0.1, ge=0.0, description="Standard deviation σ of a pull's noise, ≥ 0.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        fixed = BASES[self.base].dimension
        if self.dimension is not None and fixed not in (0, self.dimension):
            raise ValueError(f"{self.base} has dimension {fixed}: leave dimension out")
        if self.clients == 1 and self.delta > 0:
            raise ValueError("one client differs from nobody: delta must be 0")
        return self

    def functions(self, seed: int) -> list[Tilted]:
        """Returns the clients' functions."""
        d = BASES[self.base].dimension or self.dimension or 2
        rng = generator(seed, "data.bandit_objectives")
        weights = tilts(rng.standard_normal((self.clients, d)), self.delta)
        return [Tilted(self.base, w) for w in weights]

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        functions = self.functions(seed)
        weights = np.array([f.weights for f in functions])
        known: dict[bytes, Array] = {}
        for f in functions:  # clients of one function share the search
            if f.weights.tobytes() not in known:
                known[f.weights.tobytes()] = f.optimum()
        optima = np.array([known[f.weights.tobytes()] for f in functions])
        n, d = weights.shape
        code = np.full((n, 1), BASE_NAMES.index(self.base))
        rows = np.concatenate([code, np.full((n, 1), self.noise), optima, weights], axis=1)
        names = ["base", "noise", *(f"optimum[{i}]" for i in range(d))]
        names += [f"weight[{i}]" for i in range(d)]
        examples = Examples(
            rows.astype(self.dtype),
            np.zeros(n, dtype=self.dtype),
            columns={"client": np.arange(n, dtype=np.int64)},
        )
        info = DataInfo(self.name, (2 + 2 * d,), None, "none", tuple(names))
        return Source(info, examples, truth=truth)


def truth(rows: Examples) -> Mapping[str, Array]:
    """Returns the clients' maximisers, maxima and heterogeneity."""
    found = [read_row(row) for row in rows.x.astype(np.float64)]
    optima = np.array([optimum for _, _, optimum in found])
    best = np.array([f.value(o[None])[0] for f, _, o in found])
    weights = np.array([f.weights for f, _, _ in found])
    delta = np.abs(weights - weights.mean(0)).sum(1).max()
    return {"optima": optima, "best": best, "delta": np.asarray(delta)}


def read_row(row: Array) -> tuple[Tilted, float, Array]:
    """Returns the function, σ and the maximiser (d,) that a row describes.

    Raises ValueError for a row of other data.
    """
    d, rest = divmod(len(row) - 2, 2)
    if rest or d < 1 or row[0] not in range(len(BASE_NAMES)):
        raise ValueError("the client's row describes no function; use data: bandit_objectives")
    return Tilted(BASE_NAMES[int(row[0])], row[2 + d :]), float(row[1]), row[2 : 2 + d]
