"""Requests and tensors that report false properties, or that change while they are read."""

from __future__ import annotations

import gc
import sys
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import pystage
from pystage._C import ids_view

from .conftest import ids, run_of
from .fuzz import read_buffer


class Wrapper(Tensor):
    """A subclass that wraps another tensor and has no memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def fake(count: int) -> Tensor:
    with FakeTensorMode():
        return torch.arange(count)


WITHOUT_MEMORY: dict[str, Callable[[int], Tensor]] = {
    "fake": fake,
    "wrapper": lambda count: Wrapper(torch.arange(count)),
    "sparse": lambda count: torch.arange(1, count + 1).to_sparse(),
}


@pytest.fixture
def cpu_pool() -> Any:
    with pystage.StagingPool("cpu", 1 << 20) as pool:
        yield pool


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
class TestTensorsWithoutMemory:
    """Their data pointer is null, or throws: nothing may be read or written there."""

    def test_as_a_request(self, cpu_pool: pystage.StagingPool, kind: str) -> None:
        with pytest.raises(TypeError, match=r"token_ids\[1\] has no memory of its own"):
            cpu_pool.stage([[1], WITHOUT_MEMORY[kind](4)])
        assert cpu_pool.stats().leased_slots == 0

    def test_as_out(self, cpu_pool: pystage.StagingPool, kind: str) -> None:
        staged = cpu_pool.stage([[1, 2, 3, 4]])
        with pytest.raises(TypeError, match="out has no memory of its own"):
            pystage.resolve(staged, out=WITHOUT_MEMORY[kind](4))
        assert staged.tolist() == [1, 2, 3, 4]

    def test_in_the_op(self, kind: str) -> None:
        with pytest.raises((AssertionError, NotImplementedError)):  # torch's own, before ours
            torch.ops.pystage.transfer_out(torch.zeros(4).long(), WITHOUT_MEMORY[kind](4))

    def test_as_relay_or_indices(self, cpu_pool: pystage.StagingPool, kind: str) -> None:
        staged = cpu_pool.stage([[1, 2]])
        plain = torch.zeros(4, dtype=torch.int64)
        with pytest.raises((TypeError, ValueError), match="relay"):
            pystage.resolve_mixed(staged, WITHOUT_MEMORY[kind](4), plain)
        with pytest.raises(TypeError, match="indices has no memory of its own"):
            pystage.resolve_mixed(staged, plain, WITHOUT_MEMORY[kind](4))


def test_an_empty_tensor_needs_no_memory(cpu_pool: pystage.StagingPool) -> None:
    assert cpu_pool.stage([torch.empty(0, dtype=torch.int64), [7]]).tolist() == [7]


class TestNegativeViews:
    """The bit that negates a tensor lazily, as ``torch._neg_view`` sets it."""

    def test_as_a_request(self, cpu_pool: pystage.StagingPool) -> None:
        view = torch._neg_view(torch.arange(5))
        assert view.is_neg()
        assert cpu_pool.stage([view]).tolist() == [0, -1, -2, -3, -4]
        with pytest.raises(pystage.TokenRangeError, match=r"token_ids\[0\]\[1\] is -1"):
            cpu_pool.stage([view], vocab_size=10)

    def test_as_relay_and_indices(self, cpu_pool: pystage.StagingPool) -> None:
        relay = torch._neg_view(torch.tensor([10, 20, 30]))
        indices = torch._neg_view(torch.tensor([1, 2]))
        staged = cpu_pool.stage([[5]])
        assert pystage.resolve_mixed(staged, relay, indices).tolist() == [5, -30, -20]

    def test_as_out(self, cpu_pool: pystage.StagingPool) -> None:
        with pytest.raises(ValueError, match="lazily negated"):
            pystage.resolve(cpu_pool.stage([[1, 2]]), out=torch._neg_view(torch.zeros(2).long()))

    def test_in_the_op(self) -> None:
        view = torch._neg_view(torch.arange(4))
        assert torch.ops.pystage.transfer(view).tolist() == [0, -1, -2, -3]
        out = torch.empty(4, dtype=torch.int64)
        torch.ops.pystage.transfer_out(view, out)
        assert out.tolist() == [0, -1, -2, -3]
        for size in (3, 4):
            with pytest.raises(ValueError, match=r"shape|lazily negated"):
                torch.ops.pystage.transfer_out(view, torch._neg_view(torch.zeros(size).long()))


def test_the_op_refuses_to_read_a_tensor_without_data() -> None:
    with pytest.raises(NotImplementedError, match="no data"):
        torch.ops.pystage.transfer(torch.arange(4, device="meta"), device="cpu")
    made = torch.ops.pystage.transfer(torch.arange(4, device="meta"), dtype=torch.int32)
    assert made.device.type == "meta" and made.dtype is torch.int32
    ids, nothing = torch.arange(4), torch.arange(4, device="meta")
    with pytest.raises(NotImplementedError, match="no data"):
        torch.ops.pystage.transfer_out(nothing, ids)
    torch.ops.pystage.transfer_out(ids, nothing)  # a meta output has no data either
    for values in ([nothing], [ids, nothing]):
        with pytest.raises(NotImplementedError, match="no data"):
            torch.ops.pystage.small_tensors(values, device=torch.device("cpu"))
    (made,) = torch.ops.pystage.small_tensors([nothing], device=torch.device("meta"))
    assert made.device.type == "meta" and made.dtype is torch.int64


def test_an_op_that_refuses_its_output_has_not_written_it() -> None:
    ids = torch.zeros(6, dtype=torch.int64)
    version = ids._version
    with pytest.raises(ValueError, match="shares memory"):
        torch.ops.pystage.transfer_out(ids[:4], ids[2:])
    assert ids._version == version


class TestChangesWhileRead:
    def test_a_class_that_pretends_to_be_a_tensor(self, cpu_pool: pystage.StagingPool) -> None:
        class Liar:
            @property
            def __class__(self) -> Any:
                return Tensor

        assert isinstance(Liar(), Tensor)
        with pytest.raises(TypeError, match=r"token_ids\[0\] is a Liar"):
            cpu_pool.stage([Liar()])
        with pytest.raises(TypeError, match="out is a Liar, not a tensor"):
            pystage.resolve(cpu_pool.stage([[1]]), out=Liar())  # type: ignore[arg-type]

    def test_a_class_that_clears_the_batch(self, cpu_pool: pystage.StagingPool) -> None:
        requests: list[Any] = []

        class Clears:
            @property
            def __class__(self) -> Any:
                requests.clear()
                gc.collect()
                return Clears

        requests += [[1], Clears(), [2]]
        with pytest.raises((TypeError, pystage.PystageError)):
            cpu_pool.stage(requests)
        assert cpu_pool.stats().leased_slots == 0

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="__buffer__ came with Python 3.12")
    def test_a_buffer_that_clears_the_batch(self, cpu_pool: pystage.StagingPool) -> None:
        requests: list[Any] = []

        class Clears:
            def __buffer__(self, flags: int) -> memoryview:
                requests.clear()
                gc.collect()
                return memoryview(array("q", [1, 2, 3]))

        requests += [Clears(), Clears()]
        with pytest.raises(pystage.PystageError, match="token_ids shrank while it was read"):
            cpu_pool.stage(requests)
        requests[:] = [Clears()]
        assert cpu_pool.stage(requests).tolist() == [1, 2, 3]


class TestBuffersOfViews:
    """``IdsView`` exports a buffer as the protocol says, also of a strided array."""

    @pytest.fixture
    def strided(self) -> Any:
        import numpy as np

        return ids_view(np.arange(20)[::2], 2, 8)  # 4, 6, 8, 10, 12, 14

    def test_with_strides(self, strided: Any) -> None:
        view = memoryview(strided)
        assert view.strides == (16,) and view.tolist() == [4, 6, 8, 10, 12, 14]

    # PyBUF_SIMPLE, FORMAT, ND, ND | FORMAT, C-, F- and ANY_CONTIGUOUS, as in Include/pybuffer.h
    @pytest.mark.parametrize("flags", [0, 0x4, 0x8, 0xC, 0x38, 0x58, 0x98])
    def test_a_reader_without_strides_is_refused(self, strided: Any, flags: int) -> None:
        import numpy as np

        with pytest.raises(BufferError, match="not contiguous"):
            read_buffer(strided, flags)
        assert read_buffer(ids_view(run_of(0, 10), 2, 8), flags) == list(range(2, 8))
        assert read_buffer(ids_view(np.arange(20)[::2], 2, 3), flags) == [4]

    def test_bytes_of_a_strided_view_are_its_own(self, strided: Any) -> None:
        assert bytes(strided) == ids(4, 6, 8, 10, 12, 14).tobytes()
        assert bytes(ids_view(run_of(0, 9), 3, 5)) == ids(3, 4).tobytes()
