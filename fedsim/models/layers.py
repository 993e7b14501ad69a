"""Layers that mix randomness or examples into a model, as pure functions of what comes in.

They take the place of torch's: dropout whose masks come from outside, and batch normalisation that
knows which rows of a padded batch are there and returns its running statistics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from fedsim.errors import UserError
from fedsim.messages import Arrays

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_AXES = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


class KeyedDropout(nn.Module):
    """Dropout whose uniform numbers come in as a buffer: (n, *features), all ones when evaluating.

    Kept entries are scaled by 1 / (1 - p), as nn.Dropout does. The channel-wise variants drop whole
    channels: their uniforms have the shape (n, channels, 1, ...).
    """

    uniform: Tensor

    def __init__(self, p: float, channelwise: bool) -> None:
        super().__init__()
        self.p = p
        self.channelwise = channelwise
        self.shape: tuple[int, ...] | None = None  # of one example's uniforms, seen in a dry run
        self.calls = 0
        self.register_buffer("uniform", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Zeroes entries of x (n, *features) whose uniform number is below p."""
        if not self.training or self.p == 0:
            return x
        self.calls += 1
        if self.shape is None:
            features = tuple(x.shape[1:])
            ones = (1,) * (len(features) - 1)
            self.shape = (features[0], *ones) if self.channelwise else features
        if self.p == 1:
            return torch.zeros_like(x)
        return x * (self.uniform >= self.p).to(x.dtype) / (1 - self.p)


class MaskedBatchNorm(nn.Module):
    """nn.BatchNorm1d, 2d or 3d over the rows that are there, without a change in place.

    `rows` (n,) bool comes in as a buffer; the statistics of a training batch are those of its true
    rows alone, so that padding changes nothing. The running statistics come in as buffers, too, and
    the new ones are left in `updated`, from where FunctionalModel takes them.

    A batch without rows is left as it is but for the affine map. One of a single value a channel,
    which torch refuses, normalises to 0. Both leave the running statistics alone: neither has a
    variance.
    """

    rows: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, source: _BatchNorm) -> None:
        """Takes over the source's settings, parameters and statistics."""
        super().__init__()
        self.axes = _AXES[type(source)]
        self.eps, self.momentum = source.eps, source.momentum
        self.weight, self.bias = source.weight, source.bias
        self.register_buffer("rows", torch.ones((), dtype=torch.bool), persistent=False)
        self.statistics: tuple[str, ...] = ()
        self.updated: Arrays = {}
        mean, var, count = source.running_mean, source.running_var, source.num_batches_tracked
        if mean is None or var is None or count is None:
            return
        self.statistics = ("running_mean", "running_var")
        self.register_buffer("running_mean", mean.detach().clone())
        self.register_buffer("running_var", var.detach().clone())
        if self.momentum is None:  # as a float: it is averaged over clients like the others
            self.statistics += ("num_batches_tracked",)
            self.register_buffer("num_batches_tracked", count.detach().to(mean.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x (n, channels, ...) by the batch's statistics, or by running ones."""
        if x.ndim not in self.axes:
            allowed = " or ".join(map(str, self.axes))
            raise ValueError(f"batch norm expects inputs of {allowed} axes, not {x.ndim}")
        if self.statistics and not self.training:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if self.rows.ndim and len(self.rows) != len(x):
            raise ValueError(
                f"batch norm gets {len(x)} rows for a batch of {len(self.rows)} examples; the first"
                " axis of its inputs must be that of the examples"
            )
        there = self.rows.expand(len(x)).reshape(-1, *(1,) * (x.ndim - 1))
        over = (0, *range(2, x.ndim))
        channels = (1, -1, *(1,) * (x.ndim - 2))
        count = there.sum().to(x.dtype) * math.prod(x.shape[2:])  # values of a channel
        mean = torch.where(there, x, 0).sum(over) / count.clamp_min(1)
        delta = x - mean.reshape(channels)
        squares = torch.where(there, delta, 0).square().sum(over)
        if self.training and self.statistics:
            self._update(count, mean.detach(), squares.detach())
        var = torch.where(count > 0, squares / count.clamp_min(1), 1)
        out = delta * torch.rsqrt(var + self.eps).reshape(channels)
        if self.weight is not None:
            out = out * self.weight.reshape(channels) + self.bias.reshape(channels)
        return out

    def _update(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        """Moves the running statistics towards a batch's mean and unbiased variance (channels,)."""
        # a layer that is used twice in a forward pass goes on from its first update
        old = self.updated or {name: getattr(self, name) for name in self.statistics}
        batch = {"running_mean": mean, "running_var": squares / (count - 1).clamp_min(1)}
        factor: float | Tensor
        if self.momentum is None:  # the mean over all batches so far
            batch["num_batches_tracked"] = old["num_batches_tracked"] + 1
            factor = 1 / batch["num_batches_tracked"]
        else:
            factor = self.momentum
        self.updated = {}
        for name, value in batch.items():
            if name != "num_batches_tracked":
                value = (1 - factor) * old[name] + factor * value
            self.updated[name] = torch.where(count > 1, value, old[name])


def replace_layers(module: nn.Module) -> nn.Module:
    """Returns the module with its dropout and batch norm layers replaced, children in place.

    Raises UserError for layers that would leak between examples or clients.
    """
    made: dict[nn.Module, nn.Module] = {}  # a layer that has two names stays one layer
    _refuse(module)
    if (own := _replacement(module, made)) is not None:
        return nn.Sequential(own)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and (new := _replacement(child, made)) is not None:
                setattr(parent, name, new)
    return module


def _replacement(layer: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module | None:
    if layer not in made:
        if isinstance(layer, _DROPOUTS):
            made[layer] = KeyedDropout(layer.p, not isinstance(layer, nn.Dropout))
        elif isinstance(layer, _BatchNorm):
            made[layer] = MaskedBatchNorm(layer)
    return made.get(layer)


def _refuse(module: nn.Module) -> None:
    """Raises UserError for layers that would leak between clients, or are of no known kind."""
    for name, layer in module.named_modules():
        what = f"model layer {name!r} ({type(layer).__name__})"
        if isinstance(layer, LazyModuleMixin):
            raise UserError(f"{what} has no shapes yet; give it its sizes")
        if isinstance(layer, nn.SyncBatchNorm):
            raise UserError(
                f"{what} takes its statistics over processes, which would leak between clients; use"
                " nn.BatchNorm1d, 2d or 3d"
            )
        if isinstance(layer, _BatchNorm) and type(layer) not in _AXES:
            raise UserError(
                f"{what} is a batch norm of its own kind, whose statistics would leak between"
                " clients; use nn.BatchNorm1d, 2d or 3d itself, GroupNorm or LayerNorm"
            )
        instance = isinstance(layer, _NormBase) and not isinstance(layer, _BatchNorm)
        if instance and layer.track_running_stats:
            raise UserError(
                f"{what} keeps running statistics, which would leak between clients; set"
                " track_running_stats=False"
            )
