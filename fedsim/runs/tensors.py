"""Named tensors to and from safetensors bytes, bit for bit and in order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_META = "fedsim"


def to_bytes(tensors: Mapping[str, torch.Tensor | np.ndarray], **meta: object) -> bytes:
    """Returns `tensors` (any shape, also 0-d and empty, on any device) in safetensors format.

    Args:
      tensors: by name; dtypes bool, int8 … int64, uint8 … uint64, float16, bfloat16, float32,
        float64, float8, complex64.
      meta: JSON-able values kept beside them, returned by `read_meta`.

    Raises:
      TypeError: a dtype that safetensors does not know, with the tensor's name.
    """
    import torch
    from safetensors.torch import save

    ready: dict[str, torch.Tensor] = {}
    owned: set[int] = set()
    for name, value in tensors.items():
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses views and tensors that share memory (tied weights): copy those.
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in owned:
            tensor = tensor.clone()
        owned.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    unknown = [name for name, tensor in ready.items() if tensor.dtype == torch.complex128]
    if unknown:
        raise TypeError(f"{unknown[0]!r} is complex128, which safetensors cannot hold")
    # safetensors sorts tensors its own way; the order of names is part of a state.
    header = json.dumps({"names": list(ready), "meta": meta})
    data: bytes = save(ready, metadata={_META: header})
    return data


def from_bytes(data: bytes) -> dict[str, torch.Tensor]:
    """Returns the CPU tensors of `to_bytes`, in the order they were given.

    Raises ValueError if `data` is torn or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found: dict[str, torch.Tensor] = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    names = _header(data).get("names", list(found))
    return {name: found[name] for name in names}


def read_meta(data: bytes) -> dict[str, object]:
    """Returns the values given as `meta` to `to_bytes`."""
    meta: dict[str, object] = _header(data).get("meta", {})
    return meta


def read_numpy(path: Path) -> dict[str, np.ndarray]:
    """Returns a safetensors file as arrays; bfloat16 and float8 come as float32 (same values)."""
    return {name: to_numpy(tensor) for name, tensor in from_bytes(path.read_bytes()).items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns a CPU tensor as an array; dtypes that NumPy lacks are widened to float32, exactly."""
    import torch

    narrow = tensor.dtype == torch.bfloat16 or "float8" in str(tensor.dtype)
    array: np.ndarray = (tensor.to(torch.float32) if narrow else tensor).numpy()
    return array


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    header: dict[str, Any] = json.loads(metadata.get(_META, "{}"))
    return header
