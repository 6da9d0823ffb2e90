"""Regime: host time."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import pystage
from bench.common import VOCAB
from bench.suite.cells import SHAPES, Bench, Cell, Once, budget, two_calls
from bench.suite.contenders import (
    EVERYBODY,
    OURS,
    PEERS,
    POOLS,
    count_of,
)

IN_FLIGHT = 8
COLD_SHAPES = ("1 x 128", "1 x 8192", "8 x 1024", "64 x 128", "256 x 64", "1 x 131072")


def regime(bench: Bench) -> dict[str, Cell]:
    """Host time of stage and of resolve, until the calls return."""
    cells: dict[str, Cell] = {}
    for shape, lengths in SHAPES.items():
        cells[f"{shape} array"] = partial(host_cell, bench, "array", lengths, False)
    for shape in COLD_SHAPES:
        cells[f"{shape} array, cold"] = partial(host_cell, bench, "array", SHAPES[shape], True)
    for shape in ("1 x 8192", "64 x 128"):
        for kind in ("list", "numpy", "tensor"):
            cells[f"{shape} {kind}"] = partial(host_cell, bench, kind, SHAPES[shape], False)
    cells["1 x 8192 list, cold"] = partial(host_cell, bench, "list", SHAPES["1 x 8192"], True)
    for shape in ("1 x 8192", "64 x 128"):
        name = f"{shape} array, {IN_FLIGHT} in flight"
        cells[name] = partial(host_cell, bench, "array", SHAPES[shape], False, IN_FLIGHT)
    cells["trace array, cold"] = Once(_trace_cell, bench)
    cells["bytes over the link"] = Once(_link_cell, bench)
    return cells


def host_cell(
    bench: Bench, kind: str, lengths: Sequence[int], cold: bool, in_flight: int = 1
) -> dict[str, Any]:
    """Times one cell. ``in_flight``: this many calls of every contender are made between drains of
    the device."""
    count = sum(lengths)
    samples, warmup = budget(bench, count)
    everybody = [c for c in bench.contenders.all(EVERYBODY, count) if kind in c.takes]
    inputs, rotated = bench.inputs(kind, lengths, cold, (samples + warmup) * len(everybody))
    number = samples + warmup  # the lower bound reads its own arrays
    whole, _ = bench.inputs("array", [count], cold, number)
    ragged, _ = bench.inputs("array", lengths, cold, number)
    calls = itertools.count(1)

    def settle() -> None:
        if next(calls) % (in_flight * len(everybody)) == 0 or in_flight == 1:
            bench.device.synchronize()

    rows = two_calls(bench, everybody, whole, ragged, inputs, samples, warmup, settle)
    return rows | {
        "ids": count,
        "rotated_bytes": rotated,
    }


def _trace_cell(bench: Bench) -> dict[str, Any]:
    """Batches in the order of a trace, so sizes vary from call to call."""
    samples, warmup = budget(bench, 8192)
    batches = bench.trace
    everybody = bench.contenders.all([*OURS, *PEERS], 8192)
    everybody = [c for c in everybody if "array" in c.takes]
    whole = [sum(batch, array("q")) for batch in batches[: samples + warmup]]
    result = two_calls(
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
    """Bytes over the link, counted by the pools over batches of the trace."""
    rows: dict[str, Any] = {}
    for name, options in POOLS.items():
        with pystage.StagingPool(bench.device.torch, **options) as pool:
            for batch in bench.trace[:100]:
                pystage.resolve(pool.stage(batch, vocab_size=VOCAB))
            stats = pool.stats()
            bench.device.synchronize()
        rows[name] = {"bytes_per_id": round(stats.wire_bytes / stats.tokens, 3)}
    return {"contenders": rows}
