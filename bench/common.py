"""Helpers of all benchmarks: taking samples of contenders in turn, summaries, and result files with
their provenance."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

import pystage
from pystage.trace import Batch, Request, prefill_batches

RESULTS = Path(__file__).resolve().parent / "results"
BUILD = RESULTS.parents[1] / "build/bench"  # results of partial and trial runs, not for the pages
VOCAB = 128_256


def random_ids(count: int, rng: random.Random) -> array[int]:
    """``count`` random ids of the vocabulary. In a list they are distinct int objects, as in a
    server."""
    return array("q", np.random.default_rng(rng.getrandbits(64)).integers(0, VOCAB, count).tolist())


class Summary(dict[str, Any]):
    """Percentiles of samples. The samples themselves are kept as well, but not written to JSON."""

    def __init__(self, samples_us: Sequence[float]) -> None:
        p50, p90, p99, p999 = np.percentile(samples_us, [50, 90, 99, 99.9])
        super().__init__(
            {
                "p50": round(float(p50), 3),
                "p90": round(float(p90), 3),
                "p99": round(float(p99), 3),
                "p99.9": round(float(p999), 3),
                "max": round(float(max(samples_us)), 3),
                "samples": len(samples_us),
            }
        )
        self.samples_us = samples_us


def summary(samples_us: Sequence[float]) -> Summary:
    """Percentiles of samples in microseconds."""
    return Summary(samples_us)


def merged(passes: Sequence[Any]) -> Any:
    """Combines the results of several passes. Times are summarised over all samples, and ``passes``
    has the median of each pass. Other values are those of the last pass. A contender that failed in
    one pass, or was not there, counts as failed."""
    last = passes[-1]
    if len(passes) == 1 or not isinstance(last, dict):
        return last
    for result in passes:
        if "error" in result:
            return result
    if isinstance(last, Summary):
        together = summary([us for part in passes for us in part.samples_us])
        together["passes"] = [part["p50"] for part in passes]
        return together
    found = {}
    for key in dict.fromkeys(key for part in passes for key in part):
        parts = [part[key] for part in passes if key in part]
        absent = len(parts) < len(passes) and isinstance(parts[-1], dict)
        why = {"error": f"{key}: in {len(parts)} of {len(passes)} passes only"}
        found[key] = why if absent else merged(parts)
    return found


MET = {True: "yes", False: "no", None: "not measured"}
"""Whether a target is met, in words."""


def amount(row: dict[str, Any], key: str = "value") -> str:
    """A figure from a row of targets, with its unit. Empty if the row has none."""
    return "" if row.get(key) is None else f"{row[key]:,.2f} {row['unit']}".strip()


@contextmanager
def collector_off() -> Iterator[None]:
    """Disables Python's garbage collector within the block, so that it causes no pauses."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


TwoCalls: TypeAlias = "tuple[Callable[[Any], Any], Callable[[Any], Any]]"


def two_calls_time(
    contenders: dict[str, TwoCalls],
    inputs: Callable[[int], Any],
    samples: int,
    warmup: int,
    settle: Callable[[], None],
    inside: dict[str, Callable[[], Sequence[float]]] | None = None,
) -> dict[str, Any]:
    """Host time in microseconds of two calls, ``second(first(input))``: each, and both together.

    Contenders take turns, in a new random order each round. ``inputs`` gives the input of the n-th
    call. Consecutive calls never share an input, so no contender reads ids that another one has
    brought into the caches. ``settle`` runs between calls, untimed, and drains the device, so no
    call pays for the backlog of another. ``inside`` take turns with the others and time their own
    parts, in microseconds; their result is the list of the parts' summaries. A contender that
    raises is not called again, and its result is ``{"error": traceback}``.
    """
    inside = inside or {}
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in [*contenders, *inside]}
    result: dict[str, Any] = {}
    names, call, order = list(times), 0, random.Random(5)
    with collector_off():
        for i in range(-warmup, samples):
            for name in order.sample(names, len(names)):  # avoids a fixed predecessor
                try:
                    if name in inside:
                        row = tuple(inside[name]())
                        settle()
                    else:
                        first, second = contenders[name]
                        given = inputs(call)
                        call += 1
                        start = time.perf_counter_ns()
                        held = first(given)
                        middle = time.perf_counter_ns()
                        made = second(held)
                        stop = time.perf_counter_ns()
                        settle()
                        del held, made
                        row = ((middle - start) / 1e3, (stop - middle) / 1e3)
                except Exception:
                    result[name] = {"error": traceback.format_exc()}
                    names.remove(name)
                    continue
                if i >= 0:
                    times[name].append(row)
    for name in names:
        parts = [summary(values) for values in zip(*times[name], strict=True)]
        if name in inside:
            result[name] = parts
        elif parts:
            total = summary([sum(row) for row in times[name]])
            result[name] = {"stage": parts[0], "resolve": parts[1], "total": total}
    return result


def resident_bytes() -> int:
    """The memory of this process that is resident now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def host_and_ready_us(
    take: Callable[[Any], Any], batches: Iterable[Any], done: Any
) -> tuple[list[float], list[float]]:
    """For each batch, which ``take`` brings to the device: the host's time, and the time until it
    is there, in microseconds. ``done`` is an event of the device."""
    host, ready = [], []
    with collector_off():
        for batch in batches:
            start = time.perf_counter_ns()
            ids = take(batch)
            returned = time.perf_counter_ns()
            done.record()
            while not done.query():
                pass
            ready.append((time.perf_counter_ns() - start) / 1e3)
            host.append((returned - start) / 1e3)
            del ids
    return host, ready


def cpu_cache_bytes() -> int:
    """Size of the CPU's largest cache, as reported by the kernel; 64 MiB if it reports none."""
    sizes = [64 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith(("K", "M")):
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


def arriving(requests: list[Request]) -> Iterator[Batch]:
    """Groups the requests into batches of one to four, so that batches of all sizes occur."""
    first = 0
    for count in cycle((1, 2, 3, 4)):
        group = [requests[(first + i) % len(requests)] for i in range(count)]
        for batch in prefill_batches(group):
            yield replace(batch, requests=[first + r for r in batch.requests])
        first += count


def parts_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of an option that chooses parts of a benchmark, separated by commas."""

    def parts(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"unknown parts: {', '.join(sorted(unknown))}")
        return chosen

    return parts


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _command() -> str:
    """The command line, without the options --out and --peers. Of a path outside the project only
    the last part remains."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None and spec.name.startswith("bench"):
        program = ["-m", spec.name.removesuffix(".__main__")]
    else:
        program = [os.path.relpath(sys.argv[0])]
    given, words = [], iter(sys.argv[1:])
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if option in ("--out", "--peers"):
            if not equals:
                next(words, None)
            continue
        if "/" in value and not value.startswith("bench/"):
            value = Path(value).name
        given.append(option + equals + value)
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # set by torchrun
    start = ["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]
    return shlex.join([*start, *program, *given])


def provenance() -> dict[str, Any]:
    """The origin of a result. PYSTAGE_COMMIT gives the commit where git is not available."""
    cuda = torch.cuda.is_available()
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": os.environ.get("PYSTAGE_COMMIT")
        or _output("git", "-C", str(RESULTS.parents[1]), "rev-parse", "HEAD"),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 0,
        "driver": _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
        )
        if cuda
        else None,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "pystage": pystage.build_info().__dict__,
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes JSON atomically: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Reads a result that ``save`` wrote."""
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def newest_on_gpu(folder: Path, benchmark: str) -> Path | None:
    """The newest result of ``benchmark`` from a GPU, or None."""
    runs = {path: load(path) for path in folder.glob(f"{benchmark}*.json")}
    on_gpu = [path for path, run in runs.items() if run["devices"]]
    return max(on_gpu, key=lambda path: str(runs[path]["date"]), default=None)


def write_result(name: str, result: dict[str, Any], out: str | Path | None) -> Path:
    """Writes ``result`` and its provenance as JSON. Returns the file's path."""
    path = Path(out) if out else RESULTS / f"{name}.json"
    save(path, {"benchmark": name, **provenance(), **result})
    return path
