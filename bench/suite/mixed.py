"""Regime: mixed batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

import pystage
from bench.common import VOCAB, TwoCalls, summary, two_calls_time
from bench.device import Absent
from bench.suite.cells import Bench, Cell, Once, budget
from bench.suite.contenders import (
    Batch,
    ForwardBatch,
    sglang_code,
    torch_array,
)
from bench.suite.stream import Between

FUSED, APART, MIXED_SGLANG = "pystage, one kernel", "pystage copy + gather + cat", "SGLang's cat"
PLAIN_MIXED = "copy + gather + cat"


KERNELS = "kernels, 8192 ids + 64 running"
MIXED = ((128, 32), (2048, 128), (8192, 64), (8192, 256))


def regime(bench: Bench) -> dict[str, Cell]:
    """A prefill and running requests in one batch: ids from the host, then from the device."""
    cells: dict[str, Cell] = {
        f"{n} ids + {k} running": partial(_mixed_cell, bench, n, k) for n, k in MIXED
    }
    cells[KERNELS] = Once(_kernels_cell, bench)  # last: the profiler slows what runs after it
    return cells


@contextlib.contextmanager
def _mixed_ways(bench: Bench, count: int, running: int) -> Iterator[tuple[Any, Any, Any]]:
    """The two calls of each contender, after checking that all give the same ids; the inputs; and
    the contenders that are absent."""
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
    """Kernels and copies that each contender launches, counted by torch's profiler."""
    if not bench.device.gpu_regimes:
        raise Absent("no kernels on the host device")
    with _mixed_ways(bench, 8192, 64) as (calls, inputs, missing):
        rows = {
            name: bench.device.kernels(partial(finish, stage(inputs(0))))
            for name, (stage, finish) in calls.items()
        }
    return {"contenders": rows | missing}


def _mixed_stream(bench: Bench, calls: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """Time that each contender adds to the compute stream."""
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
