"""Regime: cold start and drift."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from bench.common import summary
from bench.device import Absent, Host
from bench.suite.cells import Bench, Cell
from bench.suite.contenders import (
    BATCH,
    BUFFER,
    CUPY,
    DEFERRED,
    EAGER,
    ENGINE,
    SGLANG,
    TORCH,
    UVA,
    WIDE,
    Contender,
    count_of,
)

DRIFTERS = (DEFERRED, EAGER, ENGINE, WIDE, TORCH, SGLANG, BUFFER, UVA, CUPY, BATCH)
NEW_SIZES = (128, 1024, 8192, 65536, 524288, 1048576)


def regime(bench: Bench) -> dict[str, Cell]:
    """From a cold start over a long trace: pinned memory, allocations, and the slowest call.

    Contenders run one after the other. Several of them share torch's allocator, so in turn one
    would use memory that another has allocated.
    """
    cells: dict[str, Cell] = {
        f"trace, {name}": partial(_drift_cell, bench, name) for name in DRIFTERS
    }
    for name in DRIFTERS:
        cells[f"new sizes, {name}"] = partial(_new_sizes_cell, bench, name)
    return cells


def _warm_process(bench: Bench, name: str) -> None:
    """Loads kernels and compiles code first, so that the first contender does not pay for it."""
    contender = bench.contenders.make(name, 64)
    if contender is not None:
        contender.resolve(contender.stage(bench.requests("array", [64], 0)))
        bench.device.synchronize()
        contender.close()


class Pinned:
    """The pinned memory that a contender holds, from whichever allocator counts it."""

    def __init__(self, device: Host, contender: Contender, before: tuple[int, int]) -> None:
        self.device, self.contender, self.before = device, contender, before

    def now(self) -> tuple[int, int]:
        """Bytes held, and the number of allocations so far."""
        if self.contender.pinned is not None:
            return self.contender.pinned()
        now = self.device.pinned_bytes()
        return now[0] - self.before[0], now[1] - self.before[1]


def _drift_cell(bench: Bench, name: str) -> dict[str, Any]:
    device, batches = bench.device, bench.trace
    _warm_process(bench, name)
    largest = max(map(count_of, batches))  # a buffer of fixed size is as large
    device.forget_pinned()
    before = device.pinned_bytes()
    start = time.perf_counter_ns()
    contender = bench.contenders.make(name, largest)
    made_us = (time.perf_counter_ns() - start) / 1e3
    if contender is None:
        raise Absent(bench.contenders.why_not(name))
    pinned = Pinned(device, contender, before)
    warm = len(batches) // 10
    times: list[float] = []
    held: list[tuple[int, int]] = []
    allocations = 0
    last: Any = None  # keeps the previous batch in flight while the next one is staged
    try:
        for i, batch in enumerate(batches):
            if i == warm:
                allocations = pinned.now()[1]
            start = time.perf_counter_ns()
            staged = contender.stage(batch)
            ids = contender.resolve(staged)
            stop = time.perf_counter_ns()
            device.synchronize()
            last = (staged, ids)
            times.append((stop - start) / 1e3)
            if i % max(1, len(batches) // 60) == 0:
                held.append((i, pinned.now()[0]))
        del last, staged, ids
        end_bytes, end_allocations = pinned.now()
    finally:
        contender.close()
    counted = name != BATCH  # uses memory of the driver, which cannot be counted
    return {
        "batches": len(batches),
        "warm_up_batches": warm,
        "distinct_sizes": len({count_of(b) for b in batches}),
        "contenders": {
            name: {
                "total": summary(times),
                "after_warm_up": summary(times[warm:]),
                "first_call": round(times[0], 3),
                "made": round(made_us, 3),
                "worst_call": round(max(times), 3),
                "allocations_after_warm_up": end_allocations - allocations if counted else None,
                "allocations": end_allocations if counted else None,
                "pinned_bytes": end_bytes if counted else None,
                "pinned_bytes_over_batches": held if counted else [],
            }
        },
    }


def _new_sizes_cell(bench: Bench, name: str) -> dict[str, Any]:
    """Times the first call of each size with a newly made contender, repeatedly."""
    device = bench.device
    sizes = [n for n in NEW_SIZES if not bench.quick or n <= 65536]
    batches = [bench.requests("array", [n], n) for n in sizes]
    first: dict[int, list[float]] = {n: [] for n in sizes}
    made: list[float] = []
    _warm_process(bench, name)
    for _ in range(-(-bench.samples // len(sizes))):
        device.forget_pinned()
        start = time.perf_counter_ns()
        contender = bench.contenders.make(name, max(sizes))
        made.append((time.perf_counter_ns() - start) / 1e3)
        if contender is None:
            raise Absent(bench.contenders.why_not(name))
        try:
            for n, batch in zip(sizes, batches, strict=True):
                start = time.perf_counter_ns()
                staged = contender.stage(batch)
                ids = contender.resolve(staged)
                first[n].append((time.perf_counter_ns() - start) / 1e3)
                device.synchronize()
                del staged, ids
        finally:
            contender.close()
        del contender
    rows = {str(n): summary(values) for n, values in first.items()}
    return {"contenders": {name: {"first_call_of_a_size": rows, "made": summary(made)}}}
