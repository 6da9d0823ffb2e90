"""Makes each call of the driver fail on a GPU. For a stub, see csrc/tests/test_cuda_device.cpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: the library that makes calls fail is built here")
    path = tmp_path_factory.mktemp("faults") / "driver_faults.so"
    source = HERE / "driver_faults.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl", "-pthread"], check=True
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["each", "lost", "exits", "asserts", "stale", "refused"])
def test_calls_of_the_driver_that_fail(library: Path, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.life", mode, library],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
        cwd=HERE.parent.parent,
        env={**os.environ, "LD_PRELOAD": str(library)},
    )
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr, done.stderr
    print(json.loads(done.stdout.splitlines()[-1]))
