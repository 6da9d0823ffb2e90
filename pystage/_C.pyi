"""The compiled extension. Use the pystage package instead."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch

import pystage.pool

torch_version: str
cuda_runtime: int
cuda_architectures: str

def size_class(bytes: int) -> int: ...
def current_cuda_device() -> int: ...
def host_stream() -> int: ...
def set_host_stream(number: int) -> None: ...
def count_mem_pool_regions(change: int) -> None: ...
def synchronize(pool: StagingPool) -> None: ...
def gather(
    relay: torch.Tensor, indices: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor: ...

class StagingPool:
    def __init__(
        self,
        *,
        device: str,
        capacity_bytes: int,
        reserve_bytes: int,
        at_capacity: str,
        timeout_s: float,
        eager: bool,
        copy_engine: bool,
        narrow_wire: bool,
    ) -> None: ...
    def handle(self) -> object: ...
    def stats(self) -> dict[str, Any]: ...
    def trim(self) -> int: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def why_pageable(self) -> str: ...

def stage(
    handle: object,
    pool: pystage.pool.StagingPool,
    token_ids: Sequence[Any],
    starts: Sequence[int] | None,
    stops: Sequence[int] | None,
    vocab_size: int | None,
    /,
) -> pystage.pool.StagedTokens: ...
def small_tensors(
    handle: object, values: Sequence[Any], dtypes: Sequence[torch.dtype | None], /
) -> tuple[torch.Tensor, ...]: ...
def write_rows(
    handle: object,
    table: torch.Tensor,
    rest: torch.Tensor,
    prefixes: Sequence[torch.Tensor],
    rows: torch.Tensor,
    prefix_lens: torch.Tensor,
    lens: torch.Tensor,
    /,
) -> bool:
    """Writes rows of ``table`` (int32) with one kernel on the current stream: ``table[rows[i]]``
    gets ``prefixes[i][:prefix_lens[i]]``, then the next ``lens[i]`` values of ``rest``. ``rows``,
    ``prefix_lens`` and ``lens`` are int64 CPU tensors. Returns False and does nothing if this does
    not fit one launch."""

class Parcel:
    """Replaces ``torch.tensor`` in one thread while known code runs (``python_parcel.cpp``).

    A tensor that this code makes from a list and sends with ``.to(device, non_blocking=True)`` is
    sent as a small tensor. For each number in ``deliver_at`` there is a group of code. It is the
    group's turn until so many tensors are made, which are then delivered. The last number ends the
    replacement."""

    def tensor(self, data: Any, /, **kwargs: Any) -> torch.Tensor: ...
    def end(self) -> int:
        """Delivers the remaining tensors and returns how many tensors were made."""

def parcel(
    handle: object,
    capacity: int,
    device: object,
    original: Any,
    groups: tuple[tuple[Any, ...], ...],
    deliver_at: tuple[int, ...],
    minus_one: torch.Tensor | None,
    /,
) -> Parcel: ...
def set_staged_tokens_type(type: type[StagedTokens]) -> None: ...

class StagedTokens:
    @property
    def _pool(self) -> pystage.pool.StagingPool: ...
    @property
    def _is_pinned(self) -> bool: ...
    @property
    def _wire_bits(self) -> int: ...
    def __len__(self) -> int: ...
    def _slice(self, start: int, stop: int, /) -> pystage.pool.StagedTokens: ...
    def _copy(self) -> torch.Tensor: ...
    def _resolve(
        self, out: torch.Tensor | None, dtype: torch.dtype | None, blocking: bool, /
    ) -> torch.Tensor: ...
    def _resolve_mixed(
        self, relay: torch.Tensor, indices: torch.Tensor, out: torch.Tensor | None, /
    ) -> torch.Tensor: ...

class IdsView:
    """A view of ids ``[start, stop)`` of an array. It holds the array, not its buffer, so the array
    can grow. It supports the buffer protocol, with one dimension."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> Any: ...
    def __iter__(self) -> Iterator[int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def copy(self) -> Any:
        """Returns a copy as a new array."""

def ids_view(ids: Any, start: int, stop: int, /) -> IdsView:
    """Like ``ids[start:stop]``, without a copy."""

class Hold:
    def __init__(self, pool: StagingPool) -> None: ...
    def release(self) -> None: ...
