import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from fedsim.metrics import classification as c

RNG = np.random.default_rng(0)


def predictions(
    n: int = 400, classes: int = 5, sharp: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    logits = sharp * RNG.normal(size=(n, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p, RNG.integers(0, classes, n)


def brute_ece(p: np.ndarray, y: np.ndarray, bins: int) -> float:
    """The definition, one example at a time."""
    total = 0.0
    for b in range(bins):
        members = [
            i
            for i in range(len(y))
            if b / bins <= max(p[i]) < (b + 1) / bins or (b == bins - 1 and max(p[i]) >= 1.0)
        ]
        if members:
            right = sum(int(np.argmax(p[i]) == y[i]) for i in members) / len(members)
            sure = sum(max(p[i]) for i in members) / len(members)
            total += len(members) / len(y) * abs(right - sure)
    return total


def test_scores_agree_with_scikit_learn() -> None:
    p, y = predictions()
    assert c.accuracy(p, y) == pytest.approx(sk.accuracy_score(y, p.argmax(1)), abs=1e-15)
    assert c.nll(p, y) == pytest.approx(sk.log_loss(y, p, labels=range(5)), rel=1e-12)
    one_hot = np.eye(5)[y]
    by_class = [sk.brier_score_loss(one_hot[:, k], p[:, k]) for k in range(5)]
    assert c.brier(p, y) == pytest.approx(sum(by_class), rel=1e-12)


def test_scores_bundle_the_four_under_their_names() -> None:
    p, y = predictions()
    expected = {"accuracy": c.accuracy(p, y), "nll": c.nll(p, y)}
    expected |= {"brier": c.brier(p, y), "ece": c.ece(p, y, 7)}
    assert c.scores(p, y, bins=7) == expected


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_ece_agrees_with_torchmetrics_and_with_the_definition(bins: int) -> None:
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, y = predictions()
    theirs = multiclass_calibration_error(
        torch.tensor(p), torch.tensor(y), num_classes=5, n_bins=bins, norm="l1"
    )
    assert c.ece(p, y, bins) == pytest.approx(float(theirs), abs=1e-6)
    assert c.ece(p, y, bins) == pytest.approx(brute_ece(p, y, bins), abs=1e-12)


def test_perfectly_calibrated_and_perfectly_wrong() -> None:
    sure = np.eye(3)[[0, 1, 2, 0]]
    assert c.ece(sure, np.array([0, 1, 2, 0])) == 0
    assert c.ece(sure, np.array([1, 2, 0, 1])) == 1
    assert c.brier(sure, np.array([1, 2, 0, 1])) == 2


def test_reliability_counts_every_example_once_and_marks_empty_bins() -> None:
    p, y = predictions(classes=2)
    curve = c.reliability(p, y, bins=10)
    assert curve.count.sum() == len(y)
    assert np.isnan(curve.confidence[:5]).all()  # two classes: the top one is at least a half
    filled = curve.count > 0
    assert np.all(curve.confidence[filled] >= curve.edges[:-1][filled])
    assert np.all(curve.confidence[filled] <= curve.edges[1:][filled])
    overall = np.sum(curve.count[filled] * curve.accuracy[filled]) / len(y)
    assert overall == pytest.approx(c.accuracy(p, y))


def test_a_zero_probability_costs_the_documented_maximum() -> None:
    assert c.nll([[0.0, 1.0]], np.array([0])) == pytest.approx(-math.log(c.NLL_EPS))
    assert c.nll([[0.0, 1.0]], np.array([1])) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_model_is_not_scored(bad: float) -> None:
    p, y = predictions(10)
    p[3, 1] = bad
    assert all(math.isnan(value) for value in c.scores(p, y).values())
    assert np.isnan(c.predictive_entropy(p)).sum() == 1
    assert np.isnan(c.max_probability_score(p)[3])


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([[3.0, -1.0]], [0], "logits"),
        ([[0.5, 0.9]], [0], "sum to 1"),
        ([[0.5, 0.5]], [2], r"\[0, 2\)"),
        ([[0.5, 0.5]], [-1], r"\[0, 2\)"),
        ([[0.5, 0.5]], [0.0], "integers"),
        ([[0.5, 0.5]], [0, 1], "shape"),
        (np.zeros((0, 2)), np.zeros(0, int), "non-empty"),
        ([0.5, 0.5], [0], "axes"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(p: object, y: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        c.nll(p, np.asarray(y))  # type: ignore[arg-type]


def test_no_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="bins"):
        c.ece([[1.0]], np.array([0]), bins=0)


@given(
    hnp.arrays(int, st.integers(1, 40), elements=st.integers(0, 5)),
    hnp.arrays(int, st.integers(1, 40), elements=st.integers(0, 5)),
)
def test_auroc_with_many_ties_equals_the_pairs_and_scikit_learn(
    a: np.ndarray, b: np.ndarray
) -> None:
    pairs = np.sign(b[:, None] - a[None, :])
    assert c.auroc(a, b) == pytest.approx(((pairs + 1) / 2).mean(), abs=1e-12)
    labels = np.r_[np.zeros(len(a)), np.ones(len(b))]
    assert c.auroc(a, b) == pytest.approx(sk.roc_auc_score(labels, np.r_[a, b]), abs=1e-12)


def test_auroc_ends() -> None:
    assert c.auroc([0, 1], [2, 3]) == 1
    assert c.auroc([2, 3], [0, 1]) == 0
    assert math.isnan(c.auroc([0, np.nan], [1]))
    with pytest.raises(ValueError, match="at least one"):
        c.auroc([], [1])


def test_entropy_and_disagreement_against_scipy() -> None:
    from scipy.stats import entropy

    p = RNG.dirichlet([0.3] * 4, size=(6, 50))
    assert c.predictive_entropy(p[0]) == pytest.approx(entropy(p[0], axis=1), abs=1e-12)
    # The mutual information is the mean Kullback-Leibler divergence to the mean prediction.
    divergence = entropy(p, p.mean(0)[None], axis=2).mean(0)
    assert c.mutual_information(p) == pytest.approx(divergence, abs=1e-12)


def test_certain_and_agreeing_members_have_no_entropy_and_no_disagreement() -> None:
    sure = np.broadcast_to(np.eye(3), (5, 3, 3))
    assert np.array_equal(c.predictive_entropy(np.eye(3)), np.zeros(3))
    assert np.array_equal(c.mutual_information(sure), np.zeros(3))
    assert c.max_probability_score(np.eye(3)) == pytest.approx(0)


@settings(max_examples=50)
@given(st.integers(1, 30), st.integers(2, 6), st.integers(1, 20), st.integers(0, 2**32))
def test_scores_stay_in_their_ranges(n: int, classes: int, bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, y = rng.dirichlet([0.2] * classes, size=n).astype(np.float32), rng.integers(0, classes, n)
    got = c.scores(p, y, bins)
    assert 0 <= got["accuracy"] <= 1
    assert 0 <= got["ece"] <= 1
    assert -1e-6 <= got["brier"] <= 2 + 1e-6
    assert got["nll"] >= -1e-6  # float32 rows sum to 1 only nearly
    assert np.all(c.predictive_entropy(p) <= math.log(classes) + 1e-6)
