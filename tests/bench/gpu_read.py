"""A Triton kernel that only reads: the speed that nothing which reads memory can exceed. torch.sum stays some percent below."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS, PROGRAMS_PER_SM = 8192, 8, 4


@triton.jit
def _read(source, sink, count, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for at in range(0, count, tl.num_programs(0) * BLOCK):
        total ^= tl.load(source + at + offset, mask=at + offset < count, other=0)
    tl.store(sink + tl.program_id(0), tl.max(total, 0))


def read(data: torch.Tensor, sink: torch.Tensor) -> None:
    """Every element of an int32 tensor of less than 2**31 elements; sink: [programs] int32."""
    _read[(len(sink),)](data, sink, data.numel(), BLOCK, num_warps=WARPS)


def new_sink(device: str) -> torch.Tensor:
    return torch.empty(
        PROGRAMS_PER_SM * torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.int32, device=device
    )
