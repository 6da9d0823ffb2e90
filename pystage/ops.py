"""Typed wrappers and fake kernels of ``torch.ops.pystage``. ``csrc/ops.cpp`` has the kernels.

The ops work on plain tensors, so a compiled graph can contain them. Resolve a staged batch before
the graph, with :func:`pystage.resolve`. Outside of graphs the ops accept a staged batch too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C  # noqa: F401  (defines the ops)


def transfer(
    wire: Tensor, *, dtype: torch.dtype = torch.int64, device: torch.device | str | None = None
) -> Tensor:
    """Transfers token ids to ``device`` as ``dtype``, ordered on the current stream.

    If torch pinned the memory of ``wire``, a kernel reads it directly and widens the ids on the
    way. It does not use the copy engine and does not wait, and the memory block is kept until the
    stream has finished the transfer. From pageable memory this is an ordinary blocking copy. If
    ``wire`` is on ``device`` already, it is a cast.

    Args:
        wire: int32 or int64 [n], on the CPU or on ``device``.
        dtype: ``torch.int64`` or ``torch.int32``. Ids of a tensor that do not fit int32 are
            truncated, as in ``Tensor.to``. For a staged batch they raise ``ValueError``.
        device: the destination. Default: the device of ``wire``.

    Returns:
        ``dtype`` [n] on ``device``, never an alias of ``wire``.

    Raises:
        TypeError: a dtype is neither int32 nor int64.
        ValueError: ``wire`` is not 1-D, or is neither on the CPU nor on ``device``.
        NotImplementedError: ``wire`` is a meta tensor, and ``device`` is not.
        RuntimeError: pystage has no device of that kind, or a device call failed. Torch's
            dispatcher passes on no other error type.
    """
    where = None if device is None else torch.device(device)
    result: Tensor = torch.ops.pystage.transfer(wire, dtype=dtype, device=where)
    return result


def transfer_out(wire: Tensor, out: Tensor) -> None:
    """Like :func:`transfer`, but writes into ``out``: int32 or int64 [n], contiguous."""
    torch.ops.pystage.transfer_out(wire, out)


def small_tensors(values: Sequence[Tensor], *, device: torch.device | str) -> list[Tensor]:
    """Sends small CPU tensors, of any dtype and shape, to ``device`` with one kernel.

    Like :meth:`pystage.StagingPool.small_tensors`, but without a pool: above 32 KiB in all (4 KiB
    if the driver is older than CUDA 12.1), torch pins memory and copies it. The results are ordered
    on the current stream.

    Raises:
        ValueError: a tensor is not on the CPU.
        NotImplementedError: a tensor is a meta tensor, and ``device`` is not.
        RuntimeError: pystage has no device of that kind, the current stream is capturing a CUDA
            graph, or a device call failed. Torch's dispatcher passes on no other error type.
    """
    if not values:
        return []
    made: list[Tensor] = torch.ops.pystage.small_tensors(values, device=torch.device(device))
    return made


_INTS = (torch.int32, torch.int64)


def _no_data(wire: Tensor, to: torch.device) -> None:
    """Refuses a meta tensor as the source of a tensor with data. A fake tensor is not meta."""
    if wire.is_meta and to.type != "meta":
        raise NotImplementedError(f"a meta tensor has no data to transfer to {to}")


def _check(wire: Tensor, dtype: torch.dtype) -> None:
    torch._check_type(
        wire.dtype in _INTS, lambda: f"token ids must be int64 or int32, not {wire.dtype}"
    )
    torch._check_type(dtype in _INTS, lambda: f"token ids must be int64 or int32, not {dtype}")
    torch._check_value(wire.dim() == 1, lambda: f"wire must be 1-D, not {list(wire.shape)}")


@torch.library.register_fake("pystage::transfer")
def _(
    wire: Tensor, *, dtype: torch.dtype = torch.int64, device: torch.device | None = None
) -> Tensor:
    _check(wire, dtype)
    device = wire.device if device is None else device
    _no_data(wire, device)
    return wire.new_empty(wire.shape, dtype=dtype, device=device)


@torch.library.register_fake("pystage::transfer_out")
def _(wire: Tensor, out: Tensor) -> None:
    _check(wire, out.dtype)
    _no_data(wire, out.device)
    torch._check_value(
        out.shape == wire.shape,
        lambda: f"out must have shape {list(wire.shape)}, not {list(out.shape)}",
    )


@torch.library.register_fake("pystage::small_tensors")
def _(values: list[Tensor], *, device: torch.device) -> list[Tensor]:
    for value in values:
        _no_data(value, device)
    return [value.new_empty(value.shape, device=device) for value in values]
