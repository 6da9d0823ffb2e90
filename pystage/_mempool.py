"""Tells the extension while a part of the program allocates from a ``torch.cuda.MemPool``.

Outputs of ``resolve`` are cut from blocks that live longer than one call, so inside such a region
they must not be (see Note [Outputs cut from blocks] in ``csrc/staging.cpp``). Torch has no way to
ask whether a region is active, so its two functions that begin and end one are wrapped.
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
_active: Counter[tuple[int, tuple[int, int]]] = Counter()  # regions by device and pool


@cache
def watch() -> None:
    """Starts to count, once. Regions that are active by then are not seen."""
    for name in _BEGIN:
        _wrap(name, _begun, before=True)
    _wrap(_END, _ended, before=False)


def _wrap(name: str, tell: Callable[[tuple[int, Any]], None], *, before: bool) -> None:
    original = getattr(torch._C, name, None)
    if original is None:
        return

    @wraps(original)
    def counted(device: int, pool_id: tuple[int, int]) -> Any:
        # Counted a little longer than the region lasts, never shorter.
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
        if _active[region]:  # else it began before watch()
            _active[region] -= 1
            _C.count_mem_pool_regions(-1)
