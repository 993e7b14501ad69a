"""Traces a pure tensor function once per set of shapes and replays the graph.

make_fx records the operations that torch.func's transforms end in, so that a replay costs neither
vmap's nor autograd's Python. Python scalars are baked into a graph: whatever may change must come
in as a tensor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

Graph = Callable[..., list[Tensor]]
"""From the leaves of the arguments to the leaves of the result."""

_aten = torch.ops.aten

_RESHAPES = frozenset(
    {_aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.detach.default,
     _aten.alias.default, _aten.permute.default, _aten.t.default, _aten.transpose.int}
)  # fmt: skip


class TraceCache:
    """Graphs by (name, structure, shapes, dtypes, strides). Safe to call from several threads."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.seconds = 0.0
        self._graphs: dict[object, tuple[Graph, Any]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def call(self, key: object, function: Callable[..., Any], *args: Any) -> Any:
        """Returns function(*args), a pytree of tensors; replays a graph if one was traced.

        `key` tells apart functions and whatever they have baked in besides shapes.
        """
        with torch.no_grad():
            if not self.enabled:
                return function(*args)
            graph, out_spec, leaves = self._find(key, function, args)
            return pytree.tree_unflatten(replay(graph, leaves), out_spec)

    def graph(self, key: object, function: Callable[..., Any], *args: Any) -> Graph:
        """Returns what maps the leaves of args to the leaves of function(*args)."""
        if self.enabled:
            return self._find(key, function, args)[0]
        spec = pytree.tree_structure(args)

        def eager(*leaves: Tensor) -> list[Tensor]:
            return leaves_of(function(*pytree.tree_unflatten(list(leaves), spec)))

        return eager

    def _find(
        self, key: object, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Graph, Any, list[Tensor]]:
        """Returns the graph, the structure of its result, and the leaves of args."""
        form: list[object] = []
        leaves: list[Tensor] = []
        _flatten(args, leaves, form)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        full_key = (key, tuple(form), shapes, layout(leaves))
        found = self._graphs.get(full_key) or self._trace(full_key, function, args, leaves)
        return *found, leaves

    def _trace(
        self,
        key: object,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        leaves: list[Tensor],
    ) -> tuple[Graph, Any]:
        with self._lock, torch.no_grad():
            if key in self._graphs:
                return self._graphs[key]
            start = time.perf_counter()
            spec = pytree.tree_structure(args)
            out_spec: list[Any] = []

            def flat(*inputs: Tensor) -> list[Tensor]:
                out = function(*pytree.tree_unflatten(list(inputs), spec))
                out_leaves, treedef = pytree.tree_flatten(out)
                out_spec[:] = [treedef]
                return out_leaves

            # make_fx tells inputs apart by identity: two that are one tensor now may differ later
            inputs = [leaf.detach() for leaf in leaves]
            versions = [leaf._version for leaf in inputs]
            flat(*inputs)  # whatever is made once (a thread's copy of the model) is made outside
            if [leaf._version for leaf in inputs] != versions:
                raise ValueError("it changes what it is given in place; return new tensors")
            graph = make_fx(flat)(*inputs)
            _refuse_random(graph)
            if not any(_has(node, "mutable") for node in graph.graph.nodes):
                _clean_up(graph)  # which takes equal expressions for equal tensors
            self._graphs[key] = (graph, out_spec[0])
            self.seconds += time.perf_counter() - start
            return self._graphs[key]


def replay(graph: Graph, leaves: list[Tensor]) -> list[Tensor]:
    """Returns graph(*leaves), computed below autograd: gradients are explicit in a graph."""
    with torch._C._AutoDispatchBelowAutograd():
        return graph(*leaves)


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


def _clean_up(module: fx.GraphModule) -> None:
    """Removes what vmap and autograd leave behind: no-ops, double transposes, repetitions."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and (source := _same_as(node)) is not None:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.graph = fx_graph_cse(module.graph)
    module.recompile()


def _same_as(node: fx.Node) -> fx.Node | None:
    """Returns an earlier node with this node's value, shape and strides, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is _aten.transpose.int and source.target is _aten.transpose.int:
        first = source.args[0]
        if node.args[1:] == source.args[1:] and isinstance(first, fx.Node):
            return first
    times_one = node.target is _aten.mul.Scalar and node.args[1] == 1
    if node.target not in _RESHAPES and not times_one:
        return None
    before, after = source.meta.get("val"), node.meta.get("val")
    if before is None or after is None or before.dtype != after.dtype:
        return None
    same = before.shape == after.shape and before.stride() == after.stride()
    return source if same else None
