"""Runs a client's plan over a block of clients: mapped (one call for all) or one by one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from fedsim.clients.base import Batch, Client, Inputs, Reply
from fedsim.grids.lanes import Block
from fedsim.grids.passes import dense
from fedsim.grids.trace import Graph, TraceCache, builder, layout, leaves_of, replay
from fedsim.messages import Arrays


@dataclass(frozen=True)
class Axes:
    """How a block is mapped: over clients, then over chains if there are any."""

    chains: bool
    full: bool
    shared: frozenset[str]
    noise: tuple[str, ...]

    @classmethod
    def of(cls, block: Block) -> Axes:
        """Returns the axes of a block's inputs."""
        plan = block.plan
        shared = frozenset(name for name, spec in plan.noise.items() if spec.shared)
        return cls(bool(plan.chains), block.full, shared, tuple(plan.noise))

    def map(self, function: Any, *dims: tuple[Any, Any]) -> Any:
        """Returns function mapped; dims: for each argument its axis over (clients, chains)."""
        if self.chains:
            function = vmap(function, in_dims=tuple(chain for _, chain in dims))
        return vmap(function, in_dims=tuple(client for client, _ in dims))

    @property
    def batch(self) -> tuple[Any, Any]:
        """Chains of a full-batch client share its rows."""
        return (0, None if self.full else 0)

    @property
    def noise_dims(self) -> tuple[Any, Any]:
        """Shared noise has no axis over clients."""
        return ({name: None if name in self.shared else 0 for name in self.noise}, 0)


@dataclass(frozen=True, eq=False)
class Mapped:
    """A client's functions over the axes of a block; made once, and the name of their graphs."""

    init: Any
    step: Any
    masked: Any
    finish: Any
    at_once: Any
    """init and finish, where there are no steps."""

    @classmethod
    def of(cls, client: Client, axes: Axes, static: tuple[tuple[str, Hashable], ...]) -> Mapped:
        """Returns the functions of a client whose plan has these static values."""
        fixed = dict(static)

        def init(records: Any, states: Any, batches: Any, scalars: Any) -> Any:
            return client.init(records, states, Inputs(batches, {}, scalars, fixed))

        def step(state: Any, active: Tensor, batches: Any, noise: Any, scalars: Any) -> Any:
            return client.step(state, Inputs(batches, noise, scalars, fixed))

        def masked(state: Any, active: Tensor, batches: Any, noise: Any, scalars: Any) -> Any:
            new = client.step(state, Inputs(batches, noise, scalars, fixed))
            return tree_map(lambda a, b: torch.where(active, a, b), new, state)

        def at_once(records: Any, states: Any, batches: Any, scalars: Any) -> Any:
            return client.finish(init(records, states, batches, scalars))

        record_dims = (None, 0 if axes.chains else None)
        init_dims = (record_dims, (0, 0), axes.batch, (0, None))
        step_dims = ((0, 0), (0, None), axes.batch, axes.noise_dims, (0, None))
        return cls(
            axes.map(init, *init_dims),
            axes.map(step, *step_dims),
            axes.map(masked, *step_dims),
            axes.map(client.finish, (0, 0)),
            axes.map(at_once, *init_dims),
        )


def run_mapped(
    client: Client, block: Block, records: dict[str, Arrays], states: Arrays, cache: TraceCache
) -> tuple[Reply, Arrays]:
    """Returns replies and client states leading with (C,) or (C, Q).

    The block's clients must come with the most steps first: a client that has finished is left out
    of the call (in a few sizes, so that few graphs are traced) or masked.
    """
    form = (client, Axes.of(block), tuple(sorted(block.plan.static.items())))
    mapped = cache.once(form, lambda: Mapped.of(*form))
    batches, scalars = block.init_batches(), block.scalars(0, len(block.plans))
    inputs = (records, states, batches, scalars)
    if not block.steps.any():
        return cache.call((mapped, "at once"), mapped.at_once, *inputs)  # type: ignore[no-any-return]
    state = cache.call((mapped, "init"), mapped.init, *inputs)
    state = _advanced(mapped, block, state, cache)
    return cache.call((mapped, "finish"), mapped.finish, state)  # type: ignore[no-any-return]


def _advanced(mapped: Mapped, block: Block, state: Any, cache: TraceCache) -> Any:
    """Returns the state after the steps of all clients."""
    count, total = len(block.plans), int(block.steps.max())
    ragged = int(block.steps.min()) < total
    finished: list[Any] = []  # states of clients that are done, last clients first
    steps = torch.from_numpy(block.steps).to(block.shards.device)
    everyone = steps > -1
    stepper, width = Stepper(cache, state), count
    for s in range(total):
        busy = int((block.steps > s).sum()) if ragged else count
        if (new_width := _bucket(busy, count)) < width:
            finished.append(_slice(stepper.state, new_width, width))
            stepper, width = Stepper(cache, _slice(stepper.state, 0, new_width)), new_width
            if width < torch.get_num_threads():  # which share out clients, and divide no one's sums
                torch.set_num_threads(width)
        function, name = (mapped.step, "step") if busy == width else (mapped.masked, "masked")
        active = steps[:width] > s if ragged else everyone
        inputs = (block.batches(s, width), block.noise(s, width), block.scalars(s, width))
        stepper.advance((mapped, name), function, active, *inputs)
    state = stepper.state
    if finished:
        state = tree_map(lambda *parts: torch.cat(parts), state, *reversed(finished))
    return state


class Stepper:
    """Advances a state by a graph, as leaves: building the tree at each step would cost as much.

    Graphs may overwrite the state's leaves, so those are copied first that come from outside.
    Shapes and structures of the inputs must not change during a stepper's life.
    """

    def __init__(self, cache: TraceCache, state: Any) -> None:
        self._cache = cache
        leaves, self._build = leaves_of(state), builder(state)
        # what is one tensor for all clients becomes one each
        self._leaves = [leaf if dense(leaf) else leaf.contiguous() for leaf in leaves]
        pairs = enumerate(zip(self._leaves, leaves, strict=True))
        self._own = frozenset(i for i, (mine, given) in pairs if mine is not given)
        self._key: object = None
        self._graph: Graph | None = None

    @property
    def state(self) -> Any:
        """The state as a tree; the next advance may overwrite it."""
        return self._build(iter(self._leaves))

    def advance(self, key: object, function: Any, *inputs: Any) -> None:
        """Replaces the state by function(state, *inputs)."""
        if self._graph is None or key != self._key:
            self._graph = self._cache.graph(key, function, self.state, *inputs, donate=True)
            self._key = key
            for i in self._graph.overwrites - self._own:
                self._leaves[i] = self._leaves[i].clone()
            self._own = self._graph.overwrites
        before = layout(self._leaves) if self._cache.enabled else ()
        run = replay if self._cache.enabled else _call
        with torch.no_grad():
            self._leaves = run(self._graph, self._leaves + leaves_of(inputs))
        if self._cache.enabled and layout(self._leaves) != before:
            self._graph = None  # a graph is for one layout


def _call(graph: Graph, leaves: list[Tensor]) -> list[Tensor]:
    """Returns graph(*leaves) of a function that was not traced, which may need autograd."""
    return graph.run(*leaves)


def _bucket(busy: int, count: int) -> int:
    """Returns the smallest of count, count/2, count/4, … that holds `busy` clients."""
    width = count
    while (half := -(-width // 2)) >= busy and half < width:
        width = half
    return width


def _slice(tree: Any, start: int, stop: int) -> Any:
    return tree_map(lambda t: t[start:stop], tree)


def run_one(
    client: Client,
    block: Block,
    records: dict[str, Arrays],
    states: Arrays,
    cache: TraceCache,
    images: bool = False,
) -> tuple[Reply, Arrays]:
    """Returns the reply and state of a block of one client and at most one chain, without axes.

    records and states are already those of the chain. images: lay features out channels-last, as
    convolutions on a CPU are fastest.
    """
    chain = 0 if block.chains else None
    static = block.plan.static
    key = (client, "one", tuple(sorted(static.items())))

    def init(records: Any, states: Any, batches: Any, scalars: Any) -> Any:
        return client.init(records, states, Inputs(batches, {}, scalars, static))

    def step(state: Any, batches: Any, noise: Any, scalars: Any) -> Any:
        return client.step(state, Inputs(batches, noise, scalars, static))

    def own(batches: tuple[Batch, ...]) -> Any:
        mine = at(batches, 0) if chain is None or block.full else at(at(batches, 0), chain)
        return tuple(b._replace(x=channels_last(b.x)) for b in mine) if images else mine

    def own_noise(noise: Mapping[str, Arrays]) -> Any:
        mine = {n: a if block.plan.noise[n].shared else at(a, 0) for n, a in noise.items()}
        return mine if chain is None else at(mine, chain)

    scalars = at(block.scalars(0, 1), 0)
    state = cache.call((key, "init"), init, records, states, own(block.init_batches()), scalars)
    stepper = Stepper(cache, state)
    for s in range(int(block.steps[0])):
        inputs = (
            own(block.batches(s, 1)),
            own_noise(block.noise(s, 1)),
            at(block.scalars(s, 1), 0),
        )
        stepper.advance((key, "step"), step, *inputs)
    return cache.call((key, "finish"), client.finish, stepper.state)  # type: ignore[no-any-return]


def at(tree: Any, index: int) -> Any:
    """Returns the pytree of each tensor's entry at `index`."""
    return tree_map(lambda t: t[index], tree)


def channels_last(x: Tensor, chains: bool = False) -> Tensor:
    """Returns images, or the weights of a convolution, laid out channels-last; others unchanged.

    chains: x has a leading axis more.
    """
    if x.ndim != 4 + chains:
        return x
    # contiguous() would leave one channel's stride as it is, and torch chooses a kernel by it
    return x.movedim(-3, -1).clone(memory_format=torch.contiguous_format).movedim(-1, -3)
