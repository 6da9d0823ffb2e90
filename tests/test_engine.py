"""The engine benchmark: its copies and its figures."""

from __future__ import annotations

import ctypes
import json
import random
import socket
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bench.compiled import compiled
from bench.copies import CALLS, Copies, loop_of
from bench.engine import experiment, page, plans, tables, worker
from bench.engine.plans import BURSTS, PLANS, STREAM, Traffic, Workload

# --- the copies beside ---------------------------------------------------------------------------

SIZE = 4096


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loop_of(compiled("copies.c", tmp_path_factory.mktemp("copies")))


class Runtime:
    """CUDA's calls as copies.c sees them: noted, and stopped after some copies."""

    def __init__(self, stop: ctypes.c_int, copies: int, fails: str = "") -> None:
        self.calls: list[str] = []
        self.queued = self.most = 0
        self._stop, self._left, self._fails = stop, copies, fails
        kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 5)
        self._keep = [kind(self._call(name)) for name in CALLS]
        pointers = [ctypes.cast(f, ctypes.c_void_p).value for f in self._keep]
        self.table = (ctypes.c_void_p * len(pointers))(*pointers)

    def _call(self, name: str) -> Any:
        def call(*_: Any) -> int:
            self.calls.append(name)
            if name == "cudaMemcpyAsync":
                self.queued += 1
                self.most = max(self.most, self.queued)
                self._left -= 1
                self._stop.value = self._left <= 0
            elif name == "cudaEventSynchronize":
                self.queued -= 1
            elif name == "cudaStreamSynchronize":
                self.queued = 0
            return 700 if name == self._fails else 0

        return call


def copied(
    loop: Any, runtime: Runtime, stop: ctypes.c_int, depth: int, pause: int
) -> tuple[int, int]:
    source, target = (ctypes.create_string_buffer(SIZE) for _ in range(2))
    count = ctypes.c_uint64(0)
    code = loop(
        runtime.table, 0, target, source, SIZE, depth, pause, ctypes.byref(stop),
        ctypes.byref(count),
    )  # fmt: skip
    return code, count.value


def test_so_many_copies_stay_queued(loop: Any) -> None:
    stop = ctypes.c_int(0)
    runtime = Runtime(stop, copies=20)
    assert copied(loop, runtime, stop, depth=3, pause=0) == (0, 20)
    assert runtime.most == 3
    assert runtime.calls.count("cudaMemcpyAsync") == 20
    assert runtime.calls.count("cudaStreamSynchronize") == 1  # without a pause only at the end
    assert runtime.calls.count("cudaEventCreateWithFlags") == 3
    assert runtime.calls[-4:] == ["cudaEventDestroy"] * 3 + ["cudaStreamDestroy"]


def test_bursts_end_before_the_next(loop: Any) -> None:
    stop = ctypes.c_int(0)
    runtime = Runtime(stop, copies=12)
    assert copied(loop, runtime, stop, depth=4, pause=1) == (0, 12)
    copies = [c for c in runtime.calls if c in ("cudaMemcpyAsync", "cudaStreamSynchronize")]
    assert copies == ([*["cudaMemcpyAsync"] * 4, "cudaStreamSynchronize"]) * 3


@pytest.mark.parametrize("name", [c for c in CALLS if "Synchronize" not in c and "Event" not in c])
def test_an_error_of_the_runtime_ends_the_copies(loop: Any, name: str) -> None:
    stop = ctypes.c_int(0)
    assert copied(loop, Runtime(stop, 5, fails=name), stop, depth=2, pause=0)[0] == 700
    assert copied(loop, Runtime(stop, 5), stop, depth=65, pause=0)[0] == -1


def test_on_the_host_they_are_copies_too(loop: Any) -> None:
    source, target = (ctypes.create_string_buffer(text, SIZE) for text in (b"\7" * SIZE, b""))
    stop, count = ctypes.c_int(0), ctypes.c_uint64(0)
    given = None, -1, target, source, SIZE, 2, 0, ctypes.byref(stop), ctypes.byref(count)
    thread = Thread(target=loop, args=given)
    thread.start()
    while count.value < 3:
        time.sleep(0)
    stop.value = 1
    thread.join()
    assert target.raw == source.raw


def test_copies_start_and_stop(tmp_path: Path) -> None:
    copies = Copies(-1, compiled("copies.c", tmp_path))
    assert copies.stop() is None
    for _ in range(2):
        copies.start(0.5, 2)
        with pytest.raises(RuntimeError, match="running already"):
            copies.start(0.5, 2)
        copies.wait_for(2)
        rate = copies.stop()
        assert rate is not None and rate > 0
        assert copies.count >= 2
    copies.start(0.5, 65)  # more than the loop can
    copies.wait_for(1)  # it has ended with an error, which is not waited for
    with pytest.raises(RuntimeError, match="copies beside: error -1"):
        copies.stop()


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="install one, or set CC"):
        compiled("copies.c", tmp_path)


# --- figures -------------------------------------------------------------------------------------


def sample(ms: float, out: int = 1, **more: Any) -> dict[str, Any]:
    return {"ttft_ms": ms, "itl_ms": [], "out": [out], "cached": 0, **more}


def samples(off: list[Any], bypassed: list[Any], on: list[Any], count: int = 1) -> dict[str, Any]:
    """In blocks of ``count``."""
    found = {
        name: [told[i : i + count] for i in range(0, len(told), count)]
        for name, told in (("off", off), ("bypassed", bypassed), ("on", on))
    }
    return {**found, "seconds": {v: [1.0] for v in found}, "stages": {"on": len(on)}}


def times(*ms: float) -> list[dict[str, Any]]:
    return [sample(x) for x in ms]


def test_a_row_has_quantiles_gains_and_intervals() -> None:
    dice = random.Random(1)
    off = [100 + dice.random() for _ in range(200)]
    found = samples(times(*off), times(*off), times(*[ms - 2 for ms in off]))
    row = tables.row_of("prompt-8", found)
    assert row["off"]["ttft_ms"]["p50"] == pytest.approx(100.5, abs=0.2)
    low, high = row["off"]["ttft_ms"]["p50_interval"]
    assert 100.3 < low < row["off"]["ttft_ms"]["p50"] < high < 100.7
    assert row["sooner_than_off_ms"] == 2.0 and row["sooner_than_off_interval"] == [2.0, 2.0]
    low, high = row["sooner_than_bypassed_interval"]
    assert low == high == 2.0  # of the same blocks
    assert row["compared"] == 200 and row["different_outputs"] == 0
    assert row["on"]["staged_batches"] == 200


def test_an_interval_knows_that_a_block_has_one_pace() -> None:
    dice = random.Random(4)
    paces = [dice.choice((30.0, 44.0)) for _ in range(24)]
    ms = [pace + dice.random() for pace in paces for _ in range(8)]
    blocks = [ms[i : i + 8] for i in range(0, len(ms), 8)]

    def width(blocks: Any) -> float:
        low, high = tables.interval(lambda x: x.mean(axis=1), blocks)
        return high - low

    assert width(blocks) > 2 * width([[x] for x in ms])
    # The same blocks are drawn for both: what they share is no difference.
    other = [[x + 1 for x in block] for block in blocks]
    low, high = tables.interval(lambda x, y: (y - x).mean(axis=1), blocks, other)
    assert low == pytest.approx(1.0) and high == pytest.approx(1.0)
    # One that ended early, within a block, has fewer.
    cut = [*other[:5], other[5][:3]]
    low, high = tables.interval(lambda x, y: x.mean(axis=1) - y.mean(axis=1), blocks, cut)
    assert low < high


def test_a_starved_request_is_told_and_is_no_sample() -> None:
    late = sample(61_000.0, starved_s=20.0, freed_after_s=61.0)
    row = tables.row_of("prompt-8+stream", samples([*times(5.0), late], [late], times(5.0, 6.0)))
    assert row["off"]["blocks_ms"] == [[5.0]]
    assert row["off"]["answered"] == 1 and row["off"]["starved"] == 1
    assert row["off"]["given_up_after_s"] == 20.0 and row["off"]["ttft_ms"]["max"] == 5.0
    assert row["bypassed"]["ttft_ms"] is None
    assert "1 without an answer in 20 s" in tables.line(row)
    told = {t["measure"]: t for t in tables.targets([row], {})}
    assert told["requests starved with pystage"]["ok"] is True
    turned = tables.row_of("prompt-8+stream", samples(times(5.0), [], [late]))
    told = {t["measure"]: t for t in tables.targets([turned], {})}
    assert told["requests starved with pystage"]["ok"] is False


def test_other_outputs_are_counted_where_batches_are_the_same() -> None:
    found = samples([sample(1.0, 7), sample(1.0, 8)], times(1.0), [sample(1.0, 7), sample(1.0, 9)])
    assert tables.row_of("prompt-8", found)["different_outputs"] == 1
    assert tables.row_of("open-2/s", found)["compared"] == 0
    other_chunks = tables.row_of("prompt-8", found, same_chunks=False)
    assert other_chunks["compared"] == other_chunks["different_outputs"] == 0
    assert other_chunks["sooner_than_off_ms"] is not None


def test_targets_name_the_worst_workload_and_know_noise() -> None:
    dice = random.Random(2)

    def around(ms: float, spread: float) -> list[dict[str, Any]]:
        return times(*[ms + spread * dice.random() for _ in range(60)])

    rows = [
        tables.row_of("prompt-1", samples(around(10, 5), around(10, 5), around(10.3, 5))),
        tables.row_of("prompt-2", samples(around(10, 0.1), around(10, 0.1), around(11, 0.1))),
        tables.row_of("prompt-2+stream", samples([], [], around(15, 0.1))),
    ]
    told = {t["measure"]: t for t in tables.targets(rows, {})}
    worst = told["TTFT p50, with / off"]
    assert worst["where"] == "prompt-2" and worst["value"] == pytest.approx(1.1, abs=0.01)
    assert worst["ok"] is False and worst["undecided"] is False
    beside = told["TTFT p99 with pystage, copies / none"]
    assert beside["value"] == pytest.approx(15 / 11, abs=0.02) and beside["ok"] is False
    noisy = {t["measure"]: t for t in tables.targets(rows[:1], {})}["TTFT p99, with / off"]
    assert noisy["ok"] or noisy["undecided"]
    assert all(t["ok"] is None for t in tables.targets([], {}))


def test_a_trace_counts_the_batches_whose_ids_waited() -> None:
    batches = [
        {"device_resolve_ms": 1.0, "device_ids_ms": 1.0 + ids, "device_end_ms": 9.0 + ids}
        for ids in (0.01, 0.02, 40.0)
    ]
    row = tables.trace_row(batches)
    assert row is not None and row["gated"] == 1 and row["ids_ms"] == 0.02
    assert row["longest_forward_ms"] is None
    row = tables.trace_row([{**batch, "device_forward_ms": 2.0} for batch in batches])
    assert row is not None and row["longest_forward_ms"] == 47.0
    assert tables.trace_row([]) is None
    told = tables.targets([], {"w": {"on": row, "off": None}})
    assert {t["measure"]: t for t in told}["traced batches whose ids waited, with pystage"][
        "value"
    ] == 1


def test_arrivals_are_poisson() -> None:
    at = plans.poisson(4.0, 4000, random.Random(3))
    assert at[0] == 0.0 and at == sorted(at)
    assert at[-1] / len(at) == pytest.approx(0.25, rel=0.1)


# --- the page ------------------------------------------------------------------------------------


def made_up_run(plan: str = "copies", **changes: Any) -> dict[str, Any]:
    late = sample(61_000.0, starved_s=20.0, freed_after_s=61.0)
    rows = [
        tables.row_of("prompt-4096", samples(times(119, 120), times(118, 121), times(117, 119))),
        tables.row_of("prompt-4096+stream", samples([late], [late], times(119, 121))),
        tables.row_of("loadback-256", samples(times(50), [], times(49))),
    ]
    found = {"about": "an 8B model", "rows": rows, "cut": ["the run's time was over"]}
    made = {"devices": 1, "date": "2026-01-01T00:00:00+00:00", "device": "GPU", "cores": 2}
    made |= {"cpu": "CPU", "driver": "1", "torch": "2", "commit": "a" * 40}
    made |= {"command": "python x --disclose that", "disclosed": ["that"]}
    made |= {"plans": {plan: {**found, "traces": {}}}}
    return json.loads(json.dumps({**made, **changes}))


def written(folder: Path, *runs: tuple[str, str, str, int]) -> dict[str, page.Run]:
    """What the pages take of runs: name, plan, month, number of GPUs."""
    for name, plan, month, devices in runs:
        run = made_up_run(plan, date=f"2026-{month}-01T00:00:00+00:00", devices=devices)
        (folder / f"engine{name}.json").write_text(json.dumps(run))
    return page.newest_runs(folder)


def test_the_page_has_the_newest_run_of_each_plan_on_a_gpu(tmp_path: Path) -> None:
    assert page.newest_runs(tmp_path) == {}
    assert page.table({}) == page.first_table({}) == "Not measured yet."
    runs = written(
        tmp_path,
        ("", "copies", "01", 1),
        ("-b", "copies", "02", 1),
        ("-cpu", "copies", "03", 0),
        ("-c", "kernel", "01", 1),
        ("-d", "no longer a plan", "04", 1),
    )
    assert {name: run.file for name, run in runs.items()} == {
        "copies": "engine-b.json",
        "kernel": "engine-c.json",
    }
    text = page.table(runs)
    assert "a prompt of 4,096 ids, while copies are always queued" in text
    assert "no answer in 20 s" in text and "not run" in text
    assert "This run is not complete: the run's time was over." in text
    assert text.count("What differs from a usual installation: that.") == 1 and "`python x`" in text
    assert "1.50 (1.00 to 2.00)" in text  # of pairs 119 - 117 and 120 - 119
    assert "| 118.0 / - |" in text and "118.0 / 1" not in text  # two samples have no p99
    assert "| 1 / 1 / 2 |" in text  # requests
    first = page.first_table(runs)
    assert (
        "a prompt of 4,096 ids, while copies are always queued" in first
        and "loaded back" not in first
    )
    assert "no answer in 20 s" in first and "engine-b.json" in first


def test_a_plan_that_changes_the_chunks_is_shown_and_not_judged(tmp_path: Path) -> None:
    slow = made_up_run("budget", date="2026-02-01T00:00:00+00:00")
    found = slow["plans"]["budget"]
    gaps = [sample(50.0, itl_ms=[5.0, *[6.0] * 30, 90.0])]
    found["rows"] = [
        tables.row_of("prompt-8192", samples(times(100), times(200), times(300)), False),
        tables.row_of("open-3/s", samples(gaps, gaps, gaps), False),
    ]
    sides = {"off": {"longest_forward_ms": 310.0}, "on": {"longest_forward_ms": 79.5}}
    found["traces"] = {"prompt-8192": sides}
    found["sizing"] = {"corrections": 4}
    (tmp_path / "engine-budget.json").write_text(json.dumps(slow))
    text = page.table(written(tmp_path, ("", "copies", "01", 1)))
    assert "a prompt of 8,192 ids" in text and "3.000 x" not in text
    assert "Not judged, because the chunks are not SGLang's: `budget`." in text
    assert "6.0 / 64.0 / 90.0" in text
    assert "The latency model was corrected 4 times during the run." in text
    assert (
        "Longest forward of a prompt of 8,192 ids: 310.0 ms in the baseline, 79.5 ms with pystage."
        in text
    )
    slow["plans"]["copies"] = {**found, "rows": found["rows"][:1], "traces": {}}
    (tmp_path / "engine-budget.json").write_text(json.dumps(slow))
    text = page.table(page.newest_runs(tmp_path))  # the same rows of a plan that is judged
    assert "3.000 x" in text


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_workload_has_a_name_for_people(plan: Any) -> None:
    labels = [page.label(w.name) for w in plan.workloads]
    assert all(labels) and len(set(labels)) == len(labels)


def test_the_plot_says_who_starved(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = written(tmp_path, ("", "copies", "01", 1))
    page.draw(runs["copies"], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert (
        "no answer in 20 s" in text and text.count("4,096 ids") == 3
    )  # the title's and each panel's


def test_the_plots_title_says_no_more_than_was_measured() -> None:
    rows = {row["workload"]: row for row in made_up_run()["plans"]["copies"]["rows"]}
    text = "While copies are queued, SGLang does not start prompts of 4,096 ids"
    assert (
        page.finding(rows, [4096])
        == f"{text}; with pystage every prompt takes as long as without copies"
    )
    rows["prompt-4096+stream"]["on"]["ttft_ms"]["p50"] = 130.0
    assert page.finding(rows, [4096]) == text
    rows["prompt-4096+stream"]["off"]["starved"] = 0
    assert page.finding(rows, [4096]) == "Time to first token in SGLang, with and without pystage"


# --- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_prompts_fit_into_the_engine(plan: Any) -> None:
    longest = plan.engine["context_length"]
    for workload in plan.workloads:
        behind = 0 if workload.kind in ("prompt", "open") else plan.history
        assert behind + workload.new + workload.tokens < longest
        assert workload.new < plan.engine["max_total_tokens"]
    if plan.engine.get("enable_hierarchical_cache"):  # else nothing has to be loaded back
        assert plan.history * plan.conversations > plan.engine["max_total_tokens"]
    # Whoever may starve stands last: its copies change what comes after.
    busy = [w.traffic not in (None, BURSTS) for w in plan.workloads]
    assert busy == sorted(busy)
    names = [w.name for w in plan.workloads]
    assert len(set(names)) == len(names)


def test_names_say_what_runs_beside() -> None:
    assert Workload("prompt", 4096, traffic=STREAM).name == "prompt-4096+stream"
    assert Workload("open", rate=2.5).name == "open-2.5/s"
    assert Workload("chat", 200, traffic=Traffic(1, 1)).name == "chat-200+copies"


def test_each_rank_is_asked_for_what_concerns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []

    def serve(rank: int, server: socket.socket) -> None:
        with server:
            while True:
                connection, _ = server.accept()
                with connection, connection.makefile("rw") as file:
                    op = json.loads(file.readline())["op"]
                    asked.append((rank, op))
                    if op == "end":
                        return
                    answer = {"error": "no"} if op == "bad" else {"stages": 10 + rank, "rank": rank}
                    file.write(json.dumps(answer) + "\n")

    monkeypatch.setenv("PYSTAGE_ENGINE_CONTROL", str(tmp_path / "on.control"))
    threads = []
    for rank in range(3):
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(str(tmp_path / f"on.control.{rank}"))
        server.listen()
        threads.append(Thread(target=serve, args=(rank, server)))
        threads[-1].start()
    try:
        assert worker.control("bypass", ranks=3, on=True) == {"stages": 33}
        assert worker.control("traffic", ranks=3, on=False)["rank"] == 0
        assert asked == [(0, "bypass"), (1, "bypass"), (2, "bypass"), (0, "traffic")]
        with pytest.raises(RuntimeError, match="in the scheduler of rank 0: no"):
            worker.control("bad")
    finally:
        for rank, thread in enumerate(threads):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
                link.connect(str(tmp_path / f"on.control.{rank}"))
                link.sendall(b'{"op": "end"}\n')
            thread.join()


def test_without_sglang_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"make sglang-env"):
        experiment.other_models()
