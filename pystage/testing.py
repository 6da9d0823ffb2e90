"""For tests of code that stages: work held pending, and streams on the host device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import _C
from .pool import StagingPool


@contextmanager
def hold_transfers(pool: StagingPool) -> Iterator[None]:
    """Keeps everything put on the current stream, and on the pool's eager stream, pending.

    On the host device ``resolve`` returns at once inside the block, with ids that arrive after it;
    the block must not read them. On CUDA the stream is kept busy, as by a long kernel. The hold
    ends with the block, or after 60 seconds.
    """
    hold = _C.Hold(pool._pool)
    try:
        yield
    finally:
        hold.release()


def synchronize(pool: StagingPool) -> None:
    """Waits until the current stream, and the pool's eager stream, have done all put on them."""
    _C.synchronize(pool._pool)


@contextmanager
def host_stream(number: int) -> Iterator[None]:
    """Makes stream ``number`` (0 to 63) of the host device current for this thread."""
    previous = _C.host_stream()
    _C.set_host_stream(number)
    try:
        yield
    finally:
        _C.set_host_stream(previous)
