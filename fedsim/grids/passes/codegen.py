"""Turns a graph into a Python function that costs little to call.

torch.ops' operators take twice as long to call as the functions and methods of torch that end in
them, and fx's own code looks each one up by four attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from fedsim.grids.record import Form, PlainMode

Run = Callable[..., list[Tensor]]


def emit(module: fx.GraphModule) -> Run:
    """Returns the graph as a function of its inputs; each value is dropped after its last use."""
    names: dict[fx.Node, str] = {}
    constants: dict[str, Any] = {}
    lines: list[str] = []
    last = {source: node for node in module.graph.nodes for source in node.all_input_nodes}
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]

    def constant(item: object) -> str:
        constants[name := f"c{len(constants)}"] = item
        return name

    def text(item: Any) -> str:
        if isinstance(item, fx.Node):
            return names[item]
        if isinstance(item, (list, tuple)):
            return f"[{', '.join(map(text, item))}]"
        if item is None or isinstance(item, (bool, int)):
            return repr(item)
        if isinstance(item, float) and math.isfinite(item):
            return repr(item)
        return constant(item)

    for i, node in enumerate(module.graph.nodes):
        names[node] = f"v{i}"
        if node.op == "get_attr":
            names[node] = constant(getattr(module, str(node.target)))
        elif node.op == "call_function":
            args = [text(arg) for arg in node.args]
            args += [f"{key}={text(arg)}" for key, arg in node.kwargs.items()]
            lines.append(f"v{i} = {constant(quickest(node))}({', '.join(args)})")
        elif node.op == "output":
            lines.append(f"return {text(node.args[0])}")
        done = [names[s] for s in node.all_input_nodes if last[s] is node and s.op != "get_attr"]
        if done and node.op == "call_function":
            lines.append(f"del {', '.join(done)}")
    parameters = ", ".join(names[node] for node in inputs)
    source = f"def run({parameters}):\n    " + "\n    ".join(lines)
    exec(compile(source, "<traced graph>", "exec"), constants)
    return constants["run"]  # type: ignore[no-any-return]


def quickest(node: fx.Node) -> Callable[..., Any]:
    """Returns what computes a node in the least time: a binding that dispatches the same operator.

    A candidate is called on tensors without memory; it is taken if what reaches the dispatcher is
    what the operator itself sends there.
    """
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.name.startswith("aten"):
        return target  # type: ignore[no-any-return]
    name = target._schema.name.removeprefix("aten::")
    args, kwargs = fx.map_arg((node.args, node.kwargs), _without_memory)
    result = _without_memory(node)
    wanted = _dispatched(target, args, kwargs, result)
    for home in (torch._C._TensorBase, torch._C._VariableFunctions, torch._C._nn):
        candidate = getattr(home, name, None)
        if candidate is None:
            continue
        if _dispatched(candidate, args, kwargs, result) == wanted != []:
            return candidate  # type: ignore[no-any-return]
    return target


def _without_memory(node: fx.Node) -> Any:
    """Returns tensors of a node's form."""
    return tree_map(
        lambda x: x.without_memory() if isinstance(x, Form) else x, node.meta.get("val")
    )


def _dispatched(
    function: Callable[..., Any], args: Any, kwargs: Any, result: Any
) -> list[tuple[Any, ...]]:
    """Returns the operators and arguments that a call sends to the dispatcher; [] if it fails.

    Nothing is computed: every operator seems to return `result`.
    """
    seen: list[tuple[Any, ...]] = []

    class Recorder(PlainMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            leaves = [id(x) if isinstance(x, Tensor) else x for x in tree_leaves((args, kwargs))]
            seen.append((func, len(args), tuple(kwargs or ()), *leaves))
            return result

    try:
        with torch.no_grad(), Recorder():  # type: ignore[no-untyped-call]
            function(*args, **kwargs)
    except (TypeError, RuntimeError, ValueError):
        return []
    return seen
