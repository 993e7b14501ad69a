"""Records the operations that a tensor function ends in, below autograd and torch.func.

This is what make_fx does for plain tensors, without torch's compiler, which make_fx loads though
nothing is compiled: more than a second of every run, and 100 MB.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_MASKS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class Form:
    """What is known of a value at trace time."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Returns the form of a tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Returns the number of elements."""
        return self.shape.numel()

    def zeros(self) -> Tensor:
        """Returns zeros of this form."""
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return empty.zero_()

    def without_memory(self) -> Tensor:
        """Returns a tensor of this form that has no numbers; its device is "meta"."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def record(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Returns the operations of function(*inputs) as a graph, with a Form in `meta["val"]`.

    Tensors that the function brings along are constants of the graph. Raises ValueError where the
    function reads a value of a tensor, or a shape depends on one, which may be another one later.
    """
    recorder = _Recorder(inputs)
    with recorder:
        outputs = function(*inputs)
    graph, node_of = recorder.graph, recorder.node_of
    graph.output([node_of(output) for output in outputs])
    return fx.GraphModule(recorder.constants, graph)


class _NoCompiler(ModuleType):
    """Stands for torch._dynamo as long as nothing but its absence is asked for.

    torch.func.grad switches compiled autograd off while it computes, for which torch loads its
    whole compiler; without a compiler there is nothing to switch off. Whoever asks for anything
    else gets the real one.
    """

    @property
    def compiled_autograd(self) -> Any:
        """The real one, once somebody has loaded it."""
        loaded = sys.modules.get(f"{self.__name__}.compiled_autograd")
        return loaded or SimpleNamespace(_disable=nullcontext)

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Lets torch.func.grad work without loading torch's compiler, unless that is loaded."""
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    stand_in = vars(torch)["_dynamo"] = _NoCompiler(name)
    try:
        yield
    finally:
        if vars(torch).get("_dynamo") is stand_in:  # an import puts the real one there
            del vars(torch)["_dynamo"]


class PlainMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Base of modes that are never compiled, so that torch need not load its compiler for them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Recorder(PlainMode):  # type: ignore[no-untyped-call]
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants: dict[str, Any] = {}
        self._nodes: Any = WeakTensorKeyDictionary()
        for i, tensor in enumerate(inputs):
            self._name(tensor, self.graph.placeholder(f"input{i}"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = tree_any(lambda x: isinstance(x, Tensor) and x in self._nodes, (args, kwargs))
        if known and torch.Tag.data_dependent_output in func.tags:
            raise ValueError(
                f"it reads the value of a tensor ({func}), which may be another one in the next"
                " call; use torch.where instead of if, and no .item()"
            )
        if known and _has_shape_by_values(func, args):
            raise ValueError(
                f"the shape of a result depends on a tensor's values ({func}), which may be other"
                " ones in the next call; use torch.where or weights of 0, or engine.trace: false"
            )
        node_args, node_kwargs = tree_map(
            lambda x: self.node_of(x) if isinstance(x, Tensor) else x, (args, kwargs)
        )
        result = func(*args, **kwargs)
        node = self.graph.call_function(func, node_args, node_kwargs)
        if isinstance(result, Tensor):
            self._name(result, node)
        elif isinstance(result, (tuple, list)):
            node.meta["val"] = tuple(Form.of(x) if isinstance(x, Tensor) else x for x in result)
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._name(part, self.graph.call_function(operator.getitem, (node, i)))
        return result

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Returns the node whose value the tensor is; a constant if it was not computed here."""
        if tensor not in self._nodes:
            name = f"constant{len(self.constants)}"
            self.constants[name] = tensor.detach()
            self._name(tensor, self.graph.get_attr(name))
        return self._nodes[tensor]  # type: ignore[no-any-return]

    def _name(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["val"] = Form.of(tensor)
        self._nodes[tensor] = node


def _has_shape_by_values(func: Any, args: Any) -> bool:
    """Says whether the values of the arguments decide the shape of the result."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is torch.ops.aten.index.Tensor:  # which has the tag for its masks alone
        return any(index is not None and index.dtype in _MASKS for index in args[1])
    return True
