"""Behaviour that needs a GPU: captures, several devices, ranges in a profile."""

from __future__ import annotations

import itertools
import random
import threading
from array import array
from typing import Literal

import pytest
import torch

import pystage
from pystage.testing import hold_transfers, synchronize

from .conftest import run_of
from .test_process import run

pytestmark = pytest.mark.gpu


@pytest.fixture
def pool() -> pystage.StagingPool:
    return pystage.StagingPool("cuda:0", 1 << 20)


def test_capture_is_refused_and_nothing_is_lost(pool: pystage.StagingPool) -> None:
    staged = pool.stage([run_of(0, 100)])
    static = torch.zeros(100, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in (staged.cuda, lambda: pystage.resolve(staged, out=static)):
            with pytest.raises(pystage.CaptureError, match="static input"):
                call()
        doubled = static * 2
    # As the error says: into the static input, before the replay.
    for start in (0, 7):
        pystage.resolve(pool.stage([run_of(start, 100)]), out=static)
        graph.replay()
        assert doubled.tolist() == [2 * i for i in range(start, start + 100)]
    assert pool.stats().quarantined_slots == 0
    assert staged.tolist() == list(range(100))


def test_stages_while_another_stream_captures() -> None:
    """Events are queried and memory is pinned without spoiling a capture of this thread."""
    static = torch.zeros(10, device="cuda")
    outs = [torch.zeros(100_000, dtype=torch.int64, device="cuda") for _ in range(2)]
    side = torch.cuda.Stream()
    with pystage.StagingPool("cuda:0", 4 << 20, reserve_bytes=4096) as pool:
        pystage.resolve(pool.stage([run_of(0, 100)]))  # in flight or done: to be looked at
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static.add_(1)
            staged = [pool.stage([run_of(i, 100_000)]) for i in range(2)]  # grows the pool
            with torch.cuda.stream(side):
                for s, out in zip(staged, outs, strict=True):
                    pystage.resolve(s, out=out)
        graph.replay()
        torch.cuda.synchronize()
        assert static[0].item() == 1
        assert [out[-1].item() for out in outs] == [99_999, 100_000]


def test_current_stream_is_the_one(pool: pystage.StagingPool) -> None:
    """resolve follows torch's current stream, and that of the pool's device alone."""
    side = torch.cuda.Stream()
    pystage.resolve(pool.stage([[1]]))
    with torch.cuda.stream(side), hold_transfers(pool):
        held = pystage.resolve(pool.stage([run_of(0, 10)]))
        done = torch.cuda.Event()
        done.record()
        with torch.cuda.stream(torch.cuda.Stream()):
            assert pystage.resolve(pool.stage([run_of(5, 10)])).tolist() == list(range(5, 15))
        assert not done.query()
    side.synchronize()
    assert held.tolist() == list(range(10))


def test_one_handle_for_the_default_streams_of_all_threads() -> None:
    """CUDA's per-thread default stream: a done fence of one thread tells nothing of another's."""
    with pystage.StagingPool("cuda:0", 2 * 4096, at_capacity="raise") as pool:
        outs = [torch.zeros(1000, dtype=torch.int64, device="cuda") for _ in range(2)]
        torch.cuda.synchronize()

        def work() -> None:
            with torch.cuda.stream(torch.cuda.ExternalStream(2)):
                pystage.resolve(pool.stage([run_of(1, 1000)]), out=outs[1])
                synchronize(pool)

        with torch.cuda.stream(torch.cuda.ExternalStream(2)), hold_transfers(pool):
            pystage.resolve(pool.stage([run_of(0, 1000)]), out=outs[0])
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            kept = pool.stage([run_of(5, 1000)])  # takes the slot of the thread that is done
            assert pool.stats().in_flight_slots == 1
            with pytest.raises(pystage.PoolExhaustedError):
                pool.stage([[1]])
        torch.cuda.synchronize()
        assert [out[0].item() for out in outs] == [0, 1]
        assert kept[0] == 5


def test_kernels_at_every_length_and_alignment(pool: pystage.StagingPool) -> None:
    for values in (list(range(1100)), [2**40 + i for i in range(1100)]):
        staged = pool.stage([values])
        for start in range(5):
            for count in [*range(12), 255, 256, 257, 1023, 1024, 1025]:
                out = torch.full((1200,), -7, dtype=torch.int64, device="cuda")
                for offset in (0, 1):
                    view = out[100 + offset : 100 + offset + count]
                    pystage.resolve(staged[start : start + count], out=view)
                    assert view.tolist() == values[start : start + count]
                    assert out[:100].eq(-7).all() and out[101 + count :].eq(-7).all()
                    out.fill_(-7)


def test_large_batches_fill_the_grid() -> None:
    with pystage.StagingPool("cuda:0", 64 << 20) as pool:
        for count in (1 << 18, (1 << 18) + 1, (1 << 20) + 3, 3_000_001):
            ids = torch.randint(0, 128_256, (count,))
            staged = pool.stage([ids])
            assert torch.equal(pystage.resolve(staged).cpu(), ids)
            narrow = pystage.resolve(staged, dtype=torch.int32)
            assert torch.equal(narrow.cpu(), ids.int())
            wide = pool.stage([ids + 2**33])
            assert torch.equal(pystage.resolve(wide).cpu(), ids + 2**33)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_pools_of_two_devices() -> None:
    with pystage.StagingPool("cuda:0") as a, pystage.StagingPool("cuda:1") as b:
        for pool in (a, b, a, b):
            staged = pool.stage([run_of(0, 5000)])
            for current in (0, 1):
                with torch.cuda.device(current):
                    ids = pystage.resolve(staged)
                    assert ids.device == pool.device
                    assert torch.cuda.current_device() == current
                    assert ids[-1].item() == 4999
        with pytest.raises(ValueError, match=r"staged for cuda:0, not cuda:1"):
            a.stage([[1]]).to("cuda:1")
        with pytest.raises(ValueError, match=r"staged for cuda:0, not cuda:1"):
            torch.zeros(1, dtype=torch.int64, device="cuda:1").copy_(a.stage([[1]]))


RANGES = """
import torch, pystage
names = []
push = torch.cuda.nvtx.range_push
torch.cuda.nvtx.range_push = lambda name: (names.append(name), push(name))
pool = pystage.StagingPool("cuda:0")
pystage.resolve(pool.stage([[1]]))
pool.stage([[1]]).cuda()
try:
    pool.stage([["x"]])
except TypeError:
    pass
assert torch.cuda.nvtx.range_pop() < 0   # all closed, also after an error
print(names)
"""


def test_nvtx_ranges_when_asked_for() -> None:
    out = run(RANGES, PYSTAGE_NVTX="1", PYTHONWARNINGS="ignore")
    both = ["pystage.stage", "pystage.resolve"]
    assert out.strip() == str([*both, *both, "pystage.stage"])
    assert run(RANGES, PYSTAGE_NVTX="0", PYTHONWARNINGS="ignore").strip() == "[]"


def test_first_cuda_call_of_a_thread(pool: pystage.StagingPool) -> None:
    """The driver's own functions find no context in a thread that made no call yet."""
    wire = torch.arange(5000, dtype=torch.int32).pin_memory()
    outs = [torch.zeros(5000, dtype=torch.int64, device="cuda") for _ in range(2)]
    staged = pool.stage([run_of(0, 5000)])
    threads = [
        threading.Thread(target=torch.ops.pystage.transfer_out, args=(wire, outs[0])),
        threading.Thread(target=pystage.resolve, args=(staged, outs[1])),
    ]
    for thread in threads:
        thread.start()
        thread.join()
    torch.cuda.synchronize()
    assert all(torch.equal(out.cpu(), wire.long()) for out in outs)


@pytest.mark.parametrize("issue", ["deferred", "eager"])
def test_outputs_share_blocks_and_no_bytes(issue: Literal["deferred", "eager"]) -> None:
    rng = random.Random(3)
    kept: list[tuple[array[int], torch.Tensor]] = []
    streams = [torch.cuda.Stream() for _ in range(11)]  # more than blocks are kept for
    with pystage.StagingPool("cuda:0", 64 << 20, issue=issue) as pool:
        for i in range(3000):
            count = rng.choice([1, 2, 63, 64, 65, 1000, 8192, 16384, 16385, 40000])
            ids = run_of(i, count)
            with torch.cuda.stream(streams[rng.randrange(len(streams)) if i % 2 else 0]):
                dtype = rng.choice([torch.int64, torch.int32])
                out = pystage.resolve(pool.stage([ids]), dtype=dtype)
                assert out.shape == (count,) and out.dtype == dtype and out.is_contiguous()
                assert out.data_ptr() % 512 == 0
            kept.append((ids, out))
            if len(kept) > 300:  # others stay, in the same blocks
                del kept[rng.randrange(len(kept))]
        torch.cuda.synchronize()
        for ids, out in kept:
            assert out.tolist() == list(ids)
        ranges = sorted((o.data_ptr(), o.data_ptr() + o.nbytes) for _, o in kept)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        storages = {out.untyped_storage().data_ptr() for _, out in kept}
        assert len(storages) < len(kept)


def test_blocks_of_outputs_go_back() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    pool = pystage.StagingPool("cuda:0", 4 << 20)
    outs = [pystage.resolve(pool.stage([run_of(i, 8192)])) for i in range(20)]
    assert torch.cuda.memory_allocated() - before <= (20 + 8) * 8192 * 8
    pool.close()
    assert torch.cuda.memory_allocated() > before
    last = outs[13]
    del outs
    assert 0 < torch.cuda.memory_allocated() - before <= 1 << 20  # the block of the last
    assert last.tolist() == list(range(13, 13 + 8192))
    del last
    assert torch.cuda.memory_allocated() == before


def test_a_pool_keeps_blocks_for_eight_streams() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with pystage.StagingPool("cuda:0", 4 << 20) as pool:
        for i in range(20):
            with torch.cuda.stream(torch.cuda.Stream()):
                pystage.resolve(pool.stage([run_of(i, 10)]))
            kept = torch.cuda.memory_allocated() - before
            assert kept == min(i + 1, 8) << 16  # the smallest block is 64 KiB
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("recorded", [True, False])
def test_record_stream_holds_for_the_block(recorded: bool) -> None:
    """Until the other stream is done, nobody else gets the memory; without it, somebody does."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the block is the one that would be taken
    reader = torch.cuda.Stream()
    pool = pystage.StagingPool("cuda:0", 4 << 20)
    outs = [pystage.resolve(pool.stage([run_of(i, 16384)])) for i in range(9)]
    where, size = outs[0].untyped_storage().data_ptr(), outs[0].untyped_storage().nbytes()
    assert outs[8].untyped_storage().data_ptr() != where  # the pool is done with the first block
    with torch.cuda.stream(reader), hold_transfers(pool):
        if recorded:
            outs[3].record_stream(reader)
        del outs[:8]
        with torch.cuda.stream(torch.cuda.default_stream()):
            taken = torch.empty(size, dtype=torch.uint8, device="cuda")
        assert (taken.data_ptr() == where) == (not recorded)


# Lets the next kernel start while it runs, takes its time, and then reads what that one may write.
LATE = """
extern "C" __global__ void late_copy(const long long* in, long long* out, long long n) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const long long start = clock64();
  while (clock64() - start < 2000000) {
  }
  for (long long i = threadIdx.x; i < n; i += blockDim.x) out[i] = in[i];
}
"""


def late_copy(source: torch.Tensor, out: torch.Tensor) -> None:
    compile_kernel = getattr(torch.cuda, "_compile_kernel", None)
    if compile_kernel is None:
        pytest.skip("this torch compiles no CUDA source")
    compile_kernel(LATE, "late_copy")((1, 1, 1), (128, 1, 1), (source, out, source.numel()))


@pytest.mark.parametrize("length", [3, 128, 4096])
@pytest.mark.parametrize("shift", [0, 1])  # 1: no vectors
def test_early_kernels_write_only_when_it_is_their_turn(
    pool: pystage.StagingPool, length: int, shift: int
) -> None:
    """The kernel before still reads what resolve() overwrites, and fills the relay."""
    memory = torch.full((length + shift,), 7, dtype=torch.int64, device="cuda")
    old, kept = memory[shift:], torch.zeros(length, dtype=torch.int64, device="cuda")
    late_copy(old, kept)  # compiled, and run once
    torch.cuda.synchronize()
    staged = pool.stage([run_of(0, length)])
    late_copy(old, kept.zero_())
    pystage.resolve(staged, out=old)
    assert (kept == 7).all() and old.tolist() == list(range(length))

    relay, indices = torch.zeros_like(kept), torch.arange(length, device="cuda")
    for out in (None, torch.zeros(2 * length + shift, dtype=torch.int64, device="cuda")[shift:]):
        late_copy(old, relay.zero_())
        mixed = pystage.resolve_mixed(staged, relay, indices, out=out)
        assert mixed.tolist() == 2 * list(range(length))
