"""python -m pystage doctor, on the host device."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pystage
from pystage import cli, doctor

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
    if torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("a CUDA torch without a driver is not well, and it says so")
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == 0
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

    pytest.importorskip("rich")
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "8,192 ids equal" in shown and "WRONG" not in shown and "memlock limit" in shown


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
    assert cli.main(["doctor", "--device", "cpu", "--json"]) == cli.EXIT_NOT_WELL
    check = json.loads(capsys.readouterr().out)["checks"]["self-test"]
    assert not check["ok"] and "batch 71 has other ids" in check["found"]


def test_a_build_for_another_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(pystage.build_info(), torch_built="2.0.0")
    monkeypatch.setattr(doctor, "build_info", lambda: other)
    check = doctor._build()
    assert not check.ok and "built for torch 2.0.0: rebuild" in check.found


def test_an_old_driver_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    old = dataclasses.replace(pystage.build_info(), cuda_driver="12.9", cuda_runtime="13.0")
    monkeypatch.setattr(doctor, "build_info", lambda: old)
    check = doctor._driver()
    assert not check.ok and "older than the CUDA 13.0" in check.found


def test_what_cannot_be_looked_at_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> doctor.Check:
        raise pystage.DeviceError("cudaGetDeviceProperties: no such device")

    monkeypatch.setattr(doctor, "_found", broken)
    found = {check.name: check for check in doctor.examine(CPU, 0.05)}
    assert not found["device"].ok and "no such device" in found["device"].found
    assert found["self-test"].ok


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
    (tmp_path / "sglang/srt/plugins").mkdir(parents=True)
    (tmp_path / "sglang/srt/plugins/__init__.py").write_text(module)
    (tmp_path / "sglang-9.9.dist-info").mkdir()
    (tmp_path / "sglang-9.9.dist-info/METADATA").write_text("Name: sglang\nVersion: 9.9\n")
    root = str(Path(pystage.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor._sglang()
    assert check.ok == ok and check.found.startswith("9.9") and says in check.found


def test_json_needs_no_rich() -> None:
    code = (
        "import sys; sys.modules['rich'] = None; from pystage import cli, doctor; "
        "doctor.SELF_TEST_SECONDS = 0.05; sys.exit(cli.main(['doctor', '--json']) == 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checks"]["self-test"]["ok"]
