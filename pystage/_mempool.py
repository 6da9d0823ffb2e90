"""Tells the extension when code allocates from a ``torch.cuda.MemPool``.

Outputs of ``resolve`` are cut from blocks that live longer than one call. Inside a region that
allocates from such a pool, this must not happen (see Note [Outputs cut from blocks] in
``csrc/output_memory.cpp``). Torch cannot be asked whether a region is active, so this module wraps
the functions that begin and end one.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.cuda.memory

from . import _C

_BEGIN = (
    "_cuda_beginAllocateToPool",
    "_cuda_beginAllocateCurrentStreamToPool",
    "_cuda_beginAllocateCurrentThreadToPool",
)
_END = "_cuda_endAllocateToPool"

_lock = threading.Lock()
_active: Counter[tuple[int, tuple[int, int]]] = Counter()  # active regions by device and pool


@cache
def watch() -> None:
    """Starts counting, at the first call. Regions that are active already are not counted."""
    for name in _BEGIN:
        _wrap(name, _begun, before=True)
    _wrap(_END, _ended, before=False)


def _wrap(name: str, tell: Callable[[tuple[int, Any]], None], *, before: bool) -> None:
    original = getattr(torch._C, name, None)
    if original is None:
        return

    @wraps(original)
    def counted(device: int, pool_id: tuple[int, int]) -> Any:
        # A region counts as active a little longer than it lasts, never shorter.
        if before:
            tell((device, pool_id))
        try:
            result = original(device, pool_id)
        except BaseException:
            if before:
                _ended((device, pool_id))
            raise
        if not before:
            tell((device, pool_id))
        return result

    for module in (torch._C, torch.cuda.memory):
        if getattr(module, name, None) is original:
            setattr(module, name, counted)


def _begun(region: tuple[int, Any]) -> None:
    with _lock:
        _active[region] += 1
        _C.count_mem_pool_regions(1)


def _ended(region: tuple[int, Any]) -> None:
    with _lock:
        if _active[region]:  # else the region began before watch()
            _active[region] -= 1
            _C.count_mem_pool_regions(-1)
