"""The staging pool and what it hands out. The design note stands in ``csrc/pool.h``."""

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
    """Bounded pinned memory that token ids are gathered into, and transferred from.

    Thread-safe. Any number of pools may serve one device. After warm-up no call allocates or frees
    pinned memory. A slot is handed out again only when the tokens staged in it are gone and every
    stream that reads it is done; one stuck stream never keeps the slots of others.

    A slot takes at most 12.5 % more than its ids (from 512 bytes on; below, at most 63 bytes more),
    and that waste is within the capacity.

    Args:
        device: ``"cuda:N"``, or ``"cpu"`` for the host device. None: the current accelerator, or
            ``"cpu"`` where there is none.
        capacity_bytes: hard cap on the memory held, rounded down to whole pages.
        at_capacity: what :meth:`stage` does when no slot is free at the cap. ``"wait"``: waits up
            to ``timeout_s``, without the GIL, then raises. ``"fallback"``: stages in memory of
            torch's own (pinned where torch can), outside the cap, and counts it. ``"raise"``:
            raises at once.
        timeout_s: seconds to wait for a slot, and in :meth:`close` for transfers.
        issue: ``"deferred"``: the transfer is launched by ``resolve``, on the stream current
            there. ``"eager"``: it is launched by :meth:`stage`, on a high-priority stream of the
            pool's own, and ``resolve`` makes the current stream wait for it.
        transfer: ``"kernel"``: a kernel reads the mapped slot, past any queue of the copy engine.
            ``"copy_engine"``: ``cudaMemcpyAsync``, for comparison; used anyway where the device
            cannot map host memory.
        wire: ``"auto"``: ids cross the bus as int32 where a batch's all fit, else as int64.
            ``"int64"``: always as int64. A copy engine cannot widen, so it costs a second kernel
            under ``"auto"``.
        reserve_bytes: pinned at construction, so that no first call pays for it; default 8 MiB, at
            most the capacity.

    Raises:
        ValueError: an argument out of range.
        TypeError: a size that is no int, such as ``"64M"`` or ``1e6``.
        DeviceError: no such device, no driver, or a failed device call.

    Where pinned memory cannot be had (memlock limit, WSL, Confidential Computing, or
    ``PYSTAGE_DISABLE_PINNED=1``), the pool works in pageable memory, counts it, and warns once with
    the reason (:class:`PageableMemoryWarning`).

    The logger ``"pystage"`` tells of growth (info), and of a pool without a slot: of its first
    fallback and of its first :class:`PoolExhaustedError` as a warning, of later ones for debugging.
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
            raise ValueError(f"capacity_bytes is {capacity_bytes}; it takes at least a page (4096)")
        if reserve_bytes is None:
            reserve_bytes = min(capacity_bytes, 8 << 20)
        reserve_bytes = _as_bytes("reserve_bytes", reserve_bytes)
        if not 0 <= reserve_bytes <= capacity_bytes:
            raise ValueError(f"reserve_bytes is {reserve_bytes}, outside [0, {capacity_bytes}]")
        if not 0 <= timeout_s <= 1e6:  # also refuses NaN
            raise ValueError(f"timeout_s is {timeout_s}; it is seconds, from 0 on")
        self._device = _pick_device(device)
        if self._device.type == "cuda" and _C.cuda_runtime:
            count = torch.cuda.device_count()
            if self._device.index >= count:
                raise DeviceError(
                    f"{self._device} does not exist: this process sees {count} CUDA devices"
                    + ("" if count else " (no driver?); use device='cpu'")
                )
            torch.cuda.init()  # torch's allocator and streams, before ours use them
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
        """The device that ids are staged for."""
        return self._device

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._pool.closed

    @property
    def why_pageable(self) -> str:
        """Why memory could not be pinned; empty if it could, or on the host device."""
        return self._pool.why_pageable

    def stage(
        self,
        token_ids: Sequence[Any],
        starts: Sequence[int] | None = None,
        stops: Sequence[int] | None = None,
        vocab_size: int | None = None,
    ) -> StagedTokens:
        """Gathers ragged token ids into one slot, in request order.

        Args:
            token_ids: a sequence of requests. A request is a list or tuple of ints, an
                ``array('i')`` or ``array('q')``, or a 1-D int32 or int64 NumPy array (strided
                too), CPU tensor or other buffer. Kinds may be mixed; empty requests are fine.
            starts: first id to take of each request; default 0. The ids before it are not touched.
            stops: one past the last id to take of each; default its length.
            vocab_size: if given, each id must lie in ``[0, vocab_size)``. The check is part of the
                copy. Without it any int64 passes (multimodal pad values exceed the vocabulary).

        Returns:
            The ids, as a 1-D int64 CPU tensor to its readers. No buffer stays exported: an
            ``array`` can grow again at once. From 64 Ki ids on, and while waiting, the GIL is
            released; buffers must then not be changed or grown by another thread.

        Raises:
            TokenRangeError: an id outside the vocabulary; nothing is staged.
            PoolExhaustedError: no slot within the policy; its ``stats`` has the pool's figures.
            RequestTooLargeError: the batch exceeds the capacity.
            PoolClosedError, ForkedProcessError, DeviceError: as they say.
            TypeError, ValueError: no such ids, or ``starts`` and ``stops`` that do not fit them.
        """
        try:
            return _C.stage(self._handle, self, token_ids, starts, stops, vocab_size)
        except PoolExhaustedError as error:
            self._tell(error)
            raise

    def small_tensors(
        self, values: Sequence[Any], dtypes: Sequence[torch.dtype | None] | None = None
    ) -> tuple[Tensor, ...]:
        """Lists and small arrays as tensors on the pool's device, by one kernel.

        What ``torch.tensor(list, pin_memory=True).to(device, non_blocking=True)`` does with an
        allocation, an event and a copy for each. Here the values are the kernel's parameters: no
        pinned memory, nothing to wait for, no queue of the copy engine. That takes up to 4 KiB in
        all, 32 KiB from a driver of CUDA 12.1 on, each tensor rounded up to 16 bytes. What is
        longer goes through a slot, within the pool's capacity and its policy.

        Args:
            values: lists and tuples of numbers, and NumPy arrays and CPU tensors of any shape.
            dtypes: of each, int32, int64, uint64, float32 or bool. None: that of an array.

        Returns:
            A tensor for each: [n] of a list, an array's own shape. They belong to the current
            stream, and whatever it runs next sees the values. They share a storage, as results of
            :func:`resolve` may; no two share a byte.

        Raises:
            ValueError: a value that its dtype cannot hold, or a tensor that is not on the CPU.
            TypeError: another dtype, a list without one, or something that is no number.
            CaptureError: the current stream captures a CUDA graph.
            PoolExhaustedError, RequestTooLargeError: beyond what a kernel takes, as :meth:`stage`.
            PoolClosedError, ForkedProcessError, DeviceError: as they say.
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
        """The pool's figures now."""
        return StagingStats(**self._pool.stats())

    def trim(self) -> int:
        """Gives memory without a slot in use back to the device; returns the bytes.

        Unpinning stalls the device: call it when traffic is low.
        """
        return self._pool.trim()

    def close(self) -> None:
        """Stops handing out slots and frees the memory.

        Waits up to ``timeout_s`` for transfers in flight. Tokens still staged stay valid, and what
        they hold is freed after them. Closing twice is fine.
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
    """Token ids in a slot of a pool: a 1-D int64 CPU tensor as far as readers can tell.

    It is no ``torch.Tensor`` (making one costs as much as staging) but stands in for one: torch
    functions and tensor methods take it, and read a copy of the ids. It is read-only. Where torch
    wants a tensor proper (as an index: ``table[staged]``), pass ``.cpu()``. So do code that mypy or
    pyright check: to them it is no tensor, and ``torch.cat([staged.cpu(), other])`` passes.

    While it lives, or any slice of it, its slot is not handed out again; after that, not before
    every stream that reads it is done. So every way to a device is safe: ``.to``, ``.cuda``,
    ``device_tensor.copy_(staged)``, also of a slice. Each reads the slot on the current stream.
    """

    __slots__ = ()

    @property
    def pool(self) -> StagingPool:
        """The pool they are staged in."""
        return self._pool

    @property
    def wire_dtype(self) -> torch.dtype:
        """Their type in the slot and on the bus: ``torch.int32`` where all fit."""
        return torch.int32 if self._wire_bits == 32 else torch.int64

    def __repr__(self) -> str:
        return f"StagedTokens({self.cpu()!r}, pool on {self._pool._device})"


_C.set_staged_tokens_type(StagedTokens)


def resolve(
    staged: StagedTokens, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Staged ids as a tensor on the pool's device, ordered on the current stream.

    Returns at once on CUDA: whatever the current stream runs next sees the ids. On the host device
    it waits, since a CPU reader has no stream to be ordered on. May be called again; the ids stay
    staged until ``staged`` is gone.

    Args:
        staged: what :meth:`StagingPool.stage` returned, or a slice of it.
        out: int64 or int32 [n], contiguous, on the pool's device, to be written on the current
            stream. Memory of another stream must be kept alive as for ``Tensor.copy_``.
        dtype: of the result, ``torch.int64`` or ``torch.int32``. Default: that of ``out``, or
            ``torch.int64`` without one.

    Returns:
        ``out``, or a new tensor that belongs to the current stream (of an eager pool: to the
        pool's stream, recorded on the current one). On CUDA, tensors of up to 128 KiB are cut from
        blocks of up to 1 MiB: no two share a byte, but they share a storage, which is kept while
        any of them is. As with any slice, ``resize_`` must not make one longer: the bytes behind it
        are another's.

    Raises:
        ValueError: ``out`` does not fit, or int32 asked of ids that do not fit it.
        TypeError: another dtype, also than that of ``out``; or something not staged.
        CaptureError: the current stream captures a CUDA graph.
        ForkedProcessError: in a child of the process that staged them.
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
    """``torch.cat([resolve(staged), relay[indices]])``, by one kernel, as int64.

    Ordered on the current stream and waited for as :func:`resolve`. What wrote ``relay`` and
    ``indices`` must be ordered before it (``wait_stream``, ``wait_event``); their memory is kept
    until the current stream is past the kernel, so both may be dropped at once.

    A copy engine cannot gather: pools with ``transfer="copy_engine"``, and ids outside mapped
    memory, take a copy and then a kernel.

    Args:
        staged: int64 [n], what :meth:`StagingPool.stage` returned, or a slice of it.
        relay: int64 or int32 [m], contiguous, on the pool's device.
        indices: int64 or int32 [k], on the pool's device, each in ``[-m, m)``.
        out: int64 [n + k], contiguous, on the pool's device; must not overlap ``relay``.

    Returns:
        int64 [n + k]: ``out``, or a new tensor that belongs to the current stream.

    Raises:
        IndexError: an index outside the relay, on the host device (not while a test holds the
            stream: the id is then -1). On CUDA it is a device-side assertion, as in torch.
        ValueError, TypeError: shapes, devices and dtypes other than above.
        CaptureError, ForkedProcessError, DeviceError: as :func:`resolve`.
    """
    if not isinstance(staged, StagedTokens):
        raise TypeError(f"resolve_mixed takes StagedTokens, not {type(staged).__name__}")
    return staged._resolve_mixed(relay, indices, out)


def _as_bytes(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name} is {value!r}; it is a number of bytes, as an int: 64 << 20 is 64 MiB"
        ) from None


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(map(repr, allowed))}")


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
