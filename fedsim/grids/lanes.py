"""What the steps of a block of clients need: minibatches, noise and scalars, all keyed.

A block is C clients with Q chains each (Q = 0: no chain axis). Tensors lead with (C,) where every
client has its own, with (C, Q) where every chain has, and shared noise leads with (Q,) or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.base import Batch, Noise, Plan
from fedsim.grids.minibatches import positions, stream_keys
from fedsim.grids.shards import Shards
from fedsim.messages import Arrays
from fedsim.random import Rekeyed, generator, key

GATHER_FLOATS = 2**22
"""Features of a block's minibatches up to which they are all gathered by one call."""

SHARED = -1
"""Stands for the partition in the name of a stream that all clients share."""


@dataclass(frozen=True)
class Stream:
    """Names the random streams of one message: (seed, round, message type, dispatch).

    dispatch: tells apart messages of one type that a client is sent in one round.
    """

    seed: int
    server_round: int
    message_type: str
    dispatch: int = 0

    def generator(
        self, purpose: str, partition: int, chain: int, step: int, rekeyed: Rekeyed | None = None
    ) -> np.random.Generator:
        """Returns the NumPy generator for one purpose of one client, chain and step.

        With `rekeyed` it is that one's, and valid until its next use.
        """
        make = generator if rekeyed is None else rekeyed.at
        name = f"{self.message_type}/{purpose}"
        return make(self.seed, name, self.server_round, partition, chain, step, *self._again)

    def root(self, purpose: str) -> int:
        """Returns the 64-bit number that the purpose's counter-based streams start from."""
        name = f"{self.message_type}/{purpose}"
        return key(self.seed, name, self.server_round, *self._again) & (2**64 - 1)

    @property
    def _again(self) -> tuple[int, ...]:
        """The first message of a round has no number in its streams' names."""
        return (self.dispatch,) if self.dispatch else ()


def rounded(width: int) -> int:
    """Returns the next of a few widths, at most an eighth more: 8 to each power of two."""
    step = 1 << max(width.bit_length() - 4, 0)
    return -(-width // step) * step


class Block:
    """The inputs of C clients whose plans differ in nothing but steps and scalars."""

    def __init__(
        self,
        plans: Sequence[Plan],
        partitions: Sequence[int],
        shards: Shards,
        stream: Stream,
        like: Mapping[str, Mapping[str, tuple[int, ...]]],
        chain: int | None = None,
    ) -> None:
        """`like`: the received records' shapes without the chain axis; `chain`: only this one."""
        self.plans, self.partitions, self.shards, self.stream = plans, partitions, shards, stream
        self.plan = plans[0]
        self.chain_ids = range(self.plan.chains) if chain is None else range(chain, chain + 1)
        self.chains = len(self.chain_ids)
        self.held = shards.training(partitions)
        self.steps = np.array([plan.steps for plan in plans])
        self.full = self.plan.batching.kind == "full"
        self._shapes = {
            name: dict(like[noise.like] if noise.like else noise.shapes)
            for name, noise in self.plan.noise.items()
        }
        self._examples = self._tensor(self.held.sizes)
        self._rows = self._draw_rows()
        self._full_batch = self._resident() if self.full else None
        self._gathered = self._gather_all()
        self._noise: dict[str, Arrays] = {}
        self._scalars = self._stack_scalars()

    def _draw_rows(self) -> np.ndarray[Any, Any]:
        """Returns (C[, Q], minibatches, size) rows of the table; −1 pads.

        Whole shards and clients without data have one minibatch, and chains share it.
        """
        plan, clients = self.plan, len(self.partitions)
        if self.full or plan.batching.kind == "none":
            rows = self._whole_shards() if self.full else np.empty((clients, 0), np.int64)
            if not rows.shape[1]:
                rows = np.full((clients, 1), -1, np.int64)
            return rows[:, None] if self.full or not self.chains else rows[:, None, None]
        chains = self.chain_ids if self.chains else range(1)
        counts = plan.init_minibatches + self.steps * plan.minibatches_per_step
        keys = stream_keys(self.stream.root("batches"), self.held.partitions, chains)

        def own(client: int, chain: int) -> np.random.Generator:
            partition = self.partitions[client]
            return self.stream.generator("batches", partition, chains[chain], 0, self._rekeyed)

        found = positions(plan.batching, self.held.sizes, counts, keys, own)
        rows = self.held.index(found)
        return rows if self.chains else rows[:, 0]

    def _whole_shards(self) -> np.ndarray[Any, Any]:
        """Returns (C, width) rows. Few widths: a graph is traced for each, round after round."""
        width = int(self.held.sizes.max(initial=0))
        return self.held.whole(rounded(width) if self.shards.ragged else width)

    def _gather(self, rows: np.ndarray[Any, Any], lead: int = 0) -> Batch:
        """Returns the batches of `rows` (*, size) as tensors leading with *.

        The axis of the clients comes after `lead` others.
        """
        table = self.held.table
        index = torch.from_numpy(np.ascontiguousarray(rows)).to(self.shards.device)
        trailing = (1,) * (index.ndim - 2 - lead)
        n = self._examples[: index.shape[lead]].reshape(-1, *trailing)
        if rows.size and rows.min() >= 0:  # nothing to pad
            flat = index.reshape(-1)
            weight = table.weight.index_select(0, flat).reshape(index.shape)
            scale = (n / index.shape[-1]).expand(index.shape[:-1])
        else:
            mask = index >= 0
            spare = self._spare[: index.shape[lead]].reshape(-1, 1, *trailing)
            flat = torch.where(mask, index, spare).reshape(-1)
            weight = table.weight.index_select(0, flat).reshape(index.shape) * mask
            scale = n / mask.sum(-1).clamp_min(1).to(weight.dtype)
        return Batch(
            table.x.index_select(0, flat).reshape(*index.shape, *table.x.shape[1:]),
            table.y.index_select(0, flat).reshape(*index.shape, *table.y.shape[1:]),
            weight,
            scale,
        )

    def _gather_all(self) -> Batch | None:
        """Returns all minibatches at once, leading with their number, if they are small enough."""
        floats = self._rows.size * self.held.table.x[:1].numel()
        if self.full or self.plan.batching.kind == "none" or floats > GATHER_FLOATS:
            return None
        return self._gather(np.moveaxis(self._rows, -2, 0), lead=1)

    def _resident(self) -> Batch:
        """Returns the clients' whole shards, which stay on the device from round to round."""
        return self.shards.resident(
            tuple(self.partitions), lambda: self._gather(self._rows[..., 0, :])
        )

    @cached_property
    def _rekeyed(self) -> Rekeyed:
        return Rekeyed()

    @cached_property
    def _spare(self) -> Tensor:
        """Returns (C,) rows that stand where there are none: each client's own first row.

        Their weight is 0, but a loss of another client's row may be infinite here, and 0 · inf is
        NaN.
        """
        first = self.held.index(np.where(self.held.sizes > 0, 0, -1))
        return torch.from_numpy(np.maximum(first, 0)).to(self.shards.device)

    def _stack_scalars(self) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Returns (C,) of every scalar, or one such tensor for each step."""
        clients, length = len(self.plans), max(int(self.steps.max()), 1)
        stacked: dict[str, Tensor | tuple[Tensor, ...]] = {}
        plans = [self.plan] if len({*map(id, self.plans)}) == 1 else self.plans
        for name in self.plan.scalars:
            given = [np.asarray(plan.scalars[name]) for plan in plans]
            if not any(value.ndim for value in given):
                stacked[name] = self._tensor(np.array(given, np.float64)).expand(clients)
                continue
            values = np.zeros((len(plans), length))
            for row, value in zip(values, given, strict=True):
                row[: len(value) if value.ndim else None] = value
            stacked[name] = self._tensor(values).expand(clients, -1).unbind(1)
        stacked["num-examples"] = self._examples
        stacked["partition-id"] = torch.from_numpy(self.held.partitions).to(self.shards.device)
        stacked["step"] = self._tensor(np.arange(length)).expand(clients, -1).unbind(1)
        return stacked

    def _tensor(self, values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(values).to(self.shards.device, self.shards.dtype)

    def scalars(self, step: int, active: int) -> dict[str, Tensor]:
        """Returns each scalar at `step` as (active,)."""
        now = {n: v[step] if isinstance(v, tuple) else v for n, v in self._scalars.items()}
        if active == len(self.plans):
            return now
        return {name: values[:active] for name, values in now.items()}

    def init_batches(self) -> tuple[Batch, ...]:
        """Returns the minibatches of `init`."""
        return tuple(self._batch(i, len(self.plans)) for i in range(self.plan.init_minibatches))

    def batches(self, step: int, active: int) -> tuple[Batch, ...]:
        """Returns the minibatches of `step` for the first `active` clients."""
        first = self.plan.init_minibatches + step * self.plan.minibatches_per_step
        if self.plan.batching.kind == "none":
            return ()
        return tuple(self._batch(first + i, active) for i in range(self.plan.minibatches_per_step))

    def _batch(self, index: int, active: int) -> Batch:
        if self._full_batch is not None:
            return Batch(*(part[:active] for part in self._full_batch))
        if self._gathered is not None:
            return Batch(*(part[index, :active] for part in self._gathered))
        return self._gather(self._rows[:active, ..., index, :])

    def noise(self, step: int, active: int) -> dict[str, Arrays]:
        """Returns the noise of `step`, drawn anew where it is due."""
        for name, spec in self.plan.noise.items():
            if step % spec.every == 0:
                self._noise[name] = self._draw(name, spec, step, active)
        return {
            name: {
                key: value if self.plan.noise[name].shared else value[:active]
                for key, value in arrays.items()
            }
            for name, arrays in self._noise.items()
        }

    def _draw(self, name: str, spec: Noise, step: int, active: int) -> Arrays:
        if spec.per_example and self.full:
            return self._draw_by_row(name, spec, step, active)
        shapes = {key: self._full_shape(shape, spec) for key, shape in self._shapes[name].items()}
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        partitions = [SHARED] if spec.shared else list(self.partitions)
        drawn = np.zeros((len(partitions), max(self.chains, 1), sum(sizes)), self._numpy_dtype)
        for row, partition in zip(drawn[:active], partitions, strict=False):
            for c, out in enumerate(row):
                self._fill(out, name, spec, partition, c, step)
        if not self.chains:
            drawn = drawn[:, 0]
        if spec.shared:
            drawn = drawn[0]
        flat = torch.from_numpy(drawn).to(self.shards.device)
        parts = torch.split(flat, sizes, dim=-1)
        return {
            key: part.reshape(*flat.shape[:-1], *shape)
            for (key, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def _draw_by_row(self, name: str, spec: Noise, step: int, active: int) -> Arrays:
        """Draws for each client as many numbers as it has rows.

        The block's width is that of its largest client: what is drawn must not depend on it.
        """
        count = self.plan.minibatches_per_step
        lead = (len(self.partitions), max(self.chains, 1), count, self._rows.shape[-1])
        drawn = {
            key: np.zeros((*lead, *shape), self._numpy_dtype)
            for key, shape in self._shapes[name].items()
        }
        widths = {key: int(np.prod(shape)) for key, shape in self._shapes[name].items()}
        for i, partition in enumerate(self.partitions[:active]):
            n = int(self.held.sizes[i])
            for c in range(max(self.chains, 1)):
                flat = np.zeros(count * n * sum(widths.values()), self._numpy_dtype)
                self._fill(flat, name, spec, partition, c, step)
                ends = np.cumsum([count * n * width for width in widths.values()])
                for out, part in zip(drawn.values(), np.split(flat, ends[:-1]), strict=True):
                    out[i, c, :, :n] = part.reshape(count, n, *out.shape[4:])
        return {
            key: torch.from_numpy(out if self.chains else out[:, 0]).to(self.shards.device)
            for key, out in drawn.items()
        }

    def _fill(
        self, out: np.ndarray[Any, Any], name: str, spec: Noise, partition: int, c: int, step: int
    ) -> None:
        """Fills out (n,) with the numbers of one client and the block's c-th chain."""
        chain = self.chain_ids[c] if self.chains else 0
        rng = self.stream.generator(name, partition, chain, step, self._rekeyed)
        if spec.distribution == "normal":
            rng.standard_normal(out=out, dtype=out.dtype)
        else:
            rng.random(out=out, dtype=out.dtype)

    @property
    def _numpy_dtype(self) -> type[np.floating[Any]]:
        return np.float64 if self.shards.dtype == torch.float64 else np.float32

    def _full_shape(self, shape: tuple[int, ...], spec: Noise) -> tuple[int, ...]:
        if not spec.per_example:
            return shape
        return (self.plan.minibatches_per_step, self._rows.shape[-1], *shape)
