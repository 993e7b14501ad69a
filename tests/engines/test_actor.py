"""Tensors on their way between Ray's processes."""

from __future__ import annotations

import pytest
import torch

from fedsim.grids.actor import _as_numpy, _copied, _shared


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float64,
     torch.complex64, torch.bool, torch.int64, torch.uint8],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (64, 7)])
def test_tensors_of_all_types_travel(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for rebuild in (_copied, _shared):
        found = rebuild(_as_numpy(sent))
        assert (found.dtype, found.shape) == (sent.dtype, sent.shape)
        assert torch.equal(found.to(torch.complex128), sent.to(torch.complex128))
