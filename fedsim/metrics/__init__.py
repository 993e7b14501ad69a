"""Scores of predictions, diagnostics of posterior draws, distances to a known posterior."""

from fedsim.metrics.classification import (
    ECE_BINS,
    Reliability,
    accuracy,
    auroc,
    brier,
    ece,
    max_probability_score,
    mutual_information,
    nll,
    predictive_entropy,
    reliability,
)
from fedsim.metrics.distances import (
    bures_w2,
    mean_error_sd,
    relative_cov_error,
    relative_mean_error,
    wasserstein1_marginal,
)
from fedsim.metrics.inference_data import NO_METROPOLIS, to_inference_data, write_inference_data
from fedsim.metrics.posterior import Diagnostics, diagnostics
from fedsim.metrics.regression import gaussian_nll, r2, rmse

__all__ = [
    "ECE_BINS",
    "NO_METROPOLIS",
    "Diagnostics",
    "Reliability",
    "accuracy",
    "auroc",
    "brier",
    "bures_w2",
    "diagnostics",
    "ece",
    "gaussian_nll",
    "max_probability_score",
    "mean_error_sd",
    "mutual_information",
    "nll",
    "predictive_entropy",
    "r2",
    "relative_cov_error",
    "relative_mean_error",
    "reliability",
    "rmse",
    "to_inference_data",
    "wasserstein1_marginal",
    "write_inference_data",
]
