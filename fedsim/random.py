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

import numpy as np


def key(seed: int, purpose: str, *ids: int) -> int:
    """Returns the 128-bit Philox key of a stream."""
    name = struct.pack(f"<{len(ids) + 1}q", seed, *ids) + purpose.encode()
    return int.from_bytes(blake2b(name, digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """Returns the generator of the stream named by seed, purpose and ids (64-bit integers)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *ids)))


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
