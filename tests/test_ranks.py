"""The benchmark of several ranks on one host, on the host device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import ranks


def test_lists_of_cpus_are_read_as_the_kernel_writes_them() -> None:
    assert ranks.cpus_of("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert ranks.cpus_of("\n") == set()


def test_nodes_have_the_cpus_that_the_process_may_use(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    for node, text in (("node1", f"{allowed[-1]}"), ("node0", "100000-100003"), ("nodes", "0")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(text)
    assert ranks.nodes(tmp_path) == {1: {allowed[-1]}}  # no CPU of node 0 is ours
    assert ranks.nodes(tmp_path / "none") == {}


def test_work_on_a_node_leaves_the_process_as_it_was() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    with pytest.raises(ZeroDivisionError), ranks.on_node(one):
        assert os.sched_getaffinity(0) == one
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before
    assert ranks.node_of_gpu(torch.device("cpu")) is None


def test_every_rank_is_measured_alone_and_together(tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    command = [sys.executable, "-m", "bench.ranks", "--ranks", "3", "--samples", "20"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ranks.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["devices_of_ranks"] == ["cpu"] * 3 and len(told["ranks"]) == 3
    for row in told["ranks"]:
        assert row["pinned_bytes"] == 8 << 20 and row["contexts_on"] == []
        assert row["import_s"] > 0.1 and row["pool_s"] > 0 and row["first_batch_s"] > 0
        for when in ("alone", "together"):
            assert row[when]["ready_us"]["samples"] == 20
            assert row[when]["ready_us"]["p50"] >= row[when]["host_us"]["p50"] > 0
    assert "all at once" in done.stdout


def test_pools_of_every_node_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    monkeypatch.setattr(ranks, "nodes", lambda: {0: allowed, 1: {min(allowed)}})
    rank = ranks.Rank(0, "cpu", 0.0)
    assert rank.start()["nodes"] == [0, 1]
    told = rank.near_and_far(samples=5)
    assert list(told) == ["0", "1"] and told["1"]["ready_us"]["samples"] == 5


def test_a_rank_that_ends_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 0 ended with status 1"):
        ranks.measure(["no device"], 5)
