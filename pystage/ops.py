"""``torch.ops.pystage``: typed wrappers and fakes. Schemas and kernels: ``csrc/ops.cpp``.

The ops work on plain tensors, so they may stand in a graph. A staged batch is resolved before the
graph, with :func:`pystage.resolve`; the ops accept one too, outside of graphs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C  # noqa: F401  (defines the ops)


def transfer(
    wire: Tensor, *, dtype: torch.dtype = torch.int64, device: torch.device | str | None = None
) -> Tensor:
    """Token ids as ``dtype`` on ``device``, ordered on the current stream.

    From memory that torch pinned, a kernel reads the host directly and widens on the way, without
    the copy engine and without waiting; the block is kept until the stream is past the transfer.
    From pageable memory it is an ordinary, blocking copy. On one device it is a cast.

    Args:
        wire: int32 or int64 [n], on the CPU or on ``device``.
        dtype: ``torch.int64`` or ``torch.int32``. Ids that do not fit int32 are truncated, as by
            ``Tensor.to``.
        device: where to; default: where ``wire`` is.

    Returns:
        ``dtype`` [n] on ``device``, never an alias of ``wire``.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or ``wire`` on a third device.
        RuntimeError: no pystage device of that kind, or a failed device call. Torch's dispatcher
            passes on no other type.
    """
    where = None if device is None else torch.device(device)
    result: Tensor = torch.ops.pystage.transfer(wire, dtype=dtype, device=where)
    return result


def transfer_out(wire: Tensor, out: Tensor) -> None:
    """As :func:`transfer`, into ``out``: int32 or int64 [n], contiguous. Mutates ``out``."""
    torch.ops.pystage.transfer_out(wire, out)


def small_tensors(values: Sequence[Tensor], *, device: torch.device | str) -> list[Tensor]:
    """CPU tensors of few values, of any dtype and shape, as tensors on ``device``, by one kernel.

    As :meth:`pystage.StagingPool.small_tensors`, without a pool: beyond 32 KiB in all (4 KiB with a
    driver before CUDA 12.1), torch pins memory and copies it. Ordered on the current stream.

    Raises:
        ValueError: a tensor that is not on the CPU.
        RuntimeError: no pystage device of that kind, the current stream captures a CUDA graph, or a
            failed device call. Torch's dispatcher passes on no other type.
    """
    if not values:
        return []
    made: list[Tensor] = torch.ops.pystage.small_tensors(values, device=torch.device(device))
    return made


_INTS = (torch.int32, torch.int64)


def _check(wire: Tensor, dtype: torch.dtype) -> None:
    torch._check_type(
        wire.dtype in _INTS, lambda: f"token ids are int64 or int32, not {wire.dtype}"
    )
    torch._check_type(dtype in _INTS, lambda: f"token ids are int64 or int32, not {dtype}")
    torch._check_value(wire.dim() == 1, lambda: f"wire must be 1-D, not {list(wire.shape)}")


@torch.library.register_fake("pystage::transfer")
def _(
    wire: Tensor, *, dtype: torch.dtype = torch.int64, device: torch.device | None = None
) -> Tensor:
    _check(wire, dtype)
    if wire.is_meta and device is not None and device.type != "meta":
        raise NotImplementedError(f"a meta tensor has no data to transfer to {device}")
    return wire.new_empty(wire.shape, dtype=dtype, device=wire.device if device is None else device)


@torch.library.register_fake("pystage::transfer_out")
def _(wire: Tensor, out: Tensor) -> None:
    _check(wire, out.dtype)
    torch._check_value(
        out.shape == wire.shape,
        lambda: f"out must have shape {list(wire.shape)}, not {list(out.shape)}",
    )


@torch.library.register_fake("pystage::small_tensors")
def _(values: list[Tensor], *, device: torch.device) -> list[Tensor]:
    return [value.new_empty(value.shape, device=device) for value in values]
