"""Data sets `bayesian_linear` and `bayesian_logistic`: regressions whose clients disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from fedsim.data.base import Dtype, Source, SplitParams
from fedsim.data.examples import Array, DataInfo, Examples
from fedsim.errors import UserError
from fedsim.random import generator

MAX_NUMBERS = 500_000_000


class RegressionParams(SplitParams):
    """What both generators have in common.

    Client c draws coefficients β_c = β + concept_shift · δ_c and feature centres m_c =
    feature_shift · ε_c, with β, δ_c, ε_c ~ N(0, I_d), then rows x ~ N(m_c, I_d). There is no
    intercept: give the model none. The column "client" says whose a row is, and splits take the
    same share of every client; use `partition: {name: given}` to keep the generator's clients.
    """

    test_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of each client's rows that the server holds as the test set, [0, 1).",
    )
    dtype: Dtype = Field("float64", description="Floating-point type of features and targets.")
    clients: int = Field(10, ge=1, description="Number of clients N that generate rows.")
    rows_per_client: int | list[int] = Field(
        50, description="Rows that each client generates, at least 1; one number or N of them."
    )
    features: int = Field(5, ge=1, description="Number of features d.")
    concept_shift: float = Field(
        0.0,
        ge=0.0,
        description="Standard deviation ≥ 0 of the clients' coefficients around the common ones.",
    )
    feature_shift: float = Field(
        0.0, ge=0.0, description="Standard deviation ≥ 0 of the centres of the clients' features."
    )

    def row_counts(self) -> list[int]:
        """Returns the number of rows of each client; raises UserError if it makes no sense."""
        given = self.rows_per_client
        counts = [given] * self.clients if isinstance(given, int) else given
        if len(counts) != self.clients or min(counts, default=0) < 1:
            raise UserError(
                f"data.rows_per_client: {len(counts)} numbers, the smallest "
                f"{min(counts, default=0)}, for {self.clients} clients; write one number or "
                f"{self.clients}, each at least 1"
            )
        if sum(counts) * self.features > MAX_NUMBERS:
            raise UserError(
                f"data.rows_per_client: {sum(counts)} rows of {self.features} features are more "
                f"than {MAX_NUMBERS} numbers; use fewer"
            )
        return counts

    def draw(self, seed: int) -> tuple[Array, Array, Array, Array, np.random.Generator]:
        """Returns β (d,), β_c (N, d), x (n, d), owner (n,) and the generator for the noise."""
        owner = np.repeat(np.arange(self.clients, dtype=np.int64), self.row_counts())
        rng = generator(seed, f"data.{self.name}")
        common = rng.standard_normal(self.features)
        shape = (self.clients, self.features)
        coefficients = common + self.concept_shift * rng.standard_normal(shape)
        centres = self.feature_shift * rng.standard_normal(shape)
        x = centres[owner] + rng.standard_normal((len(owner), self.features))
        return common, coefficients, x, owner, rng

    def feature_names(self) -> tuple[str, ...]:
        """Returns x0, x1, …"""
        return tuple(f"x{i}" for i in range(self.features))


class BayesianLinear(RegressionParams):
    """Linear regression y = xᵀβ_c + noise_sd · N(0, 1), with the exact posterior as the truth.

    The model of the analyst is one β for all clients, prior N(0, I / prior_precision), known
    noise_sd. Truth: `mean` (d,) and `cov` (d, d) of that posterior given the rows that clients
    train on; `coefficients` (d,), `client_coefficients` (N, d) of the generator; `noise_sd` and
    `prior_precision`, scalars.
    """

    name: Literal["bayesian_linear"] = "bayesian_linear"
    noise_sd: float = Field(
        1.0, gt=0.0, description="Standard deviation σ > 0 of the noise, in units of y."
    )
    prior_precision: float = Field(
        1.0,
        gt=0.0,
        description="Precision > 0 of the Gaussian prior under which truth is computed.",
    )

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        common, coefficients, x, owner, rng = self.draw(seed)
        y = np.einsum("nd,nd->n", x, coefficients[owner])
        y = y + self.noise_sd * rng.standard_normal(len(y))
        examples = Examples(x.astype(self.dtype), y.astype(self.dtype), None, {"client": owner})
        info = DataInfo(self.name, (self.features,), None, "real", self.feature_names())

        def truth(used: Examples) -> Mapping[str, Array]:
            mean, cov = linear_posterior(used, self.noise_sd, self.prior_precision)
            return {
                "mean": mean,
                "cov": cov,
                "coefficients": common,
                "client_coefficients": coefficients,
                "noise_sd": np.array(self.noise_sd),
                "prior_precision": np.array(self.prior_precision),
            }

        return Source(info, examples, strata=owner, truth=truth)


class BayesianLogistic(RegressionParams):
    """Logistic regression P(y = 1) = 1 / (1 + exp(−xᵀβ_c)), two classes.

    Truth: the generator's `coefficients` (d,) and `client_coefficients` (N, d). The posterior has
    no closed form; compare with a sampler on the pooled rows.
    """

    name: Literal["bayesian_logistic"] = "bayesian_logistic"

    def load(self, seed: int) -> Source:
        """See DataParams.load."""
        common, coefficients, x, owner, rng = self.draw(seed)
        logits = np.einsum("nd,nd->n", x, coefficients[owner])
        y = (rng.logistic(size=len(logits)) < logits).astype(np.int64)
        examples = Examples(x.astype(self.dtype), y, None, {"client": owner})
        info = DataInfo(self.name, (self.features,), 2, "class", self.feature_names(), ("0", "1"))
        known = {"coefficients": common, "client_coefficients": coefficients}
        return Source(info, examples, strata=owner, truth=lambda used: known)


def linear_posterior(
    rows: Examples, noise_sd: float, prior_precision: float
) -> tuple[Array, Array]:
    """Returns mean (d,) and cov (d, d) of β given y = xβ + noise, β ~ N(0, I / prior_precision).

    Rows count with their weights. Bishop, Pattern Recognition and Machine Learning, (3.50-51).
    """
    x, y = rows.x.astype(np.float64), rows.y.astype(np.float64)
    weighted = x * (rows.weights() / noise_sd**2)[:, None]
    cov = np.linalg.inv(prior_precision * np.eye(x.shape[1]) + weighted.T @ x)
    return cov @ (weighted.T @ y), cov
