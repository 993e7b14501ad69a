"""A torch module as a pure function of its parameters.

Dropout layers take their masks from outside, so that a client's randomness is keyed like all other
randomness and many clients can be computed by one call.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.errors import UserError
from fedsim.messages import Arrays

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


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


class FunctionalModel:
    """A module's parameters (which travel), its buffers (which do not) and its forward pass."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        """`example`: one input with a batch axis, (1, *shape), to see dropout shapes.

        Raises UserError if the module cannot take it or needs what is not supported.
        """
        if isinstance(module, _DROPOUT):
            module = nn.Sequential(module)
        _key_dropouts(module)
        _refuse_layers(module)
        self.module = module
        self.shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
        self.convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
        self._threads = threading.local()
        self._on_device: dict[str, nn.Module] = {}
        self._dry_run(example)
        self.dropouts = {
            name: layer.shape
            for name, layer in module.named_modules()
            if isinstance(layer, KeyedDropout) and layer.shape is not None and layer.p > 0
        }

    @property
    def num_parameters(self) -> int:
        """The number of scalars that travel."""
        return sum(int(torch.Size(shape).numel()) for shape in self.shapes.values())

    def initial(self) -> Arrays:
        """Returns a copy of the module's own parameters."""
        named = dict(self.module.named_parameters())
        return {name: named[name].detach().clone() for name in self.shapes}

    def apply(
        self, params: Mapping[str, Tensor], x: Tensor, uniforms: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Returns the outputs (n, ...) for x (n, *shape).

        `uniforms` maps a dropout layer's name to numbers in [0, 1) of shape (n, *features); without
        it the model evaluates.
        """
        values = dict(params)
        training = uniforms is not None
        for name in self.dropouts if training else ():
            assert uniforms is not None
            values[f"{name}.uniform"] = uniforms[name]
        module = self._own_module(training, x.device)
        return functional_call(module, values, (x,))  # type: ignore[no-any-return]

    def place(self, device: torch.device) -> None:
        """Makes `apply` usable on a device: what does not travel is copied to it."""
        if device.type != "cpu":
            self._on_device[device.type] = copy.deepcopy(self.module).to(device)

    def _own_module(self, training: bool, device: torch.device) -> nn.Module:
        """Returns this thread's copy: functional_call swaps parameters in place while it runs."""
        name = f"{'training' if training else 'evaluating'} on {device.type}"
        if not hasattr(self._threads, name):
            module = self._on_device.get(device.type, self.module)
            setattr(self._threads, name, copy.deepcopy(module).train(training))
        return getattr(self._threads, name)  # type: ignore[no-any-return]

    def _dry_run(self, example: Tensor) -> None:
        self.module.train()
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        state = torch.get_rng_state()
        try:
            with torch.no_grad():
                version = example._version
                self.module(example)
                changed = example._version != version
                repeated = [
                    name
                    for name, layer in self.module.named_modules()
                    if isinstance(layer, KeyedDropout) and layer.calls > 1
                ]
                # some layers draw for negative inputs only
                source = torch.Generator().manual_seed(0)
                self.module(torch.randn((8, *example.shape[1:]), generator=source).to(example))
        except Exception as error:  # the user's module may raise anything
            raise UserError(
                f"the model does not take an input of shape {tuple(example.shape)}:"
                f" {type(error).__name__}: {error}"
            ) from error
        if changed:
            raise UserError(
                "the model changes its input in place; the clients' rows stay in memory and would"
                " change from step to step: use x = x / 255 instead of x /= 255, and no"
                " inplace=True on the first layer"
            )
        moved = [n for n, b in self.module.named_buffers() if not torch.equal(b, buffers[n])]
        if moved:
            raise UserError(
                f"the model changes its buffer {moved[0]!r} in the forward pass; it would leak"
                " between clients: a model's state must be its parameters alone"
            )
        if repeated:
            raise UserError(
                f"dropout layer {repeated[0]!r} is used more than once in the forward pass; make"
                " one nn.Dropout for each use, so that each gets random numbers of its own"
            )
        if not torch.equal(state, torch.get_rng_state()):
            torch.set_rng_state(state)
            raise UserError(
                "the model draws random numbers in its forward pass outside nn.Dropout layers;"
                " fedsim can only repeat a run whose noise it draws itself: use nn.Dropout modules"
                " (and dropout=0 in attention, recurrent and transformer layers)"
            )


def _refuse_layers(module: nn.Module) -> None:
    """Raises UserError for layers that would mix examples or leak between clients."""
    for name, layer in module.named_modules():
        what = f"model layer {name!r} ({type(layer).__name__})"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"{what} normalises over the examples of a batch, padding included, and would leak"
                " statistics between clients; use GroupNorm or LayerNorm"
            )
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            raise UserError(
                f"{what} keeps running statistics, which would leak between clients; set"
                " track_running_stats=False"
            )
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            raise UserError(f"{what} has no shapes yet; give it its sizes")
    if not any(p.requires_grad for p in module.parameters()):
        raise UserError("the model has no trainable parameters")


def _key_dropouts(module: nn.Module) -> None:
    """Replaces the module's dropout layers by keyed ones, in place."""
    for name, child in module.named_children():
        if isinstance(child, _DROPOUT):
            setattr(module, name, KeyedDropout(child.p, not isinstance(child, nn.Dropout)))
        else:
            _key_dropouts(child)
