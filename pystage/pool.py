"""The staging pool and the staged tokens it returns. The design note is in ``csrc/pool.h``."""

from __future__ import annotations

import logging
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from . import _C, _mempool
from ._tensor_like import TensorLike
from .errors import DeviceError, ForkedProcessError, PoolExhaustedError
from .stats import StagingStats, in_units

AtCapacity = Literal["wait", "fallback", "raise"]
Issue = Literal["deferred", "eager"]
TransferKind = Literal["kernel", "copy_engine"]
Wire = Literal["auto", "int64"]

_logger = logging.getLogger("pystage")


class StagingPool:
    """A size-capped pool of pinned memory: token ids are gathered into it and transferred from it.

    Thread-safe. Any number of pools may serve one device. After warm-up no call allocates or frees
    pinned memory. A slot is reused only after the tokens staged in it are gone and every stream
    that reads it has finished. A stuck stream keeps its own slots only, never those of others.

    A slot takes at most 12.5 % more memory than its ids (at most 63 bytes more for batches under
    512 bytes). This rounding counts against the capacity.

    Args:
        device: ``"cuda:N"``, or ``"cpu"`` for the host device. None: the current accelerator, or
            ``"cpu"`` if there is none.
        capacity_bytes: hard limit on the memory held, rounded down to whole pages.
        at_capacity: what :meth:`stage` does when no slot is free and the limit is reached.
            ``"wait"``: waits up to ``timeout_s`` with the GIL released, then raises.
            ``"fallback"``: stages in memory from torch's own allocator (pinned if torch can pin),
            outside the limit, and counts it. ``"raise"``: raises at once.
        timeout_s: seconds to wait for a slot, and seconds :meth:`close` waits for transfers.
        issue: ``"deferred"``: ``resolve`` launches the transfer, on the stream that is current at
            that call. ``"eager"``: :meth:`stage` launches it, on a high-priority stream that the
            pool owns, and ``resolve`` makes the current stream wait for it.
        transfer: ``"kernel"``: a kernel reads the mapped slot and does not wait in the copy
            engine's queue. ``"copy_engine"``: ``cudaMemcpyAsync``. Choose it if several processes
            share the GPU without MPS. It is also used where the device cannot map host memory.
        wire: ``"auto"``: ids cross the bus as int32 if all ids of a batch fit, else as int64.
            ``"int64"``: always as int64. A copy engine cannot widen, so with ``"auto"`` it needs
            an additional kernel.
        reserve_bytes: memory to pin at construction, so that the first calls do not pay for it.
            Default: 8 MiB, or the capacity if that is less.

    Raises:
        ValueError: an argument is out of range.
        TypeError: a size is not an int, such as ``"64M"`` or ``1e6``.
        DeviceError: there is no such device or no driver, or a device call failed.

    If memory cannot be pinned (memlock limit, WSL, Confidential Computing, or
    ``PYSTAGE_DISABLE_PINNED=1``), the pool uses pageable memory, counts it, and warns once with the
    reason (:class:`PageableMemoryWarning`).

    The logger ``"pystage"`` reports growth at level INFO. It reports the pool's first fallback and
    first :class:`PoolExhaustedError` at level WARNING, and later ones at level DEBUG.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        capacity_bytes: int = 64 << 20,
        *,
        at_capacity: AtCapacity = "wait",
        timeout_s: float = 1.0,
        issue: Issue = "deferred",
        transfer: TransferKind = "kernel",
        wire: Wire = "auto",
        reserve_bytes: int | None = None,
    ) -> None:
        _require("at_capacity", at_capacity, ("wait", "fallback", "raise"))
        _require("issue", issue, ("deferred", "eager"))
        _require("transfer", transfer, ("kernel", "copy_engine"))
        _require("wire", wire, ("auto", "int64"))
        capacity_bytes = _as_bytes("capacity_bytes", capacity_bytes)
        if capacity_bytes < 4096:
            raise ValueError(
                f"capacity_bytes is {capacity_bytes}, but must be at least one page (4096 bytes)"
            )
        if reserve_bytes is None:
            reserve_bytes = min(capacity_bytes, 8 << 20)
        reserve_bytes = _as_bytes("reserve_bytes", reserve_bytes)
        if not 0 <= reserve_bytes <= capacity_bytes:
            raise ValueError(f"reserve_bytes is {reserve_bytes}, outside [0, {capacity_bytes}]")
        if not 0 <= timeout_s <= 1e6:  # also rejects NaN
            raise ValueError(
                f"timeout_s is {timeout_s}, but must be a number of seconds, 0 or more"
            )
        self._device = _pick_device(device)
        if self._device.type == "cuda" and _C.cuda_runtime:
            count = torch.cuda.device_count()
            if self._device.index >= count:
                raise DeviceError(
                    f"{self._device} does not exist: this process sees {count} CUDA devices"
                    + ("" if count else " (no driver?); use device='cpu'")
                )
            torch.cuda.init()  # starts torch's allocator and streams, which ours use
            _mempool.watch()
        self._pool = _C.StagingPool(
            device=str(self._device),
            capacity_bytes=capacity_bytes,
            reserve_bytes=reserve_bytes,
            at_capacity=at_capacity,
            timeout_s=timeout_s,
            eager=issue == "eager",
            copy_engine=transfer == "copy_engine",
            narrow_wire=wire == "auto",
        )
        self._handle = self._pool.handle()

    @property
    def device(self) -> torch.device:
        """The device for which ids are staged."""
        return self._device

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._pool.closed

    @property
    def why_pageable(self) -> str:
        """Why memory could not be pinned. Empty if it could be, and on the host device."""
        return self._pool.why_pageable

    def stage(
        self,
        token_ids: Sequence[Any],
        starts: Sequence[int] | None = None,
        stops: Sequence[int] | None = None,
        vocab_size: int | None = None,
    ) -> StagedTokens:
        """Gathers the token ids of requests of any lengths into one slot, in request order.

        Args:
            token_ids: a sequence of requests. A request is a list or tuple of ints, an
                ``array('i')`` or ``array('q')``, or a 1-D int32 or int64 NumPy array (also a
                strided one), CPU tensor or other buffer. Different kinds may be mixed, and a
                request may be empty.
            starts: index of the first id to stage, for each request. Default: 0. The ids before it
                are not read.
            stops: one past the index of the last id to stage, for each request. Default: the
                request's length.
            vocab_size: if given, each id must be in ``[0, vocab_size)``. The copy includes this
                check. Without it any int64 is accepted (multimodal pad values exceed the
                vocabulary).

        Returns:
            The staged ids, which can be read like a 1-D int64 CPU tensor. No input buffer stays
            exported, so an ``array`` can grow again at once. For 64 Ki ids or more, and while
            waiting for a slot, the GIL is released. Other threads must not change or grow the
            input buffers during that time.

        Raises:
            TokenRangeError: an id is outside the vocabulary. Nothing is staged.
            PoolExhaustedError: no slot was available under the pool's ``at_capacity`` policy. The
                error's ``stats`` has the pool's figures.
            RequestTooLargeError: the batch is larger than the capacity.
            PoolClosedError: the pool is closed.
            ForkedProcessError: this process is a child of the one that made the pool.
            DeviceError: a device call failed.
            TypeError, ValueError: ``token_ids`` has an unsupported type or shape, or ``starts`` and
                ``stops`` do not fit it.
        """
        try:
            return _C.stage(self._handle, self, token_ids, starts, stops, vocab_size)
        except PoolExhaustedError as error:
            self._tell(error)
            raise

    def small_tensors(
        self, values: Sequence[Any], dtypes: Sequence[torch.dtype | None] | None = None
    ) -> tuple[Tensor, ...]:
        """Sends lists and small arrays to the pool's device with one kernel.

        The usual ``torch.tensor(list, pin_memory=True).to(device, non_blocking=True)`` needs an
        allocation, an event and a copy for each tensor. Here the values are the kernel's
        parameters: there is no pinned memory, no wait, and no queue of the copy engine. One kernel
        takes up to 4 KiB in all (32 KiB if the driver supports CUDA 12.1 or later), with each
        tensor rounded up to 16 bytes. Larger values go through a slot, subject to the pool's
        capacity and ``at_capacity`` policy.

        Args:
            values: lists and tuples of numbers, and NumPy arrays and CPU tensors of any shape.
            dtypes: the dtype of each result: int32, int64, uint64, float32 or bool. None: the
                dtype of the array or tensor; a list must have one.

        Returns:
            One tensor for each value: [n] for a list, the same shape for an array or tensor. They
            belong to the current stream, and whatever it runs next sees the values. They share a
            storage, as results of :func:`resolve` may, but no two share a byte.

        Raises:
            ValueError: a dtype cannot hold a value, or a tensor is not on the CPU.
            TypeError: a dtype is not one of the above, a list has none, or a value is not a number.
            CaptureError: the current stream is capturing a CUDA graph.
            PoolExhaustedError, RequestTooLargeError: as for :meth:`stage`, if the values need a
                slot.
            PoolClosedError, ForkedProcessError, DeviceError: as for :meth:`stage`.
        """
        if dtypes is None:
            dtypes = [None] * len(values)
        plain = (list, tuple, Tensor)
        values = [v if isinstance(v, plain) else torch.as_tensor(v) for v in values]
        try:
            return _C.small_tensors(self._handle, values, dtypes)
        except PoolExhaustedError as error:
            self._tell(error)
            raise

    def _tell(self, error: PoolExhaustedError) -> None:
        error.stats = self.stats()
        first = error.stats.exhausted == 1
        _logger.log(logging.WARNING if first else logging.DEBUG, "%s", error)

    def stats(self) -> StagingStats:
        """Returns the pool's current figures."""
        return StagingStats(**self._pool.stats())

    def trim(self) -> int:
        """Frees the pieces of memory that have no slot in use; returns the number of bytes freed.

        Unpinning stalls the device, so call this when traffic is low.
        """
        return self._pool.trim()

    def close(self) -> None:
        """Closes the pool to new batches and frees the memory.

        Waits up to ``timeout_s`` for transfers in flight. Tokens that are still staged stay valid,
        and their memory is freed once they are gone. It is safe to close a pool twice.
        """
        self._pool.close()

    def __enter__(self) -> StagingPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        try:
            s, closed = self.stats(), self.closed
        except ForkedProcessError:
            return f"<StagingPool on {self._device}, of another process>"
        pageable = f", {in_units(s.pageable_bytes)} of it pageable" if s.pageable_bytes else ""
        return (
            f"<{'closed ' if closed else ''}StagingPool on {self._device}: "
            f"{in_units(s.in_use_bytes)} in use of {in_units(s.reserved_bytes)} reserved"
            f"{pageable}, capacity {in_units(s.capacity_bytes)}>"
        )


class StagedTokens(TensorLike):
    """Token ids in a slot of a pool. They can be used like a read-only 1-D int64 CPU tensor.

    This is not a ``torch.Tensor``, because making one costs as much as staging. Torch functions and
    tensor methods accept it and read a copy of the ids. Pass ``.cpu()`` where torch needs a real
    tensor, for example as an index (``table[staged]``), and in code that mypy or pyright checks:
    type checkers do not see a tensor here, but accept ``torch.cat([staged.cpu(), other])``.

    The slot is not reused while this object or any slice of it lives, nor before every stream that
    reads the slot has finished. So every transfer to a device is safe, also of a slice: ``.to``,
    ``.cuda``, ``device_tensor.copy_(staged)``. Each of them reads the slot on the current stream.
    """

    __slots__ = ()

    @property
    def pool(self) -> StagingPool:
        """The pool that holds the ids."""
        return self._pool

    @property
    def wire_dtype(self) -> torch.dtype:
        """The dtype of the ids in the slot and on the bus: ``torch.int32`` if all ids fit."""
        return torch.int32 if self._wire_bits == 32 else torch.int64

    def __repr__(self) -> str:
        return f"StagedTokens({self.cpu()!r}, pool on {self._pool._device})"


_C.set_staged_tokens_type(StagedTokens)


def resolve(
    staged: StagedTokens, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Makes staged ids a tensor on the pool's device, ordered on the current stream.

    On CUDA this returns at once, and whatever the current stream runs next sees the ids. On the
    host device it waits, because a CPU reader has no stream that could order it. It may be called
    again: the ids stay staged until ``staged`` is gone.

    Args:
        staged: what :meth:`StagingPool.stage` returned, or a slice of it.
        out: int64 or int32 [n], contiguous, on the pool's device. It is written on the current
            stream. If its memory belongs to another stream, keep it alive as for ``Tensor.copy_``.
        dtype: of the result, ``torch.int64`` or ``torch.int32``. Default: the dtype of ``out``, or
            ``torch.int64`` without ``out``.

    Returns:
        ``out``, or a new tensor that belongs to the current stream. From an eager pool the new
        tensor belongs to the pool's stream and is recorded on the current one. On CUDA, tensors of
        up to 128 KiB are cut from blocks of up to 1 MiB. No two of them share a byte, but they
        share a storage, which is kept while any of them lives. As with any slice, do not make one
        longer with ``resize_``: the bytes behind it belong to another tensor.

    Raises:
        ValueError: ``out`` does not fit, or the result is int32 and an id does not fit int32.
        TypeError: ``dtype`` is neither of the two, or not that of ``out``; or ``staged`` is not
            staged ids.
        CaptureError: the current stream is capturing a CUDA graph.
        ForkedProcessError: this process is a child of the one that staged the ids.
        DeviceError: a device call failed.
    """
    if not isinstance(staged, StagedTokens):
        raise TypeError(f"resolve takes StagedTokens, not {type(staged).__name__}")
    if out is not None and dtype is not None:
        if isinstance(out, Tensor) and out.dtype != dtype:
            raise TypeError(f"out is {out.dtype}, but dtype is {dtype}: leave dtype out")
        dtype = None
    return staged._resolve(out, dtype, False)


def resolve_mixed(
    staged: StagedTokens, relay: Tensor, indices: Tensor, out: Tensor | None = None
) -> Tensor:
    """Computes ``torch.cat([resolve(staged), relay[indices]])`` as int64, with one kernel.

    It is ordered on the current stream, and waits on the host device only, like :func:`resolve`.
    The caller must order the current stream after the work that writes ``relay`` and ``indices``
    (``wait_stream``, ``wait_event``). Their memory is kept until the current stream has run the
    kernel, so the caller may drop both at once.

    A copy engine cannot gather, so pools with ``transfer="copy_engine"``, and ids outside mapped
    memory, need a copy and then a kernel.

    Args:
        staged: int64 [n], what :meth:`StagingPool.stage` returned, or a slice of it.
        relay: int64 or int32 [m], contiguous, on the pool's device.
        indices: int64 or int32 [k], on the pool's device, each in ``[-m, m)``.
        out: int64 [n + k], contiguous, on the pool's device; must not overlap ``relay``.

    Returns:
        int64 [n + k]: ``out``, or a new tensor that belongs to the current stream.

    Raises:
        IndexError: an index is outside the relay, on the host device. While a test holds the
            stream, nothing is raised and the id is -1. On CUDA, such an index triggers a
            device-side assertion, as in torch.
        ValueError, TypeError: a shape, device or dtype is not as described above.
        CaptureError, ForkedProcessError, DeviceError: as for :func:`resolve`.
    """
    if not isinstance(staged, StagedTokens):
        raise TypeError(f"resolve_mixed takes StagedTokens, not {type(staged).__name__}")
    return staged._resolve_mixed(relay, indices, out)


def _as_bytes(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} is {value!r}, but must be a number of bytes as an int: 64 << 20 is 64 MiB"
        ) from None


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def _pick_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = torch.device("cpu") if found is None else found
    device = torch.device(device)
    if device.type == "cpu":
        return torch.device("cpu")
    if device.index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        device = torch.device(device.type, index)
    return device


def _ranged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.nvtx.range_push(name)
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.nvtx.range_pop()

    return method


if os.environ.get("PYSTAGE_NVTX", "0") not in ("", "0"):
    if torch.version.cuda is None:
        warnings.warn("PYSTAGE_NVTX is set, but this torch has no NVTX", stacklevel=2)
    else:
        StagingPool.stage = _ranged("pystage.stage", StagingPool.stage)  # type: ignore[method-assign]
        StagedTokens._resolve = _ranged("pystage.resolve", StagedTokens._resolve)  # type: ignore[method-assign]
        StagedTokens._resolve_mixed = _ranged("pystage.resolve_mixed", StagedTokens._resolve_mixed)  # type: ignore[method-assign]
