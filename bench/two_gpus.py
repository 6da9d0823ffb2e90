"""Checks which contexts and current devices pools leave behind on a machine with two GPUs.

    python -m bench.two_gpus [--out two_gpus.json] ['only GPU 1' ...]

Every scenario runs in its own process, because a context stays once it is made. Nothing else may
use the GPUs meanwhile, because the memory in use is compared. Writes JSON to bench/results. The
exit code is 1 if a scenario failed. csrc/tests/test_cuda_device.cpp has the same checks with a stub
of the driver.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import threading
import traceback
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import pystage
from bench.common import write_result
from pystage.testing import hold_transfers, synchronize

ROOT = Path(__file__).resolve().parents[1]
DEVICE_ORDINAL = 9  # a CUpointer_attribute


class Driver:
    """Calls the driver directly, since a call of the runtime would make a context."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} failed: {code}")

    def has_context(self, device: int) -> bool:
        flags, active = ctypes.c_uint(), ctypes.c_int()
        self._call("cuDevicePrimaryCtxGetState", device, ctypes.byref(flags), ctypes.byref(active))
        return bool(active.value)

    def current(self) -> int | None:
        """The device of the calling thread's current context. None if it has none."""
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context.value:
            return None
        self._call("cuCtxGetDevice", ctypes.byref(device))
        return device.value

    def drop_current(self) -> None:
        self._call("cuCtxSetCurrent", None)

    def device_of(self, tensor: torch.Tensor) -> int:
        """The device that holds the memory, according to the driver and not to torch."""
        ordinal = ctypes.c_int()
        pointer = ctypes.c_uint64(tensor.data_ptr())
        self._call("cuPointerGetAttribute", ctypes.byref(ordinal), DEVICE_ORDINAL, pointer)
        return ordinal.value


@cache
def driver() -> Driver:
    return Driver()


def nvidia_smi(what: str, *fields: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split(", ") for line in text.splitlines()]


def used_mib() -> list[int]:
    """The memory in use on each GPU, by all processes."""
    return [int(mib) for (mib,) in nvidia_smi("gpu", "memory.used")]


def gpus_of_this_process() -> list[int]:
    """The GPUs on which nvidia-smi lists this process."""
    gpus = [uuid for (uuid,) in nvidia_smi("gpu", "uuid")]
    apps = nvidia_smi("compute-apps", "pid", "gpu_uuid")
    return sorted(gpus.index(uuid) for pid, uuid in apps if int(pid) == os.getpid())


Step = tuple[str, Callable[[], Any]]


def ids(start: int, count: int) -> array[int]:
    return array("q", range(start, start + count))


def expect(out: torch.Tensor, start: int, count: int) -> None:
    assert torch.equal(out.cpu(), torch.arange(start, start + count)), out


Run = Callable[[Callable[[], Any]], Any]


def directly(work: Callable[[], Any]) -> Any:
    return work()


def in_thread(work: Callable[[], Any]) -> Any:
    """Runs ``work`` in a new thread, which has no context."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def without_context(work: Callable[[], Any]) -> None:
    """Runs only calls of the pool in a new thread. It must have no context afterwards either."""

    def checked() -> None:
        work()
        assert driver().current() is None, f"GPU {driver().current()} was made current"

    in_thread(checked)


class Life:
    """A pool's life in steps."""

    def __init__(self, device: int, options: dict[str, Any]) -> None:
        self.device = f"cuda:{device}"
        self.options = options
        self.pool: Any = None
        self.staged: Any = None
        self.out: Any = None

    def make(self) -> None:
        self.pool = pystage.StagingPool(self.device, 16 << 20, reserve_bytes=4096, **self.options)

    def grow(self) -> None:
        self.staged = self.pool.stage([ids(3, 300_000)])

    def resolve(self) -> None:
        self.out = pystage.resolve(self.staged)

    def figures_in_flight(self) -> None:
        """Queries a fence that is pending, then one that is done."""
        with hold_transfers(self.pool):
            self.out = pystage.resolve(self.pool.stage([ids(0, 10)]))
            assert in_thread(self.pool.stats).in_flight_slots > 0
        synchronize(self.pool)
        expect(self.out, 0, 10)

    def close(self) -> None:
        self.staged = self.out = None
        self.pool.close()

    def steps(self, where: Run) -> list[Step]:
        return [
            ("make", lambda: where(self.make)),
            ("grow", lambda: where(self.grow)),
            ("resolve", lambda: where(self.resolve)),
            ("values", lambda: expect(self.out, 3, 300_000)),
            ("blocking", lambda: expect(self.staged[5:50].to(self.device), 8, 45)),
            ("drop", lambda: where(lambda: setattr(self, "staged", None))),
            ("figures", self.figures_in_flight),
            ("stats", lambda: without_context(self.pool.stats)),
            ("trim", lambda: without_context(self.pool.trim)),
            ("close", lambda: where(self.close)),
        ]


VARIANTS: list[dict[str, Any]] = [{}, {"issue": "eager"}, {"transfer": "copy_engine"}]


def only_one(device: int) -> dict[str, Any]:
    """Nothing here needs the other GPU, so no thread may make a context on it."""
    other = 1 - device
    driver()  # cuInit takes 4 MiB on each GPU, a context several hundred
    before = used_mib()[other]
    done: list[str] = []
    for options in VARIANTS:
        for name, where in (("main", directly), ("thread", in_thread)):
            life = Life(device, options)
            for step, work in life.steps(where):
                work()
                done.append(f"{options} {name} {step}")
                assert not driver().has_context(other), f"a context on GPU {other} after {done[-1]}"
    assert driver().has_context(device)
    listed, after = gpus_of_this_process(), used_mib()[other]
    assert other not in listed and after == before, (listed, before, after)
    return {"steps": len(done), "listed_on": listed, "other_gpu_mib": [before, after]}


def other_is_current() -> dict[str, Any]:
    """A pool of GPU 1 while GPU 0 is busy and current. GPU 0 must stay current, and its memory must
    not change."""
    work = torch.ones(1 << 20, device="cuda:0")
    torch.cuda.set_device(0)
    for options in VARIANTS:  # torch uses each device for the first time
        for _, step in Life(1, options).steps(directly):
            step()
    work.add_(1)
    torch.cuda.synchronize(0)
    free, allocated = torch.cuda.mem_get_info(0)[0], torch.cuda.memory_allocated(0)
    used = used_mib()[0]
    done = 0
    for options in VARIANTS:
        for name, step in Life(1, options).steps(directly):
            work.add_(1)
            step()
            assert driver().current() == 0 and torch.cuda.current_device() == 0, name
            done += 1
    assert torch.cuda.memory_allocated(0) == allocated
    assert torch.cuda.mem_get_info(0)[0] == free
    assert work[0].item() == 2 + done
    after = used_mib()[0]
    assert after == used, (used, after)
    return {"steps": done, "other_gpu_mib": [used, after]}


def both() -> dict[str, Any]:
    """Pools of both GPUs, used by threads that have one GPU or the other current, or none at
    first."""
    pools = [pystage.StagingPool(f"cuda:{d}", 8 << 20, reserve_bytes=4096) for d in (0, 1)]
    batches = 500

    def run(number: int) -> None:
        rng = random.Random(number)
        for i in range(batches):
            device = rng.randrange(2)
            count = rng.choice([1, 100, 5000, 40_000])
            staged = pools[device].stage([ids(i, count)])
            if number % 3:
                torch.cuda.set_device((number + i) % 2)
            before = torch.cuda.current_device()
            out = pystage.resolve(staged)
            assert out.device.index == driver().device_of(out) == device
            assert torch.cuda.current_device() == before
            del staged
            expect(out, i, count)

    errors: list[str] = []

    def guarded(number: int) -> None:
        try:
            run(number)
        except BaseException:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, "\n".join(errors)
    for pool in pools:
        pool.close()
    return {"batches": batches * len(threads)}


def no_current() -> dict[str, Any]:
    """A library removes the thread's current context. The pool must go on, as torch does."""
    for device in (1, 0):
        pool = pystage.StagingPool(f"cuda:{device}")
        staged = pool.stage([ids(7, 1000)])
        expect(pystage.resolve(staged), 7, 1000)
        driver().drop_current()
        out = pystage.resolve(staged)
        assert driver().device_of(out) == device
        del staged  # puts it in flight, so that its fence is queried
        driver().drop_current()
        assert pool.stats().leased_slots == 0
        assert driver().current() is None
        expect(out, 7, 1000)
        pool.close()
    return {}


def lazy_current() -> dict[str, Any]:
    """torch reports GPU 0 as current while CUDA still has GPU 1. torch does so to save a context on
    GPU 0."""
    with torch.cuda.device(1):
        torch.zeros(1, device="cuda:1")
    told = {"torch": torch.cuda.current_device(), "cuda": driver().current()}
    assert told == {"torch": 0, "cuda": 1} and not driver().has_context(0), told
    with pystage.StagingPool("cuda:0") as pool:
        out = pystage.resolve(pool.stage([ids(7, 1000)]))
        assert driver().device_of(out) == 0
        expect(out, 7, 1000)
    return {}


def peers() -> dict[str, Any]:
    """Ids of one GPU are copied to the other, while both read each other's memory directly."""
    direct = all(torch.cuda.can_device_access_peer(d, 1 - d) for d in (0, 1))
    block = [torch.ones(64 << 20, device=f"cuda:{d}") for d in (0, 1)]
    pools = [pystage.StagingPool(f"cuda:{d}", 8 << 20) for d in (0, 1)]
    for i in range(50):
        for d in (0, 1):
            block[1 - d].copy_(block[d], non_blocking=True)  # busy with the other's memory
            out = pystage.resolve(pools[d].stage([ids(i, 40_000)]))
            there = out.to(f"cuda:{1 - d}", non_blocking=True)
            assert driver().device_of(out) == d and driver().device_of(there) == 1 - d
            expect(there, i, 40_000)
    for pool in pools:
        pool.close()
    return {"batches": 100, "direct": direct}


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "only GPU 1": lambda: only_one(1),
    "only GPU 0": lambda: only_one(0),
    "the other is current": other_is_current,
    "both": both,
    "no current context": no_current,
    "lazy current device": lazy_current,
    "peers": peers,
}


def run_apart(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.two_gpus", "--here", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        return {"ok": False, "error": done.stderr[-4000:], "rc": done.returncode}
    return {"ok": True, **json.loads(done.stdout.splitlines()[-1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--out", type=Path, help="JSON file; default in bench/results")
    parser.add_argument("--here", choices=list(SCENARIOS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(SCENARIOS[options.here]()))
        return 0
    if torch.cuda.device_count() < 2:
        parser.error(f"needs two GPUs, here are {torch.cuda.device_count()}")
    found: dict[str, Any] = {}
    for name in options.scenarios or SCENARIOS:
        found[name] = run_apart(name)
        print(f"{name}: {found[name]}", flush=True)
    kind = torch.cuda.get_device_name(0).lower().replace(" ", "-")
    print("written to", write_result(f"two-gpus-2x{kind}", {"scenarios": found}, options.out))
    return 0 if all(s["ok"] for s in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
