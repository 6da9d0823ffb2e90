"""Complete runs of the real SGLang on a CPU: the engine benchmark, two stages, equal logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.engine import __main__ as command
from bench.engine import experiment, tables, worker
from bench.engine.plans import PLANS, Traffic, Workload

pytestmark = pytest.mark.sglang


def test_the_real_engine_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sglang.srt")
    tiny = PLANS["tiny"]
    # No answer comes so soon: what is told when a request starves, with nothing that does.
    starving = Workload("prompt", 400, 2, 2, Traffic(4, 1), patience_s=0.0005)
    plan = replace(tiny, workloads=(*tiny.workloads, starving))
    monkeypatch.setitem(PLANS, "tiny", plan)
    out = tmp_path / "engine.json"
    code = command.main(["--plan", "tiny", "--out", str(out), "--disclose", "a test"])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    told = result["plans"]["tiny"]
    assert code == 0, printed
    assert told["cut"] == [] and result["disclosed"] == ["a test"]
    assert told["logprobs"]["equal"] and told["logprobs"]["ids"] == 1400
    assert told["sizing"] == {}  # no sizer, no budget
    engines = told["engines"]
    assert "staging" in engines["on"]["pystage"]["active"]
    assert engines["on"]["versions"]["sglang"] == "0.5.23"
    rows = {row["workload"]: row for row in told["rows"]}
    assert list(rows) == [w.name for w in plan.workloads]
    for row in told["rows"]:
        assert row["different_outputs"] == 0
    for workload in tiny.workloads:
        row = rows[workload.name]
        for variant in tables.VARIANTS:
            assert row[variant]["answered"] == workload.blocks * workload.count
            assert row[variant]["starved"] == 0
        # The pool was used where it is said to be, and only there.
        assert row["on"]["staged_batches"] > 0 and row["bypassed"]["staged_batches"] == 0
    assert rows["chat-40"]["on"]["cached"] >= plan.history - plan.engine["page_size"]
    assert rows["prompt-300"]["on"]["cached"] == 0
    assert rows["prompt-300+copies"]["traffic_gb_per_s"] > 0
    assert rows["open-8/s"]["on"]["output_tokens_per_s"] > 0
    assert rows["open-8/s"]["on"]["itl_ms"]["samples"] > 0
    for side in ("off", "on"):
        trace = told["traces"]["prompt-300"][side]
        assert trace["batches"] >= 2 and trace["device_end_ms"] > trace["device_prepared_ms"] > 0
    starved = rows["prompt-400+copies"]
    for variant in tables.VARIANTS:
        assert starved[variant]["starved"] == 1 and starved[variant]["answered"] == 0
        assert starved[variant]["given_up_after_s"] == 0.0005


# In each scheduler: all forwards run, but the times are those of a law, since a busy machine may
# not give a usable model. In service they are three times as long, so that a correction is due,
# and there is no pause between corrections.
SLOWER = """
from pystage.integrations.sglang import correction, pp
from pystage.pp import Correction, Timing, profile

def law(history_len, chunk_len):
    return 4.0 + 0.01 * chunk_len + 4e-6 * (2 * history_len + chunk_len) * chunk_len

def plugin():
    correction._LEAST_S = 0.0
    observe, step, points = Correction.observe_ms, pp.PrefillStep.__call__, []
    Correction.observe_ms = lambda self, pieces, ms: observe(self, pieces, 3.0 * law(*pieces[0]))

    def noted(self, *point):
        points.append(point)
        step(self, *point)

    def timer(run):
        run()
        return Timing(law(*points[-1]), law(*points[-1]))

    pp.PrefillStep.__call__ = noted
    profile.host_timer = timer
"""


def prompt(number: int, length: int) -> list[int]:
    return [(number + i) % 500 for i in range(length)]


def test_two_stages_profile_and_are_corrected_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real engine with two pipeline stages on a CPU: one process each, and the real stream of
    requests between them."""
    pytest.importorskip("sglang.srt")
    pytest.importorskip("scipy")
    plan = replace(
        PLANS["tiny"],
        engine={**PLANS["tiny"].engine, "pp_size": 2, "enable_dynamic_chunking": True},
        environment={
            "PYSTAGE_SGLANG_CPU": "1",
            "PYSTAGE_SGLANG_SIZER": "1",
            "PYSTAGE_SGLANG_BUDGET_MS": "5000",
            "PYSTAGE_SGLANG_CORRECT": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "0|0",
        },
    )
    experiment.prepare(tmp_path, plan)
    (tmp_path / "site/slower.py").write_text(SLOWER)
    entry_points = next((tmp_path / "site").glob("*.dist-info")) / "entry_points.txt"
    entry_points.write_text(entry_points.read_text() + "slower = slower:plugin\n")
    monkeypatch.setenv("PYSTAGE_ENGINE_CONTROL", str(tmp_path / "on.control"))
    side = experiment.Side("on", plan, tmp_path, tmp_path, time.monotonic() + 500)
    try:
        side.connect(*experiment._free_ports(1))
        side.receive(300)
        first = [worker._ask(rank, "stats")["pystage"] for rank in range(2)]
        assert first[0]["sizing"]["plans"] and first[0]["sizing"]["budget_ms"] == 5000
        assert first[0]["sizing"]["queue"] and first[0]["sizing"] == first[1]["sizing"]
        many = [prompt(i, 300 + 250 * i) for i in range(8)]  # they wait behind each other
        answer = side.ask("open", prompts=many, at=[0.0] * 8, tokens=1, patience=120.0)
        assert len(answer["samples"]) == 8 and all(sample["out"] for sample in answer["samples"])
        prompts = iter(range(1000))
        for _ in range(120):  # a refit takes as long as this machine lets it
            groups = [[prompt(next(prompts), 300 + 8 * i)] for i in range(8)]
            side.ask("closed", groups=groups, gap=0.0, patience=60.0)
            told = [worker._ask(rank, "stats")["pystage"]["sizing"] for rank in range(2)]
            if told[0]["corrections"]:
                break
        assert told[0]["corrections"] >= 1, side.tail()
        answer = side.ask("closed", groups=[[prompt(7, 1200)]], gap=0.0, patience=60.0)
        assert answer["samples"][0]["out"]
        # All ranks had the message before the batch that this prompt is in.
        for _ in range(100):  # another correction may be on its way
            told = [worker._ask(rank, "stats")["pystage"]["sizing"] for rank in range(2)]
            if told[0] == told[1]:
                break
        assert told[0] == told[1] and told[0]["budget_ms"] == 5000
        assert told[0]["coefficients"] != first[0]["sizing"]["coefficients"]
        assert {"sizer", "budget", "correction"} <= set(first[1]["active"])
        assert first[0]["broken"] == first[1]["broken"] == []
    finally:
        side.close(gently=True)


def test_logits_are_equal_with_and_without(tmp_path: Path) -> None:
    pytest.importorskip("sglang.srt")
    out, root = tmp_path / "logits.json", Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "bench.in_sglang.logits", "--device", "cpu", "--batches", "12"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "--out", str(out)],
        check=False,
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    logits = result["logits"]
    assert logits["batches"] == 12 and logits["tokens"] == 12 * 512
    assert set(logits["different"].values()) == {0}
    some = [kind for kind in ("logit bias", "penalties", "logprobs") if logits["requests"][kind]]
    assert some and result["plugin"]["active"]
