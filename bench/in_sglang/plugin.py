"""Compares the real SGLang with and without the plugin in one run: python -m bench.in_sglang.plugin

It uses real requests, ScheduleBatch, pools, radix cache and FutureMap, with a schedule stream and a
forward stream as in overlap mode. There is no model: what a forward would read is compared on the
forward stream. For a call "without", SGLang's own functions are put back in place; for a call
"with", the hooked ones. They take turns, call by call, on equal requests, in a new random order
each time. The lower bound is timed in C in the same places: writing the ids as int32, allocating
memory for them on the device, and a launch.

This is one file because all measurements share one rig and the switch between the two sides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from bench.common import (
    BUILD,
    VOCAB,
    amount,
    arriving,
    collector_off,
    random_ids,
    summary,
    write_result,
)
from bench.device import launched
from bench.in_sglang import rig as sglang_rig
from bench.suite.bound import PARTS, Bound
from pystage.trace import Request, draw_ids, sample_trace

CHUNK, HISTORY = 8192, 122_880
PAGED = (64, 128, 64)  # requests, ids per request, tokens per page of KV memory
WITH, WITHOUT, BELOW = "with pystage", "without", "the lower bound"
SIDES = (WITH, WITHOUT)
TIMED = ("host", "history", "latency")


def load_plugin() -> tuple[ModuleType, dict[str, Any]]:
    """Loads the plugin as a server does. Returns its module and status. Raises ``RuntimeError`` if
    it is not in place."""
    os.environ["PYSTAGE_SGLANG_CPU"] = "1"  # a trial run without a GPU
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from pystage.integrations import sglang as plugin

    status = plugin.status()
    if status["off"] or status["broken"] or not status["active"]:
        raise RuntimeError(f"the plugin is not in place: {status['line']}")
    return plugin, status


class Switch:
    """Switches between SGLang's own functions and the hooked ones, wherever they are bound."""

    def __init__(self) -> None:
        from pystage.integrations import sglang as plugin

        self.places: list[tuple[Any, str, Any, Any]] = []
        wrappers: dict[int, Any] = {}
        for hook in plugin.process.state.hooks:
            owner, name = plugin.symbols.owner_and_name(hook.target)
            hooked = vars(owner)[name]
            function = getattr(hooked, "__func__", hooked)
            original = function.__wrapped__
            if isinstance(hooked, classmethod):
                original = classmethod(original)
            self.places.append((owner, name, hooked, original))
            wrappers[id(function)] = function
        for module in [m for n, m in sys.modules.items() if n.startswith("sglang.") and m]:
            for name, value in list(vars(module).items()):
                if id(value) in wrappers:
                    self.places.append((module, name, value, value.__wrapped__))

    def __call__(self, side: str) -> None:
        for owner, name, hooked, original in self.places:
            setattr(owner, name, hooked if side == WITH else original)


class Streams:
    """The scheduler's two streams. On a CPU there are none."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.synchronize()  # waits for earlier work on the default stream
            self.schedule, self.forward = torch.cuda.Stream(), torch.cuda.Stream()
            torch.cuda.set_stream(self.schedule)

    @contextlib.contextmanager
    def on_forward(self) -> Iterator[None]:
        """Enters the forward stream in the same way as ``run_batch``."""
        if not self.cuda:
            yield
            return
        with torch.cuda.stream(self.forward):
            self.forward.wait_stream(self.schedule)
            yield

    def settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Bench:
    """A rig, its streams, and the plugin to switch on and off."""

    def __init__(self, device: str, console: Console) -> None:
        self.console = console
        self.rig = sglang_rig.Rig(
            device, overlap=True, kv_tokens=1 << 18, row_tokens=(1 << 17) + 4096, rows=320
        )
        self.streams = Streams(device)
        from sglang.srt.managers import schedule_batch
        from sglang.srt.utils.common import is_pin_memory_available

        self.record = recorder_of(console)
        self.plugin, self.status = load_plugin()
        self.switch = Switch()
        self.schedule_batch = schedule_batch
        self.pin = is_pin_memory_available(self.rig.device)
        self.bound = Bound(1 << 17) if self.streams.cuda else None
        self.bounds: dict[str, Any] = {}
        self.order = random.Random(5)

    def track(self, count: int, what: str) -> Iterator[int]:
        """A progress bar that is refreshed explicitly, since rich's thread would take the GIL
        during timed calls."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        progress = Progress(*columns, console=self.console, auto_refresh=False, transient=True)
        with progress:
            task = progress.add_task(what, total=count)
            for i in range(count):
                yield i
                if i % max(1, count // 20) == 0:
                    progress.update(task, completed=i + 1, refresh=True)

    # --- ids are equal

    def equal_ids(self, batches: int, mixed: bool) -> dict[str, Any]:
        """Runs trace batches through both sides, and compares ids and small tensors on the forward
        stream. That stream is kept busy so that it lags behind, and slots and host memory are used
        again while transfers are pending. Some requests have a logit bias or penalties, or want
        logprobs."""
        sides = (WITH, WITHOUT)
        live: dict[tuple[str, int], Any] = {}
        running = {side: self._running(side) for side in sides} if mixed else {}
        recorder = {
            s: SimpleNamespace(batch_record_ct=0, batch_record_buf=[None] * 2) for s in sides
        }
        wrong = torch.zeros(2, dtype=torch.int64, device=self.rig.device)
        requests = sample_trace()
        tokens = mixed_batches = 0
        done: deque[Any] = deque(maxlen=4)
        start = time.monotonic()
        work = islice(arriving(requests), batches)
        for number, shape in zip(self.track(batches, "ids"), work, strict=True):
            out: dict[str, torch.Tensor] = {}
            small: dict[str, list[torch.Tensor]] = {}
            with_running = mixed and number % 5 == 4
            for side in sides:
                self.switch(side)
                reqs = [self._request(live, side, requests, r) for r in shape.requests]
                for req, first, last in zip(reqs, shape.starts, shape.stops, strict=True):
                    req.prefix_len, req.extend_end = first, last
                batch = self.rig.batch(reqs)
                batch.prepare_for_extend()
                small[side] = small_tensors_of(batch)
                if with_running:
                    running[side].prepare_for_decode()
                    batch.mix_with_running(running[side])
                with self.streams.on_forward():
                    if self.streams.cuda:
                        torch.cuda._sleep(random.Random(number).randrange(0, 400_000))
                    self.rig.resolve(batch)
                    out[side] = batch.input_ids
                self.record(recorder[side], batch)
                done.append(batch)
            with self.streams.on_forward():
                a, b = out[WITH], out[WITHOUT]
                wrong[0] += (a != b).any() if a.shape == b.shape else 1
                for x, y in zip(small[WITH], small[WITHOUT], strict=True):
                    wrong[1] += (x != y).any() if x.shape == y.shape else 1
            tokens += shape.tokens
            mixed_batches += with_running
            for r, stop in zip(shape.requests, shape.stops, strict=True):
                if stop == requests[r % len(requests)].length:
                    self.rig.release(*(live.pop((side, r)) for side in sides))
            if number % 200 == 199:
                self.streams.settle()
                if int(wrong.sum()):
                    break
        self.streams.settle()
        return {
            "batches": number + 1,
            "mixed": mixed_batches,
            "tokens": tokens,
            "different": int(wrong[0]),
            "small different": int(wrong[1]),
            "seconds": round(time.monotonic() - start, 1),
            "pool": [s.__dict__ for s in self.plugin.pool_stats()],
        }

    def _request(
        self, live: dict[tuple[str, int], Any], side: str, requests: list[Request], r: int
    ) -> Any:
        if (side, r) not in live:
            ids = draw_ids(requests[r % len(requests)].length, VOCAB, r)
            live[side, r] = self.rig.request(ids, max_new_tokens=1, **sampling_of(r))
            if r % 7 == 3:
                live[side, r].return_logprob, live[side, r].logprob_start_len = True, 0
        return live[side, r]

    def _running(self, side: str) -> Any:
        """Eight running requests. Their last ids are in the relay."""
        self.switch(side)
        reqs = [self.rig.request(draw_ids(16 + i, VOCAB, i), 1 << 16) for i in range(8)]
        batch = self.rig.batch(reqs)
        batch.prepare_for_extend()
        self.rig.resolve(batch)
        relay = self.rig.future_map.output_tokens_buf
        rows = batch.req_pool_indices
        relay[rows] = torch.arange(1000, 1000 + len(reqs), dtype=relay.dtype, device=relay.device)
        for req in reqs:
            req.output_ids.append(7)
        batch.input_ids = None
        return batch

    # --- host time

    def host_times(self, samples: int) -> dict[str, Any]:
        """Times the calls of a batch with and without the plugin, in turn. Each part is timed where
        it runs, in microseconds."""
        result: dict[str, Any] = {}
        rng = random.Random(1)
        shapes = ((1, 128, 1), (1, CHUNK, 1), (8, 1024, 1), (64, 128, 1), (1, 16384, 1), PAGED)
        for count, length, page in shapes:
            rig = self.rig if page == 1 else self.rig.paged(page)
            inputs = [[random_ids(length, rng) for _ in range(count)] for _ in range(16)]
            times: dict[str, dict[str, list[float]]] = {WITH: {}, WITHOUT: {}}
            rounds = samples if count == 1 else max(samples // 4, 20)  # their setup takes longest
            shape = shape_name(count, length, page)
            for i in self.track(rounds + 50, shape):
                one_chunk = (count, length) == (1, CHUNK)
                turns = [WITH, WITHOUT, *([BELOW] if self.bound and one_chunk else [])]
                for side in self.order.sample(turns, len(turns)):
                    if side == BELOW:
                        assert self.bound is not None
                        took = self._timed_bound(self.bound, inputs[(i + 8) % len(inputs)])
                    else:
                        took = self._timed_batch(side, inputs[i % len(inputs)], rig)
                        if one_chunk:
                            took["resolve, nothing to do"] = self._idle_resolve(side, inputs[0])
                    if i >= 50:
                        for name, value in took.items():
                            times.setdefault(side, {}).setdefault(name, []).append(value)
            below = times.pop(BELOW, None)
            result[shape] = _summaries(times)
            if below:
                self.bounds["8,192"] = {name: summary(values) for name, values in below.items()}
        return result

    @contextlib.contextmanager
    def _batch(self, side: str, lists: list[array[int]], rig: Any = None) -> Iterator[Any]:
        """A batch with one request for each list, not prepared yet. Releases it afterwards."""
        rig = rig or self.rig
        self.switch(side)
        reqs = [rig.request(ids, max_new_tokens=1) for ids in lists]
        batch = rig.batch(reqs)
        self.streams.settle()
        yield batch
        self.streams.settle()
        rig.release(*reqs)

    def _timed_batch(self, side: str, lists: list[array[int]], rig: Any) -> dict[str, float]:
        took: dict[str, float] = {}
        with self._batch(side, lists, rig) as batch:
            module = self.schedule_batch
            names = ("flatten_arrays_to_pinned_cpu", "alloc_for_extend")
            timed = {name: _timed(getattr(module, name), name, took) for name in names}
            sampling = _timed(module.SamplingBatchInfo.from_schedule_batch, "sampling info", took)
            timed["SamplingBatchInfo"] = SimpleNamespace(from_schedule_batch=sampling)
            with mock.patch.multiple(module, **timed):
                t0 = time.perf_counter_ns()
                batch.prepare_for_extend()
                t1 = time.perf_counter_ns()
                with self.streams.on_forward():
                    t2 = time.perf_counter_ns()
                    rig.resolve(batch)
                    t3 = time.perf_counter_ns()
        took["prepare_for_extend"] = (t1 - t0) / 1e3
        took["resolve_forward_inputs"] = (t3 - t2) / 1e3
        took["flatten + resolve"] = took["flatten_arrays_to_pinned_cpu"] + (t3 - t2) / 1e3
        took["prepare + resolve"] = (t1 - t0 + t3 - t2) / 1e3
        return took

    def _timed_bound(self, bound: Bound, lists: list[array[int]]) -> dict[str, float]:
        """Times the lower bound's parts where flatten and resolve would run: the write within
        prepare_for_extend, the others as the first work on the forward stream. The times include no
        Python call."""
        unused = torch.empty(sum(map(len, lists)), dtype=torch.int64)
        written: list[float] = []

        def write(parts: Any, pin: bool) -> torch.Tensor:
            written.append(bound.write(lists))
            return unused

        # With the plugin on, because it reads no ids before they are flattened.
        with (
            self._batch(WITH, lists) as batch,
            mock.patch.object(self.schedule_batch, "flatten_arrays_to_pinned_cpu", write),
        ):
            batch.prepare_for_extend()
            with self.streams.on_forward():
                memory, launch, _ = bound.issue(unused.numel())
        parts = (*written, memory, launch)
        return dict(zip(PARTS, parts, strict=True)) | {"total": sum(parts)}

    def _idle_resolve(self, side: str, lists: list[array[int]]) -> float:
        """Microseconds of resolve_forward_inputs, where it runs, for a batch that already has its
        ids. This is the cost of the call when nothing is transferred."""
        with self._batch(side, lists) as batch:
            batch.prepare_for_extend()
            batch.prefill_input_ids_cpu, batch.input_ids = None, batch.req_pool_indices
            with self.streams.on_forward():
                start = time.perf_counter_ns()
                self.rig.resolve(batch)
                return (time.perf_counter_ns() - start) / 1e3

    def history_times(self, samples: int) -> dict[str, Any]:
        """Times what prepare_for_extend does with the ids of a chunk after a long history."""
        rng = random.Random(2)
        reqs = [self.rig.request(random_ids(HISTORY + CHUNK, rng)) for _ in range(8)]
        for req in reqs:
            req.prefix_len = HISTORY
        module, hook = self.schedule_batch, self.plugin.staging.prepare_for_extend
        # The lower bound: writing a chunk as int32, and SGLang's wrappers around empty hooks.
        from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

        chunks = [req.origin_input_ids[HISTORY:] for req in reqs]
        below: dict[str, list[float]] = {"hooks": [], "write": [], "total": []}
        fill_ids = _wrap_fn(module.Req.get_fill_ids, lambda original, req: (), HookType.AROUND)
        flatten = _wrap_fn(
            module.flatten_arrays_to_pinned_cpu,
            lambda original, parts, pin: None,
            HookType.AROUND,
        )

        def ids_of(batch: Any) -> Any:
            parts = [r.get_fill_ids()[r.prefix_len :] for r in batch.reqs]
            return module.flatten_arrays_to_pinned_cpu(parts, self.pin)

        calls = {WITH: lambda batch: hook(ids_of, batch), WITHOUT: ids_of}
        times: dict[str, dict[str, list[float]]] = {WITH: {"us": []}, WITHOUT: {"us": []}}
        for i in self.track(samples + 50, "history"):
            batch = self.rig.batch([reqs[i % len(reqs)]])
            for side in self.order.sample(SIDES, 2):
                self.switch(side)
                start = time.perf_counter_ns()
                staged = calls[side](batch)
                took = (time.perf_counter_ns() - start) / 1e3
                if staged[0] != reqs[i % len(reqs)].origin_input_ids[HISTORY]:
                    raise RuntimeError(f"{side}: other ids than the request's")
                del staged
                if i >= 50:
                    times[side]["us"].append(took)
            start = time.perf_counter_ns()
            flatten([fill_ids(r)[r.prefix_len :] for r in batch.reqs], self.pin)
            took = (time.perf_counter_ns() - start) / 1e3
            written = self.bound.write([chunks[(i + 4) % len(chunks)]]) if self.bound else 0.0
            if i >= 50:
                below["hooks"].append(took)
                below["write"].append(written)
                below["total"].append(took + written)
        self.bounds["history"] = {name: summary(values) for name, values in below.items() if values}
        return {f"{CHUNK} behind {HISTORY}": _summaries(times)}

    def what_remains(self) -> dict[str, int]:
        """The operators that one prepare_for_extend + resolve of 8,192 ids runs with the plugin."""
        self.switch(WITH)
        req = self.rig.request(random_ids(CHUNK, random.Random(3)))
        batch = self.rig.batch([req])
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            batch.prepare_for_extend()
            with self.streams.on_forward():
                self.rig.resolve(batch)
        self.streams.settle()
        self.rig.release(req)
        counts = {e.key: int(e.count) for e in profile.key_averages() if e.key.startswith("aten::")}
        return dict(sorted(counts.items(), key=lambda item: -item[1])[:16])

    def launches(self) -> dict[str, Any]:
        """The kernels and copies that one prepare_for_extend launches, in order."""
        rng = random.Random(4)
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        result: dict[str, Any] = {}
        for count, length, page in ((1, CHUNK, 1), PAGED):
            rig = self.rig if page == 1 else self.rig.paged(page)
            lists = [random_ids(length, rng) for _ in range(count)]
            told = result[shape_name(count, length, page)] = {}
            for side in (WITH, WITHOUT):
                for _ in range(2):  # in the second round all kernels are loaded
                    with (
                        self._batch(side, lists, rig) as batch,
                        torch.profiler.profile(activities=kinds) as profile,
                    ):
                        batch.prepare_for_extend()
                        self.streams.settle()
                told[side] = [name[:60] for name in launched(profile)]
        return result

    # --- until the ids are there

    def behind_copies(self, samples: int) -> dict[str, Any]:
        """Microseconds from entering resolve_forward_inputs until the ids are on the device."""
        host = torch.empty(256 << 20, dtype=torch.uint8).pin_memory()
        gpu = torch.empty(256 << 20, dtype=torch.uint8, device=self.rig.device)
        side_stream, ready = torch.cuda.Stream(), torch.cuda.Event()
        inputs = [random_ids(CHUNK, random.Random(i)) for i in range(16)]
        result: dict[str, Any] = {}
        for where in ("idle", "behind 2 x 256 MiB H2D"):
            times: dict[str, dict[str, list[float]]] = {WITH: {"us": []}, WITHOUT: {"us": []}}
            for i in self.track(samples + 5, where):
                for side in self.order.sample(SIDES, 2):
                    with self._batch(side, [inputs[i % 16]]) as batch:
                        batch.prepare_for_extend()
                        self.streams.settle()
                        if where != "idle":
                            with torch.cuda.stream(side_stream):
                                gpu.copy_(host, non_blocking=True)
                                gpu.copy_(host, non_blocking=True)
                        with self.streams.on_forward():
                            start = time.perf_counter_ns()
                            self.rig.resolve(batch)
                            ready.record()
                        while not ready.query():
                            pass
                        took = (time.perf_counter_ns() - start) / 1e3
                    if i >= 5:
                        times[side]["us"].append(took)
            result[where] = _summaries(times)
        return result


def recorder_of(console: Console) -> Callable[[Any, Any], None]:
    """The scheduler's ``record_batch_in_overlap``. Where its module needs more kernels than there
    are stubs for, a function here that does the same."""
    try:
        from sglang.srt.managers.scheduler import Scheduler
    except Exception as error:
        sys.modules.pop("sglang.srt.managers.scheduler", None)
        console.print(f"the scheduler's module cannot be imported here ({error})", markup=False)
    else:
        record: Callable[[Any, Any], None] = Scheduler.record_batch_in_overlap
        return record

    def record_batch(recorder: Any, batch: Any) -> None:
        recorder.batch_record_ct = (recorder.batch_record_ct + 1) % 2
        fields = [getattr(batch, f.name, None) for f in dataclasses.fields(batch)]
        recorder.batch_record_buf[recorder.batch_record_ct] = [batch, fields]

    return record_batch


def sampling_of(r: int) -> dict[str, Any]:
    """Sampling parameters of the r-th request of the trace. Most requests have none."""
    if r % 10 == 1:
        return {"logit_bias": {str(r % 500): 2.5, "7": -1.0}}
    if r % 10 == 4:
        return {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.5}
    if r % 10 == 6:
        return {"temperature": 0.5 + r % 3, "top_p": 0.75, "top_k": 1 + r % 50, "min_p": 0.125}
    return {}


def small_tensors_of(batch: Any) -> list[torch.Tensor]:
    """The tensors that prepare_for_extend makes besides the ids, copied on the schedule stream.
    They are the same with and without the plugin. KV indices are not, so the last tensor only tells
    whether each request's row has the indices of its batch."""
    info = batch.sampling_info
    made = [batch.seq_lens, batch.orig_seq_lens, info.temperatures, info.top_ps, info.top_ks]
    made += [info.min_ps, *([] if info.logit_bias is None else [info.logit_bias])]
    if batch.extend_input_logprob_token_ids is not None:
        made.append(batch.extend_input_logprob_token_ids)
    lens = torch.tensor(batch.extend_lens)
    first = torch.tensor(batch.prefix_lens) - lens.cumsum(0) + lens
    columns = torch.arange(int(lens.sum())) + first.repeat_interleave(lens)
    device = batch.out_cache_loc.device
    rows = batch.req_pool_indices.repeat_interleave(lens.to(device))
    table = batch.req_to_token_pool.req_to_token
    made.append(table[rows, columns.to(device)].long() - batch.out_cache_loc)
    return [tensor.to(device, copy=True) for tensor in made]


def shape_name(count: int, length: int, page: int) -> str:
    return f"{count} x {length}" + (f", pages of {page}" if page > 1 else "")


def _timed(function: Callable[..., Any], name: str, took: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter_ns()
        try:
            return function(*args, **kwargs)
        finally:
            took[name] = took.get(name, 0.0) + (time.perf_counter_ns() - start) / 1e3

    return timed


def _summaries(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Summaries of each part for both sides, and of the time that the plugin saves in each pair."""
    result: dict[str, Any] = {}
    for name, ours in times[WITH].items():
        theirs = times[WITHOUT][name]
        saved = np.subtract(theirs, ours)
        a, b = summary(ours), summary(theirs)
        result[name] = {
            WITH: a,
            WITHOUT: b,
            "ratio": {q: round(b[q] / a[q], 2) if a[q] else 0.0 for q in ("p50", "p99")},
            "saved_us": {"p50": round(float(np.median(saved)), 1)},
        }
    return result


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets, the measured values, and the limits that the lower bound sets, for the parts
    that ran."""
    rows: list[dict[str, Any]] = []
    bounds = result["bound"]

    def row(
        measure: str, target: str, value: float, ok: bool, unit: str, limit: float | None = None
    ) -> None:
        cells = {"measure": measure, "target": target, "value": round(value, 2), "unit": unit}
        rows.append(cells | {"limit": None if limit is None else round(limit, 2), "ok": ok})

    if "host" in result:
        cell = result["host"][f"1 x {CHUNK}"]
        both = cell["flatten + resolve"]
        # SGLang's own call remains, but has nothing to do.
        least = bounds["8,192"]["total"]["p50"] + cell["resolve, nothing to do"][WITHOUT]["p50"]
        ratio, limit = both["ratio"]["p50"], both[WITHOUT]["p50"] / least
        row("flatten + resolve, 8,192: host time", ">= 6 x less", ratio, ratio >= 6, "x", limit)
    if "history" in result:
        cell = result["history"][f"{CHUNK} behind {HISTORY}"]["us"]
        ratio, limit = (
            cell["ratio"]["p50"],
            cell[WITHOUT]["p50"] / bounds["history"]["total"]["p50"],
        )
        row("8,192 behind 122,880: slice + flatten", ">= 15 x less", ratio, ratio >= 15, "x", limit)
    if "host" in result:
        saved = result["host"][f"1 x {CHUNK}"]["prepare + resolve"]["saved_us"]["p50"]
        row("prepare_for_extend + resolve, 8,192", ">= 120 us less", saved, saved >= 120, "us")
        name = shape_name(*PAGED)
        saved = result["host"][name]["prepare + resolve"]["saved_us"]["p50"]
        row(f"prepare_for_extend + resolve, {name}", ">= 600 us less", saved, saved >= 600, "us")
    if "launches" in result:
        count = len(result["launches"][f"1 x {CHUNK}"][WITH])
        row("launches and copies of prepare_for_extend, 8,192", "<= 4", count, count <= 4, "")
    if "latency" in result:
        ratio = result["latency"]["behind 2 x 256 MiB H2D"]["us"]["ratio"]["p50"]
        row("ids ready behind 2 x 256 MiB H2D", ">= 100 x sooner", ratio, ratio >= 100, "x")
    ids = result.get("ids") or result.get("ids, prefill only")
    if ids:
        row(f"ids different, {ids['batches']:,} trace batches", "0", ids["different"],
            ids["different"] == 0, "")  # fmt: skip
        row("of them, small tensors or KV rows different", "0", ids["small different"],
            ids["small different"] == 0, "")  # fmt: skip
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    cells = [("host", c, p, s) for c, ps in result.get("host", {}).items() for p, s in ps.items()]
    for part in ("history", "latency"):
        cells += [(part, c, "", s["us"]) for c, s in result.get(part, {}).items()]
    if cells:
        table = Table("", "", *(f"{s}, p50 / p99" for s in (WITH, WITHOUT)), "p50", title="us")
        for _, cell, part, s in cells:
            pairs = [f"{s[x]['p50']:,.1f} / {s[x]['p99']:,.1f}" for x in (WITH, WITHOUT)]
            table.add_row(cell, part, *pairs, f"{s['ratio']['p50']:.1f} x")
        console.print(table)
    for part in ("ids", "ids, prefill only", "remains"):
        if part in result:
            console.print(f"{part}: {result[part]}")
    head = ("measure", "target", "measured", "at the lower bound", "")
    table = Table(*head, title=result["device_name"])
    for r in result["targets"]:
        met = "yes" if r["ok"] else "NO"
        table.add_row(r["measure"], r["target"], amount(r), amount(r, "limit"), met)
    console.print(table)
    for part, error in result["errors"].items():
        console.print(f"FAILED: {part}\n{error}", markup=False)


def install_wheels(folder: Path) -> str:
    """Adds the wheels to the path of this process only."""
    site = tempfile.mkdtemp(prefix="sglang-wheels-")
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        sys.exit(f"no wheels in {folder}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", site, *wheels], check=True)
    sys.path.insert(0, site)
    return site


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=1000, help="of each host time")
    parser.add_argument("--batches", type=int, default=10_000, help="trace batches to compare")
    parser.add_argument("--quick", action="store_true", help="few of each, a look only")
    parser.add_argument(
        "--parts", default="host,history,remains,launches,latency,ids", help="some of these"
    )
    parser.add_argument("--sglang-wheels", type=Path, metavar="DIR", help="install these first")
    parser.add_argument("--out", help="JSON file; default bench/results/sglang-<device>.json")
    args = parser.parse_args()
    samples, batches = (50, 300) if args.quick else (args.samples, args.batches)
    if args.sglang_wheels:
        install_wheels(args.sglang_wheels)
    console = Console(width=120)
    cuda = args.device.startswith("cuda")
    stood_in = sglang_rig.stand_in(sglang_rig.CUDA_KERNELS if cuda else sglang_rig.KERNELS)
    name = torch.cuda.get_device_name() if cuda else "host device"
    result: dict[str, Any] = {"device_name": name, "stood_in": stood_in, "errors": {}}
    bench: Bench | None = None
    with torch.no_grad():
        try:
            bench = Bench(args.device, console)
            result["plugin"] = bench.status
            console.print(bench.status["line"], markup=False)
        except Exception:
            result["errors"]["start"] = traceback.format_exc()
        steps: list[tuple[str, Callable[[Bench], Any]]] = [
            ("host", lambda b: b.host_times(samples)),
            ("history", lambda b: b.history_times(samples)),
            ("remains", lambda b: b.what_remains()),
        ]
        if cuda:
            steps.append(("launches", lambda b: b.launches()))
            steps.append(("latency", lambda b: b.behind_copies(max(20, samples // 10))))
        steps += [
            ("ids", lambda b: b.equal_ids(batches, mixed=True)),
        ]
        chosen = [s for s in steps if bench and s[0] in args.parts.split(",")]
        for part, step in chosen:
            assert bench is not None
            start = time.monotonic()
            try:
                with collector_off() if part in TIMED else contextlib.nullcontext():
                    result[part] = step(bench)
            except Exception:
                result["errors"][part] = traceback.format_exc()
                if part == "ids":
                    chosen.append(
                        ("ids, prefill only", lambda b: b.equal_ids(batches, mixed=False))
                    )
            console.print(f"{part}: {time.monotonic() - start:.1f} s")
    result["bound"] = bench.bounds if bench else {}
    result["targets"] = targets(result) if cuda else []
    show(result, console)
    file = "sglang-" + name.lower().replace(" ", "-")
    # The pages take the newest whole run.
    whole = (
        not result["errors"]
        and [part for part, _ in chosen] == [part for part, _ in steps]
        and batches >= 10_000
    )
    out = args.out or (None if whole and samples >= 500 else BUILD / f"{file}.json")
    console.print("written:", str(write_result(file, result, out)))
    different = sum(
        result.get(part, {}).get(kind, 0)
        for part in ("ids", "ids, prefill only")
        for kind in ("different", "small different")
    )
    return 1 if result["errors"] or different else 0


if __name__ == "__main__":
    sys.exit(main())
