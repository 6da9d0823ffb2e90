"""What stage() accepts, what it refuses, and the state that it leaves.

This is one file because it tests one function, with every kind of request that it accepts.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pystage
from pystage import _C

from .conftest import ids, run_of

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)


def read_only(values: np.ndarray) -> np.ndarray:
    copy = values.copy()
    copy.flags.writeable = False
    return copy


def as_kind(values: list[int], kind: str) -> Any:
    wide = np.array(values, dtype=np.int64)
    narrow = wide.astype(np.int32)
    doubled = np.repeat(wide, 2)
    return {
        "list": values,
        "tuple": tuple(values),
        "array q": array("q", values),
        "array i": array("i", narrow.tolist()),
        "int64": wide,
        "int32": narrow,
        "strided": doubled[::2],
        "reversed": wide[::-1].copy()[::-1],
        "read-only": read_only(wide),
        "tensor": torch.tensor(values, dtype=torch.int64),
        "tensor int32": torch.tensor(narrow),
        "tensor strided": torch.tensor(doubled)[::2],
        "memoryview": memoryview(array("q", values)),
        "memoryview @q": memoryview(array("q", values)).cast("B").cast("@q"),
        "memoryview n": memoryview(array("q", values)).cast("B").cast("n"),
        "numpy ints": [np.int64(v) for v in values],
        "mixed ints": [
            np.int32(v) if i % 2 and abs(v) < 2**31 else v for i, v in enumerate(values)
        ],
    }[kind]


NARROW = {"array i", "int32", "tensor int32"}
KINDS = sorted(
    NARROW
    | {"list", "tuple", "array q", "int64", "strided", "reversed", "read-only", "tensor"}
    | {"tensor strided", "memoryview", "memoryview @q", "memoryview n"}
    | {"numpy ints", "mixed ints"}
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_kind_of_request(device: str, kind: str, data: st.DataObject) -> None:
    element = INT32 if kind in NARROW else st.one_of(INT32, INT64)
    requests = data.draw(st.lists(st.lists(element, max_size=20), max_size=5))
    with pystage.StagingPool(device, 1 << 16) as pool:
        staged = pool.stage([as_kind(r, kind) for r in requests])
        expected = [v for r in requests for v in r]
        assert staged.tolist() == expected
        assert staged.to(device).tolist() == expected
        assert pystage.resolve(staged).tolist() == expected


@given(data=st.data())
def test_parts_of_mixed_requests(device: str, data: st.DataObject) -> None:
    requests = data.draw(st.lists(st.lists(INT32, max_size=30), min_size=1, max_size=6))
    kinds = [data.draw(st.sampled_from(KINDS)) for _ in requests]
    starts = [data.draw(st.integers(0, len(r))) for r in requests]
    stops = [
        data.draw(st.integers(start, len(r))) for start, r in zip(starts, requests, strict=True)
    ]
    expected = [v for r, a, b in zip(requests, starts, stops, strict=True) for v in r[a:b]]
    given_ids = [as_kind(r, k) for r, k in zip(requests, kinds, strict=True)]
    with pystage.StagingPool(device, 1 << 16) as pool:
        assert pool.stage(given_ids, starts, stops).tolist() == expected
        assert pool.stage(given_ids, np.array(starts), tuple(stops)).to(device).tolist() == expected


def test_ends_default_to_the_whole(pool: pystage.StagingPool) -> None:
    a, b = run_of(0, 5), run_of(10, 5)
    assert pool.stage([a, b], starts=[3, 5]).tolist() == [3, 4]
    assert pool.stage([a, b], stops=[1, 0]).tolist() == [0]
    assert pool.stage([]).tolist() == []
    assert pool.stage([[], ids()]).to(pool.device).shape == (0,)


def test_rows_of_matrices_are_requests(pool: pystage.StagingPool) -> None:
    matrix = np.arange(12).reshape(3, 4)
    assert pool.stage(matrix).tolist() == list(range(12))
    assert pool.stage(torch.tensor(matrix.T)).tolist() == matrix.T.flatten().tolist()


# --- range


@pytest.mark.parametrize("kind", ["list", "array q", "int32", "strided", "tensor", "numpy ints"])
@pytest.mark.parametrize("bad", [-1, 1000, 2**31 - 1, -(2**31)])
def test_out_of_range_says_where(pool: pystage.StagingPool, kind: str, bad: int) -> None:
    values = list(range(100))
    values[57] = bad
    with pytest.raises(pystage.TokenRangeError, match=r"^token_ids\[1\]\[57\] is") as caught:
        pool.stage([ids(1), as_kind(values, kind)], starts=[0, 40], vocab_size=1000)
    error = caught.value
    assert isinstance(error, ValueError)
    assert (error.request, error.position, error.value, error.vocab_size) == (1, 57, bad, 1000)
    stats = pool.stats()
    assert (stats.range_errors, stats.stages, stats.in_use_bytes) == (1, 0, 0)
    # Not among the ids asked for: no error.
    assert len(pool.stage([as_kind(values, kind)], starts=[58], vocab_size=1000)) == 42


@pytest.mark.parametrize("vocab_size", [1, 6, 2**31 - 1, 2**31, 2**31 + 1, 2**40])
@pytest.mark.parametrize("kind", ["list", "tuple", "array q", "strided", "numpy ints"])
@pytest.mark.parametrize("wire", ["auto", "int64"])
def test_first_and_last_id_of_a_vocabulary(kind: str, vocab_size: int, wire: Any) -> None:
    """At every place of a request: an id is checked by other code where it stands elsewhere."""
    with pystage.StagingPool("cpu", 1 << 16, wire=wire) as pool:
        for at in range(10):
            for inside, outside in ((0, -1), (vocab_size - 1, vocab_size)):
                values = [0] * 10
                values[at] = inside
                staged = pool.stage([as_kind(values, kind)], vocab_size=vocab_size)
                assert staged.tolist() == values
                values[at] = outside
                with pytest.raises(pystage.TokenRangeError) as raised:
                    pool.stage([as_kind(values, kind)], vocab_size=vocab_size)
                assert (raised.value.position, raised.value.value) == (at, outside)


@given(
    st.lists(st.one_of(st.integers(-2, 5), INT64), min_size=1, max_size=40),
    st.sampled_from([1, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**63 - 1]),
)
def test_range_check_is_exact(values: list[int], vocab_size: int) -> None:
    with pystage.StagingPool("cpu", 1 << 16) as pool:
        bad = [i for i, v in enumerate(values) if not 0 <= v < vocab_size]
        if not bad:
            assert pool.stage([array("q", values)], vocab_size=vocab_size).tolist() == values
            return
        with pytest.raises(pystage.TokenRangeError) as caught:
            pool.stage([array("q", values)], vocab_size=vocab_size)
        assert (caught.value.position, caught.value.value) == (bad[0], values[bad[0]])


def test_without_vocab_any_int64_passes(pool: pystage.StagingPool) -> None:
    wide = [2**63 - 1, -(2**63), 1_000_000 + 2**30]
    staged = pool.stage([wide])
    assert staged.wire_dtype is torch.int64
    assert staged.to(pool.device).tolist() == wide
    with pytest.raises(ValueError, match="int32"):
        pystage.resolve(staged, dtype=torch.int32)


@pytest.mark.parametrize("kind", ["list", "array q", "strided", "numpy ints"])
@pytest.mark.parametrize("wide", [2**31, -(2**31) - 1])
@pytest.mark.parametrize("options", [{}, {"wire": "int64"}])
def test_one_id_beyond_int32_makes_all_wide(
    device: str, kind: str, wide: int, options: dict[str, Any]
) -> None:
    values = [1, 2, 3, wide, 5]
    with pystage.StagingPool(device, 1 << 16, **options) as pool:
        staged = pool.stage([as_kind(values, kind)])
        assert staged.wire_dtype is torch.int64
        assert staged.tolist() == values == pystage.resolve(staged).tolist()
        with pytest.raises(ValueError, match="do not all fit int32"):
            pystage.resolve(staged, dtype=torch.int32)


def test_nothing_staged_fits_int32(pool: pystage.StagingPool) -> None:
    nothing = pystage.resolve(pool.stage([[]]), dtype=torch.int32)
    assert nothing.dtype is torch.int32 and nothing.shape == (0,)


def test_wire_is_narrow_where_the_ids_fit(device: str) -> None:
    edge = [2**31 - 1, -(2**31)]
    with pystage.StagingPool(device, 1 << 16) as pool:
        staged = pool.stage([edge])
        assert staged.wire_dtype is torch.int32
        pystage.resolve(staged)
        assert pool.stats().wire_bytes == 8
        out = pystage.resolve(staged, dtype=torch.int32)
        assert out.dtype is torch.int32 and out.tolist() == edge
        assert pool.stage([[2**31]]).wire_dtype is torch.int64
    with pystage.StagingPool(device, 1 << 16, wire="int64") as pool:
        staged = pool.stage([edge])
        assert staged.wire_dtype is torch.int64
        assert pystage.resolve(staged, dtype=torch.int32).tolist() == edge
        with pytest.raises(ValueError, match="int32"):
            pystage.resolve(pool.stage([[2**31]]), dtype=torch.int32)
        with pytest.raises(pystage.TokenRangeError):
            pool.stage([[5]], vocab_size=5)


# --- refusals


@pytest.mark.parametrize(
    ("token_ids", "error", "says"),
    [
        ([1, 2], TypeError, r"token_ids\[0\] is an int.*\[ids\]"),
        (run_of(0, 3), TypeError, r"token_ids\[0\] is an int"),
        ([[1], [2, "x"]], TypeError, r"token_ids\[1\]\[1\] is a str"),
        ([[1.0]], TypeError, r"token_ids\[0\]\[0\] is a float, not an int$"),
        ([[None]], TypeError, r"token_ids\[0\]\[0\] is a NoneType"),
        ([[[1]]], TypeError, "one level too deep"),
        ([{1: 2}], TypeError, r"token_ids\[0\] is a dict"),
        (["12"], TypeError, r"token_ids\[0\] is a str"),
        ("12", TypeError, "token_ids is a str"),
        (7, TypeError, "token_ids is a int"),
        ([np.zeros(2)], TypeError, "format 'd' and 8 bytes"),
        ([np.zeros(2, np.uint64)], TypeError, "format 'L'"),
        ([np.zeros(2, np.int16)], TypeError, "format 'h'"),
        ([np.zeros(2, ">i8")], TypeError, "format '>q'"),
        ([b"12345678"], TypeError, "format 'B'"),
        ([torch.zeros(2)], TypeError, "dtype Float"),
        ([torch.zeros(2, 2, dtype=torch.int64)], ValueError, "2 dimensions"),
        ([np.zeros((2, 2), np.int64)], ValueError, "2 dimensions"),
        ([torch.zeros(2, dtype=torch.int64, device="meta")], ValueError, "is on meta"),
        ([torch.tensor(1)], ValueError, "0 dimensions"),
        ([np.array(1)], ValueError, "0 dimensions"),
        ([np.zeros(2, np.uint32)], TypeError, "format 'I'"),
        ([[2**63]], ValueError, r"token_ids\[0\]\[0\] does not fit int64"),
        ([[-(2**63) - 1]], ValueError, r"token_ids\[0\]\[0\] does not fit int64"),
        ({1: [2]}, TypeError, "token_ids is a dict"),
    ],
)
def test_bad_ids(pool: pystage.StagingPool, token_ids: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        pool.stage(token_ids)
    stats = pool.stats()
    assert (stats.stages, stats.in_use_bytes, stats.leased_slots) == (0, 0, 0)


@pytest.mark.parametrize(
    ("starts", "stops", "error", "says"),
    [
        ([0], None, ValueError, "starts has 1 entries for 2 requests"),
        (None, [1, 2, 3], ValueError, "stops has 3 entries"),
        ([-1, 0], None, ValueError, r"starts\[0\] is -1"),
        ([4, 0], None, ValueError, r"token_ids\[0\] has 3 ids, but \[4, 3\)"),
        (None, [3, 4], ValueError, r"token_ids\[1\] has 3 ids, but \[0, 4\)"),
        ([2, 0], [1, 3], ValueError, r"\[2, 1\)"),
        ([0.5, 0], None, TypeError, "float"),
        (5, None, TypeError, "starts is a int"),
        ([2**70, 0], None, OverflowError, "int"),
    ],
)
def test_bad_ends(
    pool: pystage.StagingPool, starts: Any, stops: Any, error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        pool.stage([run_of(0, 3), [1, 2, 3]], starts, stops)


@pytest.mark.parametrize("vocab_size", [0, -1, -5, 1 << 63])
@pytest.mark.parametrize("token_ids", [[], [[1]], [[-1]]])
def test_bad_vocab_size(pool: pystage.StagingPool, vocab_size: int, token_ids: Any) -> None:
    wanted = r"^vocab_size (is .*, but must be positive|does not fit int64)$"
    with pytest.raises(ValueError, match=wanted):
        pool.stage(token_ids, vocab_size=vocab_size)
    with pytest.raises(TypeError):
        pool.stage(token_ids, vocab_size="5")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1 << 60, 1 << 61, 1 << 62])
def test_more_ids_than_memory_can_hold(pool: pystage.StagingPool, count: int) -> None:
    """A view of one id counts as many as it likes; their bytes may wrap to few."""
    endless = torch.zeros(1, dtype=torch.int64).expand(count)
    for token_ids in ([endless], [endless] * 4, [[1], endless]):
        with pytest.raises(pystage.RequestTooLargeError, match="can never fit"):
            pool.stage(token_ids)


@pytest.mark.gpu
def test_device_tensors_are_refused() -> None:
    with pystage.StagingPool("cuda:0") as pool, pytest.raises(ValueError, match="is on cuda:0"):
        pool.stage([torch.zeros(3, dtype=torch.int64, device="cuda")])


# --- nothing left behind


def test_buffers_can_grow_afterwards(pool: pystage.StagingPool) -> None:
    growing = run_of(0, 100)
    staged = pool.stage([growing], starts=[90])
    growing.extend(range(10))  # BufferError if the buffer were still exported
    assert staged.tolist() == list(range(90, 100))
    with pytest.raises(pystage.TokenRangeError):
        pool.stage([growing], vocab_size=5)
    growing.append(1)
    with pytest.raises(TypeError):
        pool.stage([growing, "x"])
    growing.append(1)


def test_views_of_ids_let_go_of_what_they_refuse() -> None:
    ids_ = run_of(0, 10)
    view = _C.ids_view(ids_, 2, 8)
    assert memoryview(view).nbytes == 48 and bytes(view) == ids_[2:8].tobytes()
    del ids_[5:]
    with pytest.raises(BufferError, match="fewer ids"):
        memoryview(view)
    ids_.extend(range(5, 10))  # BufferError if the array's buffer were still exported
    assert memoryview(view).tolist() == [2, 3, 4, 5, 6, 7]


def test_no_references_are_kept(pool: pystage.StagingPool) -> None:
    request = [10**6 + i for i in range(50)]
    counted = [request, request[7], tensor := torch.arange(4), array_ := np.arange(4)]
    before = [sys.getrefcount(o) for o in counted]
    for _ in range(10):
        pool.stage([request, tensor, array_, tuple(request)])
        with pytest.raises(pystage.TokenRangeError):
            pool.stage([request, tensor], vocab_size=3)
        with pytest.raises(TypeError):
            pool.stage([request, tensor, array_, [object()]])
    gc.collect()
    assert [sys.getrefcount(o) for o in counted] == before


class Shrinks:
    """An int that empties the list it is in while it is read."""

    def __init__(self, victim: list[Any]) -> None:
        self.victim = victim

    def __index__(self) -> int:
        self.victim.clear()
        return 1


class Does:
    """An int that does something when it is read."""

    def __init__(self, what: Callable[[], object], value: int = 1) -> None:
        self.what, self.value = what, value

    def __index__(self) -> int:
        self.what()
        return self.value


@pytest.mark.parametrize("at", [0, 31, 32, 63, 250, 255, 256])
@pytest.mark.parametrize("value", [-1, 1 << 29, 1 << 30, -(1 << 62)])
def test_any_int_anywhere_in_a_list(pool: pystage.StagingPool, at: int, value: int) -> None:
    """Small ints are read from several places at once; one that is not small ends that."""
    values = list(range(1000, 1257))
    values[at] = value
    assert pool.stage([values, tuple(values)]).tolist() == values * 2
    with pytest.raises(pystage.TokenRangeError) as raised:
        pool.stage([[1], values], vocab_size=2000)
    assert (raised.value.request, raised.value.position, raised.value.value) == (1, at, value)


def test_a_list_that_shrinks_is_an_error(pool: pystage.StagingPool) -> None:
    request: list[Any] = [1, 2, 3, 4]
    request[1] = Shrinks(request)
    with pytest.raises(pystage.PystageError, match="shrank"):
        pool.stage([request])
    assert pool.stats().in_use_bytes == 0


@pytest.mark.parametrize("left", [0, 1, 2, 9])
def test_a_list_that_another_one_shrinks_is_an_error(pool: pystage.StagingPool, left: int) -> None:
    later = list(range(1000, 1010))
    first: list[Any] = [Does(lambda: later.__delitem__(slice(left, None)))]
    with pytest.raises(pystage.PystageError, match=r"token_ids\[1\] shrank while it was staged"):
        pool.stage([first, later])
    later[:] = range(1000, 1010)
    with pytest.raises(pystage.PystageError, match="shrank"):
        pool.stage([first, later], starts=[0, 3])
    assert pool.stats().in_use_bytes == 0


def test_a_list_that_loses_its_last_id_while_it_is_read(pool: pystage.StagingPool) -> None:
    request: list[Any] = [1, 2, 3, 1 << 40]
    request[2] = Does(lambda: request.pop() and None)
    with pytest.raises(pystage.PystageError, match="shrank"):
        pool.stage([request])


def test_lists_that_shrink_while_ends_are_read(pool: pystage.StagingPool) -> None:
    requests: list[Any] = [[1, 2], [3, 4], [5, 6]]
    starts: list[Any] = [Does(lambda: requests.pop()), 0, 0]
    with pytest.raises(pystage.PystageError, match="token_ids shrank while it was read"):
        pool.stage(requests, starts=starts)
    ends: list[Any] = [0, 0]
    ends[0] = Does(lambda: ends.pop())
    for name in ("starts", "stops"):
        ends[1:] = [0]
        with pytest.raises(pystage.PystageError, match=f"{name} shrank while it was read"):
            pool.stage([[1], [2]], **{name: ends})
    assert pool.stats().in_use_bytes == 0


FREED = """
import gc, sys, torch, pystage
import numpy as np
pool = pystage.StagingPool("cpu", 1 << 24)
class Does:
    def __init__(self, what):
        self.what = what
    def __index__(self):
        self.what()
        return 1
class Bad(Does):
    def __index__(self):
        self.what()
        gc.collect()
        return "no int"
def refused(*arguments, **named):
    try:
        pool.stage(*arguments, **named)
    except (TypeError, pystage.PystageError) as error:
        return str(error)
    raise AssertionError("taken")

# The item itself goes while it is read, and is named afterwards.
request = []
request.append(Bad(request.clear))
assert "token_ids[0][0] is a Bad" in refused([request]), "item"
starts = []
starts.append(Bad(starts.clear))
refused([[1]], starts=starts)

# Whole requests go while an earlier one is read: what was taken is read nevertheless.
requests = [[], [10**6 + i for i in range(5000)], tuple(10**6 + i for i in range(5000)),
            torch.arange(1 << 19), np.arange(1 << 19)]
requests[0].append(Does(requests.clear))
wanted = [1, *requests[1], *requests[2], *requests[3].tolist(), *requests[4].tolist()]
assert pool.stage(requests).tolist() == wanted, "requests"
print("right")
"""


def test_ids_freed_while_they_are_read() -> None:
    """Under an allocator that overwrites what is freed."""
    done = subprocess.run(
        [sys.executable, "-c", FREED],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONMALLOC": "debug"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


GIL = """
import pystage
pool = pystage.StagingPool("cpu", 1 << 24)
class Id:
    def __index__(self):
        return 5  # runs Python code: without the GIL there is no thread to run it in
ids = [Id()] * (1 << 17)
assert pool.stage([ids, tuple(ids)]).tolist() == [5] * (1 << 18)
print("right")
"""


def test_the_gil_is_held_while_a_list_is_read() -> None:
    done = subprocess.run([sys.executable, "-c", GIL], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


class Raises:
    def __index__(self) -> int:
        raise KeyError("mine")


def test_errors_of_the_callers_own_code_pass(pool: pystage.StagingPool) -> None:
    with pytest.raises(KeyError, match="mine"):
        pool.stage([[1, Raises()]])
    with pytest.raises(KeyError, match="mine"):
        pool.stage([[1]], starts=[Raises()])  # type: ignore[list-item]

    def requests() -> Iterator[list[int]]:
        yield [1]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pool.stage(requests())  # type: ignore[arg-type]
    assert pool.stats().in_use_bytes == 0


def test_an_error_in_a_part_says_where_in_the_whole(pool: pystage.StagingPool) -> None:
    with pytest.raises(TypeError, match=r"token_ids\[1\]\[3\] is a str"):
        pool.stage([[1, 2], [3, 4, 5, "x"]], starts=[0, 2])  # type: ignore[list-item]
    # After an id that fits no int32, all of them are read again.
    for bad in (-1, 2**40):
        with pytest.raises(pystage.TokenRangeError) as raised:
            pool.stage([[1, 2], [3, 4, 2**35, bad]], starts=[0, 2], vocab_size=2**40)
        assert (raised.value.request, raised.value.position) == (1, 3)


def test_a_bad_id_is_named_though_wide_ids_would_not_fit(device: str) -> None:
    with pystage.StagingPool(device, 4096, at_capacity="raise") as pool:
        for bad in (-1, 1000):
            values = [*run_of(0, 999), bad]
            with pytest.raises(pystage.TokenRangeError) as raised:
                pool.stage([values], vocab_size=1000)
            assert (raised.value.position, raised.value.value) == (999, bad)


def test_large_gather_in_pieces(pool: pystage.StagingPool) -> None:
    # Large enough to release the GIL; not a multiple of any vector.
    big = np.random.default_rng(0).integers(0, 128_256, 100_003)
    staged = pool.stage([big, big[::3], array("q", big.tolist())], vocab_size=128_256)
    expected = np.concatenate([big, big[::3], big])
    assert torch.equal(staged.to(pool.device).cpu(), torch.from_numpy(expected))
