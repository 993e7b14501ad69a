"""Traces a pure tensor function once per set of shapes and replays the graph.

make_fx records the operations that torch.func's transforms end in, so that a replay costs neither
vmap's nor autograd's Python. Python scalars are baked into a graph: whatever may change must come
in as a tensor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree


class TraceCache:
    """Graphs by (name, structure, shapes, dtypes, strides). Safe to call from several threads."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.seconds = 0.0
        self._graphs: dict[object, tuple[Callable[..., Any], list[Any]]] = {}
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
            leaves, spec = pytree.tree_flatten(args)
            shapes = tuple((leaf.shape, leaf.dtype, _layout(leaf)) for leaf in leaves)
            full_key = (key, str(spec), shapes)
            found = self._graphs.get(full_key)
            if found is None:
                found = self._trace(full_key, function, leaves, spec)
            graph, out_spec = found
            return pytree.tree_unflatten(graph(*leaves), out_spec[0])

    def _trace(
        self, key: object, function: Callable[..., Any], leaves: list[Tensor], spec: Any
    ) -> tuple[Callable[..., Any], list[Any]]:
        with self._lock:
            if key in self._graphs:
                return self._graphs[key]
            start = time.perf_counter()
            out_spec: list[Any] = []

            def flat(*inputs: Tensor) -> list[Tensor]:
                out = function(*pytree.tree_unflatten(list(inputs), spec))
                out_leaves, treedef = pytree.tree_flatten(out)
                out_spec[:] = [treedef]
                return out_leaves

            # make_fx tells inputs apart by identity: two that are one tensor now may differ later
            inputs = [leaf.detach() for leaf in leaves]
            flat(*inputs)  # whatever is made once (a thread's copy of the model) is made outside
            graph = make_fx(flat)(*inputs)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            self._graphs[key] = (graph, out_spec)
            self.seconds += time.perf_counter() - start
            return self._graphs[key]


def _layout(leaf: Tensor) -> tuple[int, ...] | None:
    """Returns the strides that a graph has baked in, as it takes views; None where none can fail.

    A reshape is recorded as the view that it was for the tensors it was traced with.
    """
    return None if leaf.ndim < 2 else leaf.stride()
