"""pystage.testing: the state after a block, also if the block fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

import pystage
from pystage import _C
from pystage.testing import hold_transfers, host_stream, synchronize


@pytest.fixture
def pool(device: str) -> Iterator[pystage.StagingPool]:
    with pystage.StagingPool(device, 1 << 16) as pool:
        yield pool


def test_a_hold_ends_with_a_block_that_raises(pool: pystage.StagingPool) -> None:
    pystage.resolve(pool.stage([[0]]))  # loads the kernel, which a held stream would wait for
    synchronize(pool)
    staged = pool.stage([[1, 2], [3]])
    with pytest.raises(LookupError), hold_transfers(pool):
        ids = pystage.resolve(staged)
        raise LookupError("in the block")
    waits = threading.Thread(target=synchronize, args=(pool,), daemon=True)
    waits.start()
    waits.join(timeout=30)
    assert not waits.is_alive()  # a hold that is forgotten ends after 60 seconds
    assert ids.tolist() == [1, 2, 3]


def test_the_stream_before_is_current_again() -> None:
    before = _C.host_stream()
    with host_stream(5):
        with host_stream(7):
            assert _C.host_stream() == 7
        assert _C.host_stream() == 5
        with pytest.raises(LookupError), host_stream(9):
            raise LookupError("in the block")
        assert _C.host_stream() == 5
    assert _C.host_stream() == before
