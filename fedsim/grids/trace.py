"""Traces a pure tensor function once per set of shapes and replays the graph.

What is recorded are the operations that torch.func's transforms end in, so that a replay costs
neither vmap's nor autograd's Python. Python scalars are baked into a graph: whatever may change
must come in as a tensor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fedsim.grids.passes import Run, emit, simplify, write_in_place
from fedsim.grids.record import record, without_compiler

T = TypeVar("T")

Builder = Callable[[Iterator[Tensor]], Any]
"""Makes a tree of its leaves."""


@dataclass(frozen=True)
class Graph:
    """run: from the leaves of the arguments to those of the result. overwrites: leaves, by
    position, that it writes into; their memory must be the caller's alone.
    """

    run: Run
    overwrites: frozenset[int] = frozenset()


class TraceCache:
    """Graphs by (name, structure, shapes, dtypes, strides). Safe to call from several threads."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.seconds = 0.0
        self._graphs: dict[object, tuple[Graph, Builder]] = {}
        self._made: dict[object, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Returns what make() returned when it was first called with this key."""
        if key not in self._made:
            self._made.setdefault(key, make())  # of two threads, one's is everybody's
        return self._made[key]  # type: ignore[no-any-return]

    def call(self, key: object, function: Callable[..., Any], *args: Any) -> Any:
        """Returns function(*args), a pytree of tensors; replays a graph if one was traced.

        `key` tells apart functions and whatever they have baked in besides shapes.
        """
        with torch.no_grad():
            if not self.enabled:
                return function(*args)
            graph, build, leaves = self._find(key, function, args)
            return build(iter(replay(graph, leaves)))

    def graph(
        self, key: object, function: Callable[..., Any], *args: Any, donate: bool = False
    ) -> Graph:
        """Returns what maps the leaves of args to the leaves of function(*args).

        donate: the caller replaces the first argument, a state, by the result, again and again; the
        graph may overwrite its leaves, if they are dense and share no memory (see `overwrites`).
        """
        if self.enabled:
            donated = len(leaves_of(args[0])) if donate else 0
            return self._find(key, function, args, donated)[0]
        spec = pytree.tree_structure(args)

        def eager(*leaves: Tensor) -> list[Tensor]:
            return leaves_of(function(*pytree.tree_unflatten(list(leaves), spec)))

        return Graph(eager)

    def _find(
        self, key: object, function: Callable[..., Any], args: tuple[Any, ...], donated: int = 0
    ) -> tuple[Graph, Builder, list[Tensor]]:
        """Returns the graph, what builds its result, and the leaves of args."""
        form: list[object] = []
        leaves: list[Tensor] = []
        _flatten(args, leaves, form)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        full_key = (key, donated, tuple(form), shapes, layout(leaves))
        found = self._graphs.get(full_key)
        if found is None:
            found = self._trace(full_key, function, args, leaves, donated)
        return *found, leaves

    def _trace(
        self,
        key: object,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        leaves: list[Tensor],
        donated: int,
    ) -> tuple[Graph, Builder]:
        with self._lock, without_compiler(), torch.no_grad():
            if key in self._graphs:
                return self._graphs[key]
            start = time.perf_counter()
            spec = pytree.tree_structure(args)
            builders: list[Builder] = []

            def flat(*inputs: Tensor) -> list[Tensor]:
                out = function(*pytree.tree_unflatten(list(inputs), spec))
                builders[:] = [builder(out)]
                return leaves_of(out)

            # inputs are told apart by identity: two that are one tensor now may differ later
            inputs = [leaf.detach() for leaf in leaves]
            versions = [leaf._version for leaf in inputs]
            flat(*inputs)  # whatever is made once (a thread's copy of the model) is made outside
            if [leaf._version for leaf in inputs] != versions:
                raise ValueError("it changes what it is given in place; return new tensors")
            module = record(flat, inputs)
            _refuse_random(module)
            written: frozenset[int] = frozenset()
            if not any(_has(node, "mutable") for node in module.graph.nodes):
                simplify(module)  # which takes equal expressions for equal tensors
                written = write_in_place(module.graph, donated)
            self._graphs[key] = (Graph(emit(module), written), builders[0])
            self.seconds += time.perf_counter() - start
            return self._graphs[key]


def replay(graph: Graph, leaves: list[Tensor]) -> list[Tensor]:
    """Returns graph(*leaves), computed below autograd: gradients are explicit in a graph."""
    with torch._C._AutoDispatchBelowAutograd():
        return graph.run(*leaves)


def layout(leaves: list[Tensor]) -> tuple[tuple[int, ...] | None, ...]:
    """Returns the strides that a graph has baked in, as it takes views; None where none can fail.

    A reshape is recorded as the view that it was for the tensors it was traced with.
    """
    return tuple(None if leaf.ndim < 2 else leaf.stride() for leaf in leaves)


def leaves_of(tree: Any) -> list[Tensor]:
    """Returns the tensors of nested dicts and tuples, in torch's pytree order but faster."""
    leaves: list[Tensor] = []
    _flatten(tree, leaves, None)
    return leaves


def builder(tree: Any) -> Builder:
    """Returns what makes such a tree of other tensors, which come as `leaves_of` gives them."""
    if isinstance(tree, Tensor):
        return next
    if isinstance(tree, dict):
        parts = [(key, builder(value)) for key, value in tree.items()]
        return lambda leaves: {key: build(leaves) for key, build in parts}
    if isinstance(tree, (tuple, list)):
        items = [builder(value) for value in tree]
        kind: Any = type(tree)
        if hasattr(tree, "_fields"):  # a named tuple
            return lambda leaves: kind(*[build(leaves) for build in items])
        return lambda leaves: kind([build(leaves) for build in items])
    spec = pytree.tree_structure(tree)
    return lambda leaves: pytree.tree_unflatten([*islice(leaves, spec.num_leaves)], spec)


def _flatten(tree: Any, leaves: list[Tensor], form: list[object] | None) -> None:
    """Appends the tree's tensors to leaves and, to form, what tells its structure."""
    if isinstance(tree, Tensor):
        leaves.append(tree)
    elif isinstance(tree, dict):
        if form is not None:
            form.append(tuple(tree))
        for value in tree.values():
            _flatten(value, leaves, form)
    elif isinstance(tree, (tuple, list)):
        if form is not None:
            form.append((type(tree), len(tree)))
        for value in tree:
            _flatten(value, leaves, form)
    else:  # a type that only torch's pytree knows
        found, spec = pytree.tree_flatten(tree)
        leaves += found
        if form is not None:
            form.append(str(spec))


def _has(node: fx.Node, what: Literal["mutable", "random"]) -> bool:
    """Says whether a node writes into its arguments, or draws from a global generator."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if what == "mutable":
        return bool(node.target._schema.is_mutable)
    return torch.Tag.nondeterministic_seeded in node.target.tags


def _refuse_random(module: fx.GraphModule) -> None:
    """Raises ValueError for what no seed of fedsim's would repeat."""
    for node in module.graph.nodes:
        if _has(node, "random"):
            raise ValueError(
                f"it draws random numbers itself ({node.target}); a plan's `noise` gives keyed ones"
            )
