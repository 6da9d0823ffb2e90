"""Which CUDA contexts a pool makes, and which context it leaves current in a thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pystage
from bench.two_gpus import driver, without_context
from pystage.testing import hold_transfers, synchronize

from .conftest import run_of

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent
VARIANTS: list[dict[str, Any]] = [{}, {"issue": "eager"}, {"transfer": "copy_engine"}]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_thread_whose_context_was_taken_away_goes_on(options: dict[str, Any]) -> None:
    with pystage.StagingPool("cuda:0", **options) as pool:
        staged = pool.stage([run_of(7, 1000)])
        assert pystage.resolve(staged)[0].item() == 7
        driver().drop_current()  # as cuCtxSetCurrent(NULL) of another library
        out = pystage.resolve(staged)
        assert out.tolist() == list(range(7, 1007))
        again = pool.stage([run_of(8, 1000)])
        driver().drop_current()
        assert again.to("cuda:0").tolist() == list(range(8, 1008))


def test_threads_get_no_context() -> None:
    """Growth, figures and the end of tokens: calls of the driver, and nothing stays current."""
    pool = pystage.StagingPool("cuda:0", 8 << 20, reserve_bytes=4096)
    kept: list[Any] = []
    without_context(lambda: kept.append(pool.stage([run_of(0, 300_000)])))
    pystage.resolve(kept[0])  # what torch allocates and loads first may wait for a held stream
    with hold_transfers(pool):
        out = pystage.resolve(kept[0])
        without_context(kept.clear)
        without_context(lambda: kept.append(pool.stats()))
        assert kept.pop().in_flight_slots == 1
    synchronize(pool)
    assert out[-1].item() == 299_999
    without_context(pool.trim)
    assert pool.stats().reserved_bytes == 0
    without_context(pool.close)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or "CUDA_VISIBLE_DEVICES" in os.environ,
    reason="needs two whole GPUs: it compares what nvidia-smi says of them",
)
def test_two_gpus(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.two_gpus", "--out", str(tmp_path / "two.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
