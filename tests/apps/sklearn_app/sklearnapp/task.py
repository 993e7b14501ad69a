"""The model as arrays, and the data."""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler


def make_model(local_epochs: int) -> LogisticRegression:
    """Returns a model that goes on from where it is, with parameters already set."""
    model = LogisticRegression(max_iter=local_epochs, warm_start=True, solver="lbfgs")
    model.classes_ = np.arange(2)
    model.coef_, model.intercept_ = np.zeros((1, 30)), np.zeros(1)
    return model


def get_parameters(model: LogisticRegression) -> list[np.ndarray]:
    """Returns coefficients and intercept."""
    return [model.coef_, model.intercept_]


def set_parameters(model: LogisticRegression, arrays: list[np.ndarray]) -> None:
    """Sets coefficients and intercept."""
    model.coef_, model.intercept_ = arrays


def load_data(
    partition_id: int, num_partitions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns a node's training and test rows."""
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)[partition_id::num_partitions]
    y = y[partition_id::num_partitions]
    cut = int(0.8 * len(x))
    return x[:cut], y[:cut], x[cut:], y[cut:]
