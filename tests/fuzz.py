"""Hostile input generated from bytes: requests for stage(), views of ids, tensors for the ops, keys
and outs for staged ids. An input is either well-formed, and then the result must have the expected
ids, or it must be refused with one of the errors named here. Nothing else may happen: no crash, and
no slot that stays in use.

    make fuzz                          runs it under libFuzzer (atheris) with AddressSanitizer
    python tests/fuzz.py --replay F..  runs files or folders of them: a crash or a corpus
    tests/test_fuzz.py                 the stored corpus and random bytes, in every test run

This is one file because all targets draw their input from the same bytes, and share the list of
allowed errors and the check that nothing stays in use.
"""

from __future__ import annotations

import array as arrays
import ctypes
import gc
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import pystage
from pystage import _C

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs refusals
array = arrays.array
CORPUS = Path(__file__).with_name("fuzz_corpus.txt")
REFUSALS = (TypeError, ValueError, OverflowError, BufferError, pystage.PystageError)
# Torch's own ways to refuse a tensor; and what a FakeTensor's dispatch raises.
TORCH_REFUSALS = (*REFUSALS, RuntimeError, NotImplementedError, IndexError, AssertionError)
INT32, INT64 = range(-(2**31), 2**31), range(-(2**63), 2**63)
EDGES = [
    *(0, 1, -1, 2, 999, 1000, 128_255, 2**15, 2**16, 2**30 - 1, 2**30, -(2**30), 2**31 - 1),
    *(2**31, -(2**31), -(2**31) - 1, 2**32, 2**60, 2**63 - 1, -(2**63)),
]


class Boom(Exception):
    """What hostile objects raise."""


class Finding(Exception):
    """Something happened that may not."""


class Source:
    """Bytes, taken one decision at a time; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def below(self, n: int) -> int:
        return next(self._data, 0) % n

    def bit(self) -> bool:
        return self.below(2) == 1

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def int(self) -> int:
        """Anything; mostly small, or at the edge of a type."""
        how = self.below(4)
        if how == 0:
            return self.below(20)
        if how == 1:
            return int(self.pick(EDGES))
        if how == 2:
            return int(self.pick(EDGES)) + self.below(5) - 2
        return self.below(256) * 256 + self.below(256)

    def ids(self, of: range = INT64) -> list[int]:
        values = [self.int() for _ in range(self.below(12))]
        return [v for v in values if v in of]


class Index:
    """An int to whoever asks, and more than that: asking may change what is read."""

    def __init__(self, source: Source, victims: list[Any]) -> None:
        self.victims, self.what, self.value = victims, source.below(8), source.int()

    def __index__(self) -> int:
        if self.what == 0:
            raise Boom
        if self.what == 1:
            return self.what / 2  # type: ignore[return-value]
        for victim in self.victims:
            if self.what == 2 and isinstance(victim, list):
                victim.clear()
            elif self.what == 3 and isinstance(victim, list) and victim:
                victim.pop()
            elif self.what == 4 and isinstance(victim, list):
                victim.extend([3] * 100)
            elif self.what == 5 and isinstance(victim, array):
                victim.extend([1] * 100)  # BufferError, if it is exported
        gc.collect(0)
        return self.value


class Liar:
    """Its class is what it says, and saying so changes the batch."""

    def __init__(self, source: Source, victims: list[Any]) -> None:
        self.victims, self.says = victims, source.pick([Tensor, Liar, list, int])

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        for victim in self.victims:
            if isinstance(victim, list):
                victim.clear()
        gc.collect(0)
        return self.says


class Numbers(list):  # type: ignore[type-arg]
    """A list that lies about its length and its items to Python, not to C."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, at: Any) -> Any:
        raise Boom

    def __iter__(self) -> Iterator[Any]:
        raise Boom


def fake(count: int) -> Tensor:
    with FakeTensorMode():
        return torch.arange(count)


def view_of(whole: Any, source: Source) -> Any:
    start = source.below(8)
    return _C.ids_view(whole, start, start + source.below(12))


# --- requests ------------------------------------------------------------------------------------

Made = tuple[Any, "list[int] | None"]  # a request and its ids; None: refused, or nothing is known
Maker = Callable[[Source, list[Any]], Made]


def known(make: Callable[[list[int]], Any], of: range = INT64) -> Maker:
    def maker(source: Source, victims: list[Any]) -> Made:
        ids = source.ids(of)
        return make(ids), ids

    return maker


def many(source: Source, victims: list[Any]) -> Made:
    """So many that the GIL is released."""
    ids = [source.below(200)] * (65_536 + source.below(3))
    return array("i", ids), ids


def sliced(source: Source, victims: list[Any]) -> Made:
    ids = source.ids()
    start, stop = source.int(), source.int()
    view = _C.ids_view(array("q", ids), start, stop)
    return view, ids[max(-len(ids), min(start, 2**62)) : max(-len(ids), min(stop, 2**62))]


def other(make: Callable[[list[int]], Any]) -> Maker:
    def maker(source: Source, victims: list[Any]) -> Made:
        return make(source.ids(INT32)), None

    return maker


def hostile(source: Source, victims: list[Any]) -> Made:
    items: list[Any] = source.ids()
    for _ in range(1 + source.below(3)):
        items.insert(source.below(len(items) + 1), Index(source, victims))
    victims.append(items)
    return tuple(items) if source.bit() else items, None


def i8(ids: list[int]) -> Any:
    return np.array(ids, dtype=np.int64)


REQUESTS: dict[str, Maker] = {
    "list": known(list),
    "tuple": known(tuple),
    "list subclass": known(type("Ids", (list,), {})),
    "lying list": known(Numbers),
    "array q": known(lambda ids: array("q", ids)),
    "array i": known(lambda ids: array("i", ids), INT32),
    "array l": known(lambda ids: array("l", ids)),
    "numpy int64": known(i8),
    "numpy int32": known(lambda ids: np.array(ids, dtype=np.int32), INT32),
    "numpy strided": known(lambda ids: np.repeat(i8(ids), 3)[1::3]),
    "numpy reversed": known(lambda ids: i8(ids)[::-1].copy()[::-1]),
    "numpy unaligned": known(
        lambda ids: np.frombuffer(b"x" + i8(ids).tobytes(), np.uint8)[1:].view(np.int64)
    ),
    "numpy ints": known(lambda ids: [np.int64(v) for v in ids]),
    "bools": lambda source, _: ([True, False, True], [1, 0, 1]),
    "broadcast": lambda source, _: (np.broadcast_to(np.int64(7), (9,)), [7] * 9),
    "tensor int64": known(lambda ids: torch.tensor(ids, dtype=torch.int64)),
    "tensor int32": known(lambda ids: torch.tensor(ids, dtype=torch.int32), INT32),
    "tensor strided": known(lambda ids: torch.tensor(ids, dtype=torch.int64).repeat(2, 1).T[:, 1]),
    "tensor expanded": lambda source, _: (torch.tensor([5]).expand(7), [5] * 7),
    "tensor negated": lambda source, _: (torch._neg_view(torch.arange(4)), [0, -1, -2, -3]),
    "memoryview": known(lambda ids: memoryview(array("q", ids))[::1]),
    "memoryview reversed": known(lambda ids: memoryview(array("q", ids[::-1]))[::-1]),
    "ctypes": known(lambda ids: (ctypes.c_int64 * len(ids))(*ids)),
    "view": sliced,
    "many": many,
    # none of these has ids
    "an int": lambda source, _: (source.int(), None),
    "ints and others": other(lambda ids: [*ids, "x"]),
    "None among ints": other(lambda ids: [*ids, None]),
    "floats": other(lambda ids: [*map(float, ids), 0.5]),
    "nested": other(lambda ids: [ids, ids]),
    "too large ints": other(lambda ids: [*ids, 2**63]),
    "str": other(str),
    "bytes": other(lambda ids: bytes(len(ids))),
    "dict": other(lambda ids: dict.fromkeys(ids)),
    "generator": other(lambda ids: (v for v in ids)),
    "range": other(lambda ids: range(len(ids))),
    "array d": other(lambda ids: array("d", ids)),
    "array Q": other(lambda ids: array("Q", [abs(v) for v in ids])),
    "array h": other(lambda ids: array("h", [v % 100 for v in ids])),
    "numpy uint64": other(lambda ids: i8(ids).astype(np.uint64)),
    "numpy swapped": other(lambda ids: i8(ids).astype(">i8")),
    "numpy 2-D": other(lambda ids: i8(ids).reshape(1, -1)),
    "numpy 0-D": other(lambda ids: np.array(len(ids))),
    "numpy fields": other(lambda ids: np.zeros(len(ids), dtype=[("a", "i4"), ("b", "i4")])),
    "numpy objects": other(lambda ids: i8(ids).astype(object)),
    "tensor float": other(lambda ids: torch.tensor(ids, dtype=torch.float32)),
    "tensor bool": other(lambda ids: torch.tensor(ids, dtype=torch.bool)),
    "tensor 2-D": other(lambda ids: torch.tensor([ids], dtype=torch.int64)),
    "tensor meta": other(lambda ids: torch.empty(len(ids), dtype=torch.int64, device="meta")),
    "tensor sparse": other(lambda ids: torch.arange(1, 2 + len(ids)).to_sparse()),
    "tensor fake": other(lambda ids: fake(1 + len(ids))),
    "view of nothing": lambda source, _: (view_of(source.ids(), source), None),
    "view of bytes": lambda source, _: (view_of(bytes(9), source), None),
    # these change what is read
    "hostile ints": hostile,
    "liar": lambda source, victims: (Liar(source, victims), None),
}


def ends(source: Source, made: list[Made], victims: list[Any]) -> tuple[Any, list[int] | None]:
    """``starts`` or ``stops``, and what they are, if that is known."""
    how = source.below(8)
    lengths = [0 if ids is None else len(ids) for _, ids in made]
    if how < 4:
        values = [source.below(n + 1) for n in lengths]
        return source.pick([list, tuple, i8, lambda v: array("q", v)])(values), values
    if how == 4:
        return [source.int() for _ in made], None
    if how == 5:
        return source.pick([[], [0] * 9, 3, "ab", {}, {0: 0}, [None] * len(made), [0.5]]), None
    if how == 6:
        return [np.int64(0)] * len(made), [0] * len(made)
    values = [Index(source, victims) for _ in made]
    victims.append(values)
    return values, None


def references(made: list[Made]) -> list[int]:
    """To each request; ints are shared by all who use them."""
    return [0 if isinstance(request, int) else sys.getrefcount(request) for request, _ in made]


def first_bad(parts: list[tuple[int, list[int]]], vocab: int) -> tuple[int, int, int] | None:
    for request, (start, ids) in enumerate(parts):
        for position, value in enumerate(ids, start):
            if not 0 <= value < vocab:
                return request, position, value
    return None


def stage(source: Source, pool: pystage.StagingPool, reached: Counter[str]) -> None:
    """Requests of all kinds; read back where their ids are known."""
    victims: list[Any] = []
    kinds = [source.pick(list(REQUESTS)) for _ in range(source.below(5))]
    made = [REQUESTS[kind](source, victims) for kind in kinds]
    requests = [request for request, _ in made]
    victims.append(requests)
    starts = stops = None
    first: list[int] | None = [0] * len(made)
    last: list[int] | None = [len(ids or ()) for _, ids in made]
    if source.bit():
        starts, first = ends(source, made, victims)
    if source.bit():
        stops, last = ends(source, made, victims)
    vocab = source.pick([None, None, 1000, 128_256, 2**31, 2**40, 1, 2**63 - 1, 0, -1, 2**64, "x"])
    counts = references(made)
    batch = source.pick([list, tuple, iter])(requests) if source.bit() else requests
    staged = bad = None
    try:
        staged = pool.stage(batch, starts, stops, vocab)
    except (*REFUSALS, Boom) as error:
        bad = error.with_traceback(None)  # which would keep what it passed through
    how = type(bad).__name__ if bad else "taken"
    reached[f"{kinds[0] if len(kinds) == 1 else 'several'}: {how}"] += 1
    refused = vocab in (0, -1, 2**64, "x")
    sure = first is not None and last is not None and HOSTILE.isdisjoint(kinds)
    if sure and not REFUSED.isdisjoint(kinds) and starts is None and stops is None:
        refused = True
    if refused:
        if bad is None:
            raise Finding(f"{kinds}, vocab_size {vocab!r}: taken")
    elif sure and REFUSED.isdisjoint(kinds):
        assert first is not None and last is not None
        parts = [(a, (ids or [])[a:b]) for (_, ids), a, b in zip(made, first, last, strict=True)]
        backwards = any(a > b for a, b in zip(first, last, strict=True))
        judge(parts, backwards, vocab, staged, bad)
    if staged is not None:
        tokens(source, staged if len(staged) < 1000 else staged[-50:], reached)
    del staged, batch
    gc.collect(0)
    if sure and references(made) != counts:
        raise Finding(f"{kinds}: a reference is lost or kept")


def judge(
    parts: list[tuple[int, list[int]]],
    backwards: bool,
    vocab: int | None,
    staged: Any,
    bad: Exception | None,
) -> None:
    """Of requests whose ids are known: what became of them is right."""
    wrong = None if vocab is None else first_bad(parts, vocab)
    if backwards:
        if not isinstance(bad, ValueError):
            raise Finding(f"a start behind its stop: {bad!r}")
    elif wrong:
        if not isinstance(bad, pystage.TokenRangeError):
            raise Finding(f"{wrong} is outside {vocab}, and: {bad!r}")
        if (bad.request, bad.position, bad.value) != wrong:
            raise Finding(f"{wrong} is outside {vocab}, not {bad}")
    elif bad is not None:
        raise Finding(f"{parts} were refused: {bad!r}")
    else:
        expected = [value for _, ids in parts for value in ids]
        if staged.tolist() != expected:
            raise Finding(f"{staged.tolist()} instead of {expected}")


def same(ours: Callable[[], Any], theirs: Callable[[], Any], what: str) -> None:
    """Both give the same, or both refuse."""
    try:
        got: Any = ours()
    except (*TORCH_REFUSALS, Boom) as error:
        got = error.with_traceback(None)
    try:
        expected: Any = theirs()
    except (*TORCH_REFUSALS, Boom) as error:
        expected = error.with_traceback(None)
    if isinstance(got, Exception) != isinstance(expected, Exception):
        raise Finding(f"{what}: {got!r} instead of {expected!r}")
    if isinstance(got, (Tensor, pystage.StagedTokens)):
        if got.tolist() != expected.tolist():
            raise Finding(f"{what}: {got!r} instead of {expected!r}")
    elif not isinstance(got, Exception) and got != expected:
        raise Finding(f"{what}: {got!r} instead of {expected!r}")


def a_key(source: Source, size: int) -> Any:
    number = source.pick([0, 1, -1, size, size - 1, -size - 1, None, 2**62, -(2**62), 3])
    other_end = source.pick([0, 1, -1, size, 2, None, -(2**63), 2**63])
    return source.pick(
        [
            number,
            slice(number, other_end),
            slice(number, other_end, source.pick([1, 2, 3])),
            slice(None),
            True,
            ...,
            None,
            "x",
            0.5,
            [0, 0],
            torch.tensor(0),
            np.int64(0),
        ]
    )


def a_tensor(source: Source, ids: list[int], size: int) -> tuple[str, Tensor]:
    """Any tensor, and its kind; the kinds of GOOD hold ``ids``, or ``size`` ids."""
    kind = source.pick(TENSORS)
    wide = torch.tensor(ids, dtype=torch.int64)
    made: dict[str, Callable[[], Tensor]] = {
        "int64": lambda: wide,
        "int32": lambda: torch.tensor([v for v in ids if v in INT32], dtype=torch.int32),
        "strided": lambda: wide.repeat_interleave(2)[::2],
        "expanded": lambda: torch.tensor([3]).expand(size),
        "negated": lambda: torch._neg_view(-wide),
        "sized": lambda: torch.zeros(size, dtype=torch.int64),
        "sized int32": lambda: torch.zeros(size, dtype=torch.int32),
        "offset": lambda: torch.zeros(size + 3, dtype=torch.int64)[3:],
        "2-D": lambda: torch.zeros(1, size, dtype=torch.int64),
        "0-D": lambda: torch.tensor(4),
        "float": lambda: torch.zeros(size),
        "bool": lambda: torch.zeros(size, dtype=torch.bool),
        "uint8": lambda: torch.zeros(size, dtype=torch.uint8),
        "meta": lambda: torch.empty(size, dtype=torch.int64, device="meta"),
        "sparse": lambda: torch.ones(size, dtype=torch.int64).to_sparse(),
        "fake": lambda: fake(size),
        "subclass": lambda: wide.as_subclass(torch.nn.Buffer),
    }
    return kind, made[kind]()


TENSORS = [
    *("int64", "int32", "strided", "expanded", "negated", "sized", "sized int32", "offset", "2-D"),
    *("0-D", "float", "bool", "uint8", "meta", "sparse", "fake", "subclass"),
]
DTYPES = [torch.int64, torch.int32, torch.int64, torch.float32, torch.bool, None, "int64", 3]


def attempt(what: str, call: Callable[[], Any], reached: Counter[str]) -> Any:
    """The result, or None where it is refused."""
    try:
        made = call()
    except (*TORCH_REFUSALS, Boom) as error:
        reached[f"{what}: {type(error).__name__}"] += 1
        return None
    reached[f"{what}: taken"] += 1
    return made


def tokens(source: Source, staged: Any, reached: Counter[str]) -> None:
    """Staged ids, read, cut and resolved in any way."""
    ids = staged.tolist()
    for _ in range(source.below(4)):
        what = source.below(5)
        if what == 0:
            key = a_key(source, len(ids))
            plain = staged.cpu()
            same(lambda: staged[key], lambda: plain[key], f"[{key!r}] of {len(ids)}")  # noqa: B023
            if isinstance(key, slice):
                part = attempt("slice", lambda: staged[key], reached)  # noqa: B023
                if isinstance(part, pystage.StagedTokens):
                    staged, ids = part, part.tolist()
        elif what == 1:
            dtype: Any = source.pick(DTYPES)
            made = attempt(
                f"resolve to {dtype}",
                lambda: pystage.resolve(staged, dtype=dtype),  # noqa: B023
                reached,
            )
            if made is not None and made.tolist() != ids:
                raise Finding(f"resolved to {made}, not {ids}")
        elif what == 2:
            kind, out = a_tensor(source, ids, len(ids) + source.pick([0, 0, 0, 1]))
            made = attempt(
                f"resolve into {kind}",
                lambda: pystage.resolve(staged, out=out),  # noqa: B023
                reached,
            )
            if made is not None and made.tolist() != ids:
                raise Finding(f"resolved into {made}, not {ids}")
        elif what == 3:
            mixed(source, staged, ids, reached)
        else:
            kind, out = a_tensor(source, ids, len(ids))
            made = attempt(f"copy_ to {kind}", lambda: out.copy_(staged), reached)  # noqa: B023
            plain_kind = kind in ("int64", "strided", "sized", "offset")
            if plain_kind and (made is None or made.tolist() != ids):
                raise Finding(f"copied to {made}, not {ids}")


def mixed(source: Source, staged: Any, ids: list[int], reached: Counter[str]) -> None:
    some = source.ids()
    kind, relay = a_tensor(source, some, 1 + source.below(6))
    which, indices = a_tensor(source, source.ids(), source.below(4))
    out = None
    if source.bit():
        _, out = a_tensor(source, ids, len(ids) + source.below(6))
    made = attempt(
        f"mixed with {kind}" if source.bit() else f"mixed by {which}",
        lambda: pystage.resolve_mixed(staged, relay, indices, out),
        reached,
    )
    if isinstance(indices, FakeTensor) or indices.is_meta:  # taken, where it is empty
        indices = torch.empty(0, dtype=torch.int64)
    if made is not None:
        tail = relay.cpu()[indices.long()]
        if made.tolist() != ids + tail.tolist():
            raise Finding(f"{made} is not {ids} and {tail}")


def op(source: Source, pool: pystage.StagingPool, reached: Counter[str]) -> None:
    """torch.ops.pystage, of any tensors."""
    ids = source.ids()
    kind, wire = a_tensor(source, ids, len(ids))
    dtype: Any = source.pick(DTYPES)
    device = source.pick([None, "cpu", "meta", "cuda:7", "xyz", 0])
    if source.bit():
        made = attempt(
            f"transfer of {kind}",
            lambda: pystage.ops.transfer(wire, dtype=dtype, device=device),
            reached,
        )
    else:
        into, made = a_tensor(source, [0] * len(ids), wire.numel() + source.pick([0, 0, 1]))
        if (
            attempt(
                f"transfer into {into}",
                lambda: (pystage.ops.transfer_out(wire, made), 1),
                reached,
            )
            is None
        ):
            return
    if made is None or isinstance(made, FakeTensor) or made.is_meta or wire.is_meta:
        return
    if made.tolist() != wire.to(made.dtype).tolist():
        raise Finding(f"{wire} went over as {made}")


# --- views of ids --------------------------------------------------------------------------------


class Buffer(ctypes.Structure):
    """``Py_buffer``."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


WRITABLE, FORMAT, ND, STRIDES = 1, 4, 8, 0x18  # Include/pybuffer.h
CONTIGUOUS = [0x20, 0x40, 0x80]


def read_buffer(view: Any, flags: int) -> list[int]:
    """Ids as a C reader with these flags finds them.

    Raises:
        Finding: what was granted is not what was asked for.
    """
    buffer = Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), flags)
    try:
        count = buffer.len // buffer.itemsize
        if flags & WRITABLE or not buffer.readonly or buffer.ndim != 1:
            raise Finding("granted for writing, or of other dimensions")
        if bool(buffer.shape) != bool(flags & ND):
            raise Finding(f"shape, for flags {flags:#x}")
        if bool(buffer.strides) != (flags & STRIDES == STRIDES):
            raise Finding(f"strides, for flags {flags:#x}")
        if bool(buffer.format) != bool(flags & FORMAT):
            raise Finding(f"format, for flags {flags:#x}")
        if buffer.shape and buffer.shape[0] != count:
            raise Finding(f"a shape of {buffer.shape[0]}, not {count}")
        stride = buffer.strides[0] if buffer.strides else buffer.itemsize
        if any(flags & flag for flag in CONTIGUOUS) and count > 1 and stride != buffer.itemsize:
            raise Finding("not contiguous")
        made = ctypes.c_int32 if buffer.itemsize == 4 else ctypes.c_int64
        base = buffer.buf or 0
        return [made.from_address(base + i * stride).value for i in range(count)]
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


class Lies(list):  # type: ignore[type-arg]
    """Asked for its length, it answers what it likes."""

    answer: Any = 0

    def __len__(self) -> int:
        if self.answer is None:
            raise Boom
        return int(self.answer)


def views(source: Source, pool: pystage.StagingPool, reached: Counter[str]) -> None:
    """IdsView: as the slice of the array, whatever is done to it."""
    ids = source.ids(INT32)
    kind = source.pick(["array q", "array i", "strided", "list", "lies", "view", "bytes", "none"])
    lies = Lies(ids)
    lies.answer = source.pick([0, 3, 10**9, None])
    whole: Any = {
        "array q": array("q", ids),
        "array i": array("i", ids),
        "strided": np.repeat(i8(ids), 2)[::2],
        "list": ids,
        "lies": lies,
        "view": _C.ids_view(array("q", ids), 0, len(ids)),
        "bytes": bytes(v % 256 for v in ids),
        "none": None,
    }[kind]
    bounds = [source.pick([0, source.int(), Index(source, [ids]), None, "x"]) for _ in range(2)]
    view = attempt(f"view of {kind}", lambda: _C.ids_view(whole, *bounds), reached)
    if view is None or any(isinstance(bound, Index) for bound in bounds):
        return
    model = None
    if kind in ("array q", "array i", "strided", "view"):
        model = ids[slice(*(max(-(2**62), min(bound, 2**62)) for bound in bounds))]
    for _ in range(source.below(6)):
        what = source.below(7)
        if what == 0 and isinstance(whole, array):
            whole.extend([1] * source.below(40))
        elif what == 1 and isinstance(whole, array):
            del whole[source.below(8) :]
            model = None
        elif what == 2:
            key = a_key(source, len(view))
            if model is None:
                attempt(f"key of a view of {kind}", lambda: view[key], reached)  # noqa: B023
            elif not isinstance(key, (bool, list, Tensor)) and key is not None and key is not ...:
                reference = array("q", model)
                same(
                    lambda: list(got) if hasattr(got := view[key], "__len__") else got,  # noqa: B023
                    lambda: list(got) if hasattr(got := reference[key], "__len__") else got,  # noqa: B023
                    f"view[{key!r}]",
                )
            if isinstance(key, slice) and key.step in (None, 1):
                cut = attempt("view of a view", lambda: view[key], reached)  # noqa: B023
                if isinstance(cut, _C.IdsView):
                    view, model = cut, None if model is None else model[key]
        elif what == 3:
            got = attempt(f"list of a view of {kind}", lambda: list(view), reached)  # noqa: B023
            if model is not None and got != model:
                raise Finding(f"{got} instead of {model}")
        elif what == 4:
            flags = source.below(256)
            got = attempt(
                f"buffer of a view of {kind}",
                lambda: read_buffer(view, flags),  # noqa: B023
                reached,
            )
            if model is not None and got not in (None, model):
                raise Finding(f"{got} instead of {model}, flags {flags:#x}")
            plain = kind != "strided" and not flags & WRITABLE
            if model is not None and got is None and plain:
                raise Finding(f"no buffer of {kind} for flags {flags:#x}")
        elif what == 5:
            staged = attempt("stage of a view", lambda: pool.stage([view]), reached)  # noqa: B023
            if model is not None and (staged is None or staged.tolist() != model):
                raise Finding(f"{staged} instead of {model}")
        elif kind.startswith("array"):
            held = attempt("memoryview", lambda: memoryview(view), reached)  # noqa: B023
            if held is not None:
                grown = attempt("grow while read", lambda: (whole.append(1), 1), reached)
                if grown is not None and len(view):
                    raise Finding("an array grew while its buffer was out")
                held.release()


# --- all of it -----------------------------------------------------------------------------------

FIRST_REFUSED = list(REQUESTS).index("an int")
REFUSED = {kind for kind in list(REQUESTS)[FIRST_REFUSED:] if kind not in ("hostile ints", "liar")}
HOSTILE = {"hostile ints", "liar"}
_pools: list[pystage.StagingPool] = []


def pools() -> list[pystage.StagingPool]:
    if not _pools:
        pystage.ops.transfer(fake(1))  # the first one imports half of torch
        _pools.extend(
            [
                pystage.StagingPool("cpu", 8 << 20),
                pystage.StagingPool("cpu", 8 << 20, issue="eager"),
                pystage.StagingPool("cpu", 4096, at_capacity="fallback"),
                pystage.StagingPool("cpu", 8 << 20, wire="int64", transfer="copy_engine"),
            ]
        )
    return _pools


def one_input(data: bytes, reached: Counter[str] | None = None) -> None:
    """Runs one input. ``reached`` counts what was met, and how it ended.

    Raises:
        Finding: something happened that may not; or whatever else nobody expected.
    """
    reached = Counter() if reached is None else reached
    source = Source(data)
    pool = source.pick(pools())
    target = source.pick([stage, stage, views, op])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about odd keys
        target(source, pool, reached)
    if pool.stats().leased_slots:
        gc.collect()  # an error may hold what it passed through, in a cycle
        if pool.stats().leased_slots:
            raise Finding(f"a slot is kept: {pool.stats()}")


def corpus() -> list[bytes]:
    """The inputs that are kept: those that came by something no other did."""
    return [bytes.fromhex(line) for line in CORPUS.read_text().split()]


def main() -> None:
    if sys.argv[1:2] == ["--replay"]:
        reached: Counter[str] = Counter()
        paths = [Path(word) for word in sys.argv[2:]]
        files = [f for path in paths for f in (sorted(path.iterdir()) if path.is_dir() else [path])]
        for file in files:
            try:
                one_input(file.read_bytes(), reached)
            except BaseException:
                print(f"{file}: {file.read_bytes().hex()}", flush=True)
                raise
        print(f"{len(files)} inputs, {len(reached)} states")
        for state, count in sorted(reached.items()):
            print(f"{count:8,} {state}")
        return
    import atheris

    folder = next((Path(word) for word in sys.argv[1:] if not word.startswith("-")), None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(corpus()):
            (folder / f"kept-{number:03}").write_bytes(data)
    pools()  # not on the clock of the first input
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
