"""Runs a trace for minutes through two pools, on several streams, beside copies that keep the link
busy. Compares every id on the device. Records times and the memory held for every minute.

python bench/sustained.py --minutes 20                         in one run
python bench/sustained.py --minutes 20 --at-most 8 --resume    in parts: repeat until complete
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # so that the script runs from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pystage
from bench.common import RESULTS, amount, provenance, random_ids, resident_bytes, save, summary
from bench.device import Host, find
from pystage.testing import host_stream
from pystage.trace import prefill_batches, sample_trace

STREAMS = 4
PIECES, PIECE = 16, 1 << 17  # the arrays that the ids of requests are cut from
DRAIN = 64  # maximum number of batches that wait on a stream
READY = 8  # the host waits for one batch in this many
MIB = 1 << 20


class Traffic:
    """Keeps two copies to the device queued, from a separate thread, on a separate stream."""

    def __init__(self, device: Host, size: int) -> None:
        self.copies = 0
        self.size = size
        self._device, self._stop = device, threading.Event()
        self._source = device.pinned(size // 8).zero_()
        self._targets = [torch.empty_like(self._source, device=device.torch) for _ in range(2)]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def _run(self) -> None:
        try:
            device = self._device
            with device.on(device.new_stream()):
                events = [device.event() for _ in self._targets]
                turns: Iterator[tuple[Any, torch.Tensor]] = cycle(
                    zip(events, self._targets, strict=True)
                )
                while not self._stop.is_set():
                    event, target = next(turns)
                    event.synchronize()  # the last but one: another is queued behind it
                    target.copy_(self._source, non_blocking=True)
                    event.record()
                    self.copies += 1
                for event in events:
                    event.synchronize()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error:
            raise self._error


class Work:
    """Makes batches with the trace's lengths, and the same ids on the device to compare with."""

    def __init__(self, device: Host, seed: int) -> None:
        self._rng = random.Random(seed)
        self._pieces = [random_ids(PIECE, self._rng) for _ in range(PIECES)]
        whole = torch.tensor([list(piece) for piece in self._pieces])
        self._on_device = whole.to(device.torch)
        self._batches = prefill_batches(cycle(sample_trace()))

    def next(self) -> tuple[list[array[int]], list[int], list[int], list[torch.Tensor]]:
        """Whole requests, the starts and ends of their parts, and these parts on the device."""
        requests, starts, stops, parts = [], [], [], []
        batch = next(self._batches)
        for start, stop in zip(batch.starts, batch.stops, strict=True):
            piece, length = self._rng.randrange(PIECES), min(stop - start, PIECE)
            at = self._rng.randrange(PIECE - length + 1)
            requests.append(self._pieces[piece])
            starts.append(at)
            stops.append(at + length)
            parts.append(self._on_device[piece, at : at + length])
        return requests, starts, stops, parts


def streams_of(device: Host) -> list[Callable[[], AbstractContextManager[Any]]]:
    if not device.cuda:
        return [lambda n=n: host_stream(n) for n in range(STREAMS)]  # type: ignore[misc]
    made = [device.new_stream() for _ in range(STREAMS)]
    return [lambda s=s: device.on(s) for s in made]  # type: ignore[misc]


@contextmanager
def pools_of(device: Host) -> Iterator[list[pystage.StagingPool]]:
    with (
        pystage.StagingPool(device.torch, 16 * MIB, timeout_s=60) as deferred,
        pystage.StagingPool(device.torch, 16 * MIB, timeout_s=60, issue="eager") as eager,
    ):
        yield [deferred, eager]


class Replay:
    """Sends batches through the pools in turn, and keeps the times of the current minute."""

    def __init__(self, device: Host, pools: list[pystage.StagingPool], work: Work) -> None:
        self._device, self._pools, self._work = device, pools, work
        self._streams = streams_of(device)
        self._wrong: list[torch.Tensor] = []
        self._static: list[torch.Tensor] = []
        for on in self._streams:
            with on():
                self._wrong.append(torch.zeros((), dtype=torch.int64, device=device.torch))
                self._static.append(torch.empty(PIECE, dtype=torch.int64, device=device.torch))
        device.synchronize()
        self._count = 0
        self.forget()

    def forget(self) -> None:
        """Clears the times to begin a new minute."""
        self.host_us: list[float] = []
        self.ready_us: list[float] = []
        self.tokens = 0

    def once(self) -> None:
        """Stages one batch, resolves it in one of three ways, and compares the ids."""
        number = self._count
        self._count += 1
        stream = number % STREAMS
        pool = self._pools[number // STREAMS % len(self._pools)]
        requests, starts, stops, parts = self._work.next()
        count = sum(stops) - sum(starts)
        skipped = count // 3 if number % 7 == 3 else 0
        with self._streams[stream]():
            out = self._static[stream][:count] if number % 7 == 5 else None
            waits = number % READY == 0
            event = self._device.event()
            if waits:  # so that no earlier batch is ahead of it
                event.record()
                event.synchronize()
            begin = time.perf_counter_ns()
            staged = pool.stage(requests, starts, stops, vocab_size=128_256)
            ids = pystage.resolve(staged[skipped:] if skipped else staged, out=out)
            del staged
            self.host_us.append((time.perf_counter_ns() - begin) / 1e3)
            event.record()
            if waits:
                while not event.query():
                    pass
                self.ready_us.append((time.perf_counter_ns() - begin) / 1e3)
            expected = torch.cat(parts)[skipped:]
            self._wrong[stream] += (ids != expected).sum()
            if number // STREAMS % DRAIN == 0:
                event.record()
                event.synchronize()
        self.tokens += count

    def wrong(self) -> int:
        """Number of ids that differed so far."""
        self._device.synchronize()
        return sum(int(w) for w in self._wrong)


def contexts() -> int | None:
    """Number of compute contexts on all GPUs, from nvidia-smi. None if it does not list them."""
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return len(listed.stdout.split())


def held(device: Host, pools: list[pystage.StagingPool]) -> dict[str, int | None]:
    """Memory and other resources that the process holds now, in bytes and counts."""
    stats = [pool.stats() for pool in pools]
    figures: dict[str, int | None] = {
        "resident_bytes": resident_bytes(),
        "pool_bytes": sum(s.reserved_bytes for s in stats),
        "pool_allocations": sum(s.allocations for s in stats),
        "torch_pinned_bytes": device.pinned_bytes()[0],
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "device_bytes": None,
        "contexts": None,
    }
    if device.cuda:
        free, total = torch.cuda.mem_get_info()
        figures |= {"device_bytes": total - free, "contexts": contexts()}
    return figures


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets of a sustained run: no wrong ids, no growth, no minute unlike the others.

    Memory is compared within each run, from its second row on. The first row is the warm-up.
    """

    def growth(name: str) -> float | None:
        """None if no minute has the figure."""
        if all(row[name] is None for row in rows):
            return None
        most = 0
        for run in {row["run"] for row in rows}:
            of_run = [row for row in rows if row["run"] == run and row[name] is not None]
            later = of_run[1:] or of_run
            most = max([most, *(row[name] - later[0][name] for row in later)])
        return most

    def mib(count: float | None) -> float | None:
        return None if count is None else count / MIB

    p99 = sorted(row["host"]["p99"] for row in rows)
    found = [
        ("wrong ids", 0, sum(row["wrong"] for row in rows), ""),
        (
            "p99 of stage + resolve, worst minute of the median one",
            2,
            p99[-1] / p99[len(p99) // 2],
            "x",
        ),
        ("memory of the process: growth", 32, mib(growth("resident_bytes")), "MiB"),
        ("memory of the pools: growth", 0, mib(growth("pool_bytes")), "MiB"),
        ("memory of the GPU: growth", 0, mib(growth("device_bytes")), "MiB"),
        ("CUDA contexts: growth", 0, growth("contexts"), ""),
        ("open files: growth", 0, growth("fds"), ""),
        ("threads: growth", 0, growth("threads"), ""),
    ]
    return [
        {
            "measure": measure,
            "target": f"<= {limit} {unit}".strip() if limit else "0",
            "value": None if value is None else round(value, 3),
            "unit": unit,
            "ok": None if value is None else value <= limit,
        }
        for measure, limit, value, unit in found
    ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cuda:N or cpu; default: the GPU there is, or the host")
    parser.add_argument("--minutes", type=float, default=20, help="in all (20)")
    parser.add_argument("--at-most", type=float, help="minutes of this call")
    parser.add_argument("--every", type=float, default=60, help="seconds that a row covers (60)")
    parser.add_argument("--traffic", type=int, help="MiB of a copy beside it (256; on the host 4)")
    parser.add_argument("--resume", action="store_true", help="adds to what --out has already")
    parser.add_argument("--out", type=Path, help="the JSON (bench/results/sustained.json)")
    args = parser.parse_args(arguments)
    device = find(args.device, False)
    out = args.out or RESULTS / "sustained.json"
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    if args.resume and out.exists():
        before = json.loads(out.read_text())
        rows, runs = before["rows"], before["runs"]
    left = round(args.minutes * 60 / args.every) - len(rows)
    if args.at_most is not None:
        left = min(left, round(args.at_most * 60 / args.every))
    if left < 1:
        print(f"all {len(rows)} rows are there")
        return json.loads(out.read_text()) if rows else {}
    source = provenance()
    runs.append({key: source[key] for key in ("date", "command", "commit", "device", "driver")})
    size = (args.traffic or (256 if device.cuda else 4)) * MIB
    wrong_before, done = 0, sum(row["seconds"] for row in rows)
    with pools_of(device) as pools, Traffic(device, size) as traffic:
        replay = Replay(device, pools, Work(device, seed=len(runs)))
        for _ in range(200):
            replay.once()
        replay.forget()
        for _ in range(left):
            begin, copies = time.monotonic(), traffic.copies
            while time.monotonic() < begin + args.every:
                replay.once()
            wrong, seconds = replay.wrong(), time.monotonic() - begin
            row = {
                "run": len(runs),
                "minute": round((done + seconds) / 60, 3),
                "seconds": round(seconds, 3),
                "batches": len(replay.host_us),
                "tokens": replay.tokens,
                "wrong": wrong - wrong_before,
                "host": summary(replay.host_us),
                "ready": summary(replay.ready_us),
                "copied_gb_per_s": round((traffic.copies - copies) * size / seconds / 1e9, 3),
                **held(device, pools),
            }
            done, wrong_before = done + seconds, wrong
            replay.forget()
            rows.append(row)
            # Written every minute, so that an interrupted run keeps its results.
            result = {
                "benchmark": "sustained",
                **source,
                "minutes": round(done / 60, 2),
                "traffic_bytes": 2 * size,
                "streams": STREAMS,
                "runs": runs,
                "rows": rows,
                "targets": targets(rows),
            }
            save(out, result)
            print(
                f"minute {row['minute']:6.2f}: {row['batches']:,} batches, {row['wrong']} wrong, "
                f"p99 {row['host']['p99']:.0f} us, ready {row['ready']['p99']:.0f} us, "
                f"{row['resident_bytes'] / MIB:,.0f} MiB resident",
                flush=True,
            )
    for target in result["targets"]:
        print(f"{target['measure']}: {amount(target)} ({target['target']})")
    return result


if __name__ == "__main__":
    sys.exit(any(row["wrong"] for row in main().get("rows", [])))
