"""Pools of all ranks of one host: start-up, memory and contexts, and what ranks cost each other.

    python -m bench.ranks              one process per GPU
    python -m bench.ranks --ranks 2    on a CPU: so many processes, on the host device

Each rank is a process of its own, as in an engine. All make their pools at the same time. Then each
stages and resolves batches of 8,192 ids, first one rank at a time, then all at once, so that they
share the host's memory and links. On a host with several NUMA nodes each rank also makes a pool on
every node, and its batches run from there. Writes JSON to bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import IO, Any

import torch

import pystage
from bench.common import (
    host_and_ready_us,
    random_ids,
    resident_bytes,
    summary,
    write_result,
)
from bench.device import find

ROOT = Path(__file__).resolve().parents[1]
NODES = Path("/sys/devices/system/node")
REQUESTS, LENGTH = 8, 1024
INPUTS = 64  # different batches, so that no batch's ids are in the caches
WARMUP = 50
BLOCKS = 5  # of samples: one rank at a time, then all at once, and again


# --- the host -------------------------------------------------------------------------------------


def cpus_of(text: str) -> set[int]:
    """The CPUs of a list as the kernel writes it: ``0-3,8``."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def nodes(folder: Path = NODES) -> dict[int, set[int]]:
    """The NUMA nodes that have CPUs which this process may use, and these CPUs."""
    allowed = os.sched_getaffinity(0)
    found = {
        int(path.name.removeprefix("node")): cpus_of((path / "cpulist").read_text()) & allowed
        for path in folder.glob("node[0-9]*")
    }
    return {node: cpus for node, cpus in sorted(found.items()) if cpus}


@contextmanager
def on_node(cpus: set[int]) -> Iterator[None]:
    """Runs this process on these CPUs. Memory that it touches first comes from their node."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def node_of_gpu(device: torch.device) -> int | None:
    """The NUMA node that the GPU is attached to. None if the host does not tell."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}"
    path = Path(f"/sys/bus/pci/devices/{address}:{properties.pci_device_id:02x}.0/numa_node")
    node = int(path.read_text()) if path.exists() else -1
    return node if node >= 0 else None


# --- one rank -------------------------------------------------------------------------------------


class Rank:
    """Answers the parent's commands, one JSON object per line. ``begun`` is the time at which the
    parent started the process."""

    def __init__(self, rank: int, device: str, begun: float) -> None:
        imported = time.time()
        self.device = find(device, False)  # makes the context
        self.device.synchronize()
        self.started = {"import_s": imported - begun, "context_s": time.time() - imported}
        rng = random.Random(rank)
        self._batches = [[random_ids(LENGTH, rng) for _ in range(REQUESTS)] for _ in range(INPUTS)]
        self._pool: Any = None

    def start(self) -> dict[str, Any]:
        """Makes the pool and takes the first batch through it."""
        before, begun = resident_bytes(), time.perf_counter()
        self._pool = pystage.StagingPool(self.device.torch)
        made = time.perf_counter()
        self._ids(self._batches[0])
        self.device.synchronize()
        told = {"pool_s": made - begun, "first_batch_s": time.perf_counter() - made}
        stats = self._pool.stats()
        return {
            **self.started,
            **told,
            "pinned_bytes": stats.reserved_bytes,
            "pageable_bytes": stats.pageable_bytes,
            "resident_more_bytes": resident_bytes() - before,
            "contexts_on": self._contexts(),
            "node": node_of_gpu(self.device.torch),
            "nodes": sorted(nodes()),
        }

    def times(self, samples: int) -> dict[str, list[float]]:
        return self._times(self._pool, samples)

    def near_and_far(self, samples: int) -> dict[str, Any]:
        """The times from a pool of each NUMA node."""
        told = {}
        for node, cpus in nodes().items():
            with on_node(cpus), pystage.StagingPool(self.device.torch) as pool:
                told[str(node)] = summaries([self._times(pool, samples)])
        return told

    def _ids(self, batch: Sequence[array[int]], pool: Any = None) -> torch.Tensor:
        return pystage.resolve((pool or self._pool).stage(batch))

    def _times(self, pool: Any, samples: int) -> dict[str, list[float]]:
        host, ready = host_and_ready_us(
            lambda batch: self._ids(batch, pool),
            islice(cycle(self._batches), WARMUP + samples),
            self.device.event(),
        )
        return {"host_us": host[WARMUP:], "ready_us": ready[WARMUP:]}

    def _contexts(self) -> list[int]:
        """The GPUs on which this process has a context."""
        if not self.device.cuda:
            return []
        from bench.two_gpus import driver

        return [d for d in range(torch.cuda.device_count()) if driver().has_context(d)]


def summaries(blocks: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    return {kind: summary([us for part in blocks for us in part[kind]]) for kind in blocks[0]}


def serve(rank: int, device: str, begun: float) -> None:
    served = Rank(rank, device, begun)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        print(json.dumps(getattr(served, given.pop("op"))(**given)), flush=True)


# --- all ranks ------------------------------------------------------------------------------------


class Process:
    def __init__(self, rank: int, device: str) -> None:
        command = [sys.executable, "-m", "bench.ranks", "--rank", str(rank), "--device", device]
        command += ["--begun", f"{time.time()}"]
        self.rank = rank
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def ask(self, op: str, **given: Any) -> None:
        self._pipe(self._process.stdin).write(json.dumps({"op": op, **given}) + "\n")
        self._pipe(self._process.stdin).flush()

    def answer(self) -> Any:
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"rank {self.rank} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._pipe(self._process.stdin).close()
        self._process.wait(60)
        self._pipe(self._process.stdout).close()

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def measure(devices: Sequence[str], samples: int) -> list[dict[str, Any]]:
    """What each rank tells."""
    ranks = [Process(rank, device) for rank, device in enumerate(devices)]
    try:
        for rank in ranks:
            rank.answer()  # its context is there
        told = _all(ranks, "start")
        alone: list[list[Any]] = [[] for _ in ranks]
        together: list[list[Any]] = [[] for _ in ranks]
        for _ in range(BLOCKS):  # in turn, because the machine's speed changes
            for rank, parts in zip(ranks, alone, strict=True):
                rank.ask("times", samples=-(-samples // BLOCKS))
                parts.append(rank.answer())
            for times, parts in zip(
                _all(ranks, "times", samples=-(-samples // BLOCKS)), together, strict=True
            ):
                parts.append(times)
        for row, *both in zip(told, alone, together, strict=True):
            row["alone"], row["together"] = map(summaries, both)
        if all(len(row["nodes"]) > 1 for row in told):
            for rank, row in zip(ranks, told, strict=True):
                rank.ask("near_and_far", samples=samples)
                row["by_node"] = rank.answer()
        return told
    finally:
        for rank in ranks:
            rank.close()


def _all(ranks: Sequence[Process], op: str, **given: Any) -> list[Any]:
    for rank in ranks:
        rank.ask(op, **given)
    return [rank.answer() for rank in ranks]


def show(ranks: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rank", "pool, ms", "pinned, MiB", "contexts on", "alone, us", "all at once, us")
    for number, row in enumerate(ranks):
        times = [row[when]["ready_us"] for when in ("alone", "together")]
        table.add_row(
            f"{number}",
            f"{1e3 * row['pool_s']:.1f}",
            f"{row['pinned_bytes'] / 2**20:.0f}",
            ", ".join(map(str, row["contexts_on"])) or "none",
            *(f"{t['p50']:.1f} / {t['p99']:.1f}" for t in times),
        )
    console = Console()
    console.print(table, "Times until 8,192 ids are on the device, p50 / p99.")
    for number, row in enumerate(ranks):
        for node, times in row.get("by_node", {}).items():
            where = (
                "near" if row["node"] is not None and int(node) == row["node"] else "node " + node
            )
            console.print(f"rank {number}, pool {where}: {times['ready_us']['p50']:.1f} us")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="processes; default: one per GPU, or 2")
    parser.add_argument("--samples", type=int, default=2000, help="batches per rank and part")
    parser.add_argument("--out", type=Path, help="JSON file; default in bench/results")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        serve(options.rank, options.device, options.begun)
        return 0
    gpus = torch.cuda.device_count()
    count = options.ranks or gpus or 2
    devices = [f"cuda:{rank % gpus}" if gpus else "cpu" for rank in range(count)]
    ranks = measure(devices, options.samples)
    show(ranks)
    kind = torch.cuda.get_device_name(0).lower().replace(" ", "-") if gpus else "cpu"
    body = {"samples": options.samples, "devices_of_ranks": devices, "ranks": ranks}
    print("written to", write_result(f"ranks-{count}x{kind}", body, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
