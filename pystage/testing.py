"""Helpers for tests of code that uses pystage: held transfers, and streams of the host device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import _C
from .pool import StagingPool


@contextmanager
def hold_transfers(pool: StagingPool) -> Iterator[None]:
    """Keeps all new work on the current stream and on the pool's eager stream pending.

    On the host device, ``resolve`` returns at once inside the block, and the ids arrive after the
    block: do not read them inside it. On CUDA the stream stays busy, as if a long kernel were
    running. The hold ends with the block, or after 60 seconds.
    """
    hold = _C.Hold(pool._pool)
    try:
        yield
    finally:
        hold.release()


def synchronize(pool: StagingPool) -> None:
    """Waits until the current stream and the pool's eager stream have finished all their work."""
    _C.synchronize(pool._pool)


@contextmanager
def host_stream(number: int) -> Iterator[None]:
    """Makes stream ``number`` (0 to 63) of the host device this thread's current stream."""
    previous = _C.host_stream()
    _C.set_host_stream(number)
    try:
        yield
    finally:
        _C.set_host_stream(previous)
