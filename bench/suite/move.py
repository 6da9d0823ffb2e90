"""A kernel that moves KV-cache pages between pinned and device memory, as engines with a kernel
backend do. It uses a few blocks, so that most of the GPU stays free for the model."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROGRAMS = 16


@triton.jit
def _move(src, dst, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    step = tl.num_programs(0) * BLOCK
    for first in range(tl.program_id(0) * BLOCK, count, step):
        at = first + tl.arange(0, BLOCK)
        inside = at < count
        tl.store(dst + at, tl.load(src + at, mask=inside), mask=inside)


def move(dst: torch.Tensor, src: torch.Tensor) -> None:
    """``dst[:] = src`` by a kernel on the current stream. Both are int64 and contiguous."""
    count = src.numel()
    programs = min(PROGRAMS, triton.cdiv(count, 4096))
    _move[(programs,)](src, dst, count, BLOCK=4096, num_warps=16)
