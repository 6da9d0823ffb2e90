"""Capacity, policies and the lifetime of a pool."""

from __future__ import annotations

import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pystage
from pystage import _C
from pystage.testing import hold_transfers, synchronize

from .conftest import run_of

PAGE = 4096


def test_figures_add_up(device: str) -> None:
    with pystage.StagingPool(device, 1 << 20, reserve_bytes=1 << 16) as pool:
        first = pool.stats()
        assert (first.capacity_bytes, first.reserved_bytes) == (1 << 20, 1 << 16)
        assert (first.allocations, first.stages, first.in_use_bytes) == (1, 0, 0)
        a = pool.stage([run_of(0, 1000)])
        b = pool.stage([run_of(0, 200)], vocab_size=1000)
        ids = pystage.resolve(a)
        stats = pool.stats()
        assert stats.leased_slots == 2
        assert stats.in_use_bytes == _C.size_class(4000) + _C.size_class(800)
        assert (stats.stages, stats.tokens, stats.wire_bytes) == (2, 1200, 4000)
        assert (stats.kernel_transfers, stats.copy_engine_transfers) == (1, 0)
        assert ids.tolist() == list(range(1000))  # waits for the transfer
        del a, b
        after = pool.stats()
        assert (after.in_use_bytes, after.leased_slots, after.in_flight_slots) == (0, 0, 0)
        assert after.high_water_bytes == stats.in_use_bytes
        with pytest.raises(AttributeError):
            after.stages = 0  # type: ignore[misc]


def test_size_classes_waste_little() -> None:
    for size in range(1, 1 << 16):
        waste = _C.size_class(size) - size
        assert 0 <= waste <= (size // 8 if size >= 512 else 63)


@given(st.lists(st.integers(1, 60_000), min_size=1, max_size=60))
def test_capacity_is_never_exceeded(sizes: list[int]) -> None:
    capacity = 200_000
    with pystage.StagingPool("cpu", capacity, at_capacity="raise", reserve_bytes=0) as pool:
        held = []
        for size in sizes:
            try:
                held.append(pool.stage([run_of(0, size)]))
            except pystage.PoolExhaustedError:
                held.clear()
            stats = pool.stats()
            assert stats.in_use_bytes <= stats.reserved_bytes <= capacity // PAGE * PAGE


def test_a_failed_stage_takes_nothing_and_says_so(device: str) -> None:
    with pystage.StagingPool(device, 1 << 16, at_capacity="raise") as pool:
        held = pool.stage([run_of(0, 1 << 14)])
        for _ in range(2):
            with pytest.raises(pystage.PoolExhaustedError) as caught:
                pool.stage([[1]])
        assert caught.value.stats is not None and caught.value.stats.exhausted == 2
        del held
        assert len(pool.stage([run_of(0, 1 << 14)])) == 1 << 14


def test_a_pool_is_closed_behind_its_block() -> None:
    with pystage.StagingPool("cpu", 1 << 16) as pool:
        pass
    assert pool.closed and pool.stats().reserved_bytes == 0


def test_no_allocation_after_warm_up(pool: pystage.StagingPool) -> None:
    before = pool.stats().allocations
    for i in range(2000):
        pystage.resolve(pool.stage([run_of(i, 1 + i * 37 % 20_000)]))
    stats = pool.stats()
    assert (stats.allocations, stats.frees) == (before, 0)


def test_grows_to_the_cap_and_no_further(device: str) -> None:
    with pystage.StagingPool(device, 3 << 20, reserve_bytes=0, at_capacity="raise") as pool:
        assert pool.stats().reserved_bytes == 0
        held = [pool.stage([run_of(0, 1 << 18)]) for _ in range(3)]
        assert pool.stats().reserved_bytes == 3 << 20
        with pytest.raises(pystage.PoolExhaustedError):
            pool.stage([[1]])
        assert [int(s[5]) for s in held] == [5, 5, 5]


def test_transfers_are_counted_by_kind(device: str) -> None:
    for kind in ("kernel", "copy_engine"):
        with pystage.StagingPool(device, 1 << 20, transfer=kind) as pool:  # type: ignore[arg-type]
            wide = pool.stage([[2**40, 1]])
            assert pystage.resolve(wide).tolist() == [2**40, 1]
            stats = pool.stats()
            assert getattr(stats, f"{kind}_transfers") == 1 and stats.wire_bytes == 16
            assert stats.kernel_transfers + stats.copy_engine_transfers == 1
            assert (stats.eager_transfers, stats.fallback_transfers, stats.waits) == (0, 0, 0)


def test_figures_of_slots_are_their_own(device: str) -> None:
    with pystage.StagingPool(device, 1 << 20) as pool:
        with hold_transfers(pool):
            held = [pool.stage([run_of(0, 100)]) for _ in range(3)]
            pystage.resolve(pool.stage([run_of(0, 100)]))
            stats = pool.stats()
            assert (stats.leased_slots, stats.in_flight_slots) == (3, 1)
            assert (stats.quarantined_slots, stats.stages, stats.tokens) == (0, 4, 400)
        synchronize(pool)
        assert (pool.stats().leased_slots, pool.stats().in_flight_slots) == (3, 0)
        del held


def test_idle_memory_makes_room_for_another_size(device: str) -> None:
    with pystage.StagingPool(device, 4 << 20, reserve_bytes=0, at_capacity="raise") as pool:
        held = [pool.stage([run_of(0, 1 << 18)]) for _ in range(4)]
        held.clear()
        assert len(pool.stage([run_of(0, 1 << 20)])) == 1 << 20
        assert pool.stats().reserved_bytes <= 4 << 20


def test_trim_gives_back_what_is_idle(device: str) -> None:
    with pystage.StagingPool(device, 4 << 20, reserve_bytes=1 << 20) as pool:
        staged = pool.stage([run_of(0, 100)])
        assert pool.trim() == 0
        del staged
        assert pool.trim() == 1 << 20
        assert pool.stats().reserved_bytes == 0
        assert pool.stage([run_of(0, 100)]).tolist() == list(range(100))


# --- at the cap


def test_too_large_says_so(device: str) -> None:
    for policy in ("wait", "raise"):
        with pystage.StagingPool(device, 1 << 16, at_capacity=policy) as pool:  # type: ignore[arg-type]
            with pytest.raises(pystage.RequestTooLargeError, match="can never fit") as caught:
                pool.stage([run_of(0, 1 << 16)])
            assert caught.value.stats is not None
            assert caught.value.stats.capacity_bytes == 1 << 16
            assert caught.value.stats.exhausted == 1


def test_raise_and_timeout_carry_figures(device: str) -> None:
    for policy, waits in (("raise", 0), ("wait", 1)):
        pool = pystage.StagingPool(device, 1 << 16, at_capacity=policy, timeout_s=0.02)  # type: ignore[arg-type]
        with pool:
            held = pool.stage([run_of(0, 1 << 14)])
            with pytest.raises(pystage.PoolExhaustedError, match="1 slots leased") as caught:
                pool.stage([[1]])
            assert caught.value.stats is not None
            assert caught.value.stats.leased_slots == 1
            assert caught.value.stats.waits == waits
            waited = caught.value.stats.wait_seconds
            assert waited >= 0.02 if policy == "wait" else waited == 0
            assert not isinstance(caught.value, pystage.RequestTooLargeError)
            assert held[3] == 3


def test_wait_ends_when_a_lease_does(device: str) -> None:
    with pystage.StagingPool(device, 1 << 16, timeout_s=60) as pool:
        held = [pool.stage([run_of(0, 1 << 14)])]
        staged: list[pystage.StagedTokens] = []
        thread = threading.Thread(target=lambda: staged.append(pool.stage([run_of(7, 1 << 14)])))
        thread.start()
        while pool.stats().waits == 0:  # the GIL is free while it waits
            pass
        held.clear()
        thread.join(60)
        assert staged[0][0] == 7
        assert pool.stats().wait_seconds > 0


def test_wait_ends_when_a_transfer_does(device: str) -> None:
    with pystage.StagingPool(device, 1 << 16, timeout_s=60) as pool:
        staged: list[pystage.StagedTokens] = []
        thread = threading.Thread(target=lambda: staged.append(pool.stage([run_of(7, 1 << 14)])))
        with hold_transfers(pool):
            ids = pystage.resolve(pool.stage([run_of(0, 1 << 14)]))
            assert pool.stats().in_flight_slots == 1
            thread.start()
            while pool.stats().waits == 0:
                pass
        thread.join(60)
        assert staged[0][0] == 7
        synchronize(pool)
        assert torch.equal(ids.cpu(), torch.arange(1 << 14))


def test_close_ends_waits(device: str) -> None:
    pool = pystage.StagingPool(device, 1 << 16, timeout_s=60)
    held = pool.stage([run_of(0, 1 << 14)])
    errors: list[Exception] = []

    def wait() -> None:
        try:
            pool.stage([[1]])
        except pystage.PoolClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while pool.stats().waits == 0:
        pass
    pool.close()
    thread.join(60)
    assert len(errors) == 1 and held[1] == 1


def test_fallback_is_right_and_counted(device: str) -> None:
    with pystage.StagingPool(device, 1 << 16, at_capacity="fallback") as pool:
        held = pool.stage([run_of(0, 1 << 14)])
        for values in (list(range(50)), [2**40, 1]):
            staged = pool.stage([values])
            assert staged.is_pinned() == (device != "cpu")
            assert staged.tolist() == values
            assert staged[1:].to(device, non_blocking=True).tolist() == values[1:]
            assert pystage.resolve(staged).tolist() == values
            out = torch.empty(len(values), dtype=torch.int64, device=device)
            assert pystage.resolve(staged, out=out) is out and out.tolist() == values
        assert pystage.resolve(pool.stage([[5, 6]]), dtype=torch.int32).tolist() == [5, 6]
        with pytest.raises(ValueError, match="int32"):
            pystage.resolve(pool.stage([[2**40]]), dtype=torch.int32)
        with pytest.raises(pystage.TokenRangeError):
            pool.stage([[5]], vocab_size=5)
        assert len(pool.stage([run_of(0, 1 << 16)])) == 1 << 16  # larger than the capacity
        stats = pool.stats()
        assert (stats.fallbacks, stats.fallback_transfers) == (6, 7)
        assert stats.reserved_bytes == 1 << 16
        assert held[9] == 9


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"capacity_bytes": 100}, "at least one page"),
        ({"capacity_bytes": 0}, "at least one page"),
        ({"capacity_bytes": 4095}, "at least one page"),
        ({"capacity_bytes": -1}, "at least one page"),
        ({"capacity_bytes": 8192, "reserve_bytes": 8193}, r"outside \[0, 8192\]"),
        ({"timeout_s": 1e7}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"reserve_bytes": -1}, "reserve_bytes"),
        ({"reserve_bytes": 1 << 40}, "reserve_bytes"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"at_capacity": "block"}, "'wait', 'fallback', 'raise'"),
        ({"issue": "lazy"}, "'deferred', 'eager'"),
        ({"transfer": "dma"}, "'kernel', 'copy_engine'"),
        ({"wire": "int16"}, "'auto', 'int64'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pystage.StagingPool("cpu", **arguments)  # type: ignore[arg-type]


def test_the_least_and_the_most_that_is_taken() -> None:
    with pystage.StagingPool("cpu", PAGE, timeout_s=0, reserve_bytes=PAGE) as pool:
        assert pool.stats().reserved_bytes == PAGE
        held = pool.stage([run_of(0, 1024)])
        with pytest.raises(pystage.PoolExhaustedError):
            pool.stage([[1]])  # at once
        assert held[1023] == 1023
    with pystage.StagingPool("cpu", 2 * PAGE - 1, timeout_s=1e6, reserve_bytes=0) as pool:
        assert (pool.stats().capacity_bytes, pool.stats().reserved_bytes) == (PAGE, 0)
    with pystage.StagingPool("cpu") as pool:
        assert (pool.stats().capacity_bytes, pool.stats().reserved_bytes) == (64 << 20, 8 << 20)


def test_unknown_devices() -> None:
    with pytest.raises(pystage.DeviceError, match=r"no pystage device for xpu:0.*cuda:N"):
        pystage.StagingPool("xpu:0")
    if not pystage.build_info().cuda:
        for name in ("cuda:0", "cuda"):
            with pytest.raises(pystage.DeviceError, match="no CUDA code"):
                pystage.StagingPool(name)
    elif not torch.cuda.is_available():
        with pytest.raises(pystage.DeviceError, match="no driver"):
            pystage.StagingPool("cuda")


@pytest.mark.gpu
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(pystage.DeviceError, match="does not exist"):
        pystage.StagingPool("cuda:63")


def test_the_host_device_has_no_number() -> None:
    with pystage.StagingPool("cpu:0", PAGE) as pool:
        assert pool.device == torch.device("cpu")
        assert pool.stage([[1, 2]]).to("cpu").tolist() == [1, 2]


def test_default_device() -> None:
    with pystage.StagingPool() as pool:
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert pool.device.type == expected


# --- closing


def test_closed_pool(pool: pystage.StagingPool) -> None:
    staged = pool.stage([run_of(0, 9)])
    assert not pool.closed
    pool.close()
    pool.close()
    assert pool.closed
    for requests in ([[1]], []):
        with pytest.raises(pystage.PoolClosedError, match="closed"):
            pool.stage(requests)
    # What was staged before is still whole, and its memory goes with it.
    assert staged.to(pool.device).tolist() == list(range(9))
    assert pool.stats().reserved_bytes > 0
    del staged
    synchronize(pool)
    pystage.StagingPool("cpu", PAGE).close()  # any call looks at closed pools again
    assert pool.stats().reserved_bytes == 0


def test_dropped_pool_with_work_pending(device: str) -> None:
    pool = pystage.StagingPool(device, 1 << 16)
    with hold_transfers(pool):
        staged = pool.stage([run_of(3, 1000)])
        ids = pystage.resolve(staged)
        del pool, staged
        # Memory freed now would be handed to these, and written.
        others = [pystage.StagingPool(device, 1 << 16, at_capacity="raise") for _ in range(4)]
        for other in others:
            other.stage([run_of(0, 1 << 14)])
    synchronize(others[0])
    assert ids.tolist() == list(range(3, 1003))
    for other in others:
        other.close()


def test_several_pools_share_a_device(device: str) -> None:
    pools = [pystage.StagingPool(device, 1 << 16) for _ in range(3)]
    staged = [p.stage([run_of(i, 100)]) for i, p in enumerate(pools)]
    assert [s.to(device)[0].item() for s in staged] == [0, 1, 2]
    for p in pools:
        p.close()


def test_the_host_device_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pystage.StagingPool("cpu") as pool:
            assert pool.why_pageable == ""
            assert pool.stats().pageable_bytes == 0
            assert not pool.stage([[1]]).is_pinned()


def test_no_timeout_is_no_wait(device: str) -> None:
    with pystage.StagingPool(device, 4096, timeout_s=0) as pool:
        held = pool.stage([run_of(0, 1000)])
        with pytest.raises(pystage.PoolExhaustedError, match="no slot of 4000 bytes: "):
            pool.stage([run_of(0, 1000)])
        stats = pool.stats()
        assert (stats.waits, stats.wait_seconds, stats.exhausted) == (0, 0, 1)
        del held


def test_weak_references_end_with_the_tokens() -> None:
    ended: list[object] = []
    with pystage.StagingPool("cpu", 4096) as pool:
        staged = pool.stage([[1, 2]])
        reference = weakref.ref(staged, ended.append)
        assert reference() is staged
        del staged
        assert reference() is None and ended == [reference]


@pytest.mark.parametrize("name", ["capacity_bytes", "reserve_bytes"])
@pytest.mark.parametrize("value", ["64M", 1e6, 4096.0])
def test_a_size_is_a_number_of_bytes(name: str, value: object) -> None:
    message = f"{name} is {value!r}, but must be a number of bytes as an int: 64 << 20 is 64 MiB"
    with pytest.raises(TypeError) as raised:
        pystage.StagingPool("cpu", **{name: value})  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_a_size_may_be_any_integer() -> None:
    with pystage.StagingPool("cpu", np.int64(1 << 16)) as pool:  # type: ignore[arg-type]
        assert pool.stats().capacity_bytes == 1 << 16
