"""What ``python -m pystage doctor`` looks at: device, build, pinned memory, link, SGLang, and two
seconds of staging with every id compared."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._build import build_info
from .errors import PystageError
from .pool import StagingPool, _pick_device, resolve

SELF_TEST_SECONDS = 2.0
_TOKENS = 8192
_PLUGIN_TIMEOUT_SECONDS = 180


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        name: what was looked at.
        ok: False: staging is wrong or slow here, or a hook is not in place.
        found: what there is, in words.
        figures: the same for programs.
    """

    name: str
    ok: bool
    found: str
    figures: dict[str, Any]


def examine(device: torch.device | None = None, seconds: float | None = None) -> list[Check]:
    """All checks, in the order they are shown. Fails on nothing: what cannot be looked at is a
    check that is not ok. ``seconds``: of the self-test, default SELF_TEST_SECONDS."""
    seconds = SELF_TEST_SECONDS if seconds is None else seconds
    where = _pick_device(device)
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("build", _build),
        ("device", lambda: _found(where)),
        ("driver", _driver),
        ("toolkit", _toolkit),
        ("link", lambda: _link(where)),
        ("pinned memory", lambda: _pinned(where)),
        ("self-test", lambda: _self_test(where, seconds)),
        ("SGLang", _sglang),
    ]
    checks = []
    for name, step in steps:
        try:
            checks.append(step())
        except (PystageError, ValueError, RuntimeError, OSError) as error:
            checks.append(Check(name, False, str(error), {"error": str(error)}))
    return checks


def _build() -> Check:
    info = build_info()
    problems = []
    if torch.version.cuda and not info.cuda:
        problems.append("torch has CUDA, this build has not: rebuild with PYSTAGE_CUDA=1")
    if info.torch_built != info.torch:
        problems.append(f"built for torch {info.torch_built}: rebuild")
    code = f"CUDA {info.cuda_runtime}" if info.cuda else "no CUDA code"
    text = f"pystage {info.version}, {code}, torch {info.torch}"
    return Check("build", not problems, "; ".join([text, *problems]), dict(info.__dict__))


def _found(device: torch.device) -> Check:
    if device.type != "cuda":
        there = torch.cuda.is_available()
        text = "host device" + (", as asked" if there else ": torch sees no CUDA device")
        return Check("device", True, text, {"type": device.type})
    properties = torch.cuda.get_device_properties(device)
    figures = {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "count": torch.cuda.device_count(),
    }
    text = (
        f"{properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, {figures['count']} in all"
    )
    return Check("device", True, text, figures)


def _driver() -> Check:
    cuda = build_info().cuda_driver
    version = _query("driver_version")
    figures = {"version": version, "cuda": cuda}
    if cuda is None:
        return Check("driver", not torch.version.cuda, "no CUDA driver", figures)
    runtime = build_info().cuda_runtime
    old = runtime is not None and _number(cuda) < _number(runtime)
    text = f"{version or 'version unknown'}, up to CUDA {cuda}"
    if old:
        text += f": older than the CUDA {runtime} that this was built with"
    return Check("driver", not old, text, figures)


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _toolkit() -> Check:
    """Needed to build, not to run."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = next(
        (
            str(path)
            for path in (Path(home or "/") / "bin/nvcc", Path("/usr/local/cuda/bin/nvcc"))
            if path.exists()
        ),
        shutil.which("nvcc"),
    )
    match = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version") or "") if nvcc else None
    version = match.group(1) if match else None
    text = f"CUDA {version} ({nvcc})" if version else "none found (needed to build, not to run)"
    return Check("toolkit", True, text, {"version": version, "nvcc": nvcc})


def _link(device: torch.device) -> Check:
    fields = ("pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current",
              "pcie.link.width.max")  # fmt: skip
    if device.type != "cuda":
        return Check("link", True, "none: host device", {})
    row = (_query(",".join(fields), device) or "").split(",")
    figures = dict(zip(fields, (v.strip() for v in row), strict=False))
    if len(row) != len(fields) or not row[0].strip().isdigit():
        return Check("link", True, "not known (nvidia-smi does not tell)", {})
    gen, gen_max, width, width_max = (figures[f] for f in fields)
    narrow = width.isdigit() and width_max.isdigit() and int(width) < int(width_max)
    text = f"PCIe gen {gen} x{width} (at most gen {gen_max} x{width_max})"
    if narrow:
        text += ": fewer lanes than the device has"
    return Check("link", not narrow, text, figures)


def _pinned(device: torch.device) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    figures: dict[str, Any] = {"memlock_soft": _limit(soft), "memlock_hard": _limit(hard)}
    limit = f"memlock limit {_bytes(soft)}"
    if device.type != "cuda":
        return Check("pinned memory", True, f"not needed on the host device ({limit})", figures)
    with StagingPool(device, 64 << 20, reserve_bytes=64 << 20) as pool:
        why, stats = pool.why_pageable, pool.stats()
    figures |= {"pinned_bytes": stats.reserved_bytes - stats.pageable_bytes, "why_pageable": why}
    if why:
        return Check("pinned memory", False, f"cannot be had: {why} ({limit})", figures)
    return Check("pinned memory", True, f"64 MiB pinned, {limit}", figures)


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _bytes(value: int) -> str:
    return "none" if value == resource.RLIM_INFINITY else f"{value / 2**20:,.1f} MiB"


def _self_test(device: torch.device, seconds: float) -> Check:
    """Batches of 8,192 ids behind a history of as many, each compared."""
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 1 << 17, (16, 2 * _TOKENS), dtype=np.int64)
    inputs = [array("q", row.tobytes()) for row in wide]
    expected = [torch.from_numpy(row[_TOKENS:].copy()) for row in wide]
    times: list[float] = []
    with StagingPool(device) as pool:
        allocations, warm = 0, 64
        begin = time.monotonic()
        while time.monotonic() - begin < seconds or len(times) < 2 * warm:
            at = len(times) % len(inputs)
            if len(times) == warm:
                allocations = pool.stats().allocations
            start = time.perf_counter_ns()
            ids = resolve(pool.stage([inputs[at]], [_TOKENS]))
            times.append((time.perf_counter_ns() - start) / 1e3)
            if not torch.equal(ids.cpu(), expected[at]):
                text = f"batch {len(times)} has other ids than were staged"
                return Check("self-test", False, text, {"batches": len(times)})
        stats = pool.stats()
    p50, p99 = (round(float(v), 1) for v in np.percentile(times[warm:], [50, 99]))
    figures = {
        "batches": len(times),
        "tokens": _TOKENS,
        "p50_us": p50,
        "p99_us": p99,
        "allocations_after_warm_up": stats.allocations - allocations,
        "fallbacks": stats.fallbacks,
    }
    ok = not figures["allocations_after_warm_up"] and not stats.fallbacks
    text = (
        f"{len(times):,} batches of {_TOKENS:,} ids equal; stage + resolve p50 {p50:.1f} us, "
        f"p99 {p99:.1f} us; {figures['allocations_after_warm_up']} allocations after warm-up"
    )
    return Check("self-test", ok, text, figures)


def _sglang() -> Check:
    """Asks a process that loads SGLang's plugins as a server's processes do."""
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return Check("SGLang", True, "not installed", {"version": None})
    code = "from pystage.integrations.sglang import main; main()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_PLUGIN_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"{version}: its plugins did not load within {_PLUGIN_TIMEOUT_SECONDS} s"
        return Check("SGLang", False, text, {"version": version})
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Check("SGLang", False, f"{version} cannot load plugins: {why}", {"version": version})
    status = json.loads(done.stdout.splitlines()[-1])
    ok = bool(status["active"]) and not status["broken"]
    chosen_off = not status["settings"]["enabled"] or "SGLANG_PLUGINS" in status["off"]
    text = f"{version}; {status['line']}"
    if status["active"] and status["ray"]:
        text += f"; off in the schedulers of --use-ray: {status['ray']}"
    return Check("SGLang", ok or chosen_off, text, status)


def _query(fields: str, device: torch.device | None = None) -> str | None:
    """nvidia-smi's answer for one GPU. It counts all there are, torch those it was given."""
    which = f"--id={_identity(device)}" if device is not None else "--id=0"
    return _output("nvidia-smi", which, f"--query-gpu={fields}", "--format=csv,noheader,nounits")


def _identity(device: torch.device) -> str:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else str(device.index or 0)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
