"""Staged tokens can be used in place of a 1-D int64 CPU tensor."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pystage

from .conftest import run_of

ROOT = Path(__file__).resolve().parent.parent
VALUES = [5, 1, 4, 1, 5, 9, 2, 6]
PLAIN = torch.tensor(VALUES)


@pytest.fixture
def staged(pool: pystage.StagingPool) -> pystage.StagedTokens:
    return pool.stage([VALUES])


def test_tells_what_a_tensor_tells(staged: pystage.StagedTokens) -> None:
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu"):
        assert getattr(staged, name) == getattr(PLAIN, name)
    for name in ("size", "dim", "numel", "stride", "element_size", "is_floating_point", "nelement"):
        assert getattr(staged, name)() == getattr(PLAIN, name)()
    assert staged.size(0) == len(staged) == 8
    assert staged.is_contiguous() and not staged.requires_grad
    assert staged.is_pinned() == (staged.pool.device.type == "cuda")
    assert "5, 1, 4" in repr(staged)


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.tolist(),
        lambda t: t.numpy().tolist(),
        lambda t: np.asarray(t).tolist(),
        lambda t: np.asarray(t, dtype=np.int32).tolist(),
        lambda t: list(t),
        lambda t: [int(v) for v in t],
        lambda t: t.sum(),
        lambda t: torch.sum(t),
        lambda t: torch.cat([t, PLAIN, t]),
        lambda t: torch.stack([t, t]),
        lambda t: torch.where(t > 3, t, -t),
        lambda t: torch.equal(t, PLAIN),
        lambda t: torch.as_tensor(np.asarray(t)),
        lambda t: torch.nn.functional.one_hot(t),
        lambda t: torch.zeros(10).index_fill(0, t, 1.0),
        lambda t: torch.split(t, 3),
        lambda t: t.split([3, 5]),
        lambda t: t.view(2, 4),
        lambda t: t.unsqueeze(0),
        lambda t: t.clone(),
        lambda t: t.long(),
        lambda t: t.int(),
        lambda t: t.float(),
        lambda t: t.to(torch.int64),
        lambda t: t.to(torch.int32),
        lambda t: t.to(PLAIN.float()),
        lambda t: t.cpu(),
        lambda t: t.contiguous().detach().sum(),
        lambda t: t + 1,
        lambda t: 1 - t,
        lambda t: t * t,
        lambda t: t // 2,
        lambda t: -t,
        lambda t: t == 1,
        lambda t: t != PLAIN,
        lambda t: t < 5,
        lambda t: t[3],
        lambda t: t[-1],
        lambda t: t[2:5].tolist(),
        lambda t: t[-3:].tolist(),
        lambda t: t[5:2].tolist(),
        lambda t: t[2:7][1:3].tolist(),
        lambda t: t[2:7][-1],
        lambda t: t[::3],
        lambda t: t[[0, 2]],
        lambda t: t[t > 2],
        lambda t: t[None],
        lambda t: t[...],
        lambda t: t[True],
        lambda t: 9 in t,
        lambda t: t.max().item(),
        lambda t: copy.deepcopy(t),
        lambda t: torch.empty(8).copy_(t),
        lambda t: torch.empty(2, 8, dtype=torch.int32).copy_(t),
        lambda t: torch.cat([t, PLAIN], out=torch.empty(0, dtype=torch.int64)),
        lambda t: torch.cat(tensors=[t, PLAIN]),
        lambda t: torch.add(PLAIN, 1, alpha=2).sub(other=t),
        lambda t: t - 3,
        lambda t: 3 - t,
        lambda t: t - PLAIN,
        lambda t: t - t,
        lambda t: PLAIN - t,
        lambda t: 3 & t,
        lambda t: 3 | t,
        lambda t: 64 >> t,
        lambda t: 3 ^ t,
        lambda t: 1 << t,
        lambda t: PLAIN.float() @ t.float(),
        lambda t: t @ PLAIN,
        lambda t: +t,
        lambda t: list(reversed(t)),
        lambda t: complex(t[:1]),
        lambda t: t[0:8:2],
        lambda t: t[False],
        lambda t: t[-8],
        lambda t: t[1:4][-3],
        lambda t: t.size(-1),
        lambda t: copy.deepcopy(t[2:4]),
        lambda t: copy.deepcopy([t])[0],
    ],
)
def test_reads_as_the_tensor_reads(staged: pystage.StagedTokens, read: Any) -> None:
    got, expected = read(staged), read(PLAIN)

    def same(a: Any, b: Any) -> bool:
        if isinstance(b, torch.Tensor):
            return type(a) is torch.Tensor and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(b, (tuple, list)):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    assert same(got, expected)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.fill_(0),
        lambda t: t.copy_(PLAIN),
        lambda t: operator.setitem(t, 0, 1),
        lambda t: operator.setitem(t[2:], 0, 1),
        lambda t: torch.add(PLAIN, 1, out=t),
        lambda t: torch.max(PLAIN, 0, out=(PLAIN.clone(), t)),
        lambda t: torch.relu_(t),
        lambda t: torch.relu_(input=t),
        lambda t: torch.nn.init.zeros_(t),
        lambda t: torch.nn.functional.relu(t, inplace=True),
        lambda t: torch.nn.functional.relu(input=t, inplace=True),
        lambda t: torch._foreach_add_([PLAIN.clone(), t], 1),
        lambda t: torch.ops.aten.add_(t, PLAIN),
        lambda t: torch.ops.aten.add_.Tensor(t, PLAIN),
        lambda t: torch.ops.aten.zero_(self=t),
        lambda t: torch.ops.aten.__iand__.Tensor(t, PLAIN),
        lambda t: torch.ops.aten.__irshift__(t, PLAIN),
        lambda t: t.zero_,
        lambda t: t.data,
        lambda t: t.storage,
        lambda t: t.share_memory_(),
        lambda t: t.record_stream,
        lambda t: t.data_ptr(),
        lambda t: t.untyped_storage(),
        lambda t: pickle.dumps(t),
    ],
)
def test_is_read_only(staged: pystage.StagedTokens, write: Any) -> None:
    with pytest.raises(TypeError, match=r"read-only|outlive|pickle"):
        write(staged)
    assert staged.tolist() == VALUES
    assert staged.to(staged.pool.device).tolist() == VALUES


def test_in_place_on_others_reads_staged_ids(staged: pystage.StagedTokens) -> None:
    ids = torch.zeros(10, dtype=torch.int64)
    assert ids.index_add_(0, staged, staged).tolist() == [0, 2, 2, 0, 4, 10, 6, 0, 0, 9]
    ids = PLAIN.clone()
    ids += staged
    assert ids.add_(other=staged).tolist() == [3 * v for v in VALUES]
    assert torch.ops.aten.copy_(torch.empty_like(PLAIN), staged).tolist() == VALUES
    assert torch._foreach_add([staged], [staged])[0].tolist() == [2 * v for v in VALUES]
    with pytest.raises(TypeError):
        torch.empty_like(PLAIN).copy_(staged, non_blocking=False, spam=1)  # type: ignore[call-arg]


def test_errors_of_readers(staged: pystage.StagedTokens) -> None:
    for index in (8, -9):
        with pytest.raises(IndexError, match="out of bounds"):
            staged[index]
    for name in ("spam", "spam_", "__spam__"):
        with pytest.raises(
            AttributeError, match=f"'StagedTokens' object has no attribute '{name}'"
        ):
            getattr(staged, name)
    with pytest.raises(TypeError, match="resolve takes StagedTokens"):
        pystage.resolve(PLAIN)  # type: ignore[arg-type]


# --- to a device


@pytest.mark.parametrize(
    "route",
    [
        lambda t, d: t.to(d),
        lambda t, d: t.to(d, non_blocking=True),
        lambda t, d: t.to(device=d, dtype=torch.int64),
        lambda t, d: t.to(d, torch.int64, True, True),
        lambda t, d: t.to(d, torch.int64, False, copy=True),
        lambda t, d: t.to(torch.zeros(1, dtype=torch.int64, device=d), True, True),
        lambda t, d: t.to(d, memory_format=torch.preserve_format),
        lambda t, d: t.to(torch.zeros(1, dtype=torch.int64, device=d)),
        lambda t, d: t.cuda() if d != "cpu" else t.to(d),
        lambda t, d: t.cuda(0, non_blocking=True) if d != "cpu" else t.to(d),
        lambda t, d: torch.empty(t.shape, dtype=torch.int64, device=d).copy_(t),
        lambda t, d: torch.empty(t.shape, dtype=torch.int64, device=d).copy_(t, non_blocking=True),
        lambda t, d: (
            torch.empty(16, dtype=torch.int64, device=d)[::2].copy_(t) if len(t) == 8 else t.to(d)
        ),
        lambda t, d: torch.empty(1, len(t), dtype=torch.int64, device=d).copy_(t)[0],
        lambda t, d: pystage.resolve(t),
        lambda t, d: pystage.resolve(t, out=torch.empty(t.shape, dtype=torch.int64, device=d)),
        lambda t, d: torch.ops.pystage.transfer(t, device=torch.device(d)),
        lambda t, d: pystage.ops.transfer(t, device=d),
    ],
)
def test_every_route_to_the_device(staged: pystage.StagedTokens, device: str, route: Any) -> None:
    for part, expected in ((staged, VALUES), (staged[3:], VALUES[3:]), (staged[1:6][1:3], [4, 1])):
        ids = route(part, device)
        assert type(ids) is torch.Tensor
        assert (ids.dtype, ids.device) == (torch.int64, torch.device(device))
        assert ids.tolist() == expected
    # All of them by the pool: nothing went round the fences.
    stats = staged.pool.stats()
    if device != "cpu":
        assert stats.kernel_transfers == 3


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.int16])
def test_routes_to_other_dtypes(staged: pystage.StagedTokens, device: str, dtype: Any) -> None:
    for ids in (
        staged.to(device, dtype),
        torch.empty(8, dtype=dtype, device=device).copy_(staged),
    ):
        assert ids.dtype == dtype and ids.device.type == staged.pool.device.type
        assert ids.tolist() == VALUES
    narrow = pystage.ops.transfer(staged, dtype=torch.int32, device=device)  # type: ignore[arg-type]
    assert narrow.dtype is torch.int32 and narrow.tolist() == VALUES
    out = torch.empty(8, dtype=torch.int32, device=device)
    pystage.ops.transfer_out(staged, out)  # type: ignore[arg-type]
    assert out.tolist() == VALUES
    wide = staged.pool.stage([[2**40, 1]])
    for arguments in ((device, torch.int32), (torch.int32,), ("cpu", torch.int32)):
        with pytest.raises(ValueError, match="do not all fit int32"):
            wide.to(*arguments)
    assert wide.to(torch.float32).tolist() == [2**40, 1]
    with pystage.StagingPool(staged.pool.device, wire="int64") as pool:
        assert pool.stage([VALUES]).to(torch.int32).tolist() == VALUES


def test_out_must_fit(pool: pystage.StagingPool, device: str) -> None:
    staged = pool.stage([VALUES])

    def empty(*shape: int, dtype: Any = torch.int64) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    for out, error, says in (
        (empty(7), ValueError, "shape"),
        (empty(9), ValueError, "shape"),
        (empty(0), ValueError, "shape"),
        (empty(8, 0), ValueError, "shape"),
        (empty(8, 1), ValueError, "shape"),
        (empty(16)[::2], ValueError, "contiguous"),
        (empty(8, dtype=torch.float32), TypeError, "int64 or int32"),
        (torch.empty(8, dtype=torch.int64, device="meta"), ValueError, "is on meta"),
        (VALUES, TypeError, "not a tensor"),
    ):
        with pytest.raises(error, match=says):
            pystage.resolve(staged, out=out)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int64 or int32"):
        pystage.resolve(staged, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"not a torch\.dtype"):
        pystage.resolve(staged, dtype=int)  # type: ignore[arg-type]
    out = empty(10)[1:9]  # not aligned to a vector
    assert pystage.resolve(staged, out=out).tolist() == VALUES
    out = empty(8, dtype=torch.int32)
    assert pystage.resolve(staged, out=out) is out and out.tolist() == VALUES


def test_another_device_is_an_error(pool: pystage.StagingPool) -> None:
    staged = pool.stage([VALUES])
    other = "meta" if pool.device.type == "cpu" else "cuda:1"
    with pytest.raises(ValueError, match="staged for"):
        staged.to(other)
    for shape in ((8,), (1, 8)):
        with pytest.raises(ValueError, match="staged for"):
            torch.empty(shape, dtype=torch.int64, device="meta").copy_(staged)


# --- the lease


def test_slices_hold_the_slot(pool: pystage.StagingPool) -> None:
    staged = pool.stage([run_of(0, 1000)])
    part = staged[10:20]
    copies = [staged.cpu(), staged[5], staged[::2]]
    del staged
    assert pool.stats().leased_slots == 1
    inner = part[2:4]
    del part
    assert pool.stats().leased_slots == 1
    assert inner.tolist() == [12, 13]
    del inner
    assert pool.stats().leased_slots == 0
    assert copies[0][999] == 999


def test_references(staged: pystage.StagedTokens) -> None:
    assert weakref.ref(staged)() is staged
    part = staged[:]
    assert hash(staged) != hash(part)
    gone = weakref.ref(part)
    del part
    assert gone() is None
    assert staged in {staged: 1}
    assert staged.pin_memory() is staged


def test_a_pool_stays_while_its_tokens_do() -> None:
    pool = pystage.StagingPool("cpu", 1 << 16)
    staged, gone, count = pool.stage([[1, 2]]), weakref.ref(pool), sys.getrefcount(pool)
    parts = [staged[:1] for _ in range(10)]
    assert sys.getrefcount(pool) == count + 10
    del parts
    assert sys.getrefcount(pool) == count
    del pool
    assert gone() is not None and staged.pool is gone()
    assert staged.tolist() == [1, 2]
    del staged
    assert gone() is None


def test_copies_are_their_own(pool: pystage.StagingPool, device: str) -> None:
    """Whatever is done to a copy, the ids stay; also those that found no slot."""
    with pystage.StagingPool(device, 4096, at_capacity="fallback") as small:
        full = small.stage([run_of(0, 1000)])
        for staged in (pool.stage([VALUES]), small.stage([VALUES])):
            for made in (staged.cpu(), staged[2:].cpu(), copy.deepcopy(staged), staged.clone()):
                made.zero_()
            staged.to(device).zero_()
            staged.numpy()[:] = 0
            assert staged.tolist() == VALUES and staged[2:].tolist() == VALUES[2:]
            assert staged[2:6][1:3].tolist() == VALUES[3:5]
            assert staged[2:6].to(device).tolist() == VALUES[2:6]
        assert small.stats().fallbacks == 1 and full[1] == 1


def test_is_made_by_stage_alone() -> None:
    with pytest.raises(TypeError, match="cannot create"):
        pystage.StagedTokens()
    with pytest.raises(TypeError, match="not safe"):
        object.__new__(pystage.StagedTokens)


def test_a_pool_that_holds_its_tokens_is_collected() -> None:
    pool = pystage.StagingPool("cpu")
    pool.last = pool.stage([[1, 2]])  # type: ignore[attr-defined]
    gone = weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None


def test_the_array_protocol_gives_the_type_asked_for() -> None:
    with pystage.StagingPool("cpu", 1 << 16) as pool:
        staged = pool.stage([[1, 2]])
        assert staged.__array__(np.int32).dtype == np.int32
        assert staged.__array__().dtype == np.int64


def test_what_type_checkers_take() -> None:
    """To them it is no tensor, so ``.cpu()`` where a tensor is asked for."""
    pytest.importorskip("mypy")
    code = """
    import torch
    import pystage

    def f(staged: pystage.StagedTokens, other: torch.Tensor) -> torch.Tensor:
        torch.cat([staged, other])
        half: pystage.StagedTokens = staged.contiguous()
        size: torch.Size = half.shape
        there: torch.Tensor = half.to("cpu", non_blocking=True)
        pystage.resolve(staged, dtype=torch.int32)
        return torch.cat([staged.cpu(), other, there[: size[0]]])
    """
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and errors[0].startswith("<string>:6: error:"), done


def test_staged_again(device: str) -> None:
    with pystage.StagingPool(device, 1 << 16) as pool:
        staged = pool.stage([[1, 2, 3]])
        with pytest.raises(
            TypeError, match=r"token_ids\[1\] is staged already: .*\[staged.cpu\(\)\]"
        ):
            pool.stage([[4], staged[1:]])
        with pytest.raises(TypeError, match=r"token_ids are staged already: resolve them, or"):
            pool.stage(staged)
        assert pool.stage([[4], staged[1:].cpu()]).tolist() == [4, 2, 3]


@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int32), (torch.int32, torch.int64)])
def test_an_output_of_another_type_than_asked_for(device: str, dtypes: Any) -> None:
    with pystage.StagingPool(device, 1 << 16) as pool:
        staged = pool.stage([[1, 2, 3]])
        out = torch.zeros(3, dtype=dtypes[0], device=device)
        with pytest.raises(TypeError, match=f"out is {dtypes[0]}, but dtype is {dtypes[1]}"):
            pystage.resolve(staged, out, dtypes[1])
        assert out.tolist() == [0, 0, 0]
        assert pystage.resolve(staged, out, dtypes[0]).tolist() == [1, 2, 3]
        assert pystage.resolve(staged, out=out).dtype == dtypes[0]
        assert pystage.resolve(staged, dtype=dtypes[1]).dtype == dtypes[1]
        assert pystage.resolve(staged).dtype == torch.int64
