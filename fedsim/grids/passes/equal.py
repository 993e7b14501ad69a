"""Computes equal expressions once.

torch's fx_graph_cse does the same, but imports the whole of inductor for it, which takes longer
than torch itself.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from fedsim.grids.passes.rewrite import aten

_UNWRITTEN = frozenset({aten.empty.memory_format})


def merge_equal(graph: fx.Graph) -> None:
    """Replaces every call by an earlier one of the same function with the same arguments.

    The graph must change nothing in place. What it returns stays as many tensors as it was: who
    receives two of them may write into one.
    """
    returned = set(graph.output_node().all_input_nodes)
    first: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node in returned or _differs_each_time(node.target):
            continue
        found = first.setdefault(_expression(node), node)
        if found is not node:
            node.replace_all_uses_with(found)
            graph.erase_node(node)


def _differs_each_time(target: Any) -> bool:
    tags = getattr(target, "tags", ())
    return target in _UNWRITTEN or torch.Tag.nondeterministic_seeded in tags


def _expression(node: fx.Node) -> Hashable:
    leaves, spec = tree_flatten((node.args, node.kwargs))
    # 1, 1.0 and True are equal in Python, and so are 0.0 and -0.0
    exact = tuple((type(x), repr(x) if isinstance(x, float) else x) for x in leaves)
    return node.target, exact, repr(spec)
