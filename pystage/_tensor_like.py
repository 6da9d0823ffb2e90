"""The tensor interface of staged tokens. Of the pool it needs only the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _C

Self = TypeVar("Self", bound="TensorLike")


class TensorLike(_C.StagedTokens):
    """The tensor interface of :class:`pystage.StagedTokens`: attributes, methods, operators."""

    __slots__ = ()

    # --- a tensor's attributes

    dtype = torch.int64
    layout = torch.strided
    device = torch.device("cpu")
    ndim = 1
    is_cpu = True
    is_cuda = False
    requires_grad = False

    @property
    def shape(self) -> torch.Size:
        """``[n]``."""
        return torch.Size((len(self),))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Like ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """1."""
        return 1

    def numel(self) -> int:
        """The number of ids."""
        return len(self)

    def is_pinned(self, device: torch.device | str | None = None) -> bool:
        """Whether the ids are in pinned memory. False on the host device."""
        return self._is_pinned

    def is_contiguous(self) -> bool:
        """True."""
        return True

    # --- to a device

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Like ``Tensor.to``, but always returns a new tensor.

        To the pool's device, the pool transfers the ids, ordered on the current stream, and does
        not wait if ``non_blocking``. To the CPU, if that is not the pool's device, or with a dtype
        only, this is a copy on the host.

        Raises:
            ValueError: the device is not the pool's, or the dtype is int32 and an id does not fit.
            CaptureError, ForkedProcessError, DeviceError: as for :func:`resolve`.
        """
        kwargs.pop("copy", None)  # always a copy; the parser below rejects this argument
        if args:
            args = args[: 2 if isinstance(args[0], (torch.dtype, Tensor)) else 3]
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        here = self._pool._device
        if device is None or (device.type == "cpu" and here.type != "cpu"):
            ids = self.cpu()
            if dtype is torch.int32 and self._wire_bits == 64:
                return _narrow(ids)
            return ids if dtype is None else ids.to(dtype)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device != here:
            self._wrong_device(device)
        if dtype is None or dtype is torch.int64 or dtype is torch.int32:
            return self._resolve(None, dtype, not non_blocking)
        return _there(self._resolve(None, torch.int64, False).to(dtype), non_blocking)

    def cuda(
        self, device: torch.device | int | str | None = None, non_blocking: bool = False
    ) -> Tensor:
        """Like ``Tensor.cuda``."""
        if device is None:
            device = "cuda"
        elif isinstance(device, int):
            device = torch.device("cuda", device)
        return self.to(device, non_blocking=non_blocking)

    def _copy_into(self, out: Tensor, non_blocking: bool) -> Tensor:
        """Implements ``out.copy_(self)``."""
        here = self._pool._device
        if out.device == here and here.type != "cpu":
            plain = out.dtype in (torch.int32, torch.int64) and out.is_contiguous()
            if plain and out.shape == self.shape:
                return self._resolve(out, None, not non_blocking)
            return _there(out.copy_(self._resolve(None, torch.int64, False)), non_blocking)
        if out.device.type != "cpu":
            self._wrong_device(out.device)
        return out.copy_(self.cpu())

    def _wrong_device(self, device: torch.device) -> NoReturn:
        raise ValueError(
            f"these ids are staged for {self._pool._device}, not {device}: stage them in a pool of "
            "that device, or copy them with .cpu() first"
        )

    # --- on the host

    def cpu(self) -> Tensor:
        """Returns a plain int64 CPU tensor with a copy of the ids in its own memory."""
        return self._copy()

    def pin_memory(self: Self) -> Self:
        """Returns itself: the ids are pinned already if memory can be pinned."""
        return self

    def contiguous(self: Self) -> Self:
        """Returns itself."""
        return self

    def detach(self: Self) -> Self:
        """Returns itself, because there is no autograd graph to detach it from."""
        return self

    def __getitem__(self, key: Any) -> Any:
        """A slice of step 1 shares the slot. Any other key gives a copy, like ``cpu()[key]``."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._slice(start, max(start, stop))
        elif isinstance(key, int) and not isinstance(key, bool):
            size = len(self)
            if not -size <= key < size:
                raise IndexError(f"index {key} is out of bounds for {size} staged ids")
            at = key % size
            return self._slice(at, at + 1)._copy()[0]
        return self.cpu()[key]

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        _read_only("__setitem__")

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.cpu())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        ids = self.cpu().numpy()
        return ids if dtype is None else ids.astype(dtype)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("staged tokens belong to a pool of this process: pickle .cpu() instead")

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.cpu()

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of a tensor, taken from a copy of the ids."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name.endswith("_"):
            _read_only(name)
        if name in _OF_STORAGE:
            raise TypeError(
                f"{name} of staged tokens would outlive the lease on their slot: use .cpu().{name}"
            )
        return getattr(self.cpu(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Copies to a device go through the pool. Any other function gets copies of the ids."""
        kwargs = kwargs or {}
        if func is Tensor.copy_:
            source, non_blocking = _copy_arguments(*args, **kwargs)
            return source._copy_into(args[0], non_blocking)
        name = getattr(func, "__name__", "").partition(".")[0]  # without overload: add_.Tensor
        written = [kwargs.get("out")]
        if _is_in_place(name) or kwargs.get("inplace"):
            written += args[:1] or [kwargs.get("self"), kwargs.get("input")]
        if any(isinstance(leaf, TensorLike) for leaf in pytree.tree_leaves(written)):
            _read_only(name)  # else func would write the copies below, and the result be lost
        ops = torch.ops.pystage
        if func in (ops.transfer, ops.transfer.default):
            return _op_transfer(*args, **kwargs)
        if func in (ops.transfer_out, ops.transfer_out.default):
            return _op_transfer_out(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(TensorLike, TensorLike.cpu, (args, kwargs))
        return func(*args, **kwargs)


def _narrow(ids: Tensor) -> Tensor:
    narrow = ids.to(torch.int32)
    if not (narrow == ids).all():
        raise ValueError("these ids do not all fit int32: use int64")
    return narrow


def _there(ids: Tensor, non_blocking: bool) -> Tensor:
    """Returns ``ids``. Unless `non_blocking`, first waits for the current stream to make them."""
    if ids.is_cuda and not non_blocking:
        torch.cuda.current_stream(ids.device).synchronize()
    return ids


_OF_STORAGE = frozenset(
    ["data_ptr", "storage", "untyped_storage", "set_", "data", "share_memory_", "record_stream"]
)
_IN_PLACE = "add sub mul floordiv truediv mod pow and or xor lshift rshift"
_MUTATING_DUNDERS = frozenset(["__setitem__", *(f"__i{name}__" for name in _IN_PLACE.split())])


def _is_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _MUTATING_DUNDERS


def _read_only(name: str) -> NoReturn:
    raise TypeError(
        f"staged tokens are read-only and have no {name}: change a copy, .cpu(), and stage it again"
    )


def _copy_arguments(
    self: Tensor, src: TensorLike, non_blocking: bool = False
) -> tuple[TensorLike, bool]:
    return src, non_blocking


def _op_transfer(
    wire: TensorLike, *, dtype: torch.dtype = torch.int64, device: torch.device | None = None
) -> Tensor:
    return wire.to(device or "cpu", dtype, non_blocking=True)


def _op_transfer_out(wire: TensorLike, out: Tensor) -> None:
    wire._copy_into(out, non_blocking=True)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    @wraps(function)
    def method(self: TensorLike, *args: Any) -> Any:
        args = tuple(a.cpu() if isinstance(a, TensorLike) else a for a in args)
        return function(self.cpu(), *args)

    return method


_OPERATORS = """
    add sub mul floordiv truediv mod pow and or xor lshift rshift radd rsub rmul rfloordiv rtruediv
    rmod rpow rand ror rxor rlshift rrshift matmul rmatmul eq ne lt le gt ge neg pos invert abs bool
    int float complex index contains reversed
"""
for _name in _OPERATORS.split():
    setattr(TensorLike, f"__{_name}__", _operator(f"__{_name}__"))
TensorLike.__hash__ = object.__hash__  # type: ignore[method-assign, assignment]
