"""Staging and transfer against torch's own ways, in one run: python bench/staging.py

Every call is given ids it has not seen for a while (inputs rotate), contenders run in turn, host
times are taken around the calls alone and stream times between device events.
"""

from __future__ import annotations

import argparse
import random
import time
from array import array
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from common import (
    VOCAB,
    amount,
    arriving,
    host_time,
    random_ids,
    summary,
    two_calls_time,
    write_result,
)
from floor import PARTS, Floor
from rich.console import Console
from rich.table import Table

import pystage
from pystage.trace import draw_ids, sample_trace

Ids: TypeAlias = "list[array[int]]"
INPUTS = 64  # batches that a contender's inputs rotate through


def sglang_idiom(batch: Ids, device: torch.device) -> torch.Tensor:
    """What SGLang 0.5.23 does: concatenate, pin, copy."""
    flat = torch.from_numpy(np.concatenate(batch))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return flat.to(device, non_blocking=True)


FROMITER = "np.fromiter + pin + to"


def torch_tensor(ids: list[int], device: torch.device) -> torch.Tensor:
    """The plain way from a list."""
    return torch.tensor(ids, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def fromiter(ids: list[int], device: torch.device) -> torch.Tensor:
    """The quickest way from a list that NumPy and torch have."""
    read = torch.from_numpy(np.fromiter(ids, np.int64, len(ids)))
    return (read.pin_memory() if device.type == "cuda" else read).to(device, non_blocking=True)


def host_times(device: torch.device, samples: int) -> dict[str, Any]:
    rng = random.Random(1)
    pool = pystage.StagingPool(device)
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    result: dict[str, Any] = {}

    def ours(batch: Any, **kwargs: Any) -> torch.Tensor:
        return pystage.resolve(pool.stage(batch, **kwargs))

    for requests, length in ((1, 128), (1, 8192), (8, 1024), (64, 128), (1, 16384), (1, 131072)):
        count = INPUTS if requests * length <= 16384 else 8
        inputs = [[random_ids(length, rng) for _ in range(requests)] for _ in range(count)]
        result[f"{requests} x {length} array"] = host_time(
            {
                "pystage": lambda i, b=inputs: ours(b[i % len(b)]),
                "pystage, vocab checked": lambda i, b=inputs: ours(b[i % len(b)], vocab_size=VOCAB),
                "concatenate + pin + to": lambda i, b=inputs: sglang_idiom(b[i % len(b)], device),
            },
            samples,
            50,
            settle,
        )
    # 16 lists: 5 MiB of int objects, more than the caches of a core hold.
    lists = [random_ids(8192, rng).tolist() for _ in range(16)]
    result["1 x 8192 list"] = host_time(
        {
            "pystage": lambda i: ours([lists[i % 16]]),
            "torch.tensor + pin + to": lambda i: torch_tensor(lists[i % 16], device),
            FROMITER: lambda i: fromiter(lists[i % 16], device),
        },
        samples,
        20,
        settle,
    )
    plain = [[random_ids(8192, rng)] for _ in range(8)]
    history = [[random_ids(131072 + 8192, rng)] for _ in range(8)]
    result["1 x 8192 behind 131072"] = host_time(
        {
            "no history": lambda i: ours(plain[i % 8]),
            "history, by starts": lambda i: ours(history[i % 8], starts=[131072]),
        },
        samples,
        50,
        settle,
    )
    # Where the time goes: the two calls apart.
    parts = [[random_ids(8192, rng)] for _ in range(INPUTS)]
    result["1 x 8192, calls apart"] = two_calls_time(
        {"pystage": (pool.stage, pystage.resolve)},
        lambda i: parts[i % INPUTS],
        samples,
        50,
        settle,
    )["pystage"]
    pool.close()
    return result


def floor_times(device: torch.device, samples: int) -> dict[str, Any]:
    """What every way must spend, by parts, with the peer's call and a drain before each."""
    rng = random.Random(5)
    result: dict[str, Any] = {}
    with closing(Floor(131072)) as floor:
        for count in (128, 8192, 131072):
            inputs = [random_ids(count, rng) for _ in range(INPUTS if count <= 16384 else 8)]
            rows = []
            for i in range(-20, samples):
                sglang_idiom([inputs[(i + 1) % len(inputs)]], device)
                torch.cuda.synchronize()
                row = floor.once(inputs[i % len(inputs)])
                torch.cuda.synchronize()
                if i >= 0:
                    rows.append((*row, sum(row)))
            result[f"1 x {count}"] = {
                name: summary(values)
                for name, values in zip((*PARTS, "sum"), zip(*rows, strict=True), strict=True)
            }
    return result


class Between:
    """Microseconds that calls add to the current stream, between kernels of a given kind.

    The stream is kept busy while everything is queued, so that the device never waits for the host,
    then a number of kernels run with the call between them. What they take without is subtracted.
    """

    def __init__(self, kernel: Callable[[], Any], repeats: int, sleep_cycles: int) -> None:
        self.kernel, self.repeats, self.sleep_cycles = kernel, repeats, sleep_cycles

    def run(self, call: Callable[[int], Any]) -> float:
        torch.cuda.synchronize()
        torch.cuda._sleep(self.sleep_cycles)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for r in range(self.repeats):
            self.kernel()
            call(r)
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / self.repeats

    def compare(
        self, contenders: dict[str, Callable[[int], Any]], eager: EagerCall, samples: int
    ) -> dict[str, dict[str, float]]:
        times: dict[str, list[float]] = {n: [] for n in [*contenders, "eager", "nothing"]}
        for i in range(samples + 3):
            row = {name: self.run(call) for name, call in contenders.items()}
            eager.stage(self.repeats)
            row["eager"] = self.run(eager.resolve)
            row["nothing"], base = (self.run(lambda r: None) for _ in range(2))
            if i >= 3:
                for name, value in row.items():
                    times[name].append(value - base)
        return {name: summary(values) for name, values in times.items()}


class EagerCall:
    """Resolves what was staged, and transferred, before."""

    def __init__(self, pool: pystage.StagingPool, batch: Ids) -> None:
        self.pool, self.batch = pool, batch
        self.staged: list[pystage.StagedTokens] = []

    def stage(self, count: int) -> None:
        self.staged = [self.pool.stage(self.batch) for _ in range(count)]

    def resolve(self, index: int) -> torch.Tensor:
        return pystage.resolve(self.staged[index])


def between(
    device: torch.device, count: int, samples: int, kernel: Callable[[], Any], cycles: int
) -> dict[str, Any]:
    """All contenders between kernels, for batches of ``count`` ids."""
    batch = [random_ids(count, random.Random(2))]
    pinned = torch.from_numpy(np.array(batch[0])).pin_memory()
    out = torch.empty(count, dtype=torch.int64, device=device)
    scratch = torch.zeros(32, device=device)
    variants: list[dict[str, Any]] = [
        {},
        {"issue": "eager"},
        {"transfer": "copy_engine", "wire": "int64"},
    ]
    pools = [
        pystage.StagingPool(device, 256 << 20, reserve_bytes=64 << 20, **kwargs)
        for kwargs in variants
    ]
    deferred, eager, engine = pools
    contenders: dict[str, Callable[[int], Any]] = {
        "empty kernel": lambda r: scratch.add_(0),
        "cudaMemcpyAsync": lambda r: out.copy_(pinned, non_blocking=True),
        "deferred": lambda r: pystage.resolve(deferred.stage(batch), out=out),
        "copy engine": lambda r: pystage.resolve(engine.stage(batch), out=out),
    }
    timer = Between(kernel, 16 if count <= 131072 else 4, cycles)
    result = timer.compare(contenders, EagerCall(eager, batch), samples)
    for pool in pools:
        pool.close()
    return result


def stream_times(device: torch.device, samples: int) -> dict[str, Any]:
    """Added to the compute stream, between small kernels on an otherwise idle GPU."""
    scratch = torch.zeros(32, device=device)
    return {
        str(count): between(device, count, samples, lambda: scratch.add_(1), 20_000_000)
        for count in (128, 1024, 8192, 16384, 131072, 1048576)
    }


def busy_times(device: torch.device, samples: int) -> dict[str, Any]:
    """Added between matrix products that keep the whole GPU busy, 8,192 ids."""
    a, b = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    return between(device, 8192, samples, lambda: torch.mm(a, b, out=product), 4_000_000)


def behind_copies(device: torch.device, samples: int) -> dict[str, Any]:
    """Microseconds from the call to ids on the device, behind 2 x 256 MiB of other H2D copies."""
    rng = random.Random(4)
    batch = [random_ids(8192, rng)]
    pinned = torch.from_numpy(np.array(batch[0])).pin_memory()
    out = torch.empty(8192, dtype=torch.int64, device=device)
    host = torch.empty(256 << 20, dtype=torch.uint8).pin_memory()
    gpu = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    side = torch.cuda.Stream()
    done = torch.cuda.Event()
    pool = pystage.StagingPool(device)
    staged = pool.stage(batch)
    calls: dict[str, Callable[[], Any]] = {
        "cudaMemcpyAsync": lambda: out.copy_(pinned, non_blocking=True),
        "deferred": lambda: pystage.resolve(staged, out=out),
    }
    result: dict[str, Any] = {}
    for bulk in (False, True):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(samples + 3):
            for name, call in calls.items():
                torch.cuda.synchronize()
                if bulk:
                    with torch.cuda.stream(side):
                        gpu.copy_(host, non_blocking=True)
                        gpu.copy_(host, non_blocking=True)
                start = time.perf_counter_ns()
                call()
                done.record()
                while not done.query():
                    pass
                if i >= 3:
                    times[name].append((time.perf_counter_ns() - start) / 1e3)
        result["behind 2 x 256 MiB H2D" if bulk else "idle"] = {
            name: summary(values) for name, values in times.items()
        }
    pool.close()
    return result


def trace_allocations(device: torch.device, batches: int) -> dict[str, Any]:
    """Pinned allocations over trace batches, after as many again as warm-up."""
    pool = pystage.StagingPool(device)
    requests = sample_trace()
    warm = batches // 10
    sizes: set[int] = set()
    start = pool.stats()
    for done, batch in enumerate(islice(arriving(requests), warm + batches)):
        if done == warm:
            start = pool.stats()
        ids = [draw_ids(requests[r % len(requests)].length, VOCAB, r) for r in batch.requests]
        pystage.resolve(pool.stage(ids, batch.starts, batch.stops, VOCAB))
        sizes.add(batch.tokens)
    end = pool.stats()
    pool.close()
    return {
        "batches": batches,
        "warm-up batches": warm,
        "distinct batch sizes": len(sizes),
        "allocations": end.allocations - start.allocations,
        "frees": end.frees - start.frees,
        "reserved bytes": end.reserved_bytes,
        "high-water bytes": end.high_water_bytes,
        "wire bytes per id": round(end.wire_bytes / end.tokens, 3),
    }


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was promised, what was measured. Lists and eager transfers have theirs in the suite."""
    host, rows = result["host"], []

    def p50(cell: str, name: str) -> float:
        return float(host[cell][name]["p50"])

    def row(measure: str, target: str, value: float, ok: bool, unit: str) -> None:
        rows.append(
            {"measure": measure, "target": target, "value": round(value, 3), "unit": unit, "ok": ok}
        )

    a, idiom = p50("1 x 8192 array", "pystage"), p50("1 x 8192 array", "concatenate + pin + to")
    row("stage + resolve, 1 x 8,192 array", "<= 15", a, a <= 15, "us")
    row("  against concatenate + pin + to", ">= 2", idiom / a, idiom / a >= 2, "x")
    a, idiom = p50("1 x 8192 list", "pystage"), p50("1 x 8192 list", FROMITER)
    row(f"1 x 8,192 list against {FROMITER}", ">= 2", idiom / a, idiom / a >= 2, "x")
    a, idiom = p50("64 x 128 array", "pystage"), p50("64 x 128 array", "concatenate + pin + to")
    row("64 x 128 array against the same", ">= 3", idiom / a, idiom / a >= 3, "x")
    cell = host["1 x 8192 behind 131072"]
    ratio = cell["history, by starts"]["p50"] / cell["no history"]["p50"]
    row("8,192 behind 131,072 of history", "<= 1.2", ratio, ratio <= 1.2, "x")
    if "stream" in result:
        for count, limit in (("8192", 0.45), ("1048576", 0.60)):
            s = result["stream"][count]
            ratio = s["deferred"]["p50"] / s["cudaMemcpyAsync"]["p50"]
            row(
                f"compute stream, deferred, {int(count):,}, of cudaMemcpyAsync",
                f"<= {limit:.0%}", 100 * ratio, ratio <= limit, "%",
            )  # fmt: skip
    value = result["trace"]["allocations"]
    row(
        f"pinned allocations, {result['trace']['batches']:,} trace batches",
        "0",
        value,
        value == 0,
        "",
    )
    return rows


def show(result: dict[str, Any]) -> None:
    console = Console(width=110)
    for title, cells in (
        ("Host time, us", result["host"]),
        ("The floor, in C, us", result.get("floor", {})),
        ("Added to the compute stream, us", result.get("stream", {})),
        ("Added between 4096^3 products, us", {"8192": result["busy"]} if "busy" in result else {}),
        ("Call to ids on the device, us", result.get("latency", {})),
    ):
        if not cells:
            continue
        table = Table("", "", *(["p50", "p90", "p99", "max"]), title=title)
        for cell, contenders in cells.items():
            for name, s in contenders.items():
                table.add_row(cell, name, *(f"{s[k]:,.1f}" for k in ("p50", "p90", "p99", "max")))
            table.add_section()
        console.print(table)
    if not result["targets"]:
        return
    table = Table("measure", "target", "measured", "", title=f"Targets, {result['device_name']}")
    for r in result["targets"]:
        table.add_row(r["measure"], r["target"], amount(r), "yes" if r["ok"] else "NO")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=None)
    parser.add_argument(
        "--samples", type=int, default=1000, help="of each host time (default 1000)"
    )
    parser.add_argument("--quick", action="store_true", help="few samples, a look only")
    parser.add_argument("--out", help="JSON file; default bench/results/staging-<device>.json")
    args = parser.parse_args()
    samples = 50 if args.quick else args.samples
    pool = pystage.StagingPool(args.device)
    device = pool.device
    pool.close()
    console = Console()
    result: dict[str, Any] = {
        "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else "host device",
    }
    steps: list[tuple[str, Callable[[], Any]]] = [("host", lambda: host_times(device, samples))]
    if device.type == "cuda":
        steps += [
            ("floor", lambda: floor_times(device, samples)),
            ("stream", lambda: stream_times(device, max(10, samples // 20))),
            ("busy", lambda: busy_times(device, max(10, samples // 20))),
            ("latency", lambda: behind_copies(device, max(10, samples // 10))),
        ]
    steps.append(("trace", lambda: trace_allocations(device, 500 if args.quick else 10_000)))
    for name, step in steps:
        with console.status(f"{name} ..."):
            start = time.perf_counter()
            result[name] = step()
        console.print(f"{name}: {time.perf_counter() - start:.1f} s")
    # They are an H100's: the host device's figures show that all is right, not how fast.
    result["targets"] = targets(result) if device.type == "cuda" else []
    show(result)
    name = "staging-" + result["device_name"].lower().replace(" ", "-")
    console.print("written:", str(write_result(name, result, args.out)))


if __name__ == "__main__":
    main()
