"""A torch module as a pure function of its parameters.

Dropout layers take their masks and batch norm layers their running statistics from outside, so that
a client's randomness is keyed like all other randomness, nothing leaks between clients, and many of
them can be computed by one call.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.errors import UserError
from fedsim.messages import Arrays
from fedsim.models.layers import KeyedDropout, MaskedBatchNorm, replace_layers


class FunctionalModel:
    """A module's parameters and running statistics (which travel), the rest, and its forward pass.

    shapes: of the trainable parameters. statistics: shapes of the running statistics of batch norm
    layers, under torch's names; num_batches_tracked only where it is used (momentum=None), as a
    float. batch_norms: the names of batch norm layers. by_batch: whether one of them evaluates by
    the batch's statistics, as it keeps none. dropouts: shapes of one example's uniforms, by layer.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        """`example`: one input with a batch axis, (1, *shape), to see dropout shapes.

        Raises UserError if the module cannot take it or needs what is not supported.
        """
        module = replace_layers(module)
        if not any(p.requires_grad for p in module.parameters()):
            raise UserError("the model has no trainable parameters")
        self.module = module
        self.shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
        norms = _batch_norms(module)
        self.batch_norms = tuple(norms)
        self.statistics = {
            f"{name}.{key}": tuple(getattr(layer, key).shape)
            for name, layer in norms.items()
            for key in layer.statistics
        }
        self.by_batch = any(not layer.statistics for layer in norms.values())
        self.convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
        self._threads = threading.local()
        self._on_device: dict[str, nn.Module] = {}
        self._dry_run(example)
        self.dropouts = {
            name: layer.shape
            for name, layer in module.named_modules()
            if isinstance(layer, KeyedDropout) and layer.shape is not None and layer.p > 0
        }

    def __getstate__(self) -> dict[str, Any]:
        """Returns what another process needs; each has threads and devices of its own."""
        return {**vars(self), "_threads": None, "_on_device": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` returned."""
        vars(self).update(state, _threads=threading.local())

    @property
    def num_parameters(self) -> int:
        """The number of trainable scalars."""
        return sum(int(torch.Size(shape).numel()) for shape in self.shapes.values())

    @property
    def bytes(self) -> int:
        """What the module takes: parameters, frozen ones too, and buffers."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return sum(t.numel() * t.element_size() for t in tensors)

    def initial(self) -> Arrays:
        """Returns a copy of the module's own parameters, then of its running statistics."""
        named = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: named[name].detach().clone() for name in (*self.shapes, *self.statistics)}

    def of_batch_norms(self) -> frozenset[str]:
        """Returns the names of all arrays of batch norm layers, affine parameters included."""
        return frozenset(
            name
            for name in (*self.shapes, *self.statistics)
            if name.rpartition(".")[0] in self.batch_norms
        )

    def apply(
        self,
        params: Mapping[str, Tensor],
        x: Tensor,
        uniforms: Mapping[str, Tensor] | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Returns the outputs (n, ...) for x (n, *shape).

        `params` holds the running statistics, too, if there are any. `uniforms` maps a dropout
        layer's name to numbers in [0, 1) of shape (n, *features); without it the model evaluates.
        `weight` (n,) is 0 for rows that are not there: only batch norm without running statistics,
        which evaluates by the batch's, has to know.
        """
        if uniforms is None:
            return self._call(dict(params), x, weight, training=False)[0]
        if self.batch_norms:
            raise ValueError("a model with batch norm is trained by apply_train, not by apply")
        return self._call({**params, **self._keyed(uniforms)}, x, weight, training=True)[0]

    def apply_train(
        self,
        params: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor],
        x: Tensor,
        weight: Tensor,
        uniforms: Mapping[str, Tensor],
    ) -> tuple[Tensor, Arrays]:
        """Returns the outputs (n, ...) for x (n, *shape), and the running statistics after it.

        Rows of weight (n,) 0 are not there. `uniforms` as in `apply`, {} without dropout.
        """
        values = {**params, **statistics, **self._keyed(uniforms)}
        outputs, updated = self._call(values, x, weight, training=True)
        return outputs, {**statistics, **updated}

    def _keyed(self, uniforms: Mapping[str, Tensor]) -> Arrays:
        return {f"{name}.uniform": uniforms[name] for name in self.dropouts}

    def _call(
        self, values: Arrays, x: Tensor, weight: Tensor | None, training: bool
    ) -> tuple[Tensor, Arrays]:
        """Returns the outputs and the running statistics that were updated."""
        if weight is not None:
            values |= {f"{name}.rows": weight != 0 for name in self.batch_norms}
        module = self._own_module(training, x.device)
        norms = _batch_norms(module) if self.batch_norms else {}
        for layer in norms.values():
            layer.updated = {}
        outputs = functional_call(module, values, (x,))
        updated: Arrays = {}
        for name, layer in norms.items():
            updated |= {f"{name}.{key}": value for key, value in layer.updated.items()}
            layer.updated = {}  # whose tensors belong to this call
        return outputs, updated

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
                more = torch.randn((8, *example.shape[1:]), generator=source).to(example)
                self._call({}, more, torch.ones(8), training=True)
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


def _batch_norms(module: nn.Module) -> dict[str, MaskedBatchNorm]:
    return {n: m for n, m in module.named_modules() if isinstance(m, MaskedBatchNorm)}
