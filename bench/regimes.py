"""What is measured. A regime is a dict of cells; a cell is a call that gives a result for JSON.

Every cell stands alone: one that fails says why, and the next runs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

import pystage
from bench.common import VOCAB, TwoCalls, arriving, summary, two_calls_time
from bench.contenders import (
    BATCH,
    BUFFER,
    CUPY,
    DEFERRED,
    EAGER,
    EMPTY,
    ENGINE,
    EVERYBODY,
    FLOOR,
    OURS,
    PEERS,
    POOLS,
    READY,
    READY_BATCH,
    SGLANG,
    TORCH,
    UVA,
    WIDE,
    Batch,
    Contender,
    Contenders,
    ForwardBatch,
    count_of,
    sglang_code,
    torch_array,
)
from bench.copies import Copies, compiled
from bench.device import IN_STREAM_ORDER, Absent, Host
from pystage.trace import draw_ids, sample_trace

Cell: TypeAlias = "Callable[[], dict[str, Any]]"
CallsOf: TypeAlias = "Callable[[], Sequence[Callable[[], Any]]]"
T = TypeVar("T")
MIB = 1 << 20
LIST_ID_BYTES = 40  # the pointer and the int


@dataclass
class Bench:
    """What all regimes share."""

    device: Host
    contenders: Contenders
    samples: int  # of every cell
    warmup: int
    quick: bool
    trace_batches: int
    cache_bytes: int

    def __post_init__(self) -> None:
        self._order = random.Random(5)

    def shuffled(self, contenders: list[T]) -> list[T]:
        """In an order drawn anew: nobody always runs behind the same one."""
        return self._order.sample(contenders, len(contenders))

    @property
    def few_samples(self) -> int:
        """Of cells whose rounds take tens of milliseconds."""
        return -(-self.samples // 4) if self.quick else self.samples

    @cached_property
    def arena(self) -> np.ndarray[Any, Any]:
        """Random ids, a quarter more than the CPU's largest cache holds."""
        size = max(int(1.25 * self.cache_bytes), 16 * MIB)
        return np.random.default_rng(7).integers(0, VOCAB, size // 8)

    @cached_property
    def trace(self) -> list[list[array[int]]]:
        """Batches of the trace, cut to what each prefills, one array a request."""
        requests = sample_trace()
        batches = []
        for batch in islice(arriving(requests), self.trace_batches):
            cut = zip(batch.requests, batch.starts, batch.stops, strict=True)
            batches.append([draw_ids(stop - start, VOCAB, (r, start)) for r, start, stop in cut])
        return batches

    def requests(self, kind: str, lengths: Sequence[int], at: int) -> Batch:
        """One batch; which ids they are depends on ``at``. Its memory is its own."""
        size = self.arena.size
        batch: list[Any] = []
        for length in lengths:
            at = at % (size - length)
            ids = self.arena[at : at + length].copy()
            at += length
            if kind == "array":
                batch.append(array("q", b""))
                batch[-1].frombytes(ids.tobytes())
            elif kind == "list":
                batch.append(ids.tolist())
            else:
                batch.append(torch.from_numpy(ids) if kind == "tensor" else ids)
        return batch

    def inputs(
        self, kind: str, lengths: Sequence[int], cold: bool, calls: int
    ) -> tuple[Callable[[int], Batch], int]:
        """Inputs for so many calls, and the bytes they rotate through.

        Warm ones rotate through up to 64 batches and 4 MiB, two batches at least. Cold ones through
        more than the caches hold, or each is used once; the caches are overwritten before.
        """
        count = sum(lengths)
        size = count * (LIST_ID_BYTES if kind == "list" else 8)
        batches = min(64, max(2, 4 * MIB // size))
        if cold:
            batches = min(calls, self.arena.nbytes // size + 1)
        made = [self.requests(kind, lengths, k * count) for k in range(batches)]
        if cold:
            self.arena[:: 64 // 8] += 0  # every line of it: nothing made above stays in a cache
        return (lambda k: made[k % batches]), batches * size


def budget(bench: Bench, count: int) -> tuple[int, int]:
    """Samples and warm-up of host times: twice the samples where calls are short."""
    if count <= 16384:
        return 2 * bench.samples, bench.warmup
    return bench.samples, bench.warmup if count <= 1 << 17 else min(bench.warmup, 10)


# --- 1: host time ------------------------------------------------------------------------------

SHAPES = {
    **{f"1 x {n}": (n,) for n in (128, 1024, 8192, 16384, 65536, 131072, 1048576)},
    "8 x 1024": (1024,) * 8,
    "64 x 128": (128,) * 64,
    "256 x 64": (64,) * 256,
    "1000 x 8": (8,) * 1000,
    "4000 x 2": (2,) * 4000,
}
IN_FLIGHT = 8
COLD_SHAPES = ("1 x 128", "1 x 8192", "8 x 1024", "64 x 128", "256 x 64", "1 x 131072")


def host(bench: Bench) -> dict[str, Cell]:
    """Host time of stage and of resolve, until they return."""
    cells: dict[str, Cell] = {}
    for shape, lengths in SHAPES.items():
        cells[f"{shape} array"] = partial(_host_cell, bench, "array", lengths, False)
    for shape in COLD_SHAPES:
        cells[f"{shape} array, cold"] = partial(_host_cell, bench, "array", SHAPES[shape], True)
    for shape in ("1 x 8192", "64 x 128"):
        for kind in ("list", "numpy", "tensor"):
            cells[f"{shape} {kind}"] = partial(_host_cell, bench, kind, SHAPES[shape], False)
    cells["1 x 8192 list, cold"] = partial(_host_cell, bench, "list", SHAPES["1 x 8192"], True)
    for shape in ("1 x 8192", "64 x 128"):
        name = f"{shape} array, {IN_FLIGHT} in flight"
        cells[name] = partial(_host_cell, bench, "array", SHAPES[shape], False, IN_FLIGHT)
    cells["trace array, cold"] = partial(_trace_cell, bench)
    cells["bytes over the link"] = partial(_link_cell, bench)
    return cells


def _host_cell(
    bench: Bench, kind: str, lengths: Sequence[int], cold: bool, in_flight: int = 1
) -> dict[str, Any]:
    """``in_flight``: so many calls of all are made before the device is drained."""
    count = sum(lengths)
    samples, warmup = budget(bench, count)
    everybody = [c for c in bench.contenders.all(EVERYBODY, count) if kind in c.takes]
    inputs, rotated = bench.inputs(kind, lengths, cold, (samples + warmup) * len(everybody))
    # The floor reads arrays of its own: as many ids, for a list as many bytes.
    number = samples + warmup
    length = count * LIST_ID_BYTES // 8 if kind == "list" else count
    whole, _ = bench.inputs("array", [length], cold, number)
    ragged, _ = bench.inputs("array", lengths, cold, number)
    calls = itertools.count(1)

    def settle() -> None:
        if next(calls) % in_flight == 0:
            bench.device.synchronize()

    rows = _two_calls(bench, everybody, whole, ragged, inputs, samples, warmup, settle)
    return rows | {
        "ids": count,
        "rotated_bytes": rotated,
    }


def _trace_cell(bench: Bench) -> dict[str, Any]:
    """Batches as they come in a trace: sizes vary from call to call."""
    samples, warmup = budget(bench, 8192)
    batches = bench.trace
    everybody = bench.contenders.all([*OURS, *PEERS], 8192)
    everybody = [c for c in everybody if "array" in c.takes]
    whole = [sum(batch, array("q")) for batch in batches[: samples + warmup]]
    result = _two_calls(
        bench,
        everybody,
        lambda k: [whole[k % len(whole)]],
        lambda k: batches[(k + len(batches) // 2) % len(batches)],
        lambda k: batches[k % len(batches)],
        samples,
        warmup,
    )
    return result | {"rotated_bytes": sum(8 * count_of(b) for b in batches)}


def _link_cell(bench: Bench) -> dict[str, Any]:
    """Counted by the pools, over batches of the trace."""
    rows: dict[str, Any] = {}
    for name, options in POOLS.items():
        with pystage.StagingPool(bench.device.torch, **options) as pool:
            for batch in bench.trace[:100]:
                pystage.resolve(pool.stage(batch, vocab_size=VOCAB))
            stats = pool.stats()
            bench.device.synchronize()
        rows[name] = {"bytes_per_id": round(stats.wire_bytes / stats.tokens, 3)}
    return {"contenders": rows}


def _two_calls(
    bench: Bench,
    everybody: list[Contender],
    whole: Callable[[int], Batch],
    ragged: Callable[[int], Batch],
    inputs: Callable[[int], Batch],
    samples: int,
    warmup: int,
    settle: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """All contenders and the floor, in turn. ``whole`` gives the floor's n-th array, ``ragged`` the
    same in parts."""
    floor = bench.contenders.floor(max(8192, count_of(whole(0)), count_of(ragged(0))))
    number = itertools.count()

    def once() -> Sequence[float]:
        k = next(number)
        return floor.once(whole(k)[0], ragged(k))

    try:
        rows = two_calls_time(
            {c.name: (c.stage, c.resolve) for c in everybody},
            inputs,
            samples,
            warmup,
            settle or bench.device.synchronize,
            {"floor": once},
        )
    finally:
        floor.close()
        for contender in everybody:
            contender.close()
    below = rows.pop("floor")
    if isinstance(below, dict):  # its error
        return {"contenders": rows | {"floor": below}}
    below = dict(zip(floor.parts, below, strict=True))
    # Of the parts that each way needs; an event need not be.
    below["sum"] = round(sum(below[part]["p50"] for part in FLOOR), 3)
    return {"contenders": rows, "floor": below}


# --- 2: the compute stream ---------------------------------------------------------------------

STREAM_COUNTS = (128, 1024, 8192, 16384, 131072, 1048576)


def stream(bench: Bench) -> dict[str, Cell]:
    """What resolve adds to the compute stream, between its kernels."""
    cells: dict[str, Cell] = {
        f"idle, {n} ids": partial(_stream_cell, bench, n, busy=False) for n in STREAM_COUNTS
    }
    for n in (8192, 131072):
        cells[f"busy, {n} ids"] = partial(_stream_cell, bench, n, busy=True)
    return cells


def layer_steps(device: Host, tokens: int, history: int, hidden: int = 4096) -> list[Any]:
    """The matrix products and the attention of a decoder layer of 8B size, in bf16."""
    heads, kv_heads, wide = hidden // 128, max(1, hidden // 512), hidden * 7 // 2
    new = partial(torch.randn, device=device.torch, dtype=torch.bfloat16)
    x, context = new(tokens, hidden), new(tokens, wide)
    qkv, out = new(hidden, hidden + 2 * kv_heads * 128), new(hidden, hidden)
    up, down = new(hidden, 2 * wide), new(wide, hidden)
    q = new(1, heads, tokens, 128)
    k, v = (new(1, kv_heads, history + tokens, 128) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    return [
        partial(torch.mm, x, qkv),
        partial(attend, q, k, v, enable_gqa=True),
        partial(torch.mm, x, out),
        partial(torch.mm, x, up),
        partial(torch.mm, context, down),
    ]


def _layer(device: Host) -> list[Any]:
    """1,024 tokens behind 2,048; a toy on the host."""
    return layer_steps(device, 1024, 2048) if device.cuda else layer_steps(device, 8, 16, 512)


class Between:
    """Microseconds that calls add to a stream, each between two kernels.

    What the kernels take without calls is measured before and after, since clocks drift, and taken
    off. The device never waits for the host: all is queued while it is busy, with a spin on an idle
    GPU, else with the same kernels, so that what another stream does meanwhile runs beside them.
    """

    def __init__(
        self, device: Host, kernels: Sequence[Callable[[], Any]], repeats: int, busy: bool = False
    ) -> None:
        self.device, self.kernels, self.repeats, self.busy = device, kernels, repeats, busy
        self.hold_us = 250.0
        self.lead = 1  # rounds of the kernels
        self.late = 0

    def added(self, turns: Sequence[tuple[str, CallsOf]]) -> Iterator[tuple[str, float | str]]:
        """Of each contender in turn, the mean over its calls; or its error."""
        nothing = self.repeats * [lambda: None]
        before = self._run(nothing)
        for name, calls_of in turns:
            try:
                took = self._run(calls_of())
            except Exception:
                yield name, traceback.format_exc()
                continue
            after = self._run(nothing)
            yield name, took - (before + after) / 2
            before = after

    def _run(self, calls: Sequence[Callable[[], Any]]) -> float:
        begin, end = self.device.event(True), self.device.event(True)
        hold = self.hold_us
        for _ in range(6):
            self.device.synchronize()
            gate = begin
            if self.busy:
                begin.record()
                for kernel in self.lead * [*self.kernels]:
                    kernel()
                gate = self.device.event()
            else:
                self.device.spin(hold)
            gate.record()
            keep = []
            for r, call in enumerate(calls):
                self.kernels[r % len(self.kernels)]()
                keep.append(call())
            end.record()
            in_time = not self.device.cuda or not gate.query()
            self.device.synchronize()
            if in_time:
                break
            self.late += 1  # a hiccup of the host, or the hold is too short
            self.hold_us = min(1.1 * self.hold_us, 20_000.0)
            hold = 2 * max(hold, self.hold_us)
            self.lead = min(self.lead + 1, 8)
        return float(begin.elapsed_time(end)) * 1e3 / len(calls)


def _stream_cell(bench: Bench, count: int, busy: bool) -> dict[str, Any]:
    device = bench.device
    if not device.gpu_regimes:
        raise Absent("the host device has no streams that run beside the host")
    names = (DEFERRED, EAGER, ENGINE, WIDE, SGLANG, UVA, READY, READY_BATCH, EMPTY)
    everybody = bench.contenders.all(names, count)
    batch = bench.requests("array", [count], 0)
    if busy:
        kernels = _layer(device)
        repeats = 2 * len(kernels)
    else:
        scratch = torch.zeros(32, device=device.torch)
        kernels, repeats = [lambda: scratch.add_(1)], 8 if count <= 1 << 17 else 4
    timer = Between(device, kernels, repeats, busy)

    made: dict[str, list[Callable[[], Any]]] = {}

    def calls_of(contender: Contender) -> list[Callable[[], Any]]:
        if contender.name == EAGER and busy:  # its transfer runs beside the layer's kernels
            return repeats * [lambda: contender.resolve(contender.stage(batch))]
        # Staged once, and resolved again and again; eager ids are handed out once.
        if contender.name not in made or contender.name == EAGER:
            staged = [contender.stage(batch) for _ in range(repeats)]
            made[contender.name] = [partial(contender.resolve, s) for s in staged]
        return made[contender.name]

    times: dict[str, list[float]] = {c.name: [] for c in everybody}
    failed: dict[str, Any] = {}
    samples = bench.few_samples if busy else bench.samples
    try:
        for i in range(-min(bench.warmup, 5), samples):
            order = [c for c in bench.shuffled(everybody) if c.name not in failed]
            for name, value in timer.added([(c.name, partial(calls_of, c)) for c in order]):
                if isinstance(value, str):
                    failed[name] = {"error": value}
                elif i >= 0:
                    times[name].append(value)
    finally:
        made.clear()
        for contender in everybody:
            contender.close()
    rows: dict[str, Any] = {
        name: {"added": summary(values)} for name, values in times.items() if name not in failed
    }
    return {
        "ids": count,
        "contenders": rows | failed,
        "calls_a_sample": repeats,
        "held_again": timer.late,
    }


# --- 3: until the ids are there ----------------------------------------------------------------

PIECES = {"32 KiB": 32 << 10, "512 KiB": 512 << 10, "16 MiB": 16 << 20, "256 MiB": 256 << 20}
DIRECTIONS = ("H2D", "D2H", "H2D and D2H")
ENGINE_MOVER, BATCH_MOVER, KERNEL_MOVER = "copy engine", "cudaMemcpyBatchAsync", "kernel"
MOVERS = (ENGINE_MOVER, BATCH_MOVER, KERNEL_MOVER)
LATENCY_IDS = 8192
BULK = "H2D, 2 x 256 MiB by copy engine"
WAITED = "alone, after a wait"


def latency(bench: Bench) -> dict[str, Cell]:
    """From the call until the ids are on the device, alone and behind KV-cache traffic.

    Before a call behind traffic the host waits for that to start, and its caches lose what the call
    needs. How much of the time that is, a wait without traffic tells.
    """
    wide = (DEFERRED, EAGER, ENGINE, WIDE, SGLANG, BUFFER, UVA, CUPY, READY, READY_BATCH)
    few = (DEFERRED, READY)
    bulk = partial(Traffic, bench.device, "H2D", ENGINE_MOVER, 256 << 20, 512 << 20)
    none = partial(Traffic, bench.device, "none", ENGINE_MOVER, 0, 0)
    some = (DEFERRED, SGLANG, BUFFER, READY, EMPTY)
    cells: dict[str, Cell] = {
        "alone": partial(_latency_cell, bench, (*wide, EMPTY), None),
        WAITED: partial(_latency_cell, bench, some, none),
        BULK: partial(_latency_cell, bench, some, bulk),
    }
    for mover in MOVERS:
        for direction in DIRECTIONS:
            for label, piece in PIECES.items():
                queued = _queued_bytes(piece)
                cells[f"{direction}, {label} by {mover}"] = partial(
                    _latency_cell, bench, few,
                    partial(Traffic, bench.device, direction, mover, piece, queued),
                )  # fmt: skip
    for mib, depth in UNPAUSED:
        for ids in UNPAUSED_IDS:
            name = unpaused_name(mib, depth, ids)
            cells[name] = partial(_unpaused_cell, bench, mib, depth, ids)
    return cells


# Copies that are queued without a pause: (MiB of each, how many are queued at any time).
UNPAUSED = ((256, 2), (256, 1), (16, 2), (2, 4))
UNPAUSED_IDS = (2048, 8192)
STARVED_S = 2.0  # ids that are not there by then have starved


def unpaused_name(mib: int, depth: int, ids: int) -> str:
    return f"{depth} x {mib} MiB H2D without a pause, {ids} ids"


def _unpaused_cell(bench: Bench, mib: int, depth: int, ids: int) -> dict[str, Any]:
    """Ready beside copies on another stream that never stop, as when weights are streamed.

    Whose ids are not there after ``STARVED_S`` is out of the turn: the copies are stopped, so that
    its own can end, and started again.
    """
    device = bench.device
    if not device.gpu_regimes:
        raise Absent("on the host device ids are there when resolve returns: see host time")
    everybody = bench.contenders.all((DEFERRED, SGLANG, BUFFER, UVA, READY), ids)
    inputs, rotated = bench.inputs("array", [ids], False, bench.samples)
    times: dict[str, list[float]] = {c.name: [] for c in everybody}
    out: dict[str, Any] = {}
    number, done = itertools.count(), device.event()
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        index = torch.cuda.current_device() if device.cuda else -1
        copies = Copies(index, compiled(Path(folder)))
        size = mib if device.cuda else mib / 4096
        try:
            device.synchronize()
            copies.start(size, depth)
            while copies.count < depth:  # the link is busy from here on
                time.sleep(0)
            for i in range(-min(bench.warmup, 10), bench.few_samples):
                for contender in bench.shuffled([c for c in everybody if c.name not in out]):
                    name, batch = contender.name, inputs(next(number))
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
        "rotated_bytes": rotated,
        "copied_gb_per_s": max(rates),
        "contenders": out,
    }


def _queued_bytes(piece: int) -> int:
    """Enough of them to outlast the call, few enough to queue quickly."""
    return max(8 * MIB if piece < 64 << 10 else 64 * MIB, piece)


class Traffic:
    """Bytes moving between host and device on streams of their own, as a KV cache's do."""

    def __init__(self, device: Host, direction: str, mover: str, piece: int, queued: int) -> None:
        self.device = device
        if not device.cuda:  # a rehearsal: the same calls, of fewer bytes
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
        # Copies of one batch may overtake each other, so each writes to a place of its own.
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
        """Queues it all behind a gate, opens that, and returns.

        Returns:
            Events that happen at its end.
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
    """``call``: what of the time the host was in the call."""
    device = bench.device
    if not device.gpu_regimes:
        raise Absent("on the host device ids are there when resolve returns: see host time")
    load = traffic() if traffic else None
    batch = bench.requests("array", [LATENCY_IDS], 0)
    everybody = bench.contenders.all(names, LATENCY_IDS)
    times: dict[str, list[float]] = {c.name: [] for c in everybody}
    calls: dict[str, list[float]] = {c.name: [] for c in everybody}
    behind: dict[str, int] = dict.fromkeys(times, 0)
    failed: dict[str, Any] = {}
    done = device.event()
    try:
        for i in range(-min(bench.warmup, 10), bench.few_samples if load else bench.samples):
            for contender in bench.shuffled(everybody):
                name = contender.name
                if name in failed:
                    continue
                try:
                    device.synchronize()
                    # An eager pool transfers when it stages: its ids were on their way before.
                    early = None if name == EAGER else contender.stage(batch)
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


# --- 4: cold start and drift -------------------------------------------------------------------

DRIFTERS = (DEFERRED, EAGER, ENGINE, WIDE, TORCH, SGLANG, BUFFER, UVA, CUPY, BATCH)
NEW_SIZES = (128, 1024, 8192, 65536, 524288, 1048576)


def drift(bench: Bench) -> dict[str, Cell]:
    """From nothing, over a long trace: what is pinned, what is allocated, the worst call.

    One contender after the other, since several share torch's allocator: the second would find the
    first one's memory.
    """
    cells: dict[str, Cell] = {
        f"trace, {name}": partial(_drift_cell, bench, name) for name in DRIFTERS
    }
    for name in DRIFTERS:
        cells[f"new sizes, {name}"] = partial(_new_sizes_cell, bench, name)
    return cells


def _warm_process(bench: Bench, name: str) -> None:
    """The first contender shall not pay for the process's start: kernels loaded, code compiled."""
    contender = bench.contenders.make(name, 64)
    if contender is not None:
        contender.resolve(contender.stage(bench.requests("array", [64], 0)))
        bench.device.synchronize()
        contender.close()


class Pinned:
    """What a contender holds in pinned memory, wherever that is counted."""

    def __init__(self, device: Host, contender: Contender, before: tuple[int, int]) -> None:
        self.device, self.contender, self.before = device, contender, before

    def now(self) -> tuple[int, int]:
        """Bytes, and allocations so far."""
        if self.contender.pinned is not None:
            return self.contender.pinned()
        now = self.device.pinned_bytes()
        return now[0] - self.before[0], now[1] - self.before[1]


def _drift_cell(bench: Bench, name: str) -> dict[str, Any]:
    device, batches = bench.device, bench.trace
    _warm_process(bench, name)
    device.forget_pinned()
    before = device.pinned_bytes()
    start = time.perf_counter_ns()
    # A buffer of fixed size is as large as the largest batch.
    contender = bench.contenders.make(name, max(map(count_of, batches)))
    made_us = (time.perf_counter_ns() - start) / 1e3
    if contender is None:
        raise Absent(bench.contenders.why_not(name))
    pinned = Pinned(device, contender, before)
    warm = len(batches) // 10
    times: list[float] = []
    held: list[tuple[int, int]] = []
    allocations = 0
    last: Any = None  # the batch before is still in flight while the next is staged
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
    counted = name != BATCH  # the driver's own memory, which nobody can see
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
    """The first call of each size, by a contender just made, again and again."""
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


# --- 5: host threads ---------------------------------------------------------------------------

THREADS = (1, 2, 4, 8)
THREADED = (DEFERRED, EAGER, TORCH, SGLANG)


def threads(bench: Bench) -> dict[str, Cell]:
    """Threads with a stream each, one pool for all; and a CPU that has other work."""
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
    """Blocks of calls by all threads at once, contenders in turn."""
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
    """Seconds that all take, started at once in threads of their own; or what went wrong."""
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
    with contextlib.suppress(threading.BrokenBarrierError):  # the thread that broke it says why
        gate.wait()
    start = time.perf_counter()
    for thread in started:
        thread.join()
    return errors[0] if errors else time.perf_counter() - start


BUSY_LOOP = "import numpy as n\na = n.ones(4 << 20)\nprint(flush=True)\nwhile True: a += 1"


@contextlib.contextmanager
def cpu_load(processes: int) -> Iterator[None]:
    """So many processes that read and write memory all the time."""
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
        result = _host_cell(bench, "array", lengths, False)
    return result | {"load_processes": processes}


@contextlib.contextmanager
def python_beside() -> Iterator[None]:
    """A thread of this process that computes in Python: it wants the GIL all the time, and whoever
    lets go of it waits up to a switch interval (5 ms) to have it back."""
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
    """No floor: it would wait for the GIL in places where no contender does."""
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


# --- 6: long history ---------------------------------------------------------------------------

HISTORIES = (0, 8192, 32768, 131072, 524288, 1048576)
CUT = "torch, request sliced"


def history(bench: Bench) -> dict[str, Cell]:
    """A chunk of 8,192 ids behind a request's history, which each way reads or not."""
    return {f"8192 behind {n}": partial(_history_cell, bench, n) for n in HISTORIES}


def _history_cell(bench: Bench, before: int) -> dict[str, Any]:
    device, chunk = bench.device, 8192
    samples, warmup = budget(bench, chunk)
    whole, rotated = bench.inputs("array", [before + chunk], False, samples)
    pool = pystage.StagingPool(device.torch)
    plain = torch_array(device)
    calls: dict[str, TwoCalls] = {
        DEFERRED: (lambda batch: pool.stage(batch, starts=[before]), pystage.resolve),
        CUT: (lambda batch: plain.stage([batch[0][before:]]), plain.resolve),
    }
    failed: dict[str, Any] = {}
    try:
        code = sglang_code(bench.contenders.sources)
    except Absent as why:
        failed[SGLANG] = {"absent": str(why)}
    else:
        theirs = bench.contenders.make(SGLANG)
        assert theirs is not None

        def stage(batch: Batch) -> Any:
            # prepare_for_extend: r.get_fill_ids()[r.prefix_len:]
            request = SimpleNamespace(full_untruncated_fill_ids=batch[0], extend_end=before + chunk)
            return theirs.stage([code.get_fill_ids(request)[before:]])

        calls[SGLANG] = (stage, theirs.resolve)
    try:
        rows = two_calls_time(calls, whole, samples, warmup, device.synchronize)
    finally:
        pool.close()
    return {"history": before, "rotated_bytes": rotated, "contenders": rows | failed}


# --- 7: mixed batches --------------------------------------------------------------------------

FUSED, APART, MIXED_SGLANG = "pystage, one kernel", "pystage copy + gather + cat", "SGLang's cat"
PLAIN_MIXED = "copy + gather + cat"


KERNELS = "kernels, 8192 ids + 64 running"
MIXED = ((128, 32), (2048, 128), (8192, 64), (8192, 256))


def mixed(bench: Bench) -> dict[str, Cell]:
    """A prefill and running requests in one batch: ids from the host, then ids from the device."""
    cells: dict[str, Cell] = {
        f"{n} ids + {k} running": partial(_mixed_cell, bench, n, k) for n, k in MIXED
    }
    cells[KERNELS] = partial(_kernels_cell, bench)  # last: a profiler slows what comes after
    return cells


@contextlib.contextmanager
def _mixed_ways(bench: Bench, count: int, running: int) -> Iterator[tuple[Any, Any, Any]]:
    """The two calls of each way, all seen to give the same; inputs; and who is absent."""
    device = bench.device
    relay = torch.randint(0, VOCAB, (4096,), device=device.torch)
    indices = torch.randperm(4096, device=device.torch)[:running]
    inputs, _ = bench.inputs("array", [count], False, bench.samples)
    plain = torch_array(device)
    missing: dict[str, Any] = {}
    with pystage.StagingPool(device.torch) as pool:
        calls: dict[str, TwoCalls] = {
            FUSED: (pool.stage, lambda staged: pystage.resolve_mixed(staged, relay, indices)),
            APART: (
                pool.stage,
                lambda staged: torch.cat([pystage.resolve(staged), relay[indices]]),
            ),
            PLAIN_MIXED: (
                plain.stage,
                lambda pinned: torch.cat([plain.resolve(pinned), relay[indices]]),
            ),
        }
        try:
            code = sglang_code(bench.contenders.sources)
        except Absent as why:
            missing[MIXED_SGLANG] = {"absent": str(why)}
        else:
            future = SimpleNamespace(output_tokens_buf=relay)

            def resolve(pinned: torch.Tensor) -> torch.Tensor:
                batch = ForwardBatch(pinned, device.torch, mix_running_indices=indices)
                code.resolve_forward_inputs(batch, future)
                return batch.input_ids  # type: ignore[no-any-return]

            calls[MIXED_SGLANG] = (lambda batch: code.flatten(batch, device.cuda), resolve)
        want = torch.cat([torch.tensor(inputs(0)[0], device=device.torch), relay[indices]])
        for name, (stage, finish) in calls.items():
            if not torch.equal(finish(stage(inputs(0))), want):
                raise RuntimeError(f"{name} gives other ids")
        yield calls, inputs, missing


def _mixed_cell(bench: Bench, count: int, running: int) -> dict[str, Any]:
    samples, warmup = budget(bench, count)
    with _mixed_ways(bench, count, running) as (calls, inputs, missing):
        rows = two_calls_time(calls, inputs, samples, warmup, bench.device.synchronize)
        if bench.device.gpu_regimes:
            for name, added in _mixed_stream(bench, calls, inputs(0)).items():
                rows[name] = rows[name] | added
    return {"ids": count, "running": running, "contenders": rows | missing}


def _kernels_cell(bench: Bench) -> dict[str, Any]:
    """What each puts on the device, counted by torch's profiler."""
    if not bench.device.gpu_regimes:
        raise Absent("no kernels on the host device")
    with _mixed_ways(bench, 8192, 64) as (calls, inputs, missing):
        rows = {
            name: bench.device.kernels(partial(finish, stage(inputs(0))))
            for name, (stage, finish) in calls.items()
        }
    return {"contenders": rows | missing}


def _mixed_stream(bench: Bench, calls: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """What each adds to the compute stream."""
    scratch = torch.zeros(32, device=bench.device.torch)
    timer = Between(bench.device, [lambda: scratch.add_(1)], 8)
    times: dict[str, list[float]] = {name: [] for name in calls}

    def calls_of(name: str) -> list[Callable[[], Any]]:
        stage, finish = calls[name]
        return [partial(finish, stage(batch)) for _ in range(timer.repeats)]

    for i in range(-min(bench.warmup, 5), bench.samples):
        for name, value in timer.added(
            [(n, partial(calls_of, n)) for n in bench.shuffled([*calls])]
        ):
            if isinstance(value, str):
                raise RuntimeError(value)
            if i >= 0:
                times[name].append(value)
    return {name: {"added": summary(values)} for name, values in times.items()}


REGIMES: dict[str, Callable[[Bench], dict[str, Cell]]] = {
    "host": host,
    "stream": stream,
    "latency": latency,
    "drift": drift,
    "threads": threads,
    "history": history,
    "mixed": mixed,
}
