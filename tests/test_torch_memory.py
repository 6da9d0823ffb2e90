"""The effect of torch's allocators, memory pools and errors on the ids that ``resolve`` returns."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pystage
from pystage.testing import hold_transfers

from .conftest import run_of
from .test_process import run

gpu = pytest.mark.gpu


@pytest.fixture
def fallback() -> tuple[pystage.StagingPool, pystage.StagedTokens]:
    """Ids of a full pool, in memory of torch's own."""
    pool = pystage.StagingPool("cuda:0", 4096, at_capacity="fallback")
    held = pool.stage([run_of(0, 1000)])
    staged = pool.stage([run_of(7, 3000)])
    assert pool.stats().fallbacks == 1
    del held
    return pool, staged


WAYS: dict[str, Callable[[pystage.StagedTokens, Tensor, bool], Tensor]] = {
    "to": lambda staged, out, non_blocking: staged.to("cuda:0", non_blocking=non_blocking),
    "copy_": lambda staged, out, non_blocking: out.copy_(staged, non_blocking),  # type: ignore[arg-type]
    "copy_ of another dtype": lambda staged, out, non_blocking: out.float().copy_(
        staged,  # type: ignore[arg-type]
        non_blocking,
    ),
}


@gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slot", [True, False], ids=["slot", "fallback"])
def test_a_blocking_way_waits_for_the_stream(
    fallback: tuple[pystage.StagingPool, pystage.StagedTokens], way: str, slot: bool
) -> None:
    """It returns with the ids there, for any stream to read."""
    pool, staged = fallback
    if slot:
        pool = pystage.StagingPool("cuda:0", 1 << 20)
        staged = pool.stage([run_of(7, 3000)])
    out = torch.zeros(3000, dtype=torch.int64, device="cuda:0")
    WAYS[way](
        staged, out, False
    )  # kernels that are loaded at their first launch wait for the device
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    made: list[Tensor] = []

    def block() -> None:
        with torch.cuda.stream(stream):
            made.append(WAYS[way](staged, out, False))

    with torch.cuda.stream(stream):
        hold = hold_transfers(pool)
        hold.__enter__()
        WAYS[way](staged, out, True)  # does not wait, or this would take the hold's 60 seconds
    thread = threading.Thread(target=block)
    thread.start()
    thread.join(0.5)  # long enough to come back, if it does not wait
    assert thread.is_alive() and not made
    hold.__exit__(None, None, None)
    thread.join()
    (ids,) = made
    assert stream.query()
    assert ids.long().tolist() == list(range(7, 3007))


def test_a_fallback_takes_its_turn_on_the_host_device() -> None:
    pool = pystage.StagingPool("cpu", 4096, at_capacity="fallback")
    held = pool.stage([run_of(0, 500)])
    staged = pool.stage([run_of(7, 500), run_of(0, 2000)])
    assert pool.stats().fallbacks == 1
    out = torch.zeros(500, dtype=torch.int64)
    narrow = torch.zeros(500, dtype=torch.int32)
    with hold_transfers(pool):
        pystage.resolve(held, out=out)
        pystage.resolve(staged[:500], out=out)
        pystage.resolve(staged[:500], out=narrow)
        assert out.tolist() == narrow.tolist() == [0] * 500
    pystage.testing.synchronize(pool)
    assert out.tolist() == narrow.tolist() == list(range(7, 507))
    del staged
    assert pool.stats().fallback_transfers == 2


ALLOCATOR = """
#include <cuda_runtime.h>
#include <cstdio>
static long count = 0;
extern "C" void* take(ssize_t size, int device, cudaStream_t stream) {
  void* memory = nullptr;
  return cudaMallocAsync(&memory, size, stream) == cudaSuccess ? (++count, memory) : nullptr;
}
extern "C" void give(void* memory, ssize_t size, int device, cudaStream_t stream) {
  cudaFreeAsync(memory, stream);
}
extern "C" long taken() { return count; }
"""


@gpu
def test_another_allocator_makes_the_outputs(tmp_path: Path) -> None:
    """``torch.cuda.memory.change_current_allocator``, as RMM's users call it."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("needs nvcc to build an allocator")
    source, library = tmp_path / "allocator.cu", tmp_path / "liballocator.so"
    source.write_text(ALLOCATOR)
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    run(
        """
        import ctypes, sys, torch, pystage
        library = sys.argv[1]
        allocator = torch.cuda.memory.CUDAPluggableAllocator(library, "take", "give")
        torch.cuda.memory.change_current_allocator(allocator)
        taken = ctypes.CDLL(library).taken
        for issue in ("deferred", "eager"):
            with pystage.StagingPool("cuda:0", 1 << 20, issue=issue) as pool:
                before = taken()
                for count in (3, 5000, 50_000):
                    staged = pool.stage([list(range(count))])
                    assert pystage.resolve(staged).tolist() == list(range(count))
                assert taken() > before
        """,
        str(library),
    )


@gpu
@pytest.mark.parametrize("issue", ["deferred", "eager"])
def test_outputs_inside_a_memory_pool_come_from_it(issue: pystage.pool.Issue) -> None:
    def within(ids: Tensor, memory: torch.cuda.MemPool) -> bool:
        return any(
            s["address"] <= ids.data_ptr() < s["address"] + s["total_size"]
            for s in memory.snapshot()
        )

    with pystage.StagingPool("cuda:0", 1 << 20, issue=issue) as pool:
        before = pystage.resolve(pool.stage([run_of(0, 100)]))
        memory = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(memory):
            inside = [pystage.resolve(pool.stage([run_of(i, 100)])) for i in range(3)]
        after = pystage.resolve(pool.stage([run_of(9, 100)]))
        assert [within(ids, memory) for ids in inside] == [True] * 3
        assert not within(before, memory) and not within(after, memory)
        assert after.tolist() == list(range(9, 109))
        assert [ids[0].item() for ids in inside] == [0, 1, 2]
        # Nothing of ours keeps the memory: it goes back with the tensors.
        del inside
        torch.cuda.synchronize()
        blocks = [b for s in memory.snapshot() for b in s["blocks"]]
        assert not [b for b in blocks if b["state"] == "active_allocated"]


@gpu
def test_nested_regions_are_counted_and_errors_too() -> None:
    from pystage import _mempool

    pystage.StagingPool("cuda:0", 1 << 20).close()
    outer, inner = torch.cuda.MemPool(), torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(outer), torch.cuda.use_mem_pool(inner):
        assert sum(_mempool._active.values()) == 2
    assert sum(_mempool._active.values()) == 0
    with pytest.raises(ZeroDivisionError), torch.cuda.use_mem_pool(outer):
        raise ZeroDivisionError
    assert sum(_mempool._active.values()) == 0


FORK = """
import os, sys, torch, pystage
from pystage.testing import hold_transfers
pool = pystage.StagingPool("cuda:0", 1 << 20, issue=sys.argv[1], at_capacity="fallback")
waiting = [pool.stage([[i] * 100]) for i in range(3)]       # eager: not resolved yet
resolved = [pystage.resolve(s) for s in waiting[:2]]
large = pool.stage([range_ids]) if (range_ids := list(range(300_000))) else None
assert pool.stats().fallbacks == 1
with hold_transfers(pool):
    copying = large.to("cuda:0", non_blocking=True)
    pid = os.fork()
    if pid == 0:
        del waiting, large, pool                              # not the tensors: those are torch's
        sys.stdout.flush()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
assert status == 0, status
assert pystage.resolve(waiting[2]).tolist() == [2] * 100
assert copying.tolist() == range_ids
"""


@gpu
@pytest.mark.parametrize("issue", ["deferred", "eager"])
def test_a_forked_child_drops_pools_and_tokens(issue: str) -> None:
    run(FORK, issue, PYTHONWARNINGS="ignore")


LOST = """
import sys, torch, pystage
issue, what = sys.argv[1:]
pool = pystage.StagingPool("cuda:0", 1 << 20, issue=issue, at_capacity="fallback")
waiting = [pool.stage([[i] * 100]) for i in range(3)]
large = pool.stage([list(range(300_000))])
table = torch.zeros(4, device="cuda:0")
pystage.resolve(waiting[0])
torch.ones(4, device="cuda:0")[torch.tensor([10], device="cuda:0")]     # asserts on the device
try:
    torch.cuda.synchronize()
except RuntimeError:
    print("lost")
for call in (lambda: pystage.resolve(waiting[1]), lambda: pool.stage([[1]]).to("cuda:0")):
    try:
        call()
    except (pystage.DeviceError, RuntimeError) as error:
        assert "CUDA" in str(error) or "cu" in str(error), error
    else:
        sys.exit("no error")
pool.stats()
if what == "close":
    pool.close()
if what != "exit":
    del waiting, large, pool
print("bye")
"""


@gpu
@pytest.mark.parametrize("what", ["close", "drop", "exit"])
@pytest.mark.parametrize("issue", ["deferred", "eager"])
def test_a_lost_device_ends_no_process(issue: str, what: str) -> None:
    import os
    import sys

    done = subprocess.run(
        [sys.executable, "-c", LOST, issue, what],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert (done.returncode, done.stdout.split()) == (0, ["lost", "bye"]), done.stderr[-3000:]


@gpu
def test_a_thread_whose_context_was_taken_away() -> None:
    """Other libraries set and clear the driver's current context."""
    run(
        """
        import ctypes, torch, pystage
        driver = ctypes.CDLL("libcuda.so.1")
        pool = pystage.StagingPool("cuda:0", 1 << 20, reserve_bytes=4096)
        first = pool.stage([[1, 2, 3]])
        assert pystage.resolve(first).tolist() == [1, 2, 3]
        assert driver.cuCtxSetCurrent(None) == 0
        assert pystage.resolve(first).tolist() == [1, 2, 3]
        assert driver.cuCtxSetCurrent(None) == 0
        out = torch.empty(200_000, dtype=torch.int64, device="cuda:0")
        assert driver.cuCtxSetCurrent(None) == 0
        grown = pool.stage([list(range(200_000))])
        pystage.resolve(grown, out=out)
        assert out.tolist() == list(range(200_000))
        assert driver.cuCtxSetCurrent(None) == 0
        pool.stats(), pool.trim(), pool.close()
        """
    )


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_that_torch_puts_off() -> None:
    """Torch may count a device as current that CUDA does not: memory and launch must agree."""
    run(
        """
        import torch, pystage
        pool = pystage.StagingPool("cuda:1", 1 << 20)
        staged = pool.stage([list(range(500))])
        with torch.cuda.device(1):          # torch sets it, CUDA may not know yet
            ids = pystage.resolve(staged)
        assert torch.cuda.current_device() == 0
        assert ids.device.index == 1 and ids.tolist() == list(range(500))
        other = pystage.resolve(staged)     # device 0 is current
        assert other.device.index == 1 and other.tolist() == list(range(500))
        """
    )
