"""``pystage doctor``: checks whether this machine is ready, and says what to do if it is not.

It checks the build, device, driver, toolkit, link, pinned memory and SGLang's hooks. Its self-test
stages ids for two seconds and compares every id.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import PystageError, StagingPool, resolve
from .._build import build_info
from ..pool import _pick_device
from .output import EXIT_FAILED, Table, find_device, json_output, show

SELF_TEST_SECONDS = 2.0
HELP = (
    "Check this machine: device, driver, link, pinned memory, build, SGLang's hooks, and two "
    "seconds of staging. Says what to do where something is wrong."
)
_TOKENS = 8192
_PLUGIN_TIMEOUT_SECONDS = 180
_PCI = Path("/sys/bus/pci/devices")
_REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall . (in pystage's folder)"
_REPORT = "report it, with the output of: pystage doctor --json -"
_SHOW_PLUGIN = 'python -c "from pystage.integrations.sglang import main; main()" shows all of it'


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        ok: False if staging is wrong or slow on this machine, or an SGLang hook is not in place.
        found: the result in words.
        figures: the result for programs.
        advice: what to do. Empty if there is nothing to do.
    """

    name: str
    ok: bool
    found: str
    figures: dict[str, Any]
    advice: str = ""

    @property
    def state(self) -> str:
        """The result in one word: ok, note (nothing is wrong, but there is advice) or WRONG."""
        if not self.ok:
            return "WRONG"
        return "note" if self.advice else "ok"


def run(device: str | None, json_path: str | None) -> int:
    """Runs and shows all checks; returns the exit status.

    Raises:
        CannotRunError: the device or the file of ``--json`` cannot be used.
    """
    asked = find_device(device)
    with json_output(json_path) as write:
        with _steps_on_a_terminal() as on_step:
            checks = examine(asked, on_step=on_step)
        wrong = [check.name for check in checks if not check.ok]
        if json_path != "-":
            show(as_table(checks), _summary(wrong, len(checks)))
        by_name = {check.name: dataclasses.asdict(check) for check in checks}
        write({"ok": not wrong, "checks": by_name})
    return EXIT_FAILED if wrong else 0


@contextmanager
def _steps_on_a_terminal() -> Iterator[Callable[[str], None]]:
    """Yields a function that shows which check is running: SGLang may take a minute to load."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    clear = "\r\x1b[K"
    try:
        yield lambda name: print(f"{clear}{name} ...", end="", file=sys.stderr, flush=True)
    finally:
        print(clear, end="", file=sys.stderr, flush=True)


def as_table(checks: Sequence[Check]) -> Table:
    table = Table(columns=("check", "state", "found", "what to do"))
    for check in checks:
        table.add(check.name, check.state, check.found, check.advice or "nothing")
    return table


def _summary(wrong: Sequence[str], count: int) -> str:
    if not wrong:
        return f"All {count} checks passed."
    return f"{len(wrong)} of {count} checks failed: {', '.join(wrong)}."


def examine(
    device: torch.device | None = None,
    seconds: float | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> list[Check]:
    """Runs all checks and returns them in the order in which they are shown.

    If a check fails with an error, the error becomes its result, with ``ok`` False.

    Args:
        device: the device to check. None: the current GPU, or the host device if there is none.
        seconds: the least duration of the self-test. None: SELF_TEST_SECONDS.
        on_step: called with the name of each check before it runs.
    """
    seconds = SELF_TEST_SECONDS if seconds is None else seconds
    idle_gpu = device is None and _has_nvidia_gpu() and not torch.cuda.is_available()
    where = _pick_device(device)
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("build", _build),
        ("device", lambda: _found(where, idle_gpu)),
        ("driver", lambda: _driver(idle_gpu)),
        ("toolkit", _toolkit),
        ("link", lambda: _link(where)),
        ("pinned memory", lambda: _pinned(where)),
        ("self-test", lambda: _self_test(where, seconds)),
        ("SGLang", _sglang),
    ]
    checks = []
    for name, step in steps:
        on_step(name)
        try:
            checks.append(step())
        except (PystageError, ValueError, RuntimeError, OSError) as error:
            advice = f"first fix the checks above that say WRONG; if there are none, {_REPORT}"
            checks.append(Check(name, False, str(error), {"error": str(error)}, advice))
    return checks


def _has_nvidia_gpu() -> bool:
    """Whether the PCI bus has a display or 3D controller by NVIDIA, with or without a driver."""
    try:
        devices = list(_PCI.iterdir())
        return any(
            (device / "vendor").read_text().strip() == "0x10de"
            and (device / "class").read_text().startswith("0x03")
            for device in devices
        )
    except OSError:  # no PCI bus, or no permission to read it
        return False


def _build() -> Check:
    info = build_info()
    problems, advice = [], ""
    if info.torch_built != info.torch:
        problems.append(f"built for torch {info.torch_built}")
        advice = _REBUILD
    if torch.version.cuda and not info.cuda and (torch.cuda.is_available() or _has_nvidia_gpu()):
        problems.append("a GPU is here, and torch has CUDA code")
        advice = f"PYSTAGE_CUDA=1 {_REBUILD}"
    code = f"CUDA {info.cuda_runtime}" if info.cuda else "no CUDA code"
    text = f"pystage {info.version}, {code}, torch {info.torch}"
    found = "; ".join([text, *problems])
    return Check("build", not problems, found, dataclasses.asdict(info), advice)


def _found(device: torch.device, idle_gpu: bool) -> Check:
    if device.type != "cuda":
        return _host_device(idle_gpu)
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


def _host_device(idle_gpu: bool) -> Check:
    """The host device is right on a machine without a GPU. If torch does not see the machine's GPU,
    it may be a mistake."""
    figures = {"type": "cpu"}
    if not idle_gpu:
        there = torch.cuda.is_available()
        text = "host device" + (", as asked" if there else ": torch sees no CUDA device")
        return Check("device", True, text, figures)
    text = "host device: an NVIDIA GPU is here, and torch does not see it"
    if torch.version.cuda is None:
        advice = "to use the GPU, install a CUDA build of torch, then pystage again"
        return Check("device", True, f"{text}: it is a CPU build", figures, advice)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        advice = "to use the GPU, unset CUDA_VISIBLE_DEVICES"
        text = f"{text}: CUDA_VISIBLE_DEVICES is {hidden!r}"
        return Check("device", True, text, figures, advice)
    advice = (
        "does nvidia-smi see it? In a container, start that with --gpus all; after an update of "
        "the driver, reboot. Without the GPU: pystage doctor --device cpu"
    )
    return Check("device", False, text, figures, advice)


def _driver(idle_gpu: bool) -> Check:
    cuda = build_info().cuda_driver
    version = _query("driver_version")
    figures = {"version": version, "cuda": cuda}
    if cuda is None:
        needed = idle_gpu and torch.version.cuda is not None
        advice = "install NVIDIA's driver; in a container, start that with --gpus all"
        return Check("driver", not needed, "no CUDA driver", figures, advice if needed else "")
    runtime = build_info().cuda_runtime
    old = runtime is not None and _number(cuda) < _number(runtime)
    text, advice = f"{version or 'version unknown'}, up to CUDA {cuda}", ""
    if old:
        text += f": older than the CUDA {runtime} that this was built with"
        advice = (
            f"install a driver for CUDA {runtime}, or a torch and a toolkit of CUDA {cuda} or "
            "older, then pystage again"
        )
    return Check("driver", not old, text, figures, advice)


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _toolkit() -> Check:
    """The toolkit is needed to build pystage, not to run it."""
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
    text, advice = f"PCIe gen {gen} x{width} (at most gen {gen_max} x{width_max})", ""
    if narrow:
        text += ": fewer lanes than the device has"
        advice = "check slot, riser and firmware settings: all transfers take longer"
    return Check("link", not narrow, text, figures, advice)


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
        text = f"not available: {why} ({limit})"
        return Check("pinned memory", False, text, figures, _pinning_advice(why))
    return Check("pinned memory", True, f"64 MiB pinned, {limit}", figures)


def _pinning_advice(why: str) -> str:
    if "PYSTAGE_DISABLE_PINNED" in why:
        return "unset PYSTAGE_DISABLE_PINNED"
    if "Confidential Computing" in why:
        return "nothing helps under Confidential Computing: ids are right, transfers are slower"
    return (
        "raise the memlock limit (ulimit -l unlimited; docker run --ulimit memlock=-1), or leave "
        "the machine or the container more memory. Until then ids are right, transfers slower"
    )


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _bytes(value: int) -> str:
    return "none" if value == resource.RLIM_INFINITY else f"{value / 2**20:,.1f} MiB"


def _self_test(device: torch.device, seconds: float) -> Check:
    """Stages batches of 8,192 ids that follow a history of 8,192, and compares every batch."""
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
                advice = f"do not use pystage here, and {_REPORT}"
                return Check("self-test", False, text, {"batches": len(times)}, advice)
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
    if stats.fallbacks:
        text += f"; {stats.fallbacks:,} batches left the pool"
    return Check("self-test", ok, text, figures, "" if ok else _REPORT)


def _sglang() -> Check:
    """Reads the report of a process that loads SGLang's plugins as a server's processes do."""
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
        return Check("SGLang", False, text, {"version": version}, _SHOW_PLUGIN)
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        text = f"{version} cannot load plugins: {why}"
        return Check("SGLang", False, text, {"version": version}, _SHOW_PLUGIN)
    status = json.loads(done.stdout.splitlines()[-1])
    ok = bool(status["active"]) and not status["broken"]
    chosen_off = not status["settings"]["enabled"] or "SGLANG_PLUGINS" in status["off"]
    text = f"{version}; {status['line']}"
    if status["active"] and status["ray"]:
        text += f"; off in the schedulers of --use-ray: {status['ray']}"
    if ok or chosen_off:
        return Check("SGLang", True, text, status)
    advice = (
        "SGLang serves as without pystage. docs/sglang.md names the releases that are known; "
        f"{_SHOW_PLUGIN}"
    )
    return Check("SGLang", False, text, status, advice)


def _query(fields: str, device: torch.device | None = None) -> str | None:
    """nvidia-smi's answer for one GPU. Asked by UUID: nvidia-smi numbers all GPUs of the machine,
    torch only those that are visible to the process."""
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
