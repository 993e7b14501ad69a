"""Modules as pure functions, and the modules that cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as functional_dropout

from fedsim.errors import UserError
from fedsim.models import FunctionalModel
from fedsim.models.layers import KeyedDropout

EXAMPLE = torch.zeros(1, 4)


def test_apply_is_the_module_with_other_parameters() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    expected = module(x)
    model = FunctionalModel(module, EXAMPLE)
    params = model.initial()
    assert torch.equal(model.apply(params, x), expected)
    doubled = {k: 2 * v for k, v in params.items()}
    other = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    other.load_state_dict(doubled)
    assert torch.equal(model.apply(doubled, x), other(x))
    assert torch.equal(model.apply(params, x), expected)


def test_initial_is_a_copy() -> None:
    model = FunctionalModel(nn.Linear(4, 2), EXAMPLE)
    model.initial()["weight"].zero_()
    assert float(model.initial()["weight"].abs().sum()) > 0
    assert model.num_parameters == 10
    assert model.shapes == {"weight": (2, 4), "bias": (2,)}


def test_frozen_parameters_and_buffers_do_not_travel() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    module.register_buffer("offset", torch.ones(2))
    model = FunctionalModel(module, EXAMPLE)
    assert set(model.initial()) == {"1.weight", "1.bias"}
    x = torch.randn(5, 4)
    assert torch.equal(model.apply(model.initial(), x), module(x))


def test_tied_weights_travel_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))  # type: ignore[no-any-return]

    model = FunctionalModel(Tied(), EXAMPLE)
    assert set(model.initial()) == {"first.weight", "first.bias", "second.bias"}
    identity = {"first.weight": torch.eye(4), "first.bias": torch.zeros(4),
                "second.bias": torch.zeros(4)}  # fmt: skip
    x = torch.randn(5, 4)
    assert torch.equal(model.apply(identity, x), x)


def test_keyed_dropout_has_the_statistics_of_nn_dropout() -> None:
    """Each output is x/(1−p) with probability 1−p and 0 otherwise: mean x, variance x² p/(1−p)."""
    p, n = 0.3, 40_000
    model = FunctionalModel(nn.Sequential(nn.Dropout(p), nn.Linear(4, 4, bias=False)), EXAMPLE)
    x = torch.tensor([1.0, -2.0, 0.5, 3.0]).expand(n, 4)
    uniforms = {name: torch.rand(n, *shape) for name, shape in model.dropouts.items()}
    ours = model.apply({"1.weight": torch.eye(4)}, x, uniforms)
    torchs = nn.Dropout(p)(x)
    for out in (ours, torchs):
        kept = (out != 0).float().mean(0)
        assert (kept - (1 - p)).abs().max() < 5 * (p * (1 - p) / n) ** 0.5
        torch.testing.assert_close(out[out != 0], (x / (1 - p))[out != 0])
    # independent between examples and features
    mask = (ours != 0).float()
    assert torch.corrcoef(mask.T).fill_diagonal_(0).abs().max() < 5 / n**0.5
    assert abs(float(torch.corrcoef(torch.stack([mask[1:, 0], mask[:-1, 0]]))[0, 1])) < 5 / n**0.5


def test_a_unit_is_dropped_where_its_number_is_below_p() -> None:
    layer = KeyedDropout(0.5, channelwise=False)
    layer.uniform = torch.tensor([[0.49, 0.5, 0.0, 0.99]])
    assert layer(torch.ones(1, 4)).tolist() == [[0.0, 2.0, 0.0, 2.0]]


def test_dropout_is_off_when_evaluating() -> None:
    model = FunctionalModel(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)), EXAMPLE)
    x = torch.randn(3, 4)
    linear = nn.Linear(4, 4)
    linear.load_state_dict({k[2:]: v for k, v in model.initial().items()})
    assert torch.equal(model.apply(model.initial(), x), linear(x))


def test_channelwise_dropout_drops_channels() -> None:
    module = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Dropout2d(0.5))
    model = FunctionalModel(module, torch.zeros(1, 1, 3, 3))
    assert model.dropouts == {"1": (6, 1, 1)}
    assert model.convolutional
    out = model.apply(model.initial(), torch.ones(4, 1, 3, 3), {"1": torch.rand(4, 6, 1, 1)})
    zero = (out == 0).flatten(2)
    assert torch.equal(zero.all(2), zero.any(2))
    assert zero.any()
    assert not zero.all()


def test_dropout_of_probability_zero_is_none() -> None:
    off = FunctionalModel(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.0)), EXAMPLE)
    assert off.dropouts == {}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return functional_dropout(self.linear(x), 0.5, self.training)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(self.dropout(x)))  # type: ignore[no-any-return]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x /= 255
        return self.linear(x)  # type: ignore[no-any-return]


class OwnBatchNorm(nn.BatchNorm1d):
    pass


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "functional dropout": (Functional(), "random numbers in its forward pass"),
    "other dropout": (nn.Sequential(nn.Linear(4, 2), nn.AlphaDropout()), "random numbers"),
    "randomised activation": (nn.Sequential(nn.Linear(4, 2), nn.RReLU()), "random numbers"),
    "reused dropout": (Reused(), "'dropout' is used more than once"),
    "batch norm over processes": (
        nn.Sequential(nn.Linear(4, 2), nn.SyncBatchNorm(2)),
        r"'1' \(SyncBatchNorm\) takes its statistics over processes",
    ),
    "batch norm of its own kind": (
        nn.Sequential(nn.Linear(4, 2), OwnBatchNorm(2)),
        r"'1' \(OwnBatchNorm\) is a batch norm of its own kind",
    ),
    "batch norm without shapes": (nn.Sequential(nn.LazyBatchNorm1d()), "give it its sizes"),
    "batch norm of other rows": (
        nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1), nn.BatchNorm1d(2)),
        "batch norm gets 16 rows for a batch of 8 examples",
    ),
    "batch norm of other axes": (
        nn.Sequential(nn.Linear(4, 2), nn.BatchNorm2d(2)),
        "batch norm expects inputs of 4 axes, not 2",
    ),
    "instance norm with statistics": (
        nn.Sequential(nn.Linear(4, 2), nn.InstanceNorm1d(2, track_running_stats=True)),
        "running statistics",
    ),
    "wrong input shape": (nn.Linear(5, 2), r"input of shape \(1, 4\): RuntimeError"),
    "lazy": (nn.LazyLinear(2), "give it its sizes"),
    "no parameters": (nn.Flatten(), "no trainable parameters"),
    "all frozen": (nn.Linear(4, 2).requires_grad_(False), "no trainable parameters"),
    "input in place": (InPlace(), "changes its input in place"),
    "first layer in place": (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), "in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_keyed_or_mapped_is_refused(name: str) -> None:
    module, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        FunctionalModel(module, EXAMPLE)


def test_a_refusal_leaves_the_global_generator_alone() -> None:
    module = Functional()
    state = torch.get_rng_state()
    with pytest.raises(UserError):
        FunctionalModel(module, EXAMPLE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True)),
    ],
)
def test_norms_of_one_example_are_fine(module: nn.Module) -> None:
    model = FunctionalModel(module, EXAMPLE)
    x = torch.randn(6, 4)
    together = model.apply(model.initial(), x)
    alone = torch.cat([model.apply(model.initial(), x[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone)


class Counting(nn.Module):
    """Remembers how often it was called."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)  # type: ignore[no-any-return]


def test_a_buffer_that_changes_is_refused() -> None:
    with pytest.raises(UserError, match="changes its buffer 'calls'"):
        FunctionalModel(Counting(), EXAMPLE)
