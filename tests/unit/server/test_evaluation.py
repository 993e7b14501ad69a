"""Server-side scores against direct computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

from fedsim.data import DataInfo, Examples, FederatedData
from fedsim.errors import RunFailed
from fedsim.models import TASKS, FunctionalModel, Task, build_task
from fedsim.server.evaluation import Evaluator, split_chains
from tests.engines.toys import CLASSES, classification, federation, functional

Floats = Any


def data() -> FederatedData:
    """Returns 40 test, 30 validation and 25 out-of-distribution examples."""
    base = federation(test=40)
    validation, ood = federation(test=30, seed=1).test, federation(test=25, seed=2).test
    assert ood is not None
    return replace(base, validation=validation, ood=ood.with_x(4 * ood.x))


def chained(model: FunctionalModel, count: int, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: v + torch.randn((count, *v.shape), generator=rng, dtype=v.dtype)
        for name, v in model.initial().items()
    }


def probabilities(model: FunctionalModel, member: dict[str, Tensor], examples: Examples) -> Floats:
    logits = model.apply(member, torch.from_numpy(examples.x)).numpy()
    return special.softmax(logits, axis=1)


def expected(p: Floats, y: Floats) -> dict[str, float]:
    taken = p[np.arange(len(y)), y]
    return {
        "accuracy": float((p.argmax(1) == y).mean()),
        "nll": float(-np.log(taken).mean()),
        "brier": float(((p - np.eye(CLASSES)[y]) ** 2).sum(1).mean()),
    }


def close(got: dict[str, float], want: dict[str, float]) -> None:
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-10), name


def test_one_model() -> None:
    model, made = functional(), data()
    evaluator = Evaluator(model, classification(), made, torch.float64, batch_size=7)
    results = evaluator.evaluate(model.initial(), chains=False)
    assert set(results) == {"validation", "test", "ood"}
    for split in ("validation", "test"):
        examples = getattr(made, split)
        p = probabilities(model, model.initial(), examples)
        close(results[split], expected(p, examples.y))
    assert not any(name.startswith("sample_") for name in results["test"])


def test_ood_is_told_from_test_by_entropy() -> None:
    model, made = functional(), data()
    evaluator = Evaluator(model, classification(), made, torch.float64)
    got = evaluator.evaluate(model.initial(), chains=False)["ood"]
    assert made.test is not None
    assert made.ood is not None
    inside, outside = (probabilities(model, model.initial(), s) for s in (made.test, made.ood))
    for name, score in (
        ("auroc_entropy", stats.entropy(inside, axis=1)),
        ("auroc_max_probability", -inside.max(1)),
    ):
        other = stats.entropy(outside, axis=1) if "entropy" in name else -outside.max(1)
        wins = (other[:, None] > score[None]).mean() + 0.5 * (other[:, None] == score[None]).mean()
        assert got[name] == pytest.approx(wins, rel=1e-12)


def test_an_ensemble_averages_probabilities_and_shows_its_members() -> None:
    model, made = functional(), data()
    arrays = chained(model, 3)
    results = Evaluator(model, classification(), made, torch.float64).evaluate(arrays, chains=True)
    assert made.test is not None
    members = [probabilities(model, m, made.test) for m in split_chains(arrays)]
    close(results["test"], expected(np.mean(members, axis=0), made.test.y))
    single = [expected(p, made.test.y) for p in members]
    close(results["test"], {f"sample_{k}": np.mean([s[k] for s in single]) for k in single[0]})


def test_a_sampler_averages_over_all_draws_so_far() -> None:
    model, made = functional(), data()
    evaluator = Evaluator(model, classification(), made, torch.float64)
    draws = [chained(model, 2, seed) for seed in range(3)]
    for draw in draws:
        evaluator.absorb(draw)
    results = evaluator.evaluate(draws[-1], chains=True)
    assert made.validation is not None
    every = [probabilities(model, m, made.validation) for d in draws for m in split_chains(d)]
    close(results["validation"], expected(np.mean(every, axis=0), made.validation.y))
    restored = Evaluator(model, classification(), made, torch.float64)
    restored.load_state_dict(*evaluator.state_dict())
    assert restored.evaluate(draws[-1], chains=True) == results
    restored.absorb(draws[0])
    evaluator.absorb(draws[0])
    assert restored.evaluate(draws[0], True) == evaluator.evaluate(draws[0], True)


def test_predictions_and_logits() -> None:
    model, made = functional(), data()
    evaluator = Evaluator(model, classification(), made, torch.float64)
    arrays = chained(model, 2)
    found = evaluator.predictions(arrays, chains=True)["test"]
    assert made.test is not None
    members = [probabilities(model, m, made.test) for m in split_chains(arrays)]
    np.testing.assert_allclose(found["p"], np.mean(members, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(found["y"], made.test.y)
    logits = evaluator.logits(arrays, "test", 5)
    assert logits.shape == (2, 5, CLASSES)
    np.testing.assert_allclose(special.softmax(logits[1], 1), members[1][:5], rtol=1e-12)


def test_splits_that_are_asked_for_or_absent() -> None:
    model = functional()
    only = Evaluator(model, classification(), data(), torch.float64, splits=("validation",))
    assert set(only.evaluate(model.initial(), False)) == {"validation"}
    nothing = Evaluator(model, classification(), federation(), torch.float64)
    assert nothing.evaluate(model.initial(), False) == {}


def regression(sd: float) -> tuple[FunctionalModel, Task, FederatedData]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 2))
    test = Examples(x, x @ [1.0, -1.0] + sd * rng.standard_normal(20))
    made = FederatedData(DataInfo("line", (2,), None, "real"), test, (np.arange(20),), test=test)
    model = FunctionalModel(nn.Linear(2, 1).double(), torch.zeros(1, 2).double())
    return model, build_task(TASKS["regression"](noise_sd=sd)), made


def test_regression_averages_densities() -> None:
    model, task, made = regression(0.5)
    evaluator = Evaluator(model, task, made, torch.float64, batch_size=6)
    arrays = chained(model, 4)
    for _ in range(2):
        evaluator.absorb(arrays)
    got = evaluator.evaluate(arrays, chains=True)["test"]
    assert made.test is not None
    means = [model.apply(m, torch.from_numpy(made.test.x)).numpy()[:, 0]
             for m in split_chains(arrays)]  # fmt: skip
    density = np.mean([stats.norm(m, 0.5).pdf(made.test.y) for m in means], axis=0)
    assert got["nll"] == pytest.approx(-np.log(density).mean(), rel=1e-10)
    assert got["mse"] == pytest.approx(np.mean([(m - made.test.y) ** 2 for m in means]), rel=1e-10)


def test_likelihoods_that_underflow_are_still_scored() -> None:
    """exp(−loss) is 0 from a loss of 745 on; the mean of the logs is not infinite."""
    model, task, made = regression(1e-3)
    evaluator = Evaluator(model, task, made, torch.float64)
    params = {"weight": torch.zeros(1, 2).double(), "bias": torch.zeros(1).double()}
    assert made.test is not None
    want = float(-stats.norm(0.0, 1e-3).logpdf(made.test.y).mean())
    assert want > 1e5
    assert evaluator.evaluate(params, chains=False)["test"]["nll"] == pytest.approx(want, rel=1e-12)
    evaluator.absorb({k: v[None] for k, v in params.items()})
    one = {k: v[None] for k, v in params.items()}
    assert evaluator.evaluate(one, chains=True)["test"]["nll"] == pytest.approx(want, rel=1e-12)


def test_a_diverged_model_scores_nan_and_raises_nothing() -> None:
    model, made = functional(), data()
    broken = {k: v * float("nan") for k, v in model.initial().items()}
    results = Evaluator(model, classification(), made, torch.float64).evaluate(broken, False)
    assert np.isnan(results["test"]["nll"])
    assert np.isnan(results["test"]["accuracy"])


def test_a_draw_is_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = functional(), data()
    evaluator = Evaluator(model, classification(), made, torch.float64, batch_size=16)
    calls: list[int] = []
    apply = model.apply
    monkeypatch.setattr(model, "apply", lambda p, x: calls.append(len(x)) or apply(p, x))
    draw, other = chained(model, 2), chained(model, 2, seed=1)
    evaluator.absorb(draw)
    first = evaluator.evaluate(draw, chains=True)
    assert sum(calls) == 2 * (40 + 30 + 25)
    assert evaluator.evaluate(draw, chains=True) == first
    evaluator.evaluate(other, chains=True)
    assert sum(calls) == 2 * 2 * (40 + 30 + 25)
    fresh = Evaluator(model, classification(), made, torch.float64)
    fresh.load_state_dict(*evaluator.state_dict())
    assert fresh.evaluate(draw, True)["test"]["nll"] == pytest.approx(first["test"]["nll"])


def batch_normed() -> FunctionalModel:
    return functional(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)))


def test_a_negative_running_variance_ends_the_run() -> None:
    model = batch_normed()
    arrays = model.initial()
    evaluator = Evaluator(model, classification(), data(), torch.float64)
    evaluator.evaluate(arrays, False)
    arrays["1.running_var"][2] = -0.25
    with pytest.raises(RunFailed, match=r"'1.running_var' has become negative \(-0.25\)"):
        evaluator.evaluate(arrays, False)


def test_layers_that_stay_with_the_clients_leave_no_predictions() -> None:
    model = batch_normed()
    travels = {k: v for k, v in model.initial().items() if k not in model.of_batch_norms()}
    evaluator = Evaluator(model, classification(), data(), torch.float64)
    assert evaluator.predictions(travels, False) == {}
    assert set(evaluator.predictions(model.initial(), False)) == {"validation", "test", "ood"}
