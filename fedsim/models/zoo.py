"""The models a scenario can name, and any other by import path."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.errors import Params, UserError
from fedsim.models.functional import FunctionalModel
from fedsim.random import integer
from fedsim.registry import import_path

if TYPE_CHECKING:
    from fedsim.data import DataInfo

Activation = Literal["relu", "tanh", "gelu", "silu"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


class LinearParams(Params):
    """A linear map of the flattened input."""

    name: Literal["linear"] = "linear"
    outputs: int | None = Field(
        None, ge=1, description="Number of outputs; empty: one for each class, or one."
    )
    bias: bool = Field(True, description="Whether there is an intercept.")


class SoftmaxParams(Params):
    """Multinomial logistic regression: a linear map to one logit per class."""

    name: Literal["softmax"] = "softmax"
    bias: bool = Field(True, description="Whether there is an intercept per class.")


class MLPParams(Params):
    """A multilayer perceptron on the flattened input."""

    name: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = Field((64,), description="Width of each hidden layer, ≥ 1.")
    activation: Activation = Field("relu", description="The nonlinearity after each hidden layer.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability, in [0, 1).")


class CNNParams(Params):
    """Convolutions with 2×2 max-pooling after each, then fully connected layers."""

    name: Literal["cnn"] = "cnn"
    channels: tuple[int, ...] = Field((32, 64), description="Channels of each convolution, ≥ 1.")
    kernel_size: int = Field(3, ge=1, description="Side of the square kernels, in pixels.")
    hidden: tuple[int, ...] = Field((128,), description="Width of each fully connected layer.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the last layer, in [0, 1).")
    norm: Literal["none", "batch", "group"] = Field(
        "none",
        description="Normalisation after each convolution: batch norm, or GroupNorm of the largest"
        " number of groups up to 8 that divides the channels.",
    )


class LocationParams(Params):
    """A point θ in R^d with the potential ½(θ − m)ᵀ P (θ − m) of a client's N(m, P⁻¹).

    For the `gaussian_clients` data, whose one row per client holds m and P.
    """

    name: Literal["location"] = "location"


class CustomModelParams(Params):
    """Any torch module by import path."""

    name: Literal["custom"] = "custom"
    factory: str = Field(
        description="Import path package.module:function; called with `params` (and `info`, a"
        " DataInfo, if it takes one), returns an nn.Module."
    )
    params: dict[str, Any] = Field(default={}, description="Keyword arguments of the factory.")


MODELS: dict[str, type[Params]] = {
    "linear": LinearParams,
    "softmax": SoftmaxParams,
    "mlp": MLPParams,
    "cnn": CNNParams,
    "location": LocationParams,
    "custom": CustomModelParams,
}


class Location(nn.Module):
    """θ (d,); forward maps rows (n, d + d²) of means and precisions to potentials (n,)."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ½(θ − m)ᵀ P (θ − m) for each row."""
        d = self.theta.shape[-1]
        delta = self.theta - x[:, :d]
        precision = x[:, d:].reshape(-1, d, d)
        return 0.5 * torch.einsum("ni,nij,nj->n", delta, precision, delta)


def build_model(params: Params, info: DataInfo, seed: int, dtype: torch.dtype) -> FunctionalModel:
    """Returns the scenario's model with parameters drawn from the stream (seed, "model").

    Raises UserError if the model does not fit the data.
    """
    outputs = info.num_classes or 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer(seed, "model"))
        module = _module(params, info, outputs)
    module = module.to(dtype)
    return FunctionalModel(module, torch.zeros((1, *info.input_shape), dtype=dtype))


def _module(params: Params, info: DataInfo, outputs: int) -> nn.Module:
    features = int(torch.Size(info.input_shape).numel())
    if isinstance(params, LinearParams):
        width = params.outputs or outputs
        return nn.Sequential(nn.Flatten(), nn.Linear(features, width, bias=params.bias))
    if isinstance(params, SoftmaxParams):
        if info.num_classes is None:
            raise UserError(f"model softmax needs classes, but {info.name} has none; try linear")
        return nn.Sequential(nn.Flatten(), nn.Linear(features, outputs, bias=params.bias))
    if isinstance(params, MLPParams):
        return _mlp(params, features, outputs)
    if isinstance(params, CNNParams):
        return _cnn(params, info, outputs)
    if isinstance(params, LocationParams):
        dimension = int((features + 0.25) ** 0.5 - 0.5 + 1e-9)
        if dimension * (dimension + 1) != features:
            raise UserError(f"model location needs the data gaussian_clients, not {info.name}")
        return Location(dimension)
    if isinstance(params, CustomModelParams):
        return _custom(params, info)
    raise TypeError(f"no model for {type(params).__name__}")


def _mlp(params: MLPParams, features: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, width in pairwise((features, *params.hidden)):
        layers += [nn.Linear(before, width), _ACTIVATIONS[params.activation]()]
        if params.dropout:
            layers.append(nn.Dropout(params.dropout))
    layers.append(nn.Linear((features, *params.hidden)[-1], outputs))
    return nn.Sequential(*layers)


def _cnn(params: CNNParams, info: DataInfo, outputs: int) -> nn.Module:
    if len(info.input_shape) != 3:
        raise UserError(
            f"model cnn needs images (channels, height, width), but {info.name} has inputs of shape"
            f" {info.input_shape}"
        )
    channels, height, width = info.input_shape
    layers: list[nn.Module] = []
    for before, after in pairwise((channels, *params.channels)):
        layers.append(nn.Conv2d(before, after, params.kernel_size, padding=params.kernel_size // 2))
        if params.norm != "none":
            layers.append(_norm(params.norm, after))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*layers, nn.Flatten())
    try:
        # evaluating, so that batch norm starts from no batch
        flat = body.eval()(torch.zeros(1, channels, height, width)).shape[1]
    except RuntimeError as error:
        raise UserError(
            f"model cnn: images of {height}×{width} are too small for {len(params.channels)}"
            " convolutions with pooling"
        ) from error
    for before, after in pairwise((flat, *params.hidden)):
        body.extend([nn.Linear(before, after), nn.ReLU()])
    if params.dropout:
        body.append(nn.Dropout(params.dropout))
    body.append(nn.Linear((flat, *params.hidden)[-1], outputs))
    return body


def _norm(kind: Literal["batch", "group"], channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(max(g for g in range(1, 9) if channels % g == 0), channels)


def _custom(params: CustomModelParams, info: DataInfo) -> nn.Module:
    import inspect

    factory = import_path(params.factory)
    arguments = dict(params.params)
    try:
        if "info" in inspect.signature(factory).parameters:
            arguments["info"] = info
        module = factory(**arguments)
    except Exception as error:  # the user's factory may raise anything
        raise UserError(
            f"model factory {params.factory} failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"model factory {params.factory} returned a {type(module).__name__}, not an nn.Module"
        )
    return module
