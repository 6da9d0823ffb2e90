"""The benchmark itself: it runs, reports each absent contender, and its pages match its results.

This is one file because its tests share the example package and the example result.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.__main__ import default_path, main, parse
from bench.common import merged, provenance, save, summary, two_calls_time
from bench.device import DURING_CALL, IN_STREAM_ORDER, Absent, Cuda, Host, HostEvent
from bench.report import __main__ as report
from bench.report import figures, svg
from bench.suite import REGIMES, latency, pages, plots
from bench.suite.cells import Bench, Once
from bench.suite.contenders import (
    BOUND,
    BUFFER,
    BUFFERS,
    CHECKED,
    CUPY,
    DEFERRED,
    EAGER,
    EMPTY,
    KINDS,
    POOLS,
    RAGGED,
    READY,
    RUNNER,
    SGLANG,
    TORCH,
    TOTAL,
    UVA,
    Contenders,
    gather,
    ready,
)
from bench.suite.latency import BULK, WAITED, unpaused_name
from bench.suite.mixed import FUSED, KERNELS, PLAIN_MIXED
from bench.suite.peers import Sources
from bench.suite.targets import targets

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"p50", "p90", "p99", "p99.9", "max", "samples"}
# Laid out as SGLang, with functions of the same names: what is taken, and that nothing else runs.
PACKAGE = {
    "sglang/srt/utils/common.py": """
import no_such_module
def flatten_arrays_to_pinned_cpu(parts: List[array[int]], pin: NoSuchType) -> torch.Tensor:
    return torch.cat([torch.frombuffer(p, dtype=torch.int64) for p in parts])
""",
    "sglang/srt/managers/overlap_utils.py": """
def resolve_forward_inputs(batch: ScheduleBatch, future_map):
    batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
    if batch.mix_running_indices is not None:
        tail = future_map.output_tokens_buf[batch.mix_running_indices]
        batch.input_ids = torch.cat([batch.input_ids, tail])
""",
    "sglang/srt/managers/schedule_batch.py": """
class Req(NoSuchBase):
    def get_fill_ids(self):
        return self.full_untruncated_fill_ids[: self.extend_end]
""",
    "sglang-0.5.23.dist-info/METADATA": "Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n",
}


# As vLLM's, in plain torch: what is taken of it, and how it is called.
V2_PACKAGE = {
    "vllm/utils/torch_utils.py": "def async_tensor_h2d(data, device=None, dtype=None): ...",
    "vllm/v1/worker/gpu/buffer_utils.py": """
import no_such_module
class UvaBuffer: ...
class NonUvaBuffer: ...
class UvaBufferPool: ...
class StagedWriteTensor:
    def __init__(self, size, dtype, device, max_concurrency=None, uva_instead_of_gpu=False):
        assert uva_instead_of_gpu and dtype == torch.int32
        self.gpu, self.staged = torch.zeros(size, dtype=dtype), []
    def stage_write(self, index, start, x):
        self.staged.append((index, start, x))
    def apply_write(self):
        for index, start, x in self.staged:
            self.gpu[index, start : start + len(x)] = torch.tensor(x, dtype=torch.int32)
        self.staged.clear()
def _num_write_chunks(max_len): ...
def _apply_write_kernel(): ...
def _load_ptr(): ...
""",
    "vllm/v1/worker/gpu/input_batch.py": """
def _prepare_prefill_inputs_kernel(): ...
def prepare_prefill_inputs(ids, ahead, rows, starts, all_ids, prefill_len, computed):
    for k in range(len(rows)):
        row = all_ids[rows[k], computed[k] : prefill_len[k]]
        assert starts[k + 1] - starts[k] == len(row)
        ids[starts[k] : starts[k + 1]] = row
""",
    "vllm-0.33.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n",
}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small caches, since inputs that exceed a server's take seconds to make, and no peers."""
    monkeypatch.setattr("bench.__main__.cpu_cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("bench.suite.peers.installed", lambda package: [])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in PACKAGE.items():
        file = tmp_path / "peers" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "peers"


def run(out: Path, *arguments: str) -> dict[str, Any]:
    result = main(["--out", str(out), *arguments])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    return result


def test_the_host_device_gives_every_cell_a_result_or_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--device", "cpu", "--quick", "--samples", "3", "--trace-batches", "20")
    result = run(tmp_path / "run.json", *few)
    assert list(result["regimes"]) == list(REGIMES)
    assert result["errors"] == {}
    assert "no target applies" in result["means"]
    assert result["targets"] == []
    for name in ("commit", "command", "cpu", "torch", "driver", "device", "date"):
        assert name in result
    cell = result["regimes"]["host"]["1 x 8192 array"]
    assert {*POOLS, CHECKED, TORCH} <= set(cell["contenders"])
    assert set(cell["contenders"][DEFERRED]["total"]) == KEYS
    assert cell["contenders"][DEFERRED]["total"]["samples"] == 6  # short calls: twice as many
    parts = [cell["bound"][part]["p50"] for part in BOUND]
    assert cell["bound"][TOTAL]["p50"] >= max(parts) > 0
    drift = result["regimes"]["drift"][f"trace, {DEFERRED}"]["contenders"][DEFERRED]
    assert drift["total"]["samples"] == 20
    assert drift["allocations_after_warm_up"] == 0
    assert all("absent" in cell for cell in result["regimes"]["stream"].values())
    for peer in (SGLANG, BUFFER):
        assert "neither installed nor in --peers" in result["absent"][peer]
        assert peer not in cell["contenders"]
    printed = capsys.readouterr().out
    assert f"absent: {SGLANG}" in printed
    assert "no target applies" in printed


def test_a_command_can_be_repeated_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["bench/old.py", "--out", "/tmp/a.json", "--peers=/opt/peers", "--reps", "3", "--fast"]
    given += [
        "--like=/home/me/two.json",
        "--from",
        "/home/me/one.json",
        "--to=bench/x.json",
    ]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    started = "torchrun --nproc-per-node 2 bench/old.py --reps 3 --fast"
    told = f"{started} --like=two.json --from one.json --to=bench/x.json"
    assert provenance()["command"] == told


def test_every_cell_of_a_gpu_run_runs_on_stand_ins(tmp_path: Path, package: Path) -> None:
    few = ("--rehearse", "--samples", "2", "--trace-batches", "20", "--peers", str(package))
    result = run(tmp_path / "run.json", *few)
    assert result["errors"] == {}
    assert set(result["absent"]) == {BUFFER, UVA, RUNNER, CUPY}
    assert "0.5.23" in result["notes"][SGLANG]
    measured = result["regimes"]
    for regime, cells in measured.items():
        for name, cell in cells.items():
            assert "contenders" in cell or name.endswith((BUFFER, UVA, CUPY)), (regime, name, cell)
    for regime, name in (
        ("host", "64 x 128 array"),
        ("stream", "idle, 8192 ids"),
        ("latency", BULK),
        ("threads", "4 threads, 8 x 1024 array"),
        ("processes", "2 processes, 8 x 1024 array"),
        ("history", "8192 behind 131072"),
    ):
        assert {DEFERRED, SGLANG} <= set(measured[regime][name]["contenders"]), regime
    assert len(measured["latency"]) == 3 + 3 * 3 * 4 + 4 * 2
    beside = measured["latency"][unpaused_name(256, 2, 8192)]
    assert beside["contenders"][DEFERRED]["ready"]["samples"] == 1
    assert beside["copied_gb_per_s"] > 0
    assert measured["stream"]["idle, 8192 ids"]["contenders"][DEFERRED]["added"]["samples"] == 1
    together = measured["processes"]["4 processes, 8 x 1024 array"]["contenders"]
    assert together[DEFERRED]["ready"]["samples"] == 4 * 10
    assert together[DEFERRED]["ready"]["p50"] >= together[DEFERRED]["total"]["p50"]
    assert "absent" in together[BUFFER]
    missing = [row["where"] for row in targets(result) if row["value"] is None]
    assert [where for where in missing if "no ratio" not in where] == [
        f"host, 1 x 8192 array: {BUFFER} has no total"
    ]


def test_passes_are_merged_and_kept_apart() -> None:
    one = {"contenders": {"a": {"total": summary([1.0, 2.0, 3.0]), "kind": 7}, "b": {}}}
    two = {"contenders": {"a": {"total": summary([5.0, 6.0, 7.0]), "kind": 8}, "b": {}}}
    row = merged([one, two])["contenders"]["a"]
    assert row["total"]["p50"] == 4.0 and row["total"]["samples"] == 6
    assert row["total"]["passes"] == [2.0, 6.0]
    assert row["kind"] == 8
    assert merged([one]) is one
    failed = {"contenders": {"a": {"error": "why"}, "b": {}}}
    assert merged([failed, two])["contenders"] == {"a": {"error": "why"}, "b": {}}


def test_a_whole_run_measures_its_cells_in_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, list[int]] = {"again": [], "once": []}

    def regime(bench: Bench) -> dict[str, Any]:
        def cell(name: str) -> dict[str, Any]:
            counts[name].append(bench.samples)
            return {"contenders": {"a": {"total": summary([float(len(counts[name]))])}}}

        return {"once": Once(cell, "once"), "again": partial(cell, "again")}

    monkeypatch.setitem(REGIMES, "host", regime)
    few = ("--device", "cpu", "--samples", "10", "--regimes", "host", "--no-plots")
    cells = run(tmp_path / "run.json", *few)["regimes"]["host"]
    assert counts == {"again": [4, 4, 4], "once": [10]}
    assert cells["again"]["contenders"]["a"]["total"]["passes"] == [1.0, 2.0, 3.0]
    assert "passes" not in cells["once"]["contenders"]["a"]["total"]


@pytest.mark.parametrize("quick, few", [(True, 5), (False, 20)])
def test_only_a_quick_run_has_fewer_samples_of_slow_cells(quick: bool, few: int) -> None:
    assert Bench(Host(), Contenders(Host(), Sources(None)), 20, 3, quick, 10, 1).few_samples == few


def test_ids_that_never_come_have_starved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "STARVED_S", 0.001)
    late = iter([True, True, False])  # READY comes in time twice, and then no more

    class Event(HostEvent):
        def query(self) -> bool:
            return next(late, False)

    device = Host(gpu_regimes=True)
    monkeypatch.setattr(device, "event", lambda timing=False: Event())
    monkeypatch.setattr(Contenders, "all", lambda self, names, room: [ready(device, READY, room)])
    bench = Bench(device, Contenders(device, Sources(None)), 6, 0, False, 1 << 20, 1)
    cell = latency.regime(bench)[unpaused_name(16, 2, 2048)]()
    row = cell["contenders"][READY]
    assert row["starved_after_s"] == 0.001 and row["answered"] == 2
    assert row["ready"]["samples"] == 2
    text = pages.sections(
        made_up() | {"targets": [], "regimes": {"latency": {unpaused_name(16, 2, 2048): cell}}}
    )["suite-unpaused"]
    nobody = {**cell, "contenders": {READY: {"starved_after_s": 2.0, "answered": 0}}}
    none = pages.sections(
        made_up() | {"targets": [], "regimes": {"latency": {unpaused_name(16, 2, 2048): nobody}}}
    )["suite-unpaused"]
    assert "none within 2 s" in none
    assert "; 1 of 3 not within 0.001 s" in text and "2,048 ids, 2 x 16 MiB queued" in text


def test_turns_are_drawn_anew() -> None:
    bench = Bench(Host(), Contenders(Host(), Sources(None)), 20, 3, True, 10, 1)
    orders = {tuple(bench.shuffled(["a", "b", "c"])) for _ in range(100)}
    assert len(orders) == 6


def test_no_contender_gets_an_input_of_another() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    calls = {name: (into.append, lambda _: None) for name, into in seen.items()}
    two_calls_time(calls, lambda k: k, 50, 5, lambda: None)
    assert sorted([*seen["a"], *seen["b"]]) == list(range(110))
    first = [a < b for a, b in zip(seen["a"], seen["b"], strict=True)]
    assert 10 < sum(first) < 45  # either goes first


@pytest.mark.parametrize("requests", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_gathered_right(kind: str, requests: int) -> None:
    bench = Bench(Host(), Contenders(Host(), Sources(None)), 20, 3, True, 10, 1)
    batch = bench.requests(kind, [7 + r for r in range(requests)], 5)
    into = np.zeros(sum(map(len, batch)), np.int64)
    gather(batch, into)
    assert into.tolist() == [int(i) for request in batch for i in request]


@pytest.mark.parametrize(
    "arguments, folder",
    [
        ([], "results"),
        (["--quick"], "bench"),
        (["--rehearse"], "bench"),
        (["--samples", "600"], "bench"),
        (["--regimes", "host"], "bench"),
    ],
)
def test_only_a_whole_run_on_a_gpu_goes_to_the_pages(arguments: list[str], folder: str) -> None:
    gpu, host = SimpleNamespace(cuda=True, name="NVIDIA X"), Host()
    path = default_path(gpu, parse(arguments))
    assert path.parent.name == folder and path.name == "suite-nvidia-x.json"
    assert default_path(host, parse(arguments)).parent.name == "bench"


def test_options_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, problem in (
        ("--regimes", "host,hots", "no such regime: hots"),
        ("--samples", "0", "--samples must be at least 1"),
        ("--trace-batches", "-1", "--trace-batches must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main([option, value])
        assert problem in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no such folder"):
        main(["--peers", str(tmp_path / "nowhere")])


def test_a_cell_that_fails_is_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad() -> dict[str, Any]:
        raise ValueError("broken on purpose")

    def missing() -> dict[str, Any]:
        raise Absent("no such thing")

    good: Callable[[], dict[str, Any]] = lambda: {"contenders": {}}  # noqa: E731
    monkeypatch.setitem(
        REGIMES, "host", lambda bench: {"bad": bad, "missing": missing, "good": good}
    )
    result = run(tmp_path / "run.json", "--device", "cpu", "--regimes", "host")
    cells = result["regimes"]["host"]
    assert "broken on purpose" in cells["bad"]["error"]
    assert cells["missing"]["absent"] == "no such thing"
    assert cells["good"]["contenders"] == {}
    assert list(result["errors"]) == ["host, bad"]
    assert "broken on purpose" in capsys.readouterr().out


def test_a_contender_that_fails_leaves_the_others_their_turns() -> None:
    calls = []

    def fails(given: int) -> int:
        if len(calls) > 20:
            raise RuntimeError("worn out")
        return given

    rows = two_calls_time(
        {
            "good": (lambda given: calls.append(given), lambda held: held),
            "bad": (fails, lambda held: held),
        },
        lambda k: k,
        samples=30,
        warmup=2,
        settle=lambda: None,
    )
    assert "worn out" in rows["bad"]["error"]
    assert rows["good"]["total"]["samples"] == 30
    assert len(set(calls)) == 32  # no input twice


def test_one_that_cannot_be_made_is_an_error_not_an_absence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(device: Host) -> None:
        raise RuntimeError("half installed")

    monkeypatch.setattr("bench.suite.contenders.cupy_pool", broken)
    everybody = Contenders(Host(), Sources(None))
    assert everybody.make(CUPY) is None
    assert everybody.absent == {}
    assert "half installed" in everybody.errors[f"making {CUPY}"]
    assert "failed" in everybody.why_not(CUPY)


def test_code_is_taken_from_wheels_too(package: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    archive = shutil.make_archive(str(tmp_path / "made"), "zip", package)
    Path(archive).rename(wheels / "sglang-0.5.23-py3-none-any.whl")
    sources = Sources(wheels)
    assert sources.version("sglang") == "0.5.23"
    path, name = "srt/utils/common.py", "flatten_arrays_to_pinned_cpu"
    taken = sources.take("sglang", path, [name], {"torch": torch})
    ids = np.arange(5)
    assert taken[name]([ids, ids], False).tolist() == [*range(5), *range(5)]
    with pytest.raises(Absent, match=r"sglang 0\.5\.23 has no gone in"):
        sources.take("sglang", path, ["gone"], {})
    with pytest.raises(Absent, match="has no sglang/elsewhere"):
        sources.read("sglang", "elsewhere.py")


def test_rows_of_the_v2_runner_grow_and_are_read_behind_what_is_computed(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in V2_PACKAGE.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    device = Host(gpu_regimes=True)
    contenders = Contenders(device, Sources(package))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert (
        contenders.make(RUNNER) is None and "Triton is not installed" in contenders.absent[RUNNER]
    )
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["triton"].language = sys.modules["triton.language"]  # type: ignore[attr-defined]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert contenders.make(RUNNER) is None and "TRITON_INTERPRET=1" in contenders.absent[RUNNER]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    runner = contenders.make(RUNNER)
    assert runner is not None and contenders.errors == {}
    for batch in ([[5, 6]], [[7], [8, 9, 10], [11, 12]], [[1] * 9], [[2, 3]]):
        assert runner.resolve(runner.stage(batch)).tolist() == [*chain(*batch)]
    row = runner.stage([[4, 5, 6, 7]])
    assert runner.resolve(row, 3).tolist() == [7]


def test_inputs_are_random_and_cold_ones_are_not_used_again() -> None:
    bench = Bench(Host(), Contenders(Host(), Sources(None)), 3, 1, True, 10, 1 << 20)
    assert np.unique(bench.arena).size > 100_000
    for kind in ("array", "list", "numpy", "tensor"):
        inputs, rotated = bench.inputs(kind, (100, 28), cold=True, calls=50)
        batches = [inputs(k) for k in range(50)]
        assert len({id(request) for batch in batches for request in batch}) == 100
        assert [len(request) for request in batches[7]] == [100, 28]
        assert rotated == 50 * 128 * (40 if kind == "list" else 8)
    inputs, rotated = bench.inputs("array", (8192,), cold=True, calls=1 << 20)
    assert rotated > bench.cache_bytes
    inputs, rotated = bench.inputs("array", (128,), cold=False, calls=1000)
    assert inputs(0) is inputs(64)
    assert inputs(0) is not inputs(1)
    assert rotated == 64 * 1024


# --- targets and pages -------------------------------------------------------------------------


def made_up() -> dict[str, Any]:
    """A run that meets every target."""

    def times(p50: float) -> dict[str, Any]:
        return summary([p50] * 10)

    def host(ours: float) -> dict[str, Any]:
        def row(us: float) -> dict[str, Any]:
            return {"stage": times(us / 2), "resolve": times(us / 2), "total": times(us)}

        return {
            "contenders": {DEFERRED: row(ours), BUFFER: row(2 * ours), SGLANG: row(3 * ours)}
            | {TORCH: row(4 * ours)},
            "bound": {"write": times(2), "memory": times(2), "launch": times(4), TOTAL: times(8)}
            | {BUFFERS: times(1), RAGGED: times(3)},
        }

    def added(ours: float, **others: float) -> dict[str, Any]:
        rows = {DEFERRED: ours, READY: 10.0, EMPTY: 2.0, EAGER: 0.1}
        return {"contenders": {name: {"added": times(us)} for name, us in rows.items()}}

    def drift(worst: float) -> dict[str, Any]:
        return {
            "total": times(10),
            "first_call": 20.0,
            "worst_call": worst,
            "made": 7000.0,
            "allocations": 1,
            "allocations_after_warm_up": 0,
            "pinned_bytes": 8 << 20,
        }

    mixed = {
        FUSED: {"total": times(10), "added": times(4)},
        PLAIN_MIXED: {"total": times(30), "added": times(20)},
    }
    kernels = {FUSED: {"kernels": 1, "copies": 0}, PLAIN_MIXED: {"kernels": 2, "copies": 1}}
    ready = {DEFERRED: 30, READY: 9500, SGLANG: 9600}
    return {
        "date": "2026-01-02T00:00:00+00:00",
        "commit": "0123456789abcdef",
        "command": "python -m bench",
        "device": "NVIDIA H100",
        "device_name": "NVIDIA H100",
        "devices": 1,
        "quick": False,
        "driver": "580",
        "torch": "2.11.0",
        "cpu": "a CPU",
        "cores": 16,
        "cpu_cache_bytes": 1 << 20,
        "roles": {DEFERRED: "ours", EAGER: "ours", BUFFER: "peer", SGLANG: "peer", TORCH: "peer"},
        "notes": {SGLANG: "its own code"},
        "absent": {CUPY: "not installed"},
        "errors": {},
        "regimes": {
            "host": {
                "1 x 8192 array": host(10),
                "64 x 128 array": host(11),
                "1 x 8192 list": host(15),
                "bytes over the link": {"contenders": {DEFERRED: {"bytes_per_id": 4.0}}},
            },
            "stream": {
                **{f"idle, {n} ids": added(4.0) for n in (128, 1024, 8192, 16384, 131072, 1048576)},
                "busy, 8192 ids": added(4.0),
            },
            "latency": {
                cell: {
                    "contenders": {
                        name: {"ready": times(us), "call": times(us / 2)}
                        for name, us in ready.items()
                    }
                }
                for cell in (WAITED, BULK)
            },
            "drift": {
                f"trace, {DEFERRED}": {"contenders": {DEFERRED: drift(300)}},
                f"trace, {SGLANG}": {"contenders": {SGLANG: drift(900)}},
                f"trace, {BUFFER}": {"contenders": {BUFFER: drift(400)}},
            },
            "threads": {},
            "processes": {},
            "history": {
                f"8192 behind {n}": {"contenders": {DEFERRED: {"total": times(us)}}}
                for n, us in ((0, 10), (131072, 11))
            },
            "mixed": {
                "8192 ids + 64 running": {"contenders": mixed},
                KERNELS: {"contenders": kernels},
            },
        },
    }


def test_targets_are_met_by_what_meets_them() -> None:
    rows = targets(made_up())
    assert len(rows) == 25
    assert [row["measure"] for row in rows if not row["met"]] == []
    where = {row["measure"]: row["where"] for row in rows}
    bulk = next(w for measure, w in where.items() if "bulk" in measure)
    assert bulk.startswith("15 us in the call; 30 us as late without copies; ")
    assert "SGLang 9,600" in bulk
    assert "1.10 x where its arrays are asked" in next(w for m, w in where.items() if "bound" in m)


@pytest.mark.parametrize(
    ("where", "value", "measure"),
    [
        (("host", "64 x 128 array", "bound", TOTAL, "p50"), 7.0, "of the lower bound"),
        (("host", "1 x 8192 array", "bound", TOTAL, "p50"), 10.1, "under 1, it is no bound"),
        (("host", "64 x 128 array", DEFERRED, "total", "p99"), 23.0, "its p99 of its p50"),
        (("host", "1 x 8192 list", BUFFER, "total", "p50"), 15.0, "the best peer's host time"),
        (("host", "1 x 8192 array", BUFFER, "total", "p50"), 17.0, f"{BUFFER} over ours"),
        (("host", "1 x 8192 array", SGLANG, "total", "p50"), 24.0, f"{SGLANG} over ours"),
        (
            ("host", "1 x 8192 array", TORCH, "total", "p50"),
            19.9,
            f"{TORCH} over ours, 1",
        ),
        (("host", "64 x 128 array", TORCH, "total", "p50"), 32.0, f"{TORCH} over ours, 6"),
        (("host", "1 x 8192 list", TORCH, "total", "p50"), 29.0, f"{TORCH} over ours, 1"),
        (("history", "8192 behind 131072", DEFERRED, "total", "p50"), 12.1, "of history"),
        (("host", "1 x 8192 list", DEFERRED, "total", "p50"), 20.1, "list input"),
        (("host", "bytes over the link", DEFERRED, "bytes_per_id"), 4.1, "bytes over the link"),
        (("stream", "idle, 128 ids", DEFERRED, "added", "p50"), 5.1, "of an empty kernel"),
        (("stream", "idle, 131072 ids", DEFERRED, "added", "p50"), 10.1, "of cudaMemcpyAsync"),
        (("stream", "idle, 8192 ids", DEFERRED, "added", "p50"), 4.6, "  8,192 ids"),
        (("stream", "idle, 1048576 ids", DEFERRED, "added", "p50"), 6.1, "  1,048,576 ids"),
        (("stream", "busy, 8192 ids", EAGER, "added", "p50"), 0.6, "eager, GPU busy"),
        (("latency", BULK, DEFERRED, "ready", "p50"), 51.0, "8,192 ids, p50"),
        (("latency", BULK, DEFERRED, "ready", "p99"), 201.0, "8,192 ids, p99"),
        (("drift", f"trace, {DEFERRED}", DEFERRED, "worst_call"), 401.0, "worst call"),
        (
            ("drift", f"trace, {DEFERRED}", DEFERRED, "allocations_after_warm_up"),
            1,
            "pinned allocations",
        ),
        (("mixed", KERNELS, FUSED, "copies"), 1, "mixed batch, kernels"),
        (("mixed", "8192 ids + 64 running", FUSED, "total", "p50"), 18.1, "  host time of copy"),
        (("mixed", "8192 ids + 64 running", FUSED, "added", "p50"), 12.1, "  compute stream of"),
    ],
)
def test_each_target_is_missed_by_its_own_figure(
    where: tuple[str, ...], value: float, measure: str
) -> None:
    result = made_up()
    regime, cell, *path = where
    at = result["regimes"][regime][cell]
    for key in path[:-1] if path[0] == "bound" else ["contenders", *path[:-1]]:
        at = at[key]
    at[path[-1]] = value
    missed = [row["measure"] for row in targets(result) if not row["met"]]
    assert len(missed) == 1
    assert measure in missed[0]


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    result = made_up()
    del result["regimes"]["stream"], result["regimes"]["mixed"]
    rows = [row for row in targets(result) if row["met"] is None]
    assert len(rows) == 8
    assert all(row["value"] is None and row["where"] for row in rows)
    assert len(targets(made_up() | {"regimes": {}})) == 25
    result = made_up()
    result["regimes"]["stream"]["idle, 1024 ids"]["contenders"][READY]["added"]["p50"] = -0.1
    assert [row["met"] for row in targets(result)].count(None) == 1  # noise is no reference


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The pages and the results, to be changed. The suite's are made up."""
    found = (ROOT / figures.RESULTS).rglob("*.json")
    results = [path.relative_to(ROOT) for path in found if not path.name.startswith("suite")]
    pages_and_results = (*report.PAGES, *map(str, results))
    for name in pages_and_results:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def check(site: Path) -> None:
    report.main(["--check", "--root", str(site)])


def suite(site: Path, name: str = "suite-nvidia-h100.json", **changes: Any) -> dict[str, Any]:
    result = made_up() | changes
    result["targets"] = targets(result)
    save(site / "bench/results" / name, result)
    return result


def test_pages_follow_the_results_and_check_notices_a_changed_figure(site: Path) -> None:
    pytest.importorskip("matplotlib")
    suite(site)
    with pytest.raises(SystemExit, match=r"^benchmarks\.md: not the figures"):
        check(site)
    report.main(["--root", str(site)])
    check(site)
    page = site / "docs/benchmarks.md"
    text = page.read_text()
    assert re.search(r"\| 1 x 8,192 array +\| +10\.0 / 10\.0 \| +5\.0 \+ 5\.0 \| +8\.0 ", text)
    assert "9,500.0 / 9,500.0" in text
    assert "CuPy pinned pool: absent, not installed." in text
    assert (site / "docs/suite-host.svg").exists()
    page.write_text(text.replace("10.0 / 10.0", "19.0 / 10.0", 1))
    with pytest.raises(SystemExit, match=r"^benchmarks\.md: not the figures"):
        check(site)
    page.write_text(text)
    result = suite(site)
    result["regimes"]["latency"][BULK]["contenders"][READY]["ready"]["p50"] = 9501.0
    save(site / "bench/results/suite-nvidia-h100.json", result)
    with pytest.raises(SystemExit, match=r"^benchmarks\.md: not the figures"):
        check(site)


def test_only_whole_runs_on_a_gpu_count_and_the_newest_of_them(site: Path) -> None:
    folder = site / "bench/results"
    assert report.suite_of(folder) is None
    suite(site, "suite-a.json", quick=True)
    suite(site, "suite-b.json", devices=0)
    assert report.suite_of(folder) is None
    suite(site, "suite-c.json", commit="older")
    suite(site, "suite-d.json", commit="newer", date="2026-02-01T00:00:00+00:00")
    regimes = {name: cells for name, cells in made_up()["regimes"].items() if name != "mixed"}
    suite(site, "suite-e.json", commit="cut", date="2026-03-01T00:00:00+00:00", regimes=regimes)
    newest = report.suite_of(folder)
    assert newest is not None
    assert newest["commit"] == "newer"


def test_tables_name_pystage_and_the_baseline() -> None:
    result = made_up() | {"targets": []}
    cell = result["regimes"]["host"]["1 x 8192 array"]
    for regime in ("history", "threads"):
        result["regimes"][regime] = {"1 threads": cell}
    texts = pages.sections(result)
    heads = {
        name: [cell.strip() for cell in text.splitlines()[0].split("|")]
        for name, text in texts.items()
    }
    assert {"pystage", "baseline: best peer"} <= set(heads["suite-host"])
    for name in ("suite-history", "suite-threads"):
        assert {"pystage", "baseline: SGLang"} <= set(heads[name]), name
    assert "baseline: host time" in heads["suite-mixed"]
    assert pages._label("1 processes, 8 x 1024 array") == "1 process, 8 x 1,024 array"
    assert pages._measure("  its p99 of its p50") == "&nbsp;&nbsp;its p99 / its p50"
    assert pages._measure("SGLang over ours") == "SGLang / pystage's"


def test_plots_draw_what_was_measured() -> None:
    """Zero, and below, where that came out; and each contender of the drift."""
    plt = pytest.importorskip("matplotlib.pyplot")

    regimes = made_up()["regimes"]
    cell = regimes["stream"]["idle, 8192 ids"]["contenders"]
    cell[EAGER] = {"added": summary([-0.02])}
    figure, finding, _ = plots._stream(plt, regimes["stream"])
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert set(lines) == {name for name, row in cell.items() if "added" in row}
    assert -0.02 in lines[EAGER].get_ydata() and figure.axes[0].get_yscale() == "symlog"
    assert "us" in figure.axes[0].get_ylabel()

    held = {"pinned_bytes_over_batches": [[0, 0], [200, 1 << 20]]}
    drift = {f"trace, {n}": {"contenders": {n: held}} for n in (DEFERRED, TORCH, UVA)}
    figure, finding, _ = plots._drift(plt, drift)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [DEFERRED, TORCH, UVA] and "1.0 MiB" in finding
    plt.close("all")


def test_plots_are_as_wide_as_a_page_and_their_text_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_of = pytest.importorskip("matplotlib.text").Text

    drawn: dict[str, Any] = {}
    written = svg.save
    monkeypatch.setattr(
        svg, "save", lambda f, path: (drawn.update({path.stem: f}), written(f, path))
    )
    plots.draw(made_up(), tmp_path / "suite.json")
    figures.draw_pipeline(figures.load(ROOT / figures.PIPELINE), tmp_path / "pp-profile.svg")
    assert {"suite-host", "suite-stream", "pp-profile"} <= set(drawn)
    for name, figure in drawn.items():
        assert figure.get_size_inches()[0] == 9, name
        assert min(text.get_fontsize() for text in figure.findobj(text_of)) >= 9, name
        assert "GPU" in figure.get_supxlabel() or "NVIDIA" in figure.get_supxlabel(), name
        assert 'style="fill: #ffffff"' in (tmp_path / f"{name}.svg").read_text(), name


def test_marks_and_figures_fit(site: Path) -> None:
    known = set(pages.sections(None))
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert known <= {match[2] for match in report.MARK.finditer(text)}
    readme = site / "README.md"
    readme.write_text(readme.read_text() + "<!-- figures: unknown -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="'unknown'"):
        check(site)


def test_a_page_can_be_made_of_a_run_with_holes() -> None:
    result = made_up()
    result["targets"] = targets(result)
    for name in list(result["regimes"]):
        part = copy.deepcopy(result)
        del part["regimes"][name]
        assert all(isinstance(text, str) for text in pages.sections(part).values())
    empty = result | {"regimes": {name: {"a": {"error": "x"}} for name in REGIMES}}
    assert all(isinstance(text, str) for text in pages.sections(empty).values())


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_new_stream_is_never_the_current_one() -> None:
    device = Cuda(torch.device("cuda", 0))
    with device.on(device.new_stream()):
        current = torch.cuda.current_stream()
        assert all(device.new_stream() != current for _ in range(100))  # torch has 32


@pytest.mark.gpu
def test_ways_to_copy_do_copy() -> None:
    device = Cuda(torch.device("cuda", 0))
    with device.on(device.new_stream()):
        pinned = device.pinned(10_000)
        pinned.copy_(torch.arange(10_000))
        want = pinned.tolist()
        size = 8 * pinned.numel()
        source = pinned.clone()
        for way in ("memcpy", "stream", "during", "kernel", "view"):
            out = torch.zeros(10_000, dtype=torch.int64, device="cuda")
            to = out.data_ptr()
            if way == "memcpy":
                device.memcpy(to, pinned.data_ptr(), size)
            elif way == "stream":
                device.batch([to], [pinned.data_ptr()], [size], IN_STREAM_ORDER)()
            elif way == "during":
                halves = [source.data_ptr(), source.data_ptr() + size // 2]
                device.batch([to, to + size // 2], halves, [size // 2] * 2, DURING_CALL)()
            elif way == "kernel":
                pytest.importorskip("triton")
                device.move(out, pinned)
            else:
                out = torch.clone(device.view(pinned))
            device.synchronize()
            assert out.tolist() == want, way
        back = device.pinned(10_000)
        back.zero_()
        device.move(back, torch.tensor(want, device="cuda"))
        device.synchronize()
        assert back.tolist() == want
        held, allocations = device.pinned_bytes()
        assert held >= 2 * size
        assert allocations >= 2
        counts = device.kernels(lambda: torch.ones(8, device="cuda"))
        assert counts == {"kernels": 1, "copies": 0}
        begin, end = device.event(True), device.event(True)
        begin.record()
        device.spin(500)
        end.record()
        end.synchronize()
        assert 300 < begin.elapsed_time(end) * 1e3 < 1000


@pytest.mark.gpu
def test_a_short_run_on_a_gpu(tmp_path: Path) -> None:
    few = ("--samples", "3", "--quick", "--regimes", "stream,threads,mixed")
    result = run(tmp_path / "run.json", *few)
    assert result["errors"] == {}
    for name, cell in result["regimes"]["stream"].items():
        assert {DEFERRED, EAGER, READY, EMPTY} <= set(cell["contenders"]), name
    counted = result["regimes"]["mixed"][KERNELS]["contenders"]
    assert counted[FUSED] == {"kernels": 1, "copies": 0}
    assert counted[PLAIN_MIXED]["copies"] >= 1
    assert any(row["met"] is not None for row in result["targets"])
