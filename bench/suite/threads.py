"""Regime: several host threads, and a CPU that is busy with other work."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from bench.common import summary, two_calls_time
from bench.suite.cells import SHAPES, Bench, Cell
from bench.suite.contenders import (
    BUFFER,
    DEFERRED,
    EAGER,
    SGLANG,
    TORCH,
    UVA,
    Contender,
)
from bench.suite.host import host_cell

THREADS = (1, 2, 4, 8)
THREADED = (DEFERRED, EAGER, TORCH, SGLANG)


def regime(bench: Bench) -> dict[str, Cell]:
    """Several threads, each with its own stream, that share one pool; and a busy CPU."""
    cells: dict[str, Cell] = {
        f"{n} threads, 8 x 1024 array": partial(_threads_cell, bench, n) for n in THREADS
    }
    for shape in ("1 x 8192", "8 x 1024", "64 x 128"):
        cells[f"CPU under load, {shape} array"] = partial(_loaded_cell, bench, SHAPES[shape])
    for shape in ("1 x 8192", "64 x 128"):
        name = f"Python thread beside, {shape} array"
        cells[name] = partial(_python_beside_cell, bench, SHAPES[shape])
    return cells


def _threads_cell(bench: Bench, count: int) -> dict[str, Any]:
    """All threads make blocks of calls at once. Contenders take turns, block by block."""
    device = bench.device
    everybody = bench.contenders.all(THREADED, 8192)
    streams = [device.new_stream() for _ in range(count)]
    inputs, rotated = bench.inputs("array", SHAPES["8 x 1024"], False, 64)
    blocks = 10
    each = max(1, -(-bench.samples // (count * blocks)))
    times: dict[str, list[float]] = {c.name: [] for c in everybody}
    walls: dict[str, float] = dict.fromkeys(times, 0.0)
    failed: dict[str, Any] = {}

    def work(contender: Contender, number: int, gate: threading.Barrier, into: list[float]) -> None:
        side = streams[number]
        done = device.event()
        with device.on(side):
            gate.wait()
            for i in range(each):
                batch = inputs(number * each + i)
                start = time.perf_counter_ns()
                staged = contender.stage(batch)
                ids = contender.resolve(staged)
                stop = time.perf_counter_ns()
                done.record()
                done.synchronize()
                into.append((stop - start) / 1e3)
                del staged, ids

    try:
        for block in range(-1, blocks):
            for contender in bench.shuffled(everybody):
                name = contender.name
                if name in failed:
                    continue
                results: list[list[float]] = [[] for _ in range(count)]
                wall = _together(
                    [partial(work, contender, n, into=results[n]) for n in range(count)]
                )
                if isinstance(wall, str):
                    failed[name] = {"error": wall}
                elif block >= 0:
                    walls[name] += wall
                    times[name] += [t for values in results for t in values]
    finally:
        for contender in everybody:
            contender.close()
    rows: dict[str, Any] = {
        name: {
            "total": summary(values),
            "batches_per_second": round(len(values) / walls[name], 1),
        }
        for name, values in times.items()
        if name not in failed
    }
    return {"threads": count, "rotated_bytes": rotated, "contenders": rows | failed}


def _together(work: list[Callable[..., None]]) -> float | str:
    """Seconds until all are done, each in its own thread and started at once; or the error."""
    gate = threading.Barrier(len(work) + 1)
    errors: list[str] = []

    def guarded(call: Callable[..., None]) -> None:
        try:
            call(gate=gate)
        except Exception:
            errors.append(traceback.format_exc())
            gate.abort()

    started = [threading.Thread(target=guarded, args=(call,)) for call in work]
    for thread in started:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # the thread that broke it reports why
        gate.wait()
    start = time.perf_counter()
    for thread in started:
        thread.join()
    return errors[0] if errors else time.perf_counter() - start


BUSY_LOOP = "import numpy as n\na = n.ones(4 << 20)\nprint(flush=True)\nwhile True: a += 1"


@contextlib.contextmanager
def cpu_load(processes: int) -> Iterator[None]:
    """Runs this many processes that read and write memory all the time."""
    command = [sys.executable, "-c", BUSY_LOOP]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(processes)]
    try:
        for process in started:
            process.stdout.readline()  # type: ignore[union-attr]
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _loaded_cell(bench: Bench, lengths: Sequence[int]) -> dict[str, Any]:
    processes = os.cpu_count() or 1
    with cpu_load(processes):
        result = host_cell(bench, "array", lengths, False)
    return result | {"load_processes": processes}


@contextlib.contextmanager
def python_beside() -> Iterator[None]:
    """Runs a thread of this process that computes in Python. It always requests the GIL, so a call
    that releases the GIL waits up to a switch interval (5 ms) to get it back."""
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            for _ in range(1000):
                number = (number * 31 + 7) % 1_000_003

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _python_beside_cell(bench: Bench, lengths: Sequence[int]) -> dict[str, Any]:
    """Beside a busy Python thread. There is no lower bound here: it would wait for the GIL in
    places where no contender does."""
    everybody = bench.contenders.all((DEFERRED, EAGER, TORCH, SGLANG, BUFFER, UVA), sum(lengths))
    samples = bench.few_samples
    inputs, rotated = bench.inputs("array", lengths, False, samples * len(everybody))
    try:
        with python_beside():
            rows = two_calls_time(
                {c.name: (c.stage, c.resolve) for c in everybody},
                inputs,
                samples,
                min(bench.warmup, 10),
                bench.device.synchronize,
            )
    finally:
        for contender in everybody:
            contender.close()
    return {"ids": sum(lengths), "rotated_bytes": rotated, "contenders": rows}
