"""Input that the extension refuses: each error has a type and a clear message, and nothing stays
staged."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pystage
from pystage import _C

from .conftest import HAVE_GPU, ids, run_of


class Clears:
    """An int whose reading empties a list."""

    def __init__(self, victim: list[Any]) -> None:
        self.victim = victim

    def __index__(self) -> int:
        self.victim.clear()
        return 0


def nothing_staged(pool: pystage.StagingPool) -> bool:
    stats = pool.stats()
    return stats.in_use_bytes == 0 and stats.leased_slots == 0 and stats.stages == 0


# --- requests ----------------------------------------------------------------------------------


def test_requests_that_go_while_the_ends_are_read(pool: pystage.StagingPool) -> None:
    requests: list[Any] = [ids(1), ids(2)]
    with pytest.raises(pystage.PystageError, match="token_ids shrank while it was read"):
        pool.stage(requests, starts=[Clears(requests), 0])  # type: ignore[list-item]
    assert nothing_staged(pool)


@pytest.mark.parametrize("name", ["starts", "stops"])
def test_ends_that_go_while_they_are_read(pool: pystage.StagingPool, name: str) -> None:
    ends: list[Any] = []
    ends += [Clears(ends), 0]
    with pytest.raises(pystage.PystageError, match=f"{name} shrank while it was read"):
        pool.stage([ids(1), ids(2)], **{name: ends})
    assert nothing_staged(pool)


def test_more_ids_than_any_memory_holds(pool: pystage.StagingPool) -> None:
    """Views of one id, counted as often as one likes: their bytes would wrap around."""
    view = np.broadcast_to(np.int64(7), (1 << 59,))
    with pytest.raises(pystage.RequestTooLargeError, match="can never fit"):
        pool.stage([view, view, view])
    assert nothing_staged(pool)
    assert pool.stage([view], [5], [8]).tolist() == [7, 7, 7]


@pytest.mark.parametrize("kind", [ctypes.c_int64, ctypes.c_int32])
def test_buffers_that_name_their_byte_order(pool: pystage.StagingPool, kind: Any) -> None:
    assert memoryview((kind * 1)()).format in ("<l", "<q", "<i")
    assert pool.stage([(kind * 3)(5, -6, 7)], [1]).tolist() == [-6, 7]


@pytest.mark.parametrize(
    "request_",
    [
        (ctypes.c_uint64 * 2)(1, 2),
        np.array([1, 2], dtype=">i8"),
        np.array([1, 2], dtype=np.int16),
        np.array([1.0, 2.0]),
        np.array(["a", "b"]),
        np.array([(1, 2)], dtype="i4,i4"),
        b"\1\2",
    ],
    ids=lambda r: f"{memoryview(r).format} of {type(r).__name__}",
)
def test_buffers_of_other_items(pool: pystage.StagingPool, request_: Any) -> None:
    says = r"token_ids\[1\] .*items of format .*ids are native int32 or int64, so convert"
    with pytest.raises(TypeError, match=says):
        pool.stage([ids(1), request_])
    assert nothing_staged(pool)


def test_a_buffer_that_is_not_granted(pool: pystage.StagingPool) -> None:
    """Its own error passes, and the buffers taken before it are given back."""
    before, gone = ids(1, 2, 3), memoryview(ids(4))
    gone.release()
    with pytest.raises(ValueError, match="released memoryview"):
        pool.stage([before, gone])
    before.append(4)  # a BufferError while it is exported
    assert nothing_staged(pool)


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p, s: _C.stage(1, 2), "stage takes 6 arguments, not 2"),  # type: ignore[call-arg]
        (lambda p, s: s._resolve(None), "_resolve takes 3 arguments, not 1"),
        (lambda p, s: s._resolve_mixed(), "_resolve_mixed takes 3 arguments, not 0"),
        (lambda p, s: s._slice(0), "_slice takes 2 arguments, not 1"),
        (lambda p, s: s._slice("0", 1), "int"),
        (lambda p, s: _C.ids_view(ids(1)), "ids_view takes 3 arguments, not 1"),  # type: ignore[call-arg]
        (lambda p, s: p.stage([[1]], vocab_size="9"), "int"),
        (lambda p, s: s._resolve(None, "int64", False), "dtype is a str, not a torch.dtype"),
        (lambda p, s: pystage.resolve(s, out=[0, 0]), "out is a list, not a tensor"),
        (lambda p, s: s._resolve_mixed([1], None, None), "relay is a list, not a tensor"),
        (
            lambda p, s: s._resolve_mixed(torch.zeros(1, dtype=torch.int64), 0, None),
            "indices is a int, not a tensor",
        ),
    ],
)
def test_arguments_of_another_type_or_number(
    pool: pystage.StagingPool, call: Callable[[pystage.StagingPool, Any], object], says: str
) -> None:
    staged = pool.stage([ids(1, 2)])
    with pytest.raises(TypeError, match=says):
        call(pool, staged)
    assert staged.tolist() == [1, 2] and pool.stats().leased_slots == 1


@pytest.mark.parametrize(("start", "stop"), [(2, 1), (0, 4), (4, 4), (3, 9)])
def test_slices_that_are_none(pool: pystage.StagingPool, start: int, stop: int) -> None:
    staged = pool.stage([ids(1, 2, 3)])
    with pytest.raises(ValueError, match="the slice is out of range for 3 ids"):
        staged._slice(start, stop)
    assert staged._slice(3, 3).tolist() == []


def test_a_truth_value_that_raises_is_no_flag(pool: pystage.StagingPool) -> None:
    class Unsure:
        def __bool__(self) -> bool:
            raise KeyError("mine")

    staged = pool.stage([ids(1)])
    with pytest.raises(KeyError, match="mine"):
        staged._resolve(None, None, Unsure())


def test_a_vocabulary_beyond_int64(pool: pystage.StagingPool) -> None:
    with pytest.raises(ValueError, match="vocab_size does not fit int64"):
        pool.stage([ids(1)], vocab_size=1 << 63)
    assert pool.stage([ids(1)], vocab_size=(1 << 63) - 1).tolist() == [1]


def test_a_handle_of_something_else() -> None:
    with pytest.raises(ValueError, match="PyCapsule"):
        _C.stage(object(), None, [[1]], None, None, None)  # type: ignore[arg-type]


def test_the_error_of_an_allocator_passes(device: str) -> None:
    """No machine has 2 ** 60 bytes: torch's own error, and the pool is as before."""
    view = np.broadcast_to(np.int64(7), (1 << 57,))
    with pystage.StagingPool(device, 1 << 16, at_capacity="fallback") as pool:
        with pytest.raises(RuntimeError, match="alloc"):
            pool.stage([view])
        assert nothing_staged(pool)
        assert pool.stage([ids(1)]).tolist() == [1]


@pytest.mark.skipif(HAVE_GPU, reason="needs a machine without a CUDA device")
def test_asking_for_the_current_cuda_device_without_one() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)cuda"):
        _C.current_cuda_device()


# --- relays ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"relay": torch.zeros(3)}, TypeError, "relay is int64 or int32, not Float"),
        ({"indices": torch.zeros(3)}, TypeError, "indices is int64 or int32, not Float"),
        ({"relay": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "relay must be 1-D"),
        ({"indices": torch.tensor(0)}, ValueError, r"indices must be 1-D, not \[\]"),
        ({"relay": torch.zeros(6, dtype=torch.int64)[::2]}, ValueError, "relay must be contig"),
        ({"relay": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "on meta"),
        ({"out": torch.zeros(4, dtype=torch.int32)}, TypeError, "out must be int64, not Int"),
        ({"out": torch.zeros(5, dtype=torch.int64)}, ValueError, r"shape \[4\], not \[5\]"),
    ],
)
def test_relays_that_do_not_fit(change: dict[str, Any], error: type, says: str) -> None:
    fits: dict[str, Any] = {
        "relay": torch.arange(3),
        "indices": torch.tensor([2, 0]),
        "out": None,
    }
    with pystage.StagingPool("cpu", 1 << 16) as pool:
        staged = pool.stage([ids(8, 9)])
        with pytest.raises(error, match=says):
            pystage.resolve_mixed(staged, **(fits | change))
        out = torch.full((4,), -1)
        assert pystage.resolve_mixed(staged, **(fits | {"out": out})) is out
        assert out.tolist() == [8, 9, 2, 0]


@pytest.mark.parametrize("issue", ["deferred", "eager"])
@pytest.mark.parametrize("index", [3, -4])
def test_an_index_outside_the_relay(issue: Any, index: int) -> None:
    with pystage.StagingPool("cpu", 1 << 16, issue=issue) as pool:
        staged = pool.stage([ids(8, 9)])
        says = rf"indices\[1\] is {index}, outside a relay of 3 ids"
        with pytest.raises(IndexError, match=says):
            pystage.resolve_mixed(staged, torch.arange(3), torch.tensor([0, index]))
        again = pystage.resolve_mixed(staged, torch.arange(3), torch.tensor([0, -1]))
        assert again.tolist() == [8, 9, 0, 2]


@pytest.mark.parametrize("how", ["slot", "eager", "fallback", "empty"])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_a_mixed_batch_from_wherever_its_ids_are(how: str, index: torch.dtype) -> None:
    relay, indices = torch.arange(100, 104), torch.tensor([3, -4, 1], dtype=index)
    requests = [] if how == "empty" else [run_of(0, 600)]
    at_cap: Any = "fallback" if how == "fallback" else "wait"
    issue: Any = "eager" if how == "eager" else "deferred"
    with pystage.StagingPool("cpu", 4096, at_capacity=at_cap, issue=issue) as pool:
        keep = pool.stage([run_of(0, 1000)]) if how == "fallback" else None
        staged = pool.stage(requests)
        assert pool.stats().fallbacks == (how == "fallback")
        mixed = pystage.resolve_mixed(staged, relay, indices)
        expected = [v for r in requests for v in r] + [103, 100, 101]
        assert mixed.dtype is torch.int64 and mixed.tolist() == expected
        none = pystage.resolve_mixed(staged, relay, indices[:0])
        assert none.tolist() == expected[:-3]
        del keep


def test_gathering_from_a_relay_alone() -> None:
    relay = torch.arange(10, dtype=torch.int32)
    out = torch.empty(2, dtype=torch.int64)
    assert _C.gather(relay, torch.tensor([7, -1]), out) is out and out.tolist() == [7, 9]
    assert _C.gather(relay, torch.empty(0, dtype=torch.int64), None).tolist() == []
    with pytest.raises(IndexError, match=r"indices\[0\] is 10, outside a relay of 10 ids"):
        _C.gather(relay, torch.tensor([10]), None)
    with pytest.raises(TypeError, match="out must be int64"):
        _C.gather(relay, torch.tensor([1]), torch.empty(1, dtype=torch.int32))


# --- staged tokens as objects ------------------------------------------------------------------


@pytest.mark.parametrize("device", [1, "cuda:1", torch.device("cuda", 1)])
def test_cuda_of_another_pool_names_both_devices(device: Any) -> None:
    with pystage.StagingPool("cpu", 1 << 16) as pool:
        staged = pool.stage([ids(1)])
        with pytest.raises(ValueError, match=r"cpu.*cuda:1|cuda:1.*cpu"):
            staged.cuda(device)


def test_a_slice_of_what_the_collector_has_cleared() -> None:
    """A finalizer of a cycle may still read what is in it."""
    code = """
import gc, pystage
class Cycle:
    def __del__(self):
        print(self.staged.tolist(), self.staged[1:].tolist())
pool = pystage.StagingPool("cpu", 1 << 16)
cycle = Cycle()
cycle.me, cycle.staged = cycle, pool.stage([[1, 2, 3]])
pool.keeps = cycle.staged
handle = pool._pool
del cycle, pool
gc.collect()
assert handle.stats()["leased_slots"] == 0, handle.stats()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[1, 2, 3] [2, 3]" and not done.stderr


def test_a_forked_child_is_refused_by_every_call_and_exits_as_any_process() -> None:
    code = """
import os, sys, torch, pystage
pool = pystage.StagingPool("cpu", 1 << 16)
staged = pool.stage([[1, 2, 3]])
relay = torch.arange(4)
pid = os.fork()
if pid == 0:
    calls = [lambda: pool.stage([[1]]), lambda: pystage.resolve(staged), lambda: staged.cpu(),
             lambda: pystage.resolve_mixed(staged, relay, relay[:1]), pool.stats, pool.trim]
    refused = 0
    for call in calls:
        try:
            call()
        except pystage.ForkedProcessError as error:
            refused += "after fork" in str(error)
    sys.exit(refused)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), staged.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "6 [1, 2, 3]" and "Traceback" not in done.stderr


# --- views of ids ------------------------------------------------------------------------------


def test_a_view_of_what_has_no_buffer() -> None:
    view = _C.ids_view([1, 2, 3], 1, 3)  # type: ignore[arg-type]
    assert list(view) == [2, 3] and view[1] == 3
    with pytest.raises(TypeError, match="bytes-like"):
        memoryview(view)


def test_a_view_of_what_is_short_now(pool: pystage.StagingPool) -> None:
    buffer = ids(1, 2, 3, 4)
    view = _C.ids_view(buffer, 1, 4)
    del buffer[2:]
    with pytest.raises(BufferError, match="fewer ids than when the view was made"):
        pool.stage([ids(9), view])
    buffer.extend([5, 6])
    assert pool.stage([view]).tolist() == [2, 5, 6]
    buffer.append(7)  # neither call keeps it exported


@pytest.mark.parametrize("bounds", [("a", 2), (0, "b"), (0.5, 2)])
def test_bounds_of_a_view_that_are_no_ints(bounds: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        _C.ids_view(ids(1, 2), *bounds)


def test_views_of_views_are_no_chain() -> None:
    """The end of a long chain would overflow the stack."""
    view = _C.ids_view(ids(*range(100)), 10, 90)
    assert list(_C.ids_view(view, 5, -5)) == list(range(15, 85))
    for _ in range(300_000):
        view = _C.ids_view(view, 0, 80)
    assert list(view) == list(range(10, 90))


def test_a_view_of_what_has_no_length() -> None:
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        _C.ids_view(iter([1]), 0, 1)  # type: ignore[arg-type]


def test_a_view_is_read_by_every_kind_of_subscript() -> None:
    whole = array("q", range(10))
    view = _C.ids_view(whole, 2, 8)
    assert list(view[::2]) == [2, 4, 6] and list(view[::-1]) == [7, 6, 5, 4, 3, 2]
    assert view[-1] == 7 and len(view[1:-1]) == 4 and list(view[4:2]) == []
    with pytest.raises(IndexError):
        view[6]
    with pytest.raises(TypeError):
        view["a"]  # type: ignore[index]
    with pytest.raises(TypeError):
        view[0.5:2]  # type: ignore[misc]
