"""What the allocator is told."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fedsim.grids.memory import keep_freed_memory

FAULTS = """
import resource
import torch
from fedsim.grids.memory import keep_freed_memory

torch.set_num_threads(1)
assert keep_freed_memory()

def work():
    held = [torch.ones(1_000_000) for _ in range(4)]
    return sum(float(x[0]) for x in held)

work(), work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_faulted_in_again() -> None:
    faults = int(subprocess.check_output([sys.executable, "-c", FAULTS], text=True))
    # 20 times 16 MB in pages of 4 KiB are 78,000 faults, if all of it goes back each time. What
    # is left are one or two times 16 MB, as the heap grows to where it stays.
    assert faults < 10_000


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory.__wrapped__()
