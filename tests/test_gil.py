"""Signals, exits and other threads while the extension waits or launches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import pystage
from pystage.testing import hold_transfers

from .conftest import HOLDS


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


INTERRUPTED = """
import os, signal, sys, threading, pystage, torch
from pystage import _C
device, what = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
pool = pystage.StagingPool(device, 1 << 16, timeout_s=1000)
held = pool.stage([list(range(12000))])
def known(values):
    return torch_tensor(values, dtype=torch.int64, device=device)
def wait():
    global torch_tensor
    if what == "close":
        pool.close()
    elif what == "stage":
        pool.stage([list(range(12000))])
    elif what == "small_tensors":
        pool.small_tensors([list(range(6000))], [torch.int64])
    else:
        parcel = _C.parcel(
            pool._handle, 1 << 16, device, torch.tensor, ((known.__code__,),), (1,), None
        )
        torch_tensor = parcel.tensor
        known(list(range(6000)))
def interrupt():
    while not (pool.closed if what == "close" else pool.stats().waits):
        pass
    os.kill(os.getpid(), signal.SIGINT)
if what == "close":
    from pystage.testing import hold_transfers
    hold = hold_transfers(pool)
    hold.__enter__()
    ids = pystage.resolve(held)
    del held
threading.Thread(target=interrupt, daemon=True).start()
try:
    wait()
except KeyboardInterrupt:
    print("interrupted")
if what != "close":
    stats = pool.stats()
    assert stats.waits == 1 and stats.wait_seconds > 0 and stats.leased_slots == 1, stats
    del held
    assert pool.stage([[1, 2]]).tolist() == [1, 2]
else:
    hold.__exit__(None, None, None)
"""


@pytest.mark.parametrize("what", ["stage", "small_tensors", "parcel", "close"])
def test_ctrl_c_ends_a_wait(device: str, what: str) -> None:
    """The wait would last 1,000 seconds."""
    done = run(INTERRUPTED, device, what)
    assert done.returncode == 0 and done.stdout.strip() == "interrupted", done.stderr


def test_a_handler_that_raises_nothing_lets_the_wait_go_on() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with pystage.StagingPool("cpu", 1 << 16, timeout_s=60) as pool:
            held = [pool.stage([list(range(12000))])]

            def interrupt_then_free() -> None:
                while pool.stats().waits == 0:
                    pass
                os.kill(os.getpid(), signal.SIGUSR1)
                while not seen:
                    pass
                held.clear()

            thread = threading.Thread(target=interrupt_then_free)
            thread.start()
            assert len(pool.stage([list(range(12000))])) == 12000
            thread.join()
            assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


AT_EXIT = """
import sys, threading, torch, pystage
device, what = sys.argv[1:]
pool = pystage.StagingPool(device, 1 << 22, issue="eager" if what == "eager" else "deferred")
started = threading.Barrier(5)
class Slow:
    def __index__(self):
        return sum(range(50))
batch = [[Slow()] * 200] if what == "index" else [list(range(2000))]
large = [__import__("array").array("q", range(70_000))]  # the GIL is released while it is gathered
def work():
    # Torch itself ends the process where such a thread drops a tensor: none is made below.
    out = torch.empty(70_000 if what == "large" else 2000, dtype=torch.int64, device=device)
    started.wait()
    while True:
        staged = pool.stage(large if what == "large" else batch)
        if what != "index":
            pystage.resolve(staged, out=out)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
started.wait()
while pool.stats().stages < 40:
    pass
print("bye")
"""


@pytest.mark.parametrize("what", ["resolve", "eager", "large", "index"])
def test_daemon_threads_do_not_end_the_process_at_exit(device: str, what: str) -> None:
    """Their threads are in the extension, or ask for the GIL, when the interpreter goes."""
    done = run(AT_EXIT, device, what)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "bye", "")


IN_PYTHON_AT_EXIT = """
import gc, logging, sys, threading, time, torch, pystage
device, what = sys.argv[1:]
pool = pystage.StagingPool(device, 1 << 22)
calls = 0
started = threading.Event()
def count(most):
    global calls
    calls += 1
    if calls > most:
        started.set()
def slow(*_):
    count(5)
    sum(1 for _ in range(200_000))
def brief():
    count(20)
    sum(1 for _ in range(20_000))
class AtTheEnd:
    def __del__(self):
        sum(1 for _ in range(2_000_000))  # the threads run on while the interpreter ends
end = AtTheEnd()
class Big(int):
    def __repr__(self):
        slow()
        return "big"
def of_range():
    try:
        pool.stage([[1, 999]], vocab_size=10)
    except pystage.TokenRangeError:
        count(2000)
def collect(kept=[]):
    kept.append(pool.stage([[1, 2, 3]]))
    if len(kept) > 100:
        kept.clear()
def repr_():
    try:
        pystage._C.small_tensors(pool._handle, [[Big(1 << 80)]], [torch.int64])
    except ValueError:
        pass
def log():
    pool.stage([list(range(40_000))])
    pool.trim()  # the next batch makes the pool grow
if what == "collect":
    main = threading.current_thread()
    gc.callbacks.append(lambda *_: threading.current_thread() is main or brief())
    gc.set_threshold(1, 1, 1)
original = logging.getLogger
if what == "log":
    logging.getLogger = lambda name: slow() or original(name)
def work(do):
    while True:
        do()
do = {"range": of_range, "collect": collect, "repr": repr_, "log": log}[what]
for _ in range(4 if what == "range" else 1):
    threading.Thread(target=work, args=[do], daemon=True).start()
started.wait()
print("bye")
"""


@pytest.mark.parametrize("what", ["range", "collect", "repr", "log"])
def test_threads_in_python_code_that_pystage_calls_do_not_end_the_process_at_exit(
    device: str, what: str
) -> None:
    """An error's class, a collection of garbage, a value's text, the logger."""
    for _ in range(3):
        done = run(IN_PYTHON_AT_EXIT, device, what)
        assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "bye", "")


WAITING_AT_EXIT = """
import sys, threading, pystage
pool = pystage.StagingPool(sys.argv[1], 1 << 16, timeout_s=1000)
big = pool.stage([list(range(12000))])
for _ in range(4):
    threading.Thread(target=lambda: pool.stage([list(range(12000))]), daemon=True).start()
while pool.stats().waits < 4:
    pass
print("bye")
"""


def test_threads_that_wait_for_a_slot_do_not_end_the_process_at_exit(device: str) -> None:
    done = run(WAITING_AT_EXIT, device)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "bye", "")


FULL_QUEUE = """
import sys, threading, torch, pystage
from ctypes import CFUNCTYPE, c_void_p, CDLL, py_object, pythonapi
pool = pystage.StagingPool("cuda:0", 1 << 22)
out = torch.empty(8, dtype=torch.int64, device="cuda:0")
turn, go = threading.Event(), threading.Event()

# A host function on the stream that needs the GIL: the stream waits for Python.
@CFUNCTYPE(None, c_void_p)
def needs_python(_):
    go.wait(60)

staged = pool.stage([range_ids]) if (range_ids := list(range(8))) else None
stream = torch.cuda.Stream()
cudart = torch.cuda.cudart()
import glob, os
path = next(p for p in open("/proc/self/maps").read().split() if "libcudart" in p)
launch = CDLL(path).cudaLaunchHostFunc
launch.argtypes = [c_void_p, c_void_p, c_void_p]
with torch.cuda.stream(stream):
    assert launch(stream.cuda_stream, needs_python, None) == 0
    done = []
    def release():
        # Once the queue is full the launch below waits: only this thread can end that.
        while counted[0] < 1100:
            if stalled.wait(0.2) or counted[0] == last[0]:
                break
            last[0] = counted[0]
        go.set()
    counted, last, stalled = [0], [-1], threading.Event()
    helper = threading.Thread(target=release)
    helper.start()
    for _ in range(6000):
        if sys.argv[1] == "resolve":
            pystage.resolve(staged, out=out)
        else:
            staged.to("cuda:0", non_blocking=True)
        counted[0] += 1
helper.join()
torch.cuda.synchronize()
assert out.tolist() == list(range(8)) or sys.argv[1] != "resolve"
print("done", counted[0])
"""


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["resolve", "to"])
def test_a_full_launch_queue_does_not_keep_the_gil(what: str) -> None:
    """The stream waits for a Python thread, and its queue is full: the launch has to wait without
    the GIL, or neither goes on."""
    done = run(FULL_QUEUE, what)
    assert done.returncode == 0 and done.stdout.split() == ["done", "6000"], done.stderr


@pytest.mark.skipif(not HOLDS, reason="holds a stream")
@pytest.mark.parametrize("issue", ["deferred", "eager"])
def test_threads_resolve_one_batch_at_once(device: str, issue: str) -> None:
    """The eager ids are handed out once; all others get a transfer of their own."""
    with pystage.StagingPool(device, 1 << 20, issue=issue) as pool:  # type: ignore[arg-type]
        want = list(range(500))
        for _ in range(20):
            staged = pool.stage([want])
            results: list[torch.Tensor] = []
            start = threading.Barrier(4)

            def resolve(
                staged: pystage.StagedTokens = staged,
                start: threading.Barrier = start,
                results: list[torch.Tensor] = results,
            ) -> None:
                start.wait()
                results.append(pystage.resolve(staged))

            threads = [threading.Thread(target=resolve) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [ids.tolist() for ids in results] == [want] * 4
            storages = {(ids.data_ptr(), ids.device) for ids in results}
            assert len(storages) == 4


def test_the_last_lease_of_a_closed_pool_frees_its_memory(device: str) -> None:
    pool = pystage.StagingPool(device, 1 << 20)
    staged = pool.stage([[1, 2, 3]])
    pool.close()
    part = staged[1:]
    del staged
    assert pool.stats().reserved_bytes > 0 and part.tolist() == [2, 3]
    del part
    assert pool.stats().reserved_bytes == 0


@pytest.mark.gpu
def test_memory_is_unpinned_without_the_gil() -> None:
    """Unpinning waits for the device, and the device for a Python thread."""
    pool = pystage.StagingPool("cuda:0", 1 << 20)
    staged = pool.stage([[1, 2, 3]])
    pool.close()
    order: list[str] = []
    go = threading.Event()
    other = pystage.StagingPool("cuda:0", 1 << 20)
    hold = hold_transfers(other)
    hold.__enter__()

    def release() -> None:
        go.wait()
        order.append("released")
        hold.__exit__(None, None, None)

    thread = threading.Thread(target=release)
    thread.start()
    go.set()
    del staged
    order.append("unpinned")
    thread.join()
    assert order == ["released", "unpinned"]
