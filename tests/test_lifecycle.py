"""Pools, processes, interpreters and graphs that start and end."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

import pystage

from .conftest import SCALE, run_of
from .test_process import run

MANY_POOLS = """
import ctypes, gc, os, sys
from pathlib import Path
import torch, pystage
from pystage.testing import hold_transfers, synchronize

device, count, bound = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
keep = pystage.StagingPool(device, 1 << 16)  # its calls look at what the others have left

def closed(issue):
    pool = pystage.StagingPool(device, 1 << 16, reserve_bytes=4096, issue=issue)
    ids = pystage.resolve(pool.stage([range_of]))
    pool.close()
    return pool.stats().reserved_bytes == 0 and ids[-1].item() == 99

def dropped(issue):
    pool = pystage.StagingPool(device, 1 << 16, reserve_bytes=4096, issue=issue)
    staged = pool.stage([range_of])
    del pool
    return staged.tolist()[-1] == 99

def in_flight(issue):
    pool = pystage.StagingPool(device, 1 << 16, reserve_bytes=4096, issue=issue, timeout_s=0)
    with hold_transfers(keep):
        ids = pystage.resolve(pool.stage([range_of]))
        del pool  # its slot is in flight: the pool outlives its owner
    synchronize(keep)
    return ids[-1].item() == 99

def in_a_cycle(issue):
    class Owner: pass
    owner = Owner()
    owner.me = owner
    owner.pool = pystage.StagingPool(device, 1 << 16, reserve_bytes=4096, issue=issue)
    owner.staged = owner.pool.stage([range_of])
    return owner.staged[1:].tolist()[-1] == 99

range_of = list(range(100))
ways = [closed, dropped, in_flight, in_a_cycle]
if device != "cpu":
    ways.remove(in_flight)  # memory that is unpinned would wait for the held stream

def figures():
    gc.collect()
    keep.trim(); keep.stats()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    figures = {"resident": pages * os.sysconf("SC_PAGESIZE")}
    figures |= {name: len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task")}
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # torch keeps 2 MiB for each of the 32 streams that pools share
        figures["device"] = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
    return figures

def make(pools):
    for i in range(pools):
        assert ways[i % len(ways)]("eager" if i // len(ways) % 2 else "deferred")

make(max(count // 10, 40))
before = figures()
make(count)
after = figures()
print(before, after)
grown = after.pop("resident") - before.pop("resident")
assert after == before, (before, after)
assert grown <= bound, f"{grown} bytes more after {count} pools"
"""


def test_many_pools_leave_nothing(device: str) -> None:
    """10,000 pools, ended in every way: no memory, no file, no thread is left of them."""
    count = max(int((10_000 if device == "cpu" else 1000) * SCALE), 100)
    bound = 2 << 20 if SCALE >= 1 else 1 << 30  # a sanitizer keeps what is freed for a while
    print(run(MANY_POOLS, device, str(count), str(bound), PYTHONWARNINGS="ignore"))


FORK = """
import gc, os, sys
import torch, pystage
from pystage.testing import hold_transfers, synchronize

device, how = sys.argv[1:]
pools = [pystage.StagingPool(device, 1 << 20, issue=issue) for issue in ("eager", "deferred")]
for pool in pools:
    pystage.resolve(pool.stage([[1]]))
    synchronize(pool)
lost = pystage.StagingPool(device, 1 << 16, timeout_s=0)
with hold_transfers(pools[0]):
    staged = [pool.stage([list(range(n))]) for pool in pools for n in (10, 20)]
    ids = [pystage.resolve(s) for s in staged[1::2]]  # the others' eager ids: nobody has them yet
    orphan = pystage.resolve(lost.stage([list(range(30))]))
    del lost
    pid = os.fork()
    if pid == 0:
        # Everything is dropped here, by hand or by the end of the interpreter.
        try:
            staged[0].tolist()
        except pystage.ForkedProcessError:
            pass
        else:
            os._exit(2)
        if how == "dropped":
            del ids, orphan, staged, pool, pools
            gc.collect()
        fresh = pystage.StagingPool("cpu", 1 << 16, issue="eager")
        ok = pystage.resolve(fresh.stage([[4, 2]])).tolist() == [4, 2]
        fresh.close()
        if how == "left":
            sys.exit(0 if ok else 3)
        os._exit(0 if ok else 3)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, status
for pool in pools:
    synchronize(pool)
assert [i[-1].item() for i in ids] == [19, 19] and orphan[-1].item() == 29
assert [s.to(device)[-1].item() for s in staged] == [9, 19, 9, 19]
del staged, ids
for pool in pools:
    synchronize(pool)
    stats = pool.stats()
    assert stats.leased_slots == stats.in_flight_slots == 0, stats
"""


@pytest.mark.parametrize("how", ["dropped", "left"])
def test_fork_beside_eager_pools_and_lost_ones(device: str, how: str) -> None:
    """hold_transfers keeps their slots in flight while the process forks."""
    run(FORK, device, how, PYTHONWARNINGS="ignore")


def stage_elsewhere(device: str, start: int, queue: Any) -> None:
    try:
        with pystage.StagingPool(device, 1 << 16) as pool:
            queue.put(pystage.resolve(pool.stage([run_of(start, 100)])).tolist())
    except Exception as error:
        queue.put(repr(error))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_processes(device: str, method: str) -> None:
    """Beside a pool of this process, with tokens staged."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    with pystage.StagingPool(device, 1 << 16) as pool:
        staged = pool.stage([[7]])
        workers = [
            context.Process(target=stage_elsewhere, args=(device, start, queue))
            for start in (0, 1000)
        ]
        for worker in workers:
            worker.start()
        results = sorted(queue.get(timeout=120) for _ in workers)
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert results == [list(range(100)), list(range(1000, 1100))]
        assert staged.tolist() == [7]


SUBINTERPRETER = """
import sys
{first}
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
made = interpreters.create()
code = '''
import sys
sys.path[:0] = {path!r}
try:
    import pystage
except ImportError as error:
    print("refused:", error)
assert "torch" not in sys.modules
'''
failed = interpreters.run_string(made, code)
assert failed is None, failed
interpreters.destroy(made)
import pystage
with pystage.StagingPool("cpu", 1 << 16) as pool:
    print(pystage.resolve(pool.stage([[1, 2]])).tolist())
"""


@pytest.mark.parametrize("first", ["", "import pystage"])
def test_a_subinterpreter_is_refused(first: str) -> None:
    """Before torch is imported there: that hangs, or crashes at exit."""
    pytest.importorskip("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
    code = SUBINTERPRETER.format(first=first, path=[p for p in sys.path if p] + ["."])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, right = done.stdout.strip().splitlines()
    assert refused.startswith("refused: pystage does not work in a subinterpreter")
    assert right == "[1, 2]"


def embed(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(pystage.ops.transfer(ids) % 100, table) * 2


def test_reduce_overhead(device: str) -> None:
    """On CUDA these are graphs: ids that are resolved before a replay are the ones it sees."""
    torch.compiler.reset()
    table = torch.randn(100, 4, device=device)
    compiled = torch.compile(embed, fullgraph=True, mode="reduce-overhead")
    static = torch.zeros(64, dtype=torch.int64, device=device)
    skips = torch._dynamo.utils.counters["inductor"]
    before = skips["cudagraph_skips"]
    with pystage.StagingPool(device, 1 << 20) as pool:
        for turn in range(6):  # warm-up, recording, and replays
            ids = run_of(turn * 7, 64)
            torch.compiler.cudagraph_mark_step_begin()
            pystage.resolve(pool.stage([ids]), out=static)
            made = compiled(table, static).clone()
            torch.testing.assert_close(made, embed(table, torch.tensor(ids, device=device)))
        for turn in range(6):  # an output of resolve, another one each time
            ids = run_of(turn * 5, 64)
            torch.compiler.cudagraph_mark_step_begin()
            made = compiled(table, pystage.resolve(pool.stage([ids]))).clone()
            torch.testing.assert_close(made, embed(table, torch.tensor(ids, device=device)))
    if device != "cpu":
        assert skips["cudagraph_skips"] == before


@pytest.mark.gpu
def test_the_op_in_a_graph() -> None:
    """Captured on the device: each replay reads what its input holds by then."""
    wire = torch.zeros(1000, dtype=torch.int32, device="cuda")
    out = torch.zeros(1000, dtype=torch.int64, device="cuda")
    pystage.ops.transfer_out(wire, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pystage.ops.transfer_out(wire, out)
        doubled = out * 2
    with pystage.StagingPool("cuda:0", 1 << 20) as pool:
        for turn in range(5):
            pystage.resolve(pool.stage([run_of(turn, 1000)]), out=wire)
            graph.replay()
            assert doubled.tolist() == [2 * i for i in range(turn, turn + 1000)]


@pytest.mark.gpu
def test_a_capture_on_the_stream_of_an_eager_pool() -> None:
    """Torch hands out 32 streams in turn. A transfer in a capture would run at each replay."""
    with pystage.StagingPool("cuda:0", 4 << 20, issue="eager") as pool:
        static = torch.zeros(10, device="cuda")
        staged = []
        for turn in range(32):
            stream = torch.cuda.Stream(priority=-100)  # the highest there is, as the pool's
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
                static.add_(1)
                staged.append(pool.stage([run_of(turn, 100)]))
            graph.replay()
        assert pool.stats().eager_transfers == 31  # one of the streams is the pool's
        for turn, tokens in enumerate(staged):
            assert pystage.resolve(tokens).tolist() == list(range(turn, turn + 100))
        staged.clear()
        torch.cuda.synchronize()
        assert pool.stats().quarantined_slots == 0 and pool.stats().in_flight_slots == 0


@pytest.mark.gpu
@pytest.mark.parametrize("issue", ["deferred", "eager"])
def test_every_way_to_the_device_is_refused_in_a_capture(issue: Any) -> None:
    """And works once it is over, as if nothing had been."""
    with pystage.StagingPool("cuda:0", 1 << 20, issue=issue) as pool:
        staged = pool.stage([run_of(0, 100)])
        relay = torch.arange(10, device="cuda")
        out = torch.zeros(100, dtype=torch.int64, device="cuda")
        ways = [
            lambda: pystage.resolve(staged),
            lambda: pystage.resolve(staged, dtype=torch.int32),
            lambda: pystage.resolve(staged[5:]),
            lambda: pystage.resolve_mixed(staged, relay, relay[:3]),
            lambda: staged.to("cuda:0", non_blocking=True),
            lambda: out.copy_(staged, non_blocking=True),
        ]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for way in ways:
                with pytest.raises(pystage.CaptureError):
                    way()
            out.add_(1)
        graph.replay()
        for way in ways:
            assert way()[5 if len(way()) >= 100 else 0].item() == 5
        assert pool.stats().quarantined_slots == 0
