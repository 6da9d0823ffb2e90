"""Hooks that stage a batch's ids and write the rows of its KV indices."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..._C import IdsView, ids_view, write_rows
from ...errors import PoolExhaustedError, PystageError
from ...pool import StagedTokens, StagingPool
from . import process
from .small import PREPARED, small_scope
from .symbols import Function


def prepare_for_extend(original: Function, batch: Any, *args: Any, **kwargs: Any) -> Any:
    here = process.here
    here.pool = pool = process.pools.of(batch.device)
    here.views = pool is not None and process.state.gives_views
    small = small_scope(pool, batch.device, batch, PREPARED)
    try:
        return original(batch, *args, **kwargs)
    finally:
        here.pool = None
        here.views = False
        if small is not None:
            small.close()


def get_fill_ids(end_of: Callable[[Any], Any], original: Function, req: Any) -> Any:
    """A view of the ids instead of a copy. ``prepare_for_extend`` takes its length, slices it and
    passes it on."""
    if process.here.views:
        ids, end = req.full_untruncated_fill_ids, end_of(req)
        if type(ids) is array and type(end) is int:
            return ids_view(ids, 0, end)
    return original(req)


def flatten(original: Function, parts: list[Any], pin: bool) -> StagedTokens | Tensor:
    pool = process.here.pool
    if pool is not None:
        # Later calls of get_fill_ids come from other code, which may need an array.
        process.here.views = False
        staged = _stage(pool, parts, pin)
        if staged is not None:
            return staged
        process.state.left_to_sglang["stagings"] += 1
    arrays = [part.copy() if type(part) is IdsView else part for part in parts]
    result: Tensor = original(arrays, pin)
    return result


def _stage(pool: StagingPool, parts: list[Any], pin: bool) -> StagedTokens | None:
    """Stages the ids. Returns None if SGLang has to stage them itself."""
    if not pin and pool.device.type == "cuda":
        process.once("pystage: SGLang asks for memory that is not pinned, and stages by itself")
        return None
    try:
        return pool.stage(parts)
    except PystageError as error:
        if isinstance(error, PoolExhaustedError) and process.state.settings.at_capacity == "raise":
            raise
        kind = type(error).__name__
        process.once(f"pystage: {kind}: %s; SGLang's own staging is used for such batches", error)
        return None


ROWS = (
    "out_cache_loc",
    "req_pool_indices_tensor",
    "req_pool_indices_cpu",
    "prefix_lens_tensor",
    "prefix_lens_cpu",
    "seq_lens_tensor",
    "seq_lens_cpu",
    "extend_lens_tensor",
    "extend_lens_cpu",
    "prefix_tensors",
    "req_to_token_pool",
)


def write_cache_indices(original: Function, *args: Any, **kwargs: Any) -> Any:
    pool = process.here.pool
    if pool is not None and process.state.writes_rows and len(args) == len(ROWS) and not kwargs:
        rows = dict(zip(ROWS, args, strict=True))
        written = write_rows(
            pool._handle,
            rows["req_to_token_pool"].req_to_token,
            rows["out_cache_loc"],
            rows["prefix_tensors"],
            rows["req_pool_indices_cpu"],
            rows["prefix_lens_cpu"],
            rows["extend_lens_cpu"],
        )
        if written:
            return None
        process.state.left_to_sglang["rows"] += 1
    return original(*args, **kwargs)
