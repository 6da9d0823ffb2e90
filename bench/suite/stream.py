"""Regime: time on the compute stream."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.common import summary
from bench.device import Absent, Host
from bench.suite.cells import Bench, CallsOf, Cell
from bench.suite.contenders import (
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
    Contender,
)

STREAM_COUNTS = (128, 1024, 8192, 16384, 131072, 1048576)


def regime(bench: Bench) -> dict[str, Cell]:
    """Time that resolve adds to the compute stream, between its kernels."""
    cells: dict[str, Cell] = {
        f"idle, {n} ids": partial(_stream_cell, bench, n, busy=False) for n in STREAM_COUNTS
    }
    for n in (8192, 131072):
        cells[f"busy, {n} ids"] = partial(_stream_cell, bench, n, busy=True)
    return cells


def layer_steps(device: Host, tokens: int, history: int, hidden: int = 4096) -> list[Any]:
    """The matrix products and attention of a decoder layer of an 8B model, in bf16."""
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
    """A layer for 1,024 tokens after a history of 2,048; a much smaller one on the host."""
    return layer_steps(device, 1024, 2048) if device.cuda else layer_steps(device, 8, 16, 512)


class Between:
    """Microseconds that calls add to a stream, each between two kernels.

    The time of the kernels without the calls is measured before and after, since clocks drift, and
    subtracted. The device never waits for the host: everything is queued while it is busy. A spin
    kernel keeps an idle GPU busy; otherwise the same kernels do, so that work on another stream
    runs beside them.
    """

    def __init__(
        self, device: Host, kernels: Sequence[Callable[[], Any]], repeats: int, busy: bool = False
    ) -> None:
        self.device, self.kernels, self.repeats, self.busy = device, kernels, repeats, busy
        self.hold_us = 250.0
        self.lead = 1  # rounds of the kernels that run first
        self.late = 0

    def added(self, turns: Sequence[tuple[str, CallsOf]]) -> Iterator[tuple[str, float | str]]:
        """For each contender in turn, the mean over its calls, or its error."""
        nothing = self.repeats * [lambda: None]
        before = self._run(nothing)
        for name, calls_of in turns:
            try:
                while True:
                    lead = self.lead
                    took, after = self._run(calls_of()), self._run(nothing)
                    if lead == self.lead:
                        break
                    before = after  # all three must run behind as much work
            except Exception:
                yield name, traceback.format_exc()
                continue
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
            self.late += 1  # the host was delayed, or the hold is too short
            self.hold_us = min(1.1 * self.hold_us, 20_000.0)
            hold = 2 * max(hold, self.hold_us)
            self.lead = min(self.lead + 1, 8)
        return float(begin.elapsed_time(end)) * 1e3 / len(calls)


def _stream_cell(bench: Bench, count: int, busy: bool) -> dict[str, Any]:
    device = bench.device
    if not device.gpu_regimes:
        raise Absent("the host device has no streams that run beside the host")
    names = (DEFERRED, EAGER, ENGINE, WIDE, SGLANG, UVA, RUNNER, READY, READY_BATCH, EMPTY)
    everybody = bench.contenders.all(names, count)
    batches = {c.takes[0]: bench.requests(c.takes[0], [count], 0) for c in everybody}
    if busy:
        kernels = _layer(device)
        repeats = 2 * len(kernels)
    else:
        scratch = torch.zeros(32, device=device.torch)
        kernels, repeats = [lambda: scratch.add_(1)], 8 if count <= 1 << 17 else 4
    timer = Between(device, kernels, repeats, busy)

    made: dict[str, list[Callable[[], Any]]] = {}

    def calls_of(contender: Contender) -> list[Callable[[], Any]]:
        if contender.name == EAGER and busy:  # the transfer runs beside the layer's kernels
            batch = batches[contender.takes[0]]
            return repeats * [lambda: contender.resolve(contender.stage(batch))]
        # Staged once and resolved repeatedly. Eager ids can be handed out only once.
        if contender.name not in made or contender.name == EAGER:
            staged = [contender.stage(batches[contender.takes[0]]) for _ in range(repeats)]
            made[contender.name] = [partial(contender.resolve, s) for s in staged]
        return made[contender.name]

    times: dict[str, list[float]] = {c.name: [] for c in everybody}
    failed: dict[str, Any] = {}
    samples = bench.few_samples if busy else bench.samples
    samples = -(-samples // 2)  # each is a mean of several calls; only medians are shown
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
