"""setup.py: what it builds, and its errors if it cannot build. The limits of `make coverage`."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch

SETUP = Path(__file__).resolve().parent.parent / "setup.py"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of setup.py's functions, without the build."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: calls.append(kwargs))
    for name in ("PYSTAGE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "PYSTAGE_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    namespace = runpy.run_path(str(SETUP))
    assert len(calls) == 1 and calls[0]["ext_modules"][0].name == "pystage._C"
    return namespace["cuda_toolkit"].__globals__  # type: ignore[no-any-return]


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a toolkit of CUDA 13.0."""
    for name in ("bin", "include"):
        (tmp_path / name).mkdir()
    (tmp_path / "include/cuda_runtime.h").touch()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case $1 in --version) echo "Cuda compilation tools, release 13.0, V13.0.88";;\n'
        "*) printf 'compute_80\\ncompute_86\\ncompute_90\\n';; esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return tmp_path


def test_without_torch_it_names_the_command() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['setup.py', '--version']; runpy.run_path({str(SETUP)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "pip install --no-build-isolation ." in done.stderr
    assert "torch>=2.11" in done.stderr and "Traceback" not in done.stderr


def test_the_other_project_of_that_name_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "pystage-0.1.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pystage\nVersion: 0.1.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit, match=r"pystage 0\.1\.1 .*\n +pip uninstall pystage\n"):
        runpy.run_path(str(SETUP))


@pytest.mark.parametrize(
    ("mode", "torch_cuda", "expected"),
    [
        ("auto", None, False),
        ("auto", "13.1", True),
        ("0", "13.0", False),
        ("1", None, True),
        ("1", "13.0", True),
    ],
)
def test_when_cuda_code_is_built(
    build: dict[str, Any],
    toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    torch_cuda: str | None,
    expected: bool,
) -> None:
    monkeypatch.setenv("PYSTAGE_CUDA", mode)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert build["cuda_toolkit"]() == (toolkit if expected else None)


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_another_major_version_is_an_error(
    build: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("PYSTAGE_CUDA", mode)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(
        SystemExit, match=r"CUDA 12\.8, but the toolkit .* is 13\.0.*PYSTAGE_CUDA=0"
    ):
        build["cuda_toolkit"]()


@pytest.mark.parametrize(
    ("mode", "torch_cuda", "reason"),
    [
        ("auto", "13.0", r"torch .* has CUDA, .* toolkit of CUDA 13 "),
        ("1", "13.0", r"PYSTAGE_CUDA is 1, .* toolkit of CUDA 13 "),
        ("1", None, r"PYSTAGE_CUDA is 1, .* toolkit of CUDA "),
    ],
)
def test_cuda_torch_without_a_toolkit_is_an_error(
    build: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    torch_cuda: str | None,
    reason: str,
) -> None:
    """A build that left CUDA out in silence would be noticed only by the server that it slows."""
    monkeypatch.setitem(build, "find_toolkit", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setenv("PYSTAGE_CUDA", mode)
    with pytest.raises(SystemExit, match=reason + r".*CUDA_HOME.*PYSTAGE_CUDA=0"):
        build["cuda_toolkit"]()


@pytest.mark.parametrize(("mode", "torch_cuda"), [("0", "13.0"), ("auto", None)])
def test_a_build_without_cuda_needs_no_toolkit(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mode: str, torch_cuda: str | None
) -> None:
    monkeypatch.setitem(build, "find_toolkit", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setenv("PYSTAGE_CUDA", mode)
    assert build["cuda_toolkit"]() is None


def test_a_mistyped_mode_is_an_error(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSTAGE_CUDA", "yes")
    with pytest.raises(SystemExit, match="auto, 0 or 1"):
        build["cuda_toolkit"]()


def test_a_wrapper_is_no_toolkit(
    build: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toolkit / "include/cuda_runtime.h").unlink()
    assert build["find_toolkit"]() != toolkit


def test_architectures(
    build: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, names = build["architectures"](toolkit)
    assert names == "8.0 8.6 9.0+PTX"  # what this nvcc knows; PTX of the last for later ones
    assert flags[-1] == "-gencode=arch=compute_90,code=compute_90"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a;10.0+PTX")
    flags, names = build["architectures"](toolkit)
    assert names == "9.0a 10.0+PTX"
    assert flags == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="Hopper"):
        build["architectures"](toolkit)


@pytest.fixture
def coverage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("coverage")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("measure_coverage")


def test_each_measure_of_coverage_has_its_limit(
    coverage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file below the limit is named; so is one that no test ran, and has no figure at all."""
    figures = {name: 92.0 for name in coverage.CPP_FILES}
    figures["staging.cpp"] = 91.9
    del figures["ops.cpp"]
    files = [{"filename": f"csrc/{n}", "line_percent": p} for n, p in figures.items()]
    (tmp_path / "cpp.json").write_text(json.dumps({"files": files}))
    monkeypatch.setattr(subprocess, "run", lambda command, check: None)
    problems = coverage.cpp(tmp_path)
    assert problems == [
        "coverage: csrc/ops.cpp has 0.0 %, 92 % needed",
        "coverage: csrc/staging.cpp has 91.9 %, 92 % needed",
    ]
    monkeypatch.setattr(coverage, "python", lambda folder, with_sglang: [])
    assert coverage.main(tmp_path, with_sglang=True) == 1
    monkeypatch.setattr(coverage, "cpp", lambda folder: [])
    assert coverage.main(tmp_path, with_sglang=True) == 0


def test_lines_left_out_of_coverage_are_told_with_their_reason(coverage: ModuleType) -> None:
    text = """
    if (x)  // GCOV_EXCL_START: no such device
      one();
    // GCOV_EXCL_STOP
    two();  // GCOV_EXCL_LINE: never"""
    assert coverage.left_out(text) == [(2, "no such device"), (1, "never")]
