"""Compares the host time of stage + resolve with that of another tree of pystage, in one run:

    python bench/against.py ../pystage-before

Both trees must be built in place. Each runs in its own process, in short blocks that take turns, so
that other activity of the machine affects both. The placement of objects in memory differs between
processes and stays the same for a process's life, so several pairs of processes are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

CELLS = {
    "1 x 128 array": (1, 128, "array"),
    "1 x 8192 array": (1, 8192, "array"),
    "8 x 1024 array": (8, 1024, "array"),
    "64 x 128 array": (64, 128, "array"),
    "1 x 131072 array": (1, 131072, "array"),
    "1 x 8192 list": (1, 8192, "list"),
}
HERE = Path(__file__).resolve().parent


def work(calls: int) -> None:
    """The worker. For each name of a cell on standard input, it prints a line of times in
    microseconds."""
    import torch

    import pystage
    from bench.common import collector_off, random_ids

    pool = pystage.StagingPool()
    settle = torch.cuda.synchronize if pool.device.type == "cuda" else lambda: None
    rng = random.Random(1)
    inputs: dict[str, list[Any]] = {}
    for name, (requests, length, kind) in CELLS.items():
        count = 64 if requests * length <= 16384 else 8
        batches = [[random_ids(length, rng) for _ in range(requests)] for _ in range(count)]
        if kind == "list":
            inputs[name] = [[ids.tolist() for ids in batch] for batch in batches[:16]]
        else:
            inputs[name] = batches
    print(pystage.__file__, flush=True)
    turn = 0
    with collector_off():
        for line in sys.stdin:
            batches = inputs[line.strip()]
            times = []
            for _ in range(calls):
                batch = batches[turn % len(batches)]
                turn += 1
                start = time.perf_counter_ns()
                ids = pystage.resolve(pool.stage(batch))
                times.append((time.perf_counter_ns() - start) / 1e3)
                settle()
                del ids
            print(json.dumps(times), flush=True)


class Worker:
    def __init__(self, tree: Path, calls: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "against.py"), "--work", str(calls)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{tree}:{os.environ.get('PYTHONPATH', '')}"},
        )
        loaded = Path(self._line().strip()).resolve()
        if tree not in loaded.parents:
            raise SystemExit(f"{tree} is not what was loaded, but {loaded}: build it in place")

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()

    def block(self, cell: str) -> list[float]:
        assert self._process.stdin
        self._process.stdin.write(cell + "\n")
        self._process.stdin.flush()
        times: list[float] = json.loads(self._line())
        return times

    def stop(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def interval(by_pair: list[np.ndarray[Any, Any]]) -> list[float]:
    """The ratio's 95 % bootstrap interval. Draws pairs of processes first, then their rounds."""
    rng = np.random.default_rng(0)
    medians = []
    for _ in range(2000):
        pairs = rng.integers(0, len(by_pair), len(by_pair))
        medians.append(
            np.median([np.median(rng.choice(by_pair[p], len(by_pair[p]))) for p in pairs])
        )
    return [round(float(v), 4) for v in np.percentile(medians, [2.5, 97.5])]


def compare(other: Path, pairs: int, rounds: int, calls: int) -> dict[str, Any]:
    trees = {"here": HERE.parent, "other": other}
    order = random.Random(3)
    times: dict[str, dict[str, list[list[float]]]] = {c: {n: [] for n in trees} for c in CELLS}
    ratios: dict[str, list[np.ndarray[Any, Any]]] = {cell: [] for cell in CELLS}
    for pair in range(pairs):
        workers = {name: Worker(trees[name], calls) for name in order.sample(list(trees), 2)}
        for cell in CELLS:
            blocks: dict[str, list[list[float]]] = {name: [] for name in trees}
            for i in range(-5, rounds):
                for name in order.sample(list(workers), 2):
                    block = workers[name].block(cell)
                    if i >= 0:
                        blocks[name].append(block)
            medians = {name: np.median(np.array(found), axis=1) for name, found in blocks.items()}
            ratios[cell].append(medians["here"] / medians["other"])
            for name, found in blocks.items():
                times[cell][name] += found
        for worker in workers.values():
            worker.stop()
        print(f"pair {pair + 1} of {pairs}", flush=True)
    cells: dict[str, Any] = {}
    for cell in CELLS:
        by_pair = [round(float(np.median(r)), 4) for r in ratios[cell]]
        cells[cell] = {
            **{
                name: {
                    "p50": round(float(np.median(found)), 3),
                    "p99": round(float(np.percentile(found, 99)), 3),
                }
                for name, found in times[cell].items()
            },
            "ratio": round(float(np.median(by_pair)), 4),
            "interval": interval(ratios[cell]),
            "by_pair": by_pair,
        }
        print(
            f"{cell:>18}: here {cells[cell]['here']['p50']:8.2f} us, other "
            f"{cells[cell]['other']['p50']:8.2f}, ratio {cells[cell]['ratio']:.3f} "
            f"{cells[cell]['interval']} {by_pair}"
        )
    return {"pairs": pairs, "rounds": rounds, "calls_a_round": calls, "cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("other", type=Path, help="the other tree, built in place")
    parser.add_argument("--other-commit", default="unknown", help="its commit, for the result")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=60, help="rounds a pair")
    parser.add_argument("--calls", type=int, default=20, help="calls a round")
    parser.add_argument("--out", help="JSON; default bench/results/against.json")
    args = parser.parse_args()
    result = compare(args.other.resolve(), args.pairs, args.rounds, args.calls)
    from bench.common import write_result

    write_result("against", {"other_commit": args.other_commit, **result}, args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(int(sys.argv[2]))
    else:
        main()
