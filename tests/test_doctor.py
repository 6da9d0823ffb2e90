"""pystage doctor, on the host device."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pystage
from pystage import cli
from pystage.cli import doctor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.05)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.metadata.version

    def absent(name: str) -> str:
        if name == "sglang":
            raise doctor.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)


@pytest.mark.usefixtures("no_sglang")
def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", "cpu", "--json", "-"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    found = answer["checks"]
    assert list(found) == [
        "build", "device", "driver", "toolkit", "link", "pinned memory", "self-test", "SGLang",
    ]  # fmt: skip
    figures = found["self-test"]["figures"]
    assert figures["batches"] >= 128 and figures["allocations_after_warm_up"] == 0
    assert 0 < figures["p50_us"] <= figures["p99_us"]
    assert found["SGLang"]["found"] == "not installed"

    assert cli.main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "8,192 ids equal" in shown and "WRONG" not in shown and "memlock limit" in shown
    assert "All 8 checks passed." in shown and "what to do" in shown


@pytest.mark.usefixtures("no_sglang")
def test_a_machine_without_a_gpu_is_green_with_any_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the torch that pip installs, with CUDA, is beside a build without."""
    monkeypatch.setattr(doctor, "_PCI", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info = dataclasses.replace(pystage.build_info(), cuda=False, cuda_driver=None)
    monkeypatch.setattr(doctor, "build_info", lambda: info)
    for cuda in ("13.0", None):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert [check.state for check in doctor.examine(None, 0.0)] == ["ok"] * 8


@pytest.mark.usefixtures("no_sglang")
def test_what_is_wrong_is_shown_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(pystage.build_info(), torch_built="2.0.0")
    monkeypatch.setattr(doctor, "build_info", lambda: other)
    out = tmp_path / "out"
    assert cli.main(["doctor", "--device", "cpu", "--json", str(out)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 8 checks failed: build." in shown
    assert "WRONG" in shown and "--force-reinstall" in shown
    build = json.loads(out.read_text())["checks"]["build"]
    assert build["advice"].startswith("pip install --no-build-isolation")


@pytest.mark.usefixtures("no_sglang")
def test_a_terminal_is_told_what_runs_and_is_left_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["doctor", "--device", "cpu"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["doctor", "--device", "cpu", "--json", "-"])
    captured = capsys.readouterr()
    steps = captured.err.split("\r\x1b[K")
    assert steps[1:-1] == [f"{name} ..." for name in json.loads(captured.out)["checks"]]
    assert steps[0] == steps[-1] == ""


def bus(root: Path, vendor: str = "0x10de", kind: str = "0x030200") -> Path:
    """A PCI bus with this device."""
    (root / "0000:05:00.0").mkdir()
    (root / "0000:05:00.0/vendor").write_text(f"{vendor}\n")
    (root / "0000:05:00.0/class").write_text(f"{kind}\n")
    return root


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x10de", "0x030200", True),
        ("0x10de", "0x030000", True),
        ("0x10de", "0x040300", False),  # the sound of a graphics card
        ("0x10de", "0x068000", False),  # an NVSwitch
        ("0x1a03", "0x030000", False),  # another maker's
    ],
)
def test_a_gpu_on_the_bus(
    vendor: str, kind: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_PCI", tmp_path / "none")
    assert not doctor._has_nvidia_gpu()
    monkeypatch.setattr(doctor, "_PCI", bus(tmp_path, vendor, kind))
    assert doctor._has_nvidia_gpu() == found


@pytest.mark.usefixtures("no_sglang")
@pytest.mark.parametrize(
    ("cuda", "hidden", "driver", "device", "states", "advice"),
    [
        (None, None, None, None, ["note", "ok"], "install a CUDA build of torch"),
        ("13.0", "", "13.0", None, ["note", "ok"], "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", None, "13.0", None, ["WRONG", "ok"], "does nvidia-smi see it?"),
        ("13.0", None, None, None, ["WRONG", "WRONG"], "does nvidia-smi see it?"),
        ("13.0", None, None, "cpu", ["ok", "ok"], ""),
    ],
)
def test_a_gpu_that_torch_does_not_see(
    cuda: str | None,
    hidden: str | None,
    driver: str | None,
    device: str | None,
    states: list[str],
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong only where torch was installed to use it, and nobody hid it or asked for the CPU."""
    monkeypatch.setattr(doctor, "_PCI", bus(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    info = dataclasses.replace(pystage.build_info(), cuda_driver=driver, cuda_runtime=None)
    monkeypatch.setattr(doctor, "build_info", lambda: info)
    checks = doctor.examine(None if device is None else torch.device(device), 0.0)
    found = {check.name: check for check in checks}
    assert [found[name].state for name in ("device", "driver")] == states
    assert advice in found["device"].advice and bool(advice) == bool(found["device"].advice)
    assert bool(found["driver"].advice) == (states[1] == "WRONG")


@pytest.mark.usefixtures("no_sglang")
def test_wrong_ids_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = iter(range(1 << 30))

    def wrong(staged: pystage.StagedTokens) -> torch.Tensor:
        ids = pystage.resolve(staged)
        if next(calls) == 70:
            ids[8000] += 1
        return ids

    monkeypatch.setattr(doctor, "resolve", wrong)
    assert cli.main(["doctor", "--device", "cpu", "--json", "-"]) == cli.EXIT_FAILED
    check = json.loads(capsys.readouterr().out)["checks"]["self-test"]
    assert not check["ok"] and "batch 71 has other ids" in check["found"]
    assert "do not use pystage here" in check["advice"]


def test_a_build_for_another_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(pystage.build_info(), torch_built="2.0.0")
    monkeypatch.setattr(doctor, "build_info", lambda: other)
    check = doctor._build()
    assert not check.ok and "built for torch 2.0.0" in check.found
    assert check.advice.startswith("pip install --no-build-isolation --no-deps --force-reinstall .")


def test_an_old_driver_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    old = dataclasses.replace(pystage.build_info(), cuda_driver="12.9", cuda_runtime="13.0")
    monkeypatch.setattr(doctor, "build_info", lambda: old)
    check = doctor._driver(False)
    assert not check.ok and "older than the CUDA 13.0" in check.found
    assert "install a driver for CUDA 13.0, or a torch and a toolkit of CUDA 12.9" in check.advice


@pytest.mark.parametrize("seen", [True, False], ids=["by torch", "on the bus"])
def test_a_build_without_cuda_beside_a_gpu_is_found(
    seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dataclasses.replace(pystage.build_info(), cuda=False)
    monkeypatch.setattr(doctor, "build_info", lambda: plain)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(doctor, "_PCI", tmp_path / "none" if seen else bus(tmp_path))
    check = doctor._build()
    assert not check.ok and "no CUDA code" in check.found and "a GPU is here" in check.found
    assert check.advice.startswith("PYSTAGE_CUDA=1 pip install")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU as torch and nvidia-smi describe it. Returns the file with nvidia-smi's answer; what it
    was asked is beside it."""
    properties = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, uuid="1b2c"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    answer = tmp_path / "answer"
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\ncat "{answer}"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return answer


def test_a_gpu_is_described(gpu: Path) -> None:
    check = doctor._found(torch.device("cuda:1"), False)
    assert check.ok and check.found == "NVIDIA H100, sm_90, 80 GiB, 2 in all"
    assert check.figures["memory_bytes"] == 80 << 30 and check.figures["capability"] == "9.0"


@pytest.mark.parametrize(
    ("answer", "ok", "says"),
    [
        ("5, 5, 16, 16", True, "PCIe gen 5 x16 (at most gen 5 x16)"),
        ("1, 5, 16, 16", True, "PCIe gen 1 x16 (at most gen 5 x16)"),  # idle: it speeds up
        ("4, 5, 8, 16", False, "x8 (at most gen 5 x16): fewer lanes than the device has"),
        ("4, 5, [N/A], 16", True, "PCIe gen 4 x[N/A]"),
        ("[N/A], [N/A], [N/A], [N/A]", True, "not known"),
        ("5, 5", True, "not known"),
    ],
)
def test_the_link_of_a_gpu(gpu: Path, answer: str, ok: bool, says: str) -> None:
    gpu.write_text(answer + "\n")
    check = doctor._link(torch.device("cuda:1"))
    assert check.ok == ok and says in check.found
    assert check.advice.startswith("" if ok else "check slot, riser")
    assert (gpu.parent / "asked").read_text().startswith("--id=GPU-1b2c --query-gpu=pcie.link.")


def test_a_link_that_nvidia_smi_does_not_tell(gpu: Path) -> None:
    (gpu.parent / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    check = doctor._link(torch.device("cuda:1"))
    assert check.ok and "not known" in check.found


def test_a_driver_and_its_version(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.write_text("580.159.04\n")
    info = dataclasses.replace(pystage.build_info(), cuda_driver="13.0", cuda_runtime="13.0")
    monkeypatch.setattr(doctor, "build_info", lambda: info)
    check = doctor._driver(False)
    assert check.ok and check.found == "580.159.04, up to CUDA 13.0"
    assert check.figures == {"version": "580.159.04", "cuda": "13.0"}


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'Cuda compilation tools, release 13.0, V13.0.88'", "CUDA 13.0 ("),
        ("echo 'of no known kind'", "none found"),
        ("exit 1", "none found"),
    ],
)
def test_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str
) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    check = doctor._toolkit()
    assert check.ok and check.found.startswith(says) and check.figures["nvcc"] == str(nvcc)


@pytest.mark.parametrize(
    ("why", "advice"),
    [
        ("", ""),
        ("cuMemHostAlloc of 8 bytes failed: cudaErrorMemoryAllocation", "raise the memlock limit"),
        ("PYSTAGE_DISABLE_PINNED is set", "unset PYSTAGE_DISABLE_PINNED"),
        ("no host memory (as under Confidential Computing)", "nothing helps under Confidential"),
    ],
)
def test_pinned_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch, why: str, advice: str) -> None:
    class Pool(pystage.StagingPool):
        why_pageable = why  # type: ignore[assignment]

        def __init__(self, device: torch.device, *args: Any, **kwargs: Any) -> None:
            assert device.type == "cuda"
            super().__init__("cpu", *args, **kwargs)

    monkeypatch.setattr(doctor, "StagingPool", Pool)
    limits = (64 << 10, resource.RLIM_INFINITY)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: limits)
    check = doctor._pinned(torch.device("cuda:0"))
    assert check.ok == (not why) and "memlock limit 0.1 MiB" in check.found
    assert check.advice.startswith(advice) and bool(check.advice) == bool(why)
    assert check.figures["memlock_soft"] == 64 << 10 and check.figures["memlock_hard"] is None
    if why:
        assert f"not available: {why}" in check.found and check.figures["why_pageable"] == why
    else:
        assert "64 MiB pinned" in check.found and check.figures["pinned_bytes"] == 64 << 20


def test_a_pool_that_leaves_its_memory_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are right, but slots come from elsewhere: the self-test counts them."""

    class Small(pystage.StagingPool):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device, 8192, at_capacity="fallback")

    monkeypatch.setattr(doctor, "StagingPool", Small)
    check = doctor._self_test(CPU, 0.0)
    assert not check.ok and "8,192 ids equal" in check.found
    assert "128 batches left the pool" in check.found and "report it" in check.advice
    assert check.figures["batches"] == check.figures["fallbacks"] == 128


def test_a_pool_that_allocates_again_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets(pystage.StagingPool):
        staged = 0

        def stage(self, *args: Any, **kwargs: Any) -> Any:
            self.staged += 1
            if self.staged == 100:  # after the warm-up
                self.trim()
            return super().stage(*args, **kwargs)

    monkeypatch.setattr(doctor, "StagingPool", Forgets)
    check = doctor._self_test(CPU, 0.0)
    assert check.figures["allocations_after_warm_up"] > 0 and check.figures["fallbacks"] == 0
    assert not check.ok


@pytest.mark.parametrize(
    ("active", "broken", "enabled", "off", "ok"),
    [
        (["staging"], [], True, "", True),
        (["staging"], ["resolve"], True, "", False),
        ([], [], True, "not as expected", False),
        ([], [], False, "PYSTAGE_SGLANG=0", True),
        ([], [], True, "SGLANG_PLUGINS leaves it out", True),
    ],
)
def test_a_plugin_is_well_or_off_on_purpose(
    active: list[str],
    broken: list[str],
    enabled: bool,
    off: str,
    ok: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    status = {"active": active, "broken": broken, "settings": {"enabled": enabled}, "off": off}
    answer = json.dumps({**status, "line": "the line", "ray": ""})
    done = subprocess.CompletedProcess([], 0, stdout=f"a log line\n{answer}\n", stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: done)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "9.9")
    check = doctor._sglang()
    assert check.ok is ok and check.found == "9.9; the line"
    assert check.advice.startswith("" if ok else "SGLang serves as without pystage.")
    assert bool(check.advice) != ok


def test_what_cannot_be_looked_at_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, idle_gpu: bool) -> doctor.Check:
        raise pystage.DeviceError("cudaGetDeviceProperties: no such device")

    monkeypatch.setattr(doctor, "_found", broken)
    found = {check.name: check for check in doctor.examine(CPU, 0.05)}
    assert not found["device"].ok and "no such device" in found["device"].found
    assert found["device"].advice.startswith("first fix the checks above that say WRONG")
    assert found["self-test"].ok


def other_sglang(root: Path, monkeypatch: pytest.MonkeyPatch, plugins: str) -> None:
    """Installs an SGLang 9.9 with this module for its plugins."""
    (root / "sglang/srt/plugins").mkdir(parents=True)
    (root / "sglang/srt/plugins/__init__.py").write_text(plugins)
    (root / "sglang-9.9.dist-info").mkdir()
    (root / "sglang-9.9.dist-info/METADATA").write_text("Name: sglang\nVersion: 9.9\n")
    here = str(Path(pystage.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", f"{root}:{here}")
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(root))


@pytest.mark.parametrize(
    ("module", "ok", "says"),
    [
        ("def load_plugins(): pass", False, "SGLang did not load it"),
        (
            "from pystage.integrations.sglang import plugin as load_plugins",
            False,
            "this SGLang is not as expected: no managers.schedule_batch",
        ),
        ("raise ImportError('no sgl_kernel')", False, "cannot load plugins: ImportError: no sgl_k"),
    ],
)
def test_another_sglang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, ok: bool, says: str
) -> None:
    """One whose plugins load otherwise, or not at all."""
    other_sglang(tmp_path, monkeypatch, module)
    check = doctor._sglang()
    assert check.ok == ok and check.found.startswith("9.9") and says in check.found
    assert "main()" in check.advice


def test_plugins_that_do_not_load_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_sglang(tmp_path, monkeypatch, "import threading; threading.Event().wait()")
    monkeypatch.setattr(doctor, "_PLUGIN_TIMEOUT_SECONDS", 1)
    check = doctor._sglang()
    assert not check.ok and check.found == "9.9: its plugins did not load within 1 s"


def test_versions_are_compared_as_numbers() -> None:
    assert doctor._number("10.2") > doctor._number("9.10") > doctor._number("9.9")
