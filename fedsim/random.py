"""Random numbers that belong to what they are for, never to the order of execution.

A stream is named by (seed, purpose, integers such as round, partition, chain, step). The name is
hashed into the key of NumPy's counter-based Philox generator, so two streams never overlap and a
resumed, parallel or reordered run draws the same numbers.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np

_WORD = 2**64 - 1


def key(seed: int, purpose: str, *ids: int) -> int:
    """Returns the 128-bit Philox key of a stream."""
    name = struct.pack(f"<{len(ids) + 1}q", seed, *ids) + purpose.encode()
    return int.from_bytes(blake2b(name, digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """Returns the generator of the stream named by seed, purpose and ids (64-bit integers)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *ids)))


class Rekeyed:
    """One generator that is set to the start of any stream, at half the cost of a new one.

    What it returns is valid until the next call; the numbers are `generator`'s.
    """

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)
        self._state: Any = dict(self._philox.state)

    def at(self, seed: int, purpose: str, *ids: int) -> np.random.Generator:
        """Returns the generator at the start of the stream that `generator` would return."""
        name = key(seed, purpose, *ids)
        words = np.array([name & _WORD, name >> 64], np.uint64)
        self._state["state"] = {"counter": np.zeros(4, np.uint64), "key": words}
        self._philox.state = self._state
        return self._generator


def integer(seed: int, purpose: str, *ids: int) -> int:
    """Returns a 63-bit integer of the stream, to seed a library that takes nothing else."""
    return key(seed, purpose, *ids) & (2**63 - 1)


@contextmanager
def seeded_globals(seed: int, purpose: str, *ids: int) -> Iterator[None]:
    """Seeds Python's and NumPy's global generators inside the block and restores them after it.

    Flower's strategies sample nodes and draw noise from them.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        random.seed(integer(seed, purpose, *ids))
        np.random.seed(integer(seed, purpose, *ids) % 2**32)  # noqa: NPY002
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
