"""Runs a pool on a GPU while calls of the driver fail. Prints what it observed as JSON.

LD_PRELOAD must name driver_faults.c, built as a shared library. test_driver_faults.py does this:

    LD_PRELOAD=$LIBRARY python -m tests.faults.life MODE $LIBRARY
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
import warnings
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import pystage
from pystage.testing import hold_transfers

ONCE, LOST, DROP = range(3)
UNKNOWN, OUT_OF_MEMORY, LAUNCH_FAILED = 999, 2, 719
DEVICE = "cuda:0"

# A failure of these may be no error: what only gives something back or asks for figures does not
# throw, and without cuCtxGetCurrent the context is made current anyway.
SILENT = {
    "cuMemFreeHost",
    "cuEventDestroy",
    "cuEventQuery",
    "cuStreamDestroy",
    "cuCtxGetCurrent",
    "cuMemGetInfo",
    "cuCtxPopCurrent",
    "cuCtxPushCurrent",
    "cuThreadExchangeStreamCaptureMode",
}
MADE_AND_GIVEN_BACK = [
    ("cuMemHostAlloc", "cuMemFreeHost"),
    ("cuEventCreate", "cuEventDestroy"),
    ("cuStreamCreate", "cuStreamDestroy"),
]


class Faults:
    """The preloaded library."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.faults_caught.restype = ctypes.c_char_p
        self._library.faults_clear.restype = ctypes.c_char_p
        self._library.faults_name.restype = ctypes.c_char_p
        self._library.faults_succeeded.restype = ctypes.c_long

    def arm(self, nth: int, code: int, mode: int, name: str = "") -> None:
        self._library.faults_arm(name.encode(), nth, code, mode)

    def caught(self) -> str:
        """The call that failed first, empty if none did."""
        return str(self._library.faults_caught().decode())

    def clear(self) -> str:
        """Ends the failing. Returns the call that failed first, empty if none did."""
        return str(self._library.faults_clear().decode())

    def names(self) -> list[str]:
        """The driver's functions that pystage has asked for."""
        count = self._library.faults_count()
        return [self._library.faults_name(i).decode() for i in range(count)]

    def live(self) -> int:
        """How much was made and not given back."""
        done = {name: self._library.faults_succeeded(name.encode()) for name in self.names()}
        return sum(done.get(made, 0) - done.get(back, 0) for made, back in MADE_AND_GIVEN_BACK)


def ids(start: int, count: int) -> array[int]:
    return array("q", range(start, start + count))


def expect(out: torch.Tensor, start: int, count: int) -> None:
    assert torch.equal(out.cpu(), torch.arange(start, start + count)), out


def in_new_thread(work: Callable[[], Any]) -> Any:
    """Runs it where CUDA has no context."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except pystage.DeviceError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], pystage.DeviceError):
        raise results[0]
    return results[0]


class Life:
    """What a server does with a pool, step by step; a step that failed can be done again."""

    def __init__(self, issue: str, transfer: str) -> None:
        self.options: dict[str, Any] = {"issue": issue, "transfer": transfer, "wire": "int64"}
        self.pool: Any = None
        self.staged: Any = None
        self.side = torch.cuda.Stream()
        self.relay = torch.arange(7, device=DEVICE)
        self.indices = torch.tensor([3, 5], device=DEVICE)

    def make(self) -> None:
        self.pool = pystage.StagingPool(
            DEVICE, 8 << 20, reserve_bytes=4096, timeout_s=0, **self.options
        )

    def stage(self) -> None:
        self.staged = self.pool.stage([ids(5, 100)])

    def resolve(self) -> None:
        expect(pystage.resolve(self.staged), 5, 100)

    def resolve_on_another_stream(self) -> None:
        with torch.cuda.stream(self.side):
            expect(pystage.resolve(self.staged[1:]), 6, 99)

    def blocking(self) -> None:
        expect(self.staged.to(DEVICE), 5, 100)

    def mixed(self) -> None:
        out = pystage.resolve_mixed(self.staged, self.relay, self.indices)
        assert out[100:].tolist() == [3, 5]

    def grow_in_a_thread(self) -> None:
        self.staged = in_new_thread(lambda: self.pool.stage([ids(9, 200_000)]))

    def resolve_in_a_thread(self) -> None:
        expect(in_new_thread(lambda: pystage.resolve(self.staged)), 9, 200_000)

    def hold(self) -> None:
        with hold_transfers(self.pool):
            pass

    def figures(self) -> None:
        self.staged = None
        self.pool.stats()
        in_new_thread(self.pool.stats)

    def trim(self) -> None:
        torch.cuda.synchronize()
        self.pool.trim()

    def close(self) -> None:
        in_new_thread(self.pool.close)
        self.pool = None
        gc.collect()

    def steps(self) -> list[Callable[[], None]]:
        steps = [self.make, self.stage, self.resolve, self.resolve_on_another_stream, self.blocking]
        steps += [self.mixed, self.grow_in_a_thread, self.resolve_in_a_thread]
        steps += [self.hold] if self.options["issue"] == "deferred" else []
        return [*steps, self.figures, self.trim, self.close]


VARIANTS = [("deferred", "kernel"), ("eager", "kernel"), ("deferred", "copy_engine")]


def in_child(work: Callable[[], str]) -> str:
    """Runs it in a fork, where CUDA is not initialised yet. Returns its result."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.write(writing, work().encode())
        os.close(writing)
        sys.exit(0)  # as any process ends, with whatever is still there
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, (result, status)
    return result


def fail_once(faults: Faults, life: Life, nth: int, steps: list[Callable[[], None]]) -> str:
    """Lets the nth call fail, and does the step again that it was part of. Returns the call."""
    before = faults.live()
    hit = ""
    faults.arm(nth, UNKNOWN, ONCE)
    for step in steps:
        try:
            step()
        except pystage.DeviceError as error:
            assert not hit, f"{hit} failed, and later {step.__name__}: {error}"
            hit = faults.clear()
            assert hit and hit in str(error) and DEVICE in str(error), (hit, error)
            step()
    raised = bool(hit)
    hit = hit or faults.clear()
    assert raised or not hit or hit in SILENT, (nth, hit)
    # Looks at the slots of a pool that was closed when the query of a fence failed.
    pystage.StagingPool(DEVICE, 4096, reserve_bytes=0).close()
    # A slot whose fence could not be recorded is never handed out again, nor freed: the record
    # failed, or the context could not be made current for it.
    allowed = 0 if not hit or (raised and hit not in {"cuEventRecord", "cuCtxPushCurrent"}) else 1
    leaked = faults.live() - before
    assert 0 <= leaked <= allowed, (life.options, nth, hit, leaked)
    return hit


def each(faults: Faults) -> dict[str, Any]:
    """Every call fails once, at every place: a typed error that names it, then the same again."""

    def first_pool(nth: int) -> str:
        life = Life(*VARIANTS[0])
        return fail_once(faults, life, nth, [life.make, life.close])

    def whole_life(nth: int, variant: tuple[str, str]) -> str:
        life = Life(*variant)
        return fail_once(faults, life, nth, life.steps())

    hits: list[str] = []
    while hit := in_child(lambda: first_pool(len(hits) + 1)):
        hits.append(hit)
    for variant in VARIANTS:
        nth = 1
        while hit := whole_life(nth, variant):
            hits.append(hit)
            nth += 1
    # The first is for a device that could not be made, the second for contexts that are not ours.
    never = set(faults.names()) - set(hits) - {"cuDevicePrimaryCtxRelease", "cuCtxGetDevice"}
    assert not never, f"no failure of {never} was tried"
    return {"places": len(hits), "calls": sorted(set(hits))}


def lose(faults: Faults, life: Life, nth: int, steps: list[Callable[[], None]]) -> int:
    """Does the steps that can be done, on a device that is lost from the nth call on. Returns how
    many failed."""
    errors = 0
    faults.arm(nth, LAUNCH_FAILED, LOST)
    for step in steps:
        needs_tokens = step not in (life.make, life.stage, life.hold, life.trim, life.close)
        if (step != life.make and life.pool is None) or (needs_tokens and life.staged is None):
            continue
        try:
            step()
        except pystage.DeviceError:
            errors += 1
    return errors


def lost(faults: Faults) -> dict[str, Any]:
    """The device is lost at every place: typed errors, and the next pool works once it is back."""
    places = 0
    for variant in VARIANTS:
        nth = 0
        hit = "first"
        while hit:
            nth += 1
            life = Life(*variant)
            errors = lose(faults, life, nth, life.steps())
            del life
            gc.collect()
            hit = faults.clear()
            assert errors or not hit or hit in SILENT, (variant, nth, hit)
        places += nth - 1
    life = Life(*VARIANTS[0])
    for step in life.steps():
        step()
    return {"places": places}


def exits(faults: Faults) -> dict[str, Any]:
    """A process ends with a pool, tokens and transfers on a lost device: exit code 0. Each place
    takes a process, so one in eight is tried."""
    kept: list[Life] = []

    def end(variant: tuple[str, str], nth: int) -> str:
        Life(*variant).make()  # the device is made, and a pool that is dropped
        kept.append(Life(*variant))
        lose(faults, kept[0], nth, kept[0].steps()[:-3])
        return faults.caught()

    places = 0
    for variant in VARIANTS:
        nth = 1
        while in_child(partial(end, variant, nth)):
            nth += 8
            places += 1
    return {"places": places}


def asserts(faults: Faults) -> dict[str, Any]:
    """A real loss: an index that asserts on the device. Errors, then the end of the process."""
    kept: list[Life] = []

    def end(variant: tuple[str, str]) -> str:
        life = Life(*variant)
        kept.append(life)
        life.make()
        life.stage()
        life.indices += 100
        pystage.resolve_mixed(life.staged, life.relay, life.indices)
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            assert "device-side assert" in str(error), error
        for step in (life.resolve, life.blocking, life.trim):
            try:
                step()
            except RuntimeError:  # DeviceError, or torch's own
                continue
            raise AssertionError(f"{step.__name__} worked on a lost device")
        life.pool.stats()
        life.pool.close()
        return "dead"

    return {str(variant): in_child(partial(end, variant)) for variant in VARIANTS}


def stale(faults: Faults) -> dict[str, Any]:
    """The probe's second kernel does not run, so what it should have read is not seen."""
    faults.arm(2, 0, DROP, "cuLaunchKernelEx")
    return pageable(faults, "stale bytes")


def refused(faults: Faults) -> dict[str, Any]:
    """The platform gives no pinned memory."""
    faults.arm(1, OUT_OF_MEMORY, ONCE, "cuMemHostAlloc")
    return pageable(faults, "cuMemHostAlloc of 4096 bytes failed")


def pageable(faults: Faults, reason: str) -> dict[str, Any]:
    life = Life("deferred", "kernel")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        life.make()
        assert faults.clear()
        life.stage()
    assert [w.category for w in seen] == [pystage.PageableMemoryWarning], seen
    assert reason in str(seen[0].message), seen[0].message
    assert not life.staged.is_pinned()
    assert life.pool.stats().pageable_bytes == 4096
    life.resolve()
    torch.cuda.synchronize()
    assert faults.live() == 1  # the fence of the transfer
    return {"reason": reason}


def main() -> None:
    modes = [each, lost, exits, asserts, stale, refused]
    start = time.monotonic()
    report = {mode.__name__: mode for mode in modes}[sys.argv[1]](Faults(sys.argv[2]))
    report["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
