"""Keeps freed memory in the process: a round frees and takes the same blocks again and again.

glibc hands large blocks back to the kernel as soon as they are free, and the kernel fills each new
page with zeros: for a million parameters that takes longer than adding to them. Other allocators
(macOS, musl, jemalloc preloaded) are left alone.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h

KEPT = 2**29
"""Bytes free at the top of a heap beyond which they go back."""

GROWTH = 2**26
"""Bytes by which a heap grows at once."""

LARGEST = 2**25
"""Bytes from which a block is mapped on its own; glibc takes no more."""


@cache
def keep_freed_memory() -> bool:
    """Sets the allocator for this process, once; returns whether it is glibc's."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_THRESHOLD, LARGEST), (_TRIM_THRESHOLD, KEPT), (_TOP_PAD, GROWTH))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]
