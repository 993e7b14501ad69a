"""How good and how honest predicted class probabilities are. Pure NumPy, computed in float64.

`p` is always (n, C): row i is the predictive distribution of example i, non-negative, summing to 1.
`y` is always (n,): integer labels in [0, C). A prediction that holds a NaN or an infinity makes
every score NaN, so that a diverged model is never scored as if it had answered.
Shapes, labels or probabilities that cannot be right raise ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

NLL_EPS = 1e-12
"""Probabilities below this are raised to it before the logarithm: one example costs ≤ 27.6 nats."""
ECE_BINS = 15
SUM_TOLERANCE = 1e-2  # wide enough for bfloat16 rows, narrow enough to catch logits


@dataclass(frozen=True)
class Reliability:
    """The points of a reliability diagram, one per equal-width bin of the top-label confidence.

    edges: (bins + 1,). Bin b is [edges[b], edges[b+1]); the last one includes 1.
    count: (bins,) examples. confidence, accuracy: (bins,) means, NaN where the bin is empty.
    """

    edges: Floats
    count: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats


def accuracy(p: ArrayLike, y: ArrayLike) -> float:
    """Returns the share of examples whose most probable class is the label, in [0, 1].

    Ties go to the lowest class index.
    """
    probs, labels = _checked(p, y)
    return float(np.mean(probs.argmax(1) == labels)) if _finite(probs) else np.nan


def nll(p: ArrayLike, y: ArrayLike) -> float:
    """Returns the mean negative log-likelihood in nats, probabilities clipped at `NLL_EPS`."""
    probs, labels = _checked(p, y)
    taken = probs[np.arange(len(labels)), labels]
    return float(-np.mean(np.log(np.maximum(taken, NLL_EPS)))) if _finite(probs) else np.nan


def brier(p: ArrayLike, y: ArrayLike) -> float:
    """Returns the multi-class Brier score: the mean over examples of Σ_c (p_c − 1[y = c])².

    In [0, 2]. It sums over the classes, as Brier (1950) did; for two classes it is twice the
    score that looks at the positive class alone (scikit-learn's `brier_score_loss`).
    """
    probs, labels = _checked(p, y)
    error = probs - np.eye(probs.shape[1])[labels]
    return float(np.mean(np.sum(error**2, axis=1)))


def reliability(p: ArrayLike, y: ArrayLike, bins: int = ECE_BINS) -> Reliability:
    """Returns confidence against accuracy in `bins` ≥ 1 equal-width bins over [0, 1]."""
    probs, labels = _checked(p, y)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    edges = np.linspace(0.0, 1.0, bins + 1)
    if not _finite(probs):
        nothing = np.full(bins, np.nan)
        return Reliability(edges, np.zeros(bins, np.int64), nothing, nothing.copy())
    top = np.minimum(probs.max(1), 1.0)
    index = np.minimum(np.searchsorted(edges, top, side="right") - 1, bins - 1)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(index, weights=top, minlength=bins) / count
        right = (probs.argmax(1) == labels).astype(np.float64)
        hit = np.bincount(index, weights=right, minlength=bins) / count
    return Reliability(edges, count.astype(np.int64), confidence, hit)


def ece(p: ArrayLike, y: ArrayLike, bins: int = ECE_BINS) -> float:
    """Returns the expected calibration error (L1, top label), in [0, 1].

    Σ_b (n_b / n) |accuracy_b − confidence_b| over the bins of `reliability`: equal width, 15 unless
    said otherwise. The figure depends on the number of bins: name it wherever it is shown.
    Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
    """
    curve = reliability(p, y, bins)
    filled = curve.count > 0
    if not filled.any():
        return np.nan
    share = curve.count[filled] / curve.count.sum()
    return float(np.sum(share * np.abs(curve.accuracy[filled] - curve.confidence[filled])))


def scores(p: ArrayLike, y: ArrayLike, bins: int = ECE_BINS) -> dict[str, float]:
    """Returns accuracy, nll, brier and ece under these names."""
    return {
        "accuracy": accuracy(p, y),
        "nll": nll(p, y),
        "brier": brier(p, y),
        "ece": ece(p, y, bins),
    }


def predictive_entropy(p: ArrayLike) -> Floats:
    """Returns −Σ_c p_c log p_c of each example, (n,) nats in [0, log C]: higher is less certain."""
    probs = _probabilities(p, ndim=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(probs == 0, 0.0, probs * np.log(probs))
    # The maximum removes the -0.0 and the last-digit negatives of a one-hot row.
    return np.asarray(np.maximum(-terms.sum(1), 0.0), dtype=np.float64)


def max_probability_score(p: ArrayLike) -> Floats:
    """Returns 1 − max_c p_c of each example, (n,) in [0, 1]: higher is less certain."""
    return np.asarray(1.0 - _probabilities(p, ndim=2).max(1), dtype=np.float64)


def mutual_information(p: ArrayLike) -> Floats:
    """Returns what the members of an ensemble disagree about, (n,) nats ≥ 0 (BALD).

    p: (members, n, C), one predictive distribution per draw. The entropy of the mean prediction
    less the mean entropy. Houlsby et al., arXiv 1112.5745.
    """
    probs = _probabilities(p, ndim=3)
    members = np.mean([predictive_entropy(member) for member in probs], axis=0)
    return np.asarray(np.maximum(predictive_entropy(probs.mean(0)) - members, 0.0))


def auroc(score_in: ArrayLike, score_out: ArrayLike) -> float:
    """Returns the probability that an `out` score exceeds an `in` score, ties counting one half.

    score_in: (n,), score_out: (m,), any real scores that should be higher for `out` (the positive
    class: out-of-distribution examples). In [0, 1]; 0.5 is chance. NaN if a score is NaN.
    """
    inside = np.sort(np.asarray(score_in, dtype=np.float64).ravel())
    outside = np.asarray(score_out, dtype=np.float64).ravel()
    if not len(inside) or not len(outside):
        raise ValueError("AUROC needs at least one score on either side")
    if np.isnan(inside).any() or np.isnan(outside).any():
        return np.nan
    below = np.searchsorted(inside, outside, side="left")
    not_above = np.searchsorted(inside, outside, side="right")
    return float((below + not_above).mean() / (2 * len(inside)))


def _checked(p: ArrayLike, y: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    probs, labels = _probabilities(p, ndim=2), np.asarray(y)
    if labels.shape != probs.shape[:1]:
        raise ValueError(f"labels of shape {labels.shape} for probabilities {probs.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(f"labels must lie in [0, {probs.shape[1]})")
    return probs, labels.astype(np.int64)


def _probabilities(p: ArrayLike, ndim: int) -> Floats:
    probs: NDArray[Any] = np.asarray(p, dtype=np.float64)
    if probs.ndim != ndim or not probs.size:
        raise ValueError(f"expected non-empty probabilities of {ndim} axes, got {probs.shape}")
    good = np.isfinite(probs).all(-1)
    off = np.abs(probs[good].sum(-1) - 1)
    if (probs[good] < 0).any() or (off > SUM_TOLERANCE).any():
        raise ValueError("probabilities must be non-negative and sum to 1 (are these logits?)")
    return np.where(good[..., None], probs, np.nan)


def _finite(values: Floats) -> bool:
    return bool(np.isfinite(values).all())
