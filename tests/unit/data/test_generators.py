"""Generators: what they call the truth, against independent computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import integrate, stats

from fedsim.data import DATASETS, PARTITIONS, FederatedData, build_data


def given(name: str, seed: int = 0, **parameters: Any) -> FederatedData:
    return build_data(DATASETS[name](**parameters), PARTITIONS["given"](), seed)


def test_the_ten_gaussians_of_the_paper() -> None:
    data = given("gaussian_clients", means=[20.0] * 5 + [1.0] * 5, sds=[1.0] * 5 + [2.0] * 5)
    assert data.truth["mean"] == pytest.approx([16.2])
    assert data.truth["cov"] == pytest.approx(np.array([[1.6]]))
    assert data.train.x.tolist() == [[20.0, 1.0]] * 5 + [[1.0, 0.25]] * 5
    assert data.train.weights().sum() == pytest.approx(1.0)
    assert [rows.tolist() for rows in data.shards] == [[i] for i in range(10)]


@pytest.mark.parametrize("potential", ["mean", "sum"])
def test_gaussian_truth_by_numerical_integration(potential: str) -> None:
    means, sds = [0.3, -1.0, 2.0], [0.7, 1.5, 2.5]
    data = given("gaussian_clients", means=means, sds=sds, potential=potential)
    share = 1 / 3 if potential == "mean" else 1.0

    def density(theta: float, power: int) -> float:
        logs = [stats.norm.logpdf(theta, m, s) for m, s in zip(means, sds, strict=True)]
        return theta**power * float(np.exp(share * sum(logs)))

    norm, first, second = (integrate.quad(density, -20, 20, args=(k,))[0] for k in range(3))
    mean = first / norm
    assert data.truth["mean"][0] == pytest.approx(mean, rel=1e-6)
    assert data.truth["cov"][0, 0] == pytest.approx(second / norm - mean**2, rel=1e-6)


def test_gaussian_rows_hold_mean_and_precision() -> None:
    covariances = [[[2.0, 0.5], [0.5, 1.0]], [[1.0, 0.0], [0.0, 4.0]]]
    data = given("gaussian_clients", means=[[1.0, 2.0], [3.0, 4.0]], covariances=covariances)
    assert data.info.input_shape == (6,)
    assert data.info.target == "none"
    assert data.train.x[:, :2].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    for row, covariance in zip(data.train.x, covariances, strict=True):
        assert np.allclose(row[2:].reshape(2, 2) @ covariance, np.eye(2))


def test_random_gaussians_have_the_condition_number() -> None:
    data = given("gaussian_clients", clients=6, dimension=4, condition_number=50.0)
    precisions = data.train.x[:, 4:].reshape(6, 4, 4)
    assert np.allclose(precisions, precisions.transpose(0, 2, 1))
    assert np.allclose(np.linalg.cond(precisions), 50.0)
    assert not np.allclose(precisions[0], precisions[1])
    one = given("gaussian_clients", clients=3, dimension=1, condition_number=9.0)
    assert one.train.x[:, 1].tolist() == pytest.approx([9.0] * 3)
    assert np.array_equal(data.train.x, given("gaussian_clients", clients=6, dimension=4,
                                              condition_number=50.0).train.x)  # fmt: skip


def test_linear_posterior_against_the_kernel_form() -> None:
    data = given(
        "bayesian_linear",
        concept_shift=0.7,
        feature_shift=0.5,
        noise_sd=0.6,
        prior_precision=2.5,
        rows_per_client=[3, 10, 20],
        clients=3,
    )
    # The same posterior as a Gaussian process: condition the joint Gaussian of (β, y) on y.
    x, y = data.train.x, data.train.y
    prior = np.eye(5) / 2.5
    marginal = x @ prior @ x.T + 0.36 * np.eye(33)
    gain = prior @ x.T @ np.linalg.inv(marginal)
    assert np.allclose(data.truth["mean"], gain @ y)
    assert np.allclose(data.truth["cov"], prior - gain @ x @ prior)


def test_linear_truth_is_that_of_the_rows_that_are_trained_on() -> None:
    data = build_data(
        DATASETS["bayesian_linear"](test_fraction=0.2), PARTITIONS["given"](holdout=0.25), 0
    )
    rows = data.train.take(np.concatenate(data.shards))
    assert len(rows) == 300
    precision = np.eye(5) + rows.x.T @ rows.x
    assert np.allclose(np.linalg.inv(data.truth["cov"]), precision)
    assert np.allclose(precision @ data.truth["mean"], rows.x.T @ rows.y)
    assert data.test is not None
    assert np.bincount(data.test.columns["client"]).tolist() == [10] * 10


def test_concept_shift_moves_the_clients_apart() -> None:
    still, shifted = given("bayesian_linear"), given("bayesian_linear", concept_shift=2.0)
    assert np.allclose(still.truth["client_coefficients"], still.truth["coefficients"])
    apart = shifted.truth["client_coefficients"] - shifted.truth["coefficients"]
    assert apart.std() == pytest.approx(2.0, rel=0.3)


def test_linear_residuals_have_the_noise_sd() -> None:
    data = given("bayesian_linear", rows_per_client=2000, noise_sd=0.3, concept_shift=1.0)
    owner = data.train.columns["client"]
    predicted = (data.train.x * data.truth["client_coefficients"][owner]).sum(axis=1)
    assert (data.train.y - predicted).std() == pytest.approx(0.3, rel=0.02)


def test_logistic_frequencies_follow_the_logits() -> None:
    data = given("bayesian_logistic", rows_per_client=5000, concept_shift=0.5)
    owner = data.train.columns["client"]
    logits = (data.train.x * data.truth["client_coefficients"][owner]).sum(axis=1)
    for low, high in ((-2, -1), (-0.5, 0.5), (1, 2)):
        inside = (logits > low) & (logits < high)
        expected = (1 / (1 + np.exp(-logits[inside]))).mean()
        assert data.train.y[inside].mean() == pytest.approx(expected, abs=0.02)
    assert data.info.num_classes == 2


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"means": [1.0]}, "exactly one of them"),
        ({"sds": [1.0]}, "need means"),
        ({"means": [1.0, 2.0], "sds": [1.0]}, "sds must be 2 numbers"),
        ({"means": [1.0], "sds": [-1.0]}, "above 0"),
        ({"means": [[1.0, 2.0], [1.0]], "sds": [1.0, 1.0]}, "same length"),
        ({"means": [[1.0, 2.0]], "covariances": [[[1.0, 0.0]]]}, "1 matrices of 2 × 2"),
        ({"means": [[1.0, 2.0]], "covariances": [[[1.0, 0.5], [0.0, 1.0]]]}, "symmetric"),
        ({"means": [[1.0, 2.0]], "covariances": [[[1.0, 2.0], [2.0, 1.0]]]}, "not positive"),
        ({"means": [1.0], "sds": [1.0], "clients": 3}, "leave them out"),
        ({"means": [], "sds": []}, "same length"),
    ],
)
def test_wrong_gaussians_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DATASETS["gaussian_clients"](**parameters)


@pytest.mark.parametrize(
    "parameters",
    [
        {"means": [1.0, -2.0], "sds": [1.0, 0.5]},
        {"means": [[1.0, 2.0]], "covariances": [[[1.0, 0.5], [0.5, 1.0]]]},
        {"clients": 3, "dimension": 2},
    ],
)
def test_gaussians_are_read_again_from_what_is_dumped(parameters: dict[str, Any]) -> None:
    """Every run is made from the resolved scenario, and a resumed one from its file."""
    kind = DATASETS["gaussian_clients"]
    made = kind(**parameters)
    again = kind(**made.model_dump(mode="json"))
    assert again == made
    assert ("clients" in made.model_dump()) == ("clients" in parameters)
