"""Regime: time until the ids are on the device."""

from __future__ import annotations

import itertools
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.common import summary
from bench.compiled import compiled
from bench.copies import Copies
from bench.device import IN_STREAM_ORDER, Absent, Host
from bench.suite.cells import MIB, Bench, Cell, Once
from bench.suite.contenders import (
    BUFFER,
    CUPY,
    DEFERRED,
    EAGER,
    EMPTY,
    ENGINE,
    READY,
    READY_BATCH,
    RUNNER,
    SGLANG,
    UVA,
    WIDE,
)

PIECES = {"32 KiB": 32 << 10, "512 KiB": 512 << 10, "16 MiB": 16 << 20, "256 MiB": 256 << 20}
DIRECTIONS = ("H2D", "D2H", "H2D and D2H")
ENGINE_MOVER, BATCH_MOVER, KERNEL_MOVER = "copy engine", "cudaMemcpyBatchAsync", "kernel"
MOVERS = (ENGINE_MOVER, BATCH_MOVER, KERNEL_MOVER)
LATENCY_IDS = 8192
BULK = "H2D, 2 x 256 MiB by copy engine"
WAITED = "alone, after a wait"


def regime(bench: Bench) -> dict[str, Cell]:
    """Time from the call until the ids are on the device, alone and behind KV-cache traffic.

    Before a call behind traffic, the host waits for the traffic to start. During that wait its
    caches lose code and data that the call needs. A cell with the same wait but without traffic
    shows how much time this costs.
    """
    wide = (DEFERRED, EAGER, ENGINE, WIDE, SGLANG, BUFFER, UVA, RUNNER, CUPY, READY, READY_BATCH)
    few = (DEFERRED, READY)
    bulk = partial(Traffic, bench.device, "H2D", ENGINE_MOVER, 256 << 20, 512 << 20)
    none = partial(Traffic, bench.device, "none", ENGINE_MOVER, 0, 0)
    some = (DEFERRED, SGLANG, BUFFER, UVA, RUNNER, READY, EMPTY)
    cells: dict[str, Cell] = {
        "alone": partial(_latency_cell, bench, (*wide, EMPTY), None),
        WAITED: partial(_latency_cell, bench, some, none),
        BULK: partial(_latency_cell, bench, some, bulk),
    }
    for mover in MOVERS:
        for direction in DIRECTIONS:
            for label, piece in PIECES.items():
                queued = _queued_bytes(piece)
                cells[f"{direction}, {label} by {mover}"] = Once(
                    _latency_cell, bench, few,
                    partial(Traffic, bench.device, direction, mover, piece, queued),
                )  # fmt: skip
    for mib, depth in UNPAUSED:
        for ids in UNPAUSED_IDS:
            name = unpaused_name(mib, depth, ids)
            cells[name] = Once(_unpaused_cell, bench, mib, depth, ids)
    return cells


# Copies that are queued without a pause: (MiB per copy, number queued at any time).
UNPAUSED = ((256, 2), (256, 1), (16, 2), (2, 4))
UNPAUSED_IDS = (2048, 8192)
STARVED_S = 2.0  # ids that have not arrived by then count as starved


def unpaused_name(mib: int, depth: int, ids: int) -> str:
    return f"{depth} x {mib} MiB H2D without a pause, {ids} ids"


def _unpaused_cell(bench: Bench, mib: int, depth: int, ids: int) -> dict[str, Any]:
    """Time until ids are ready beside endless copies on another stream, as when weights are
    streamed.

    A contender whose ids have not arrived after ``STARVED_S`` is not called again. The copies are
    stopped so that its own copy can finish, and then started again.
    """
    device = bench.device
    if not device.gpu_regimes:
        raise Absent("on the host device ids are there when resolve returns: see host time")
    everybody = bench.contenders.all((DEFERRED, SGLANG, BUFFER, UVA, RUNNER, READY), ids)
    kinds = {c.takes[0] for c in everybody}
    inputs = {kind: bench.inputs(kind, [ids], False, bench.samples)[0] for kind in kinds}
    times: dict[str, list[float]] = {c.name: [] for c in everybody}
    out: dict[str, Any] = {}
    number, done = itertools.count(), device.event()
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        index = torch.cuda.current_device() if device.cuda else -1
        copies = Copies(index, compiled("copies.c", Path(folder)))
        size = mib if device.cuda else mib / 4096
        try:
            device.synchronize()
            copies.start(size, depth)
            copies.wait_for(depth)  # from here on the link is busy
            for i in range(-min(bench.warmup, 10), bench.few_samples):
                for contender in bench.shuffled([c for c in everybody if c.name not in out]):
                    name, batch = contender.name, inputs[contender.takes[0]](next(number))
                    try:
                        start = time.perf_counter_ns()
                        keep = contender.resolve(contender.stage(batch))
                        done.record()
                        late = False
                        while not done.query() and not late:
                            late = time.perf_counter_ns() - start > STARVED_S * 1e9
                        took = (time.perf_counter_ns() - start) / 1e3
                        if late:
                            out[name] = {"starved_after_s": STARVED_S, "answered": len(times[name])}
                            rates.append(copies.stop() or 0.0)
                            device.synchronize()
                            copies.start(size, depth)
                            copies.wait_for(depth)
                        elif i >= 0:
                            times[name].append(took)
                        del keep
                    except Exception:
                        out[name] = {"error": traceback.format_exc()}
        finally:
            rates.append(copies.stop() or 0.0)
            device.synchronize()
            for contender in everybody:
                contender.close()
    for name, values in times.items():
        if values and "error" not in out.get(name, {}):
            out[name] = out.get(name, {}) | {"ready": summary(values)}
    return {
        "ids": ids,
        "copied_gb_per_s": max(rates),
        "contenders": out,
    }


def _queued_bytes(piece: int) -> int:
    """Bytes to queue: enough to outlast the call, few enough to be queued quickly."""
    return max(8 * MIB if piece < 64 << 10 else 64 * MIB, piece)


class Traffic:
    """Copies between host and device on separate streams, like those of a KV cache."""

    def __init__(self, device: Host, direction: str, mover: str, piece: int, queued: int) -> None:
        self.device = device
        if not device.cuda:  # a trial run: the same calls with fewer bytes
            piece, queued = max(8, piece >> 12), max(8, queued >> 12)
        self.gate = device.new_stream()
        self.lanes = [
            (device.new_stream(), self._lane(way, mover, piece, queued))
            for way in ("H2D", "D2H")
            if way in direction
        ]
        self.queued = queued
        self.hold_us = 300.0

    def _lane(self, way: str, mover: str, piece: int, queued: int) -> Callable[[], None]:
        pieces = queued // piece
        # Copies of one batch may overtake each other, so each has its own destination.
        places = pieces if mover == BATCH_MOVER else 1
        pinned = self.device.pinned(piece // 8 * places)
        pinned.zero_()
        there = torch.zeros(pinned.shape, dtype=torch.int64, device=self.device.torch)
        src, dst = (pinned, there) if way == "H2D" else (there, pinned)
        to, from_ = dst.data_ptr(), src.data_ptr()
        if mover == BATCH_MOVER:
            offsets = range(0, piece * pieces, piece)
            copy = self.device.batch(
                [to + o for o in offsets],
                [from_ + o for o in offsets],
                [piece] * pieces,
                IN_STREAM_ORDER,
            )
        elif mover == KERNEL_MOVER:
            copy = partial(self.device.move, dst, src)
        else:
            copy = partial(self.device.memcpy, to, from_, piece)

        def lane(_keep: Any = (src, dst)) -> None:
            for _ in range(pieces // places):
                copy()

        return lane

    def start(self) -> list[Any]:
        """Queues all copies behind a gate, opens the gate, and returns.

        Returns:
            Events that are recorded after the last copies.
        """
        ends, gate = [], self.device.event()
        begin = time.perf_counter_ns()
        with self.device.on(self.gate):
            self.device.spin(self.hold_us)
            gate.record()
        for side, lane in self.lanes:
            with self.device.on(side):
                self.device.wait(side, gate)
                lane()
                end = self.device.event()
                end.record()
            ends.append(end)
        took = (time.perf_counter_ns() - begin) / 1e3
        self.hold_us = min(max(100.0, 1.2 * took), 20_000.0)
        gate.synchronize()
        return ends


def _latency_cell(
    bench: Bench, names: Sequence[str], traffic: Callable[[], Traffic] | None
) -> dict[str, Any]:
    """Times one cell. ``call``: the part of the time that the host spent in the call."""
    device = bench.device
    if not device.gpu_regimes:
        raise Absent("on the host device ids are there when resolve returns: see host time")
    load = traffic() if traffic else None
    everybody = bench.contenders.all(names, LATENCY_IDS)
    batches = {c.takes[0]: bench.requests(c.takes[0], [LATENCY_IDS], 0) for c in everybody}
    times: dict[str, list[float]] = {c.name: [] for c in everybody}
    calls: dict[str, list[float]] = {c.name: [] for c in everybody}
    behind: dict[str, int] = dict.fromkeys(times, 0)
    failed: dict[str, Any] = {}
    done = device.event()
    try:
        for i in range(-min(bench.warmup, 10), bench.few_samples if load else bench.samples):
            for contender in bench.shuffled(everybody):
                name, batch = contender.name, batches[contender.takes[0]]
                if name in failed:
                    continue
                try:
                    device.synchronize()
                    # An eager pool starts the transfer in stage(), so its ids are already on the
                    # way.
                    early = None if name == EAGER else contender.stage(batch)
                    device.synchronize()  # one contender's stage() launches a kernel
                    ends = load.start() if load else []
                    running = bool(ends) and not any(end.query() for end in ends)
                    start = time.perf_counter_ns()
                    staged = contender.stage(batch) if early is None else early
                    keep = contender.resolve(staged)
                    returned = time.perf_counter_ns()
                    done.record()
                    while not done.query():
                        pass
                    stop = time.perf_counter_ns()
                    device.synchronize()
                    del keep, staged, early
                except Exception:
                    failed[name] = {"error": traceback.format_exc()}
                    continue
                if i >= 0:
                    times[name].append((stop - start) / 1e3)
                    calls[name].append((returned - start) / 1e3)
                    behind[name] += running
    finally:
        for contender in everybody:
            contender.close()
    rows: dict[str, Any] = {
        name: {
            "ready": summary(values),
            "call": summary(calls[name]),
            "behind_traffic": behind[name] / len(values),
        }
        for name, values in times.items()
        if name not in failed and values
    }
    result = {"ids": LATENCY_IDS, "contenders": rows | failed}
    return result | ({"queued_bytes": load.queued * len(load.lanes)} if load else {})
