"""The compiled part. Use the pystage package."""

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
    """``table[rows[i]]`` (int32) begins with ``prefixes[i][:prefix_lens[i]]`` and goes on with the
    next ``lens[i]`` of ``rest``, by one kernel on the current stream. ``rows``, ``prefix_lens`` and
    ``lens`` are int64 CPU tensors. False, and nothing is done, where one launch cannot do it."""

class Parcel:
    """Stands in for ``torch.tensor`` in one thread, while known code runs (``python_parcel.cpp``).

    What that code makes of a list and sends with ``.to(device, non_blocking=True)`` is a small
    tensor. Those made so far are delivered when their number is in ``deliver_at``; the last of
    these ends it."""

    def tensor(self, data: Any, /, **kwargs: Any) -> torch.Tensor: ...
    def end(self) -> int:
        """Delivers what is left, and returns how many tensors it made."""

def parcel(
    handle: object,
    capacity: int,
    device: object,
    original: Any,
    codes: tuple[Any, ...],
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
    """Ids ``[start, stop)`` of an array, not copied. Holds the array, not its buffer, so the array
    can grow. A buffer of one dimension to whoever reads it."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> Any: ...
    def __iter__(self) -> Iterator[int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def copy(self) -> Any:
        """As an array of its own."""

def ids_view(ids: Any, start: int, stop: int, /) -> IdsView:
    """As ``ids[start:stop]``."""

class Hold:
    def __init__(self, pool: StagingPool) -> None: ...
    def release(self) -> None: ...
