"""torch.ops.pystage on plain tensors: schemas, fakes, compilation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pystage
from pystage import _C
from pystage.testing import hold_transfers

GPU = pytest.mark.gpu
PLACES = [
    pytest.param("cpu", "cpu"),
    pytest.param("cpu", "cuda:0", marks=GPU),
    pytest.param("pinned", "cuda:0", marks=GPU),
    pytest.param("cuda:0", "cuda:0", marks=GPU),
]


def wire_on(place: str, count: int, dtype: torch.dtype) -> torch.Tensor:
    ids = torch.randint(0, 128_256, (count,), dtype=dtype)
    return ids.pin_memory() if place == "pinned" else ids.to(place)


def sample_inputs(place: str, device: str) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    for count in (0, 1, 7, 4096, 100_003):
        for source in (torch.int32, torch.int64):
            wire = wire_on(place, count, source)
            yield wire, {"device": torch.device(device)}
            yield wire, {"device": torch.device(device), "dtype": torch.int32}
    strided = wire_on(place, 50, torch.int64)
    yield strided[::2], {"device": torch.device(device)}
    yield strided[3:], {"device": torch.device(device)}  # not aligned to a vector


@pytest.mark.parametrize(("place", "device"), PLACES)
def test_transfer_is_a_cast(place: str, device: str) -> None:
    for wire, kwargs in sample_inputs(place, device):
        ids = torch.ops.pystage.transfer(wire, **kwargs)
        dtype = kwargs.get("dtype", torch.int64)
        assert (ids.dtype, ids.device) == (dtype, torch.device(device))
        assert torch.equal(ids.cpu(), wire.cpu().to(dtype))
        assert len(wire) == 0 or ids.data_ptr() != wire.data_ptr()
        out = torch.empty_like(ids)
        assert torch.ops.pystage.transfer_out(wire, out) is None
        assert torch.equal(out, ids)


@pytest.mark.parametrize(("place", "device"), PLACES)
def test_opcheck(place: str, device: str) -> None:
    for wire, kwargs in sample_inputs(place, device):
        if len(wire) <= 4096:
            torch.library.opcheck(torch.ops.pystage.transfer.default, (wire,), kwargs)
            out = torch.empty(
                len(wire), dtype=kwargs.get("dtype", torch.int64), device=kwargs["device"]
            )
            torch.library.opcheck(torch.ops.pystage.transfer_out.default, (wire, out))


@pytest.mark.parametrize(("place", "device"), PLACES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(place: str, device: str, backend: str) -> None:
    table = torch.randn(100, 4, device=device)

    def embed(wire: torch.Tensor) -> torch.Tensor:
        ids = pystage.ops.transfer(wire, device=device)
        return torch.nn.functional.embedding(ids % 100, table) * 2

    def into(wire: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        pystage.ops.transfer_out(wire, out)
        return out + 1

    torch.compiler.reset()
    compiled = torch.compile(embed, fullgraph=True, backend=backend)
    compiled_into = torch.compile(into, fullgraph=True, backend=backend)
    for count in (16, 33):
        wire = wire_on(place, count, torch.int32)
        torch.testing.assert_close(compiled(wire), embed(wire))
        outs = [torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2)]
        assert torch.equal(compiled_into(wire, outs[0]), into(wire, outs[1]))
        assert torch.equal(outs[0], outs[1])


def test_ids_staged_before_a_compiled_function(pool: pystage.StagingPool) -> None:
    table = torch.randn(100, 4, device=pool.device)
    compiled = torch.compile(lambda ids: table[ids], fullgraph=True, backend="aot_eager")
    staged = pool.stage([[3, 1, 4]])
    assert torch.equal(compiled(pystage.resolve(staged)), table[[3, 1, 4]])


@pytest.mark.parametrize(
    ("wire", "kwargs", "error", "says"),
    [
        (torch.zeros(3), {}, TypeError, "int64 or int32, not"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, ValueError, "1-D"),
        (torch.zeros(2, dtype=torch.int64), {"dtype": torch.float32}, TypeError, "int64 or int32"),
    ],
)
def test_bad_input(wire: torch.Tensor, kwargs: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        pystage.ops.transfer(wire, **kwargs)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(error, match=says):
        pystage.ops.transfer(mode.from_tensor(wire), **kwargs)


def test_out_that_shares_memory_with_what_is_read(device: str) -> None:
    ids = torch.arange(100, device=device)
    for wire, out in ((ids.view(torch.int32)[:50], ids[:50]), (ids[:50], ids[1:51])):
        before = ids.clone()
        with pytest.raises(ValueError, match="out shares memory with wire"):
            torch.ops.pystage.transfer_out(wire, out)
        assert torch.equal(ids, before)
    torch.ops.pystage.transfer_out(ids[:50], ids[50:])
    assert ids.tolist() == [*range(50), *range(50)]
    torch.ops.pystage.transfer_out(ids, ids)  # onto itself
    assert ids.tolist() == [*range(50), *range(50)]


def test_autograd_sees_that_out_was_written(pool: pystage.StagingPool, device: str) -> None:
    table = torch.nn.Embedding(4, 2, device=device)
    tokens, one = pool.stage([[2, 3]]), torch.tensor([0], device=device)
    relay = torch.tensor([1], device=device)
    for write in (
        lambda out: torch.ops.pystage.transfer_out(torch.tensor([2, 3]), out),
        lambda out: pystage.resolve(tokens, out=out),
        lambda out: pystage.resolve_mixed(tokens[:1], relay, one, out=out),
        lambda out: _C.gather(relay, one.repeat(2), out),
    ):
        ids = torch.tensor([0, 1], device=device)
        rows = table(ids).sum()
        write(ids)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            rows.backward()
        with torch.inference_mode():  # where tensors have no version
            write(torch.tensor([0, 1], device=device))


def test_bad_out() -> None:
    wire = torch.arange(4)
    for out in (torch.empty(3, dtype=torch.int64), torch.empty(8, dtype=torch.int64)[::2]):
        with pytest.raises(ValueError, match=r"shape|contiguous"):
            pystage.ops.transfer_out(wire, out)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match="shape"):
        pystage.ops.transfer_out(
            mode.from_tensor(wire), mode.from_tensor(torch.empty(3, dtype=torch.int64))
        )


@pytest.mark.gpu
def test_wire_and_out_on_other_devices() -> None:
    wire = torch.arange(4, device="cuda")
    with pytest.raises(ValueError, match="wire is on cuda:0, out on cpu"):
        pystage.ops.transfer(wire, device="cpu")


@pytest.mark.gpu
def test_pinned_wire_is_kept_while_it_is_read() -> None:
    """torch's host allocator must not hand the block out again before the kernel ran."""
    with pystage.StagingPool("cuda:0") as pool:
        with hold_transfers(pool):
            wire = torch.arange(5000).pin_memory()
            pointer = wire.data_ptr()
            ids = pystage.ops.transfer(wire, device="cuda")
            del wire
            taken = [torch.full((5000,), -1).pin_memory() for _ in range(4)]
            assert all(t.data_ptr() != pointer for t in taken)
        assert ids.tolist() == list(range(5000))


def test_ops_from_threads(device: str) -> None:
    wire = torch.arange(1000, dtype=torch.int32)
    if device != "cpu":
        wire = wire.pin_memory()
    right: list[bool] = []

    def work() -> None:
        for _ in range(100):
            right.append(bool((pystage.ops.transfer(wire, device=device).cpu() == wire).all()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(right) == 400 and all(right)
