"""Batch norm over padded batches against torch's over the rows that are there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from fedsim.grids.trace import TraceCache
from fedsim.messages import Arrays
from fedsim.models import FunctionalModel

MASKS = torch.tensor(  # of three batches, each of at least two rows
    [[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0.3, 0]], dtype=torch.float64
)
SHAPES: dict[type[nn.Module], list[tuple[int, ...]]] = {
    nn.BatchNorm1d: [(3,), (3, 4)],
    nn.BatchNorm2d: [(3, 2, 5)],
    nn.BatchNorm3d: [(3, 2, 1, 2)],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum and eps": {"momentum": 0.7, "eps": 0.1},
    "cumulative": {"momentum": None},
    "frozen statistics": {"momentum": 0.0},
    "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def layers(kind: type[nn.Module], shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
    """Returns a batch norm layer between two scalings, with parameters that matter."""
    torch.manual_seed(0)
    scale = nn.Linear(shape[-1], shape[-1])
    module = nn.Sequential(scale, kind(3, **options), nn.Tanh(), nn.Linear(shape[-1], 1)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


def halves(model: FunctionalModel) -> tuple[Arrays, Arrays]:
    """Returns the parameters and the running statistics."""
    start = model.initial()
    return (
        {k: v for k, v in start.items() if k not in model.statistics},
        {k: start[k] for k in model.statistics},
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("kind", "shape"), [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]
)
@pytest.mark.parametrize("how", ["plain", "mapped", "traced"])
def test_padding_changes_nothing(
    how: str, kind: type[nn.Module], shape: tuple[int, ...], options: str
) -> None:
    """Outputs, gradients and running statistics over three batches, each padded its own way."""
    module = layers(kind, shape, OPTIONS[options])
    theirs = copy.deepcopy(module).train()
    model = FunctionalModel(module, torch.zeros(1, *shape).double())
    params, statistics = halves(model)
    rng = torch.Generator().manual_seed(1)
    x = 3 * torch.randn((3, 6, *shape), generator=rng, dtype=torch.float64) + 1

    def objective(params: Arrays, statistics: Arrays, x: Tensor, w: Tensor) -> Any:
        outputs, new = model.apply_train(params, statistics, x, w, {})
        return (outputs.flatten(1).square().sum(1) * w).sum(), (outputs, new)

    ours: Any = grad_and_value(objective, has_aux=True)
    if how == "mapped":  # beside a client whose batch has other rows, and one without any
        one = vmap(ours, in_dims=(None, 0, 0, 0))
        more = torch.stack([torch.ones(6), torch.eye(6)[3], torch.zeros(6)]).double()

        def ours(p: Arrays, s: Arrays, x: Tensor, w: Tensor) -> Any:
            masks = torch.stack([more[0], w, *more[1:]])
            same = {k: v.expand(4, *v.shape) for k, v in s.items()}
            out = one(p, same, x.expand(4, *x.shape), masks)
            assert all(torch.isfinite(t).all() for t in torch.utils._pytree.tree_leaves(out))
            return torch.utils._pytree.tree_map(lambda t: t[1], out)

    cache = TraceCache(how == "traced")
    for batch, weight in zip(x, MASKS, strict=True):
        grads, (loss, (outputs, statistics)) = cache.call(
            "batch", ours, params, statistics, batch, weight
        )
        there = weight != 0
        theirs.zero_grad()
        expected = theirs(batch[there])
        theirs_loss = (expected.flatten(1).square().sum(1) * weight[there]).sum()
        theirs_loss.backward()
        torch.testing.assert_close(outputs[there], expected.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(loss, theirs_loss.detach(), rtol=1e-11, atol=1e-11)
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-10)
        for name, value in theirs.named_buffers():
            if name in model.statistics:
                torch.testing.assert_close(statistics[name], value.to(x.dtype), rtol=1e-11, atol=0)
    theirs.eval()
    torch.testing.assert_close(
        model.apply({**params, **statistics}, x[0]), theirs(x[0]).detach(), rtol=1e-11, atol=1e-11
    )
    theirs.load_state_dict({**params, **statistics})  # torch's own names, none of them missing


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_without_rows_changes_nothing(momentum: float | None) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 2))
    model = FunctionalModel(module, torch.zeros(1, 4))
    params, statistics = halves(model)
    x = torch.randn(5, 4)

    def objective(params: Arrays, x: Tensor) -> Any:
        outputs, new = model.apply_train(params, statistics, x, torch.zeros(5), {})
        return (outputs.square().sum(1) * 0).sum(), (outputs, new)

    grads, (_, (outputs, new)) = grad_and_value(objective, has_aux=True)(params, x)
    assert outputs.isfinite().all()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())
    assert all(torch.equal(new[k], v) for k, v in statistics.items())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_value_a_channel_normalises_to_zero(momentum: float | None) -> None:
    """Where torch raises: (x − x) / sqrt(0 + eps) · weight + bias, and no statistics of it."""
    model = FunctionalModel(nn.Sequential(nn.BatchNorm1d(4, momentum=momentum)), torch.zeros(1, 4))
    statistics = halves(model)[1]
    params = {"0.weight": torch.randn(4), "0.bias": torch.randn(4)}
    x = torch.randn(3, 4)

    def objective(x: Tensor) -> Any:
        outputs, new = model.apply_train(params, statistics, x, torch.eye(3)[1], {})
        return outputs[1].square().sum(), (outputs, new)

    gradient, (_, (outputs, new)) = grad_and_value(objective, has_aux=True)(x)
    assert torch.equal(outputs[1], params["0.bias"])
    assert torch.equal(gradient, torch.zeros_like(x))
    assert all(torch.equal(new[k], v) for k, v in statistics.items())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(4)(x[:1])


def test_a_layer_that_is_used_twice_is_updated_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.again = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.linear(self.norm(x)))  # type: ignore[no-any-return]

    theirs = Twice().double()
    model = FunctionalModel(copy.deepcopy(theirs), torch.zeros(1, 4).double())
    params, statistics = halves(model)
    x = torch.randn(6, 4).double()
    for _ in range(2):
        outputs, statistics = model.apply_train(params, statistics, x, torch.ones(6), {})
        torch.testing.assert_close(outputs, theirs(x))
    assert set(statistics) == {"norm.running_mean", "norm.running_var"}
    for name, value in statistics.items():
        torch.testing.assert_close(value, theirs.get_buffer(name))
    assert model.of_batch_norms() == {"norm.weight", "norm.bias", *statistics}


def test_names_and_counts() -> None:
    module = nn.Sequential(
        nn.Linear(4, 3),
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, momentum=None, affine=False),
        nn.BatchNorm1d(3, track_running_stats=False),
    )
    torchs = dict(copy.deepcopy(module).state_dict())
    model = FunctionalModel(module, torch.zeros(1, 4))
    assert model.num_parameters == 4 * 3 + 3 + 6 + 6
    assert model.batch_norms == ("1", "2", "3")
    assert model.by_batch
    unused = {"1.num_batches_tracked"}  # torch counts batches whether it needs them or not
    assert set(model.initial()) == set(torchs) - unused
    for name, value in model.initial().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, torchs[name].float())


def test_without_running_statistics_evaluation_looks_at_the_rows_that_are_there() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).double()
    theirs = copy.deepcopy(module).eval()
    model = FunctionalModel(module, torch.zeros(1, 4).double())
    x, weight = torch.randn(6, 4).double(), MASKS[1]
    ours = model.apply(model.initial(), x, weight=weight)
    torch.testing.assert_close(ours[weight != 0], theirs(x[weight != 0]))
    torch.testing.assert_close(model.apply(model.initial(), x), theirs(x))


def test_apply_does_not_train_what_it_cannot_keep() -> None:
    model = FunctionalModel(nn.Sequential(nn.BatchNorm1d(4)), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="apply_train"):
        model.apply(model.initial(), torch.randn(3, 4), {})
