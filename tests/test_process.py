"""Imports, forks and exits of a process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

import pystage
from pystage.pool import _ranged


def run(code: str, *arguments: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "terminate" not in done.stderr, done.stderr
    return done.stdout


def test_import_works_without_a_driver() -> None:
    out = run(
        """
        import torch, pystage
        info = pystage.build_info()
        assert info.torch_built == torch.__version__, info
        with pystage.StagingPool("cpu") as pool:
            print(pool.stage([[1, 2]]).to("cpu").tolist())
        """,
        CUDA_VISIBLE_DEVICES="",
    )
    assert out.strip() == "[1, 2]"


@pytest.mark.gpu
def test_import_starts_no_cuda_context() -> None:
    """A child forked after the import can still use the GPU; after a context it could not."""
    run(
        """
        import os, torch, pystage
        pystage.build_info()
        assert not torch.cuda.is_initialized()
        pid = os.fork()
        if pid == 0:
            with pystage.StagingPool("cuda:0") as pool:
                ok = pool.stage([[1, 2, 3]]).to("cuda:0").tolist() == [1, 2, 3]
            os._exit(0 if ok else 1)
        assert os.waitpid(pid, 0)[1] == 0
        """
    )


FORK = """
import os, sys, threading, torch, pystage
from pystage.testing import hold_transfers
device = sys.argv[1]
pool = pystage.StagingPool(device, 1 << 16, timeout_s=30)
staged = pool.stage([list(range(100))])
big = pool.stage([list(range(12000))])
waiting = threading.Thread(target=lambda: pool.stage([list(range(12000))]))
waiting.start()
while pool.stats().waits == 0:
    pass
pid = os.fork()
if pid == 0:
    calls = [lambda: pool.stage([[1]]), lambda: pool.stage([]), lambda: pystage.resolve(staged),
             lambda: staged.tolist(), lambda: staged[2:].cpu(), pool.stats, pool.trim]
    for call in calls:
        try:
            call()
        except pystage.ForkedProcessError as error:
            assert "after fork" in str(error)
        else:
            os._exit(2)
    pool.close()
    del big, staged, pool, calls, call
    fresh = pystage.StagingPool("cpu", 1 << 16)
    ok = fresh.stage([[4, 2]]).to("cpu").tolist() == [4, 2]
    os._exit(0 if ok else 3)
status = os.waitpid(pid, 0)[1]
assert status == 0, status
del big
waiting.join()
assert staged.to(device).tolist() == list(range(100))
"""


def test_a_forked_child_gets_a_clear_error(device: str) -> None:
    run(FORK, device, PYTHONWARNINGS="ignore")


EXIT = """
import sys, threading, torch, pystage
from pystage.testing import hold_transfers
device, how = sys.argv[1:]
pool = pystage.StagingPool(device, 1 << 16, issue="eager" if how == "eager" else "deferred")
staged = pool.stage([[1, 2, 3]])
sys.modules["keeps"] = staged          # alive until the interpreter is nearly gone
pystage.keeps = pool
torch.keeps = staged[1:]
ids = pystage.resolve(staged)
if how == "closed":
    pool.close()
if how == "in flight":
    hold = hold_transfers(pool)
    hold.__enter__()
    more = pystage.resolve(pool.stage([[4]]))
    hold.__exit__(None, None, None)
if how == "waiting":
    big = pool.stage([list(range(12000))])
    threading.Thread(target=lambda: pool.stage([list(range(12000))]), daemon=True).start()
    while pool.stats().waits == 0:
        pass
if how == "cycle":
    class Cycle: pass
    cycle = Cycle(); cycle.me = cycle; cycle.staged = staged; cycle.pool = pool
print("bye")
"""


@pytest.mark.parametrize("how", ["open", "closed", "eager", "in flight", "waiting", "cycle"])
def test_exits_cleanly(device: str, how: str) -> None:
    assert run(EXIT, device, how, PYTHONWARNINGS="ignore").strip() == "bye"


@pytest.mark.gpu
def test_pageable_memory_is_right_counted_and_told() -> None:
    run(
        """
        import warnings, torch, pystage
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            pool = pystage.StagingPool("cuda:0", 1 << 20, reserve_bytes=1 << 16)
            held = [pool.stage([list(range(i, i + 9000))]) for i in range(20)]
        assert [w.category for w in seen] == [pystage.PageableMemoryWarning], seen
        assert "PYSTAGE_DISABLE_PINNED is set" in str(seen[0].message)
        assert pool.why_pageable and not held[0].is_pinned()
        for i, staged in enumerate(held):
            assert staged.to("cuda:0", non_blocking=True).tolist() == list(range(i, i + 9000))
            assert staged[1:3].to("cuda:0").tolist() == [i + 1, i + 2]
        wide = pool.stage([[2**40]])
        assert pystage.resolve(wide).tolist() == [2**40]
        stats = pool.stats()
        assert stats.pageable_bytes == stats.reserved_bytes > 0
        assert stats.kernel_transfers == 0 and stats.copy_engine_transfers == 41
        """,
        PYSTAGE_DISABLE_PINNED="1",
    )


def test_an_extension_that_does_not_load_is_told_with_what_to_do() -> None:
    run(
        """
        import sys
        sys.modules["pystage._C"] = None
        try:
            import pystage
        except ImportError as error:
            assert "pystage's extension does not load (" in str(error), error
            assert "rebuild with: pip install --no-build-isolation " in str(error), error
            assert error.__cause__ is not None
        else:
            raise AssertionError("it loaded")
        """
    )


@pytest.mark.parametrize(("status", "expected"), [(0, "12.9"), (999, None)])
def test_the_driver_is_asked_for_its_version(
    monkeypatch: pytest.MonkeyPatch, status: int, expected: str | None
) -> None:
    class Driver:
        def cuDriverGetVersion(self, version: Any) -> int:
            version._obj.value = 12090
            return status

    asked: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name) or Driver())
    assert pystage.build_info().cuda_driver == expected
    assert asked == ["libcuda.so.1"]


def test_build_info_tells_the_build() -> None:
    info = pystage.build_info()
    assert info.version == pystage.__version__
    if info.cuda:
        assert info.cuda_runtime and info.cuda_architectures
    else:
        assert info.cuda_runtime is None and info.cuda_architectures == ()


def test_a_torch_without_nvtx_says_so_once_and_stages() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has NVTX")
    out = run(
        """
        import warnings
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            import pystage
        print([str(w.message) for w in seen if "NVTX" in str(w.message)])
        with pystage.StagingPool("cpu") as pool:
            print(pool.stage([[1, 2]]).to("cpu").tolist())
        """,
        PYSTAGE_NVTX="1",
    )
    assert out.splitlines() == ["['PYSTAGE_NVTX is set, but this torch has no NVTX']", "[1, 2]"]


def test_a_range_ends_with_its_call_whatever_the_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[str | None] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", marks.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: marks.append(None))
    with pystage.StagingPool("cpu") as pool:
        stage = _ranged("pystage.stage", pystage.StagingPool.stage)
        assert stage(pool, [[1], [2]], stops=[1, 1]).tolist() == [1, 2]
        assert stage.__doc__ == pystage.StagingPool.stage.__doc__
        with pytest.raises(pystage.TokenRangeError):
            stage(pool, [[5]], vocab_size=5)
    assert marks == ["pystage.stage", None] * 2
