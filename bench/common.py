"""What every benchmark needs: samples, contenders in turn, and results that say where they come
from."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import random
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pystage

RESULTS = Path(__file__).resolve().parent / "results"
VOCAB = 128_256


def random_ids(count: int, rng: random.Random) -> array[int]:
    """``count`` ids of the vocabulary; distinct int objects once made a list, as in a server."""
    return array("q", np.random.default_rng(rng.getrandbits(64)).integers(0, VOCAB, count).tolist())


def summary(samples_us: Sequence[float]) -> dict[str, float]:
    """Microseconds."""
    p50, p90, p99 = np.percentile(samples_us, [50, 90, 99])
    return {
        "p50": round(float(p50), 3),
        "p90": round(float(p90), 3),
        "p99": round(float(p99), 3),
        "max": round(float(max(samples_us)), 3),
        "samples": len(samples_us),
    }


def host_time(
    contenders: dict[str, Callable[[int], Any]],
    samples: int,
    warmup: int,
    settle: Callable[[], None],
) -> dict[str, dict[str, float]]:
    """Microseconds of host time a call takes; contenders in turn, call by call, paired.

    Each round gives every contender the same number, to rotate its inputs, and another goes first.
    ``settle`` runs between calls, untimed, and drains the device: no call pays for the backlog of
    another.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(-warmup, samples):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                call = contenders[name]
                start = time.perf_counter_ns()
                result = call(i)
                stop = time.perf_counter_ns()
                settle()
                del result
                if i >= 0:
                    times[name].append((stop - start) / 1e3)
    finally:
        if collecting:
            gc.enable()
    return {name: summary(values) for name, values in times.items()}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _command() -> str:
    """What was run, without where its results went."""
    words = ["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join(words)


def provenance() -> dict[str, Any]:
    """Where a result comes from. The commit may be given as PYSTAGE_COMMIT, where git is not."""
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
        "commit": os.environ.get("PYSTAGE_COMMIT") or _output("git", "rev-parse", "HEAD"),
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


def write_result(name: str, result: dict[str, Any], out: str | Path | None) -> Path:
    """Writes ``result`` with its provenance as JSON; returns the file."""
    path = Path(out) if out else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, **provenance(), **result}, indent=1) + "\n")
    return path
