"""Regime: several processes on one GPU, each with its own context, pool and peers. It shows what an
engine pays when it shares a GPU. The regime starts `python -m bench.suite.processes` several times.

Each process reads a line `{"name": ..., "calls": ...}`, takes that many batches to the device with
that contender, and answers with a line of times in microseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import host_and_ready_us, summary
from bench.device import Host, find, own_stream
from bench.suite.cells import SHAPES, Bench, Cell
from bench.suite.contenders import (
    BUFFER,
    DEFERRED,
    ENGINE,
    SGLANG,
    TORCH,
    UVA,
    Contender,
    Contenders,
)
from bench.suite.peers import Sources

COUNTS = (1, 2, 4)
NAMES = (DEFERRED, ENGINE, TORCH, SGLANG, BUFFER, UVA)
SHAPE = "8 x 1024"
BLOCKS = 10
ROOT = Path(__file__).resolve().parents[2]


def regime(bench: Bench) -> dict[str, Cell]:
    """Host time and time until ids are ready, in all processes at once, contenders in turn."""
    return {f"{n} processes, {SHAPE} array": partial(_cell, bench, n) for n in COUNTS}


def _cell(bench: Bench, count: int) -> dict[str, Any]:
    calls = max(1, -(-bench.samples // (count * BLOCKS)))
    times: dict[str, dict[str, list[float]]] = {n: {"total": [], "ready": []} for n in NAMES}
    rows: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(_started(bench)) for _ in range(count)]
        for other in others:
            _answer(other)  # waits until it has started
        for block in range(-1, BLOCKS):
            for name in bench.shuffled([n for n in NAMES if n not in rows]):
                for other in others:
                    assert other.stdin is not None
                    print(json.dumps({"name": name, "calls": calls}), file=other.stdin, flush=True)
                for answer in [_answer(other) for other in others]:
                    if "times" not in answer:
                        rows[name] = answer
                    elif block >= 0:
                        for kind, values in answer["times"].items():
                            times[name][kind] += values
    for name, kinds in times.items():
        if name not in rows:
            rows[name] = {kind: summary(values) for kind, values in kinds.items()}
    return {"processes": count, "contenders": rows}


@contextlib.contextmanager
def _started(bench: Bench) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-m",
        "bench.suite.processes",
        "--device",
        str(bench.device.torch),
    ]
    if bench.contenders.sources.folder is not None:
        command += ["--peers", str(bench.contenders.sources.folder.resolve())]
    if not bench.device.cuda and bench.device.gpu_regimes:
        command += ["--rehearse"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process beside ended with code {process.wait()}")
    answer: dict[str, Any] = json.loads(line)
    return answer


# --- one of them -------------------------------------------------------------------------------


def _times(device: Host, contender: Contender, batches: Any, calls: int) -> dict[str, list[float]]:
    total, ready = host_and_ready_us(
        lambda batch: contender.resolve(contender.stage(batch)),
        (batches(k) for k in range(calls)),
        device.event(),
    )
    return {"total": total, "ready": ready}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    device = find(args.device, args.rehearse)
    contenders = Contenders(device, Sources(args.peers))
    bench = Bench(device, contenders, 1, 1, quick=True, trace_batches=1, cache_bytes=1 << 20)
    batches, _ = bench.inputs("array", SHAPES[SHAPE], False, 64)
    made: dict[str, Contender | None] = {}
    with own_stream(device):
        print(json.dumps({}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            name = asked["name"]
            if name not in made:
                made[name] = contenders.make(name, 8192)
            contender = made[name]
            answer: dict[str, Any]
            if contender is None:
                why = contenders.absent.get(name)
                answer = {"absent": why} if why else {"error": contenders.why_not(name)}
            else:
                try:
                    answer = {"times": _times(device, contender, batches, asked["calls"])}
                except Exception:
                    answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), flush=True)
        for contender in made.values():
            if contender is not None:
                contender.close()


if __name__ == "__main__":
    main()
