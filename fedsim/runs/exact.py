"""JSON that gives back exactly what was put in.

Floats are written as their shortest repr, which reads back to the same bits; integers have any
size; NaN and infinities, which JSON lacks, are written as {"$float": "nan"}. What JSON would
change silently (dictionary keys that are not strings, objects) is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_FLOAT = "$float"


def dumps(value: object, indent: int | None = None) -> str:
    """Returns `value` as JSON.

    Args:
      value: None, bool, int, float, str, NumPy scalars, and lists, tuples (which come back as
        lists) and dicts with string keys of them.
      indent: as in `json.dumps`.

    Raises:
      TypeError: something that JSON would not give back; the message says where it is.
    """
    return json.dumps(_encode(value, "state"), allow_nan=False, indent=indent)


def loads(text: str | bytes) -> Any:
    """Returns the value written by `dumps`; raises ValueError if `text` is not JSON."""
    return json.loads(text, object_hook=_decode)


def _encode(value: object, where: str) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str) or name == _FLOAT:
                raise TypeError(f"{where}: {name!r} cannot be a key, only strings can")
        return {name: _encode(item, f"{where}.{name}") for name, item in value.items()}
    raise TypeError(f"{where}: {type(value).__name__} cannot be written as JSON")


def _decode(found: dict[str, Any]) -> Any:
    if len(found) == 1 and isinstance(found.get(_FLOAT), str):
        return float(found[_FLOAT])
    return found
