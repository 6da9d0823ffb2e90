"""The study of simulated models: its surfaces, its optimum, and its results for the planners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.pp import parts
from bench.pp import surfaces as study
from bench.pp.truth import (
    FAMILIES,
    HARSH,
    NOISES,
    PAGE,
    Engine,
    chunk_times,
    least_ms_within,
    makespan,
    optimum,
)
from bench.suite.peers import Sources
from pystage.pp import ChunkSizer, Sample
from pystage.pp.makespan import fixed_chunks

ROOT = Path(__file__).resolve().parent.parent
SMALL = parts.Item("MLA 671B, TP 8", 4, "3 %", (16_384,))


# --- the truth ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_no_surface_falls_with_chunk_or_history(family: str) -> None:
    surface = FAMILIES[family].stage(4)
    history = np.arange(0, 131_072, 4096)[:, None]
    chunk = np.arange(64, 16_385, 64)[None, :]
    ms = surface(history, chunk)
    assert ms.shape == (32, 256)
    assert (np.diff(ms, axis=1) >= -1e-9).all()
    assert (np.diff(ms, axis=0) >= -1e-9).all()


def test_surfaces_are_what_their_names_say() -> None:
    def ms(family: str, history: int, chunk: int) -> float:
        return float(FAMILIES[family].stage(4)(history, chunk))

    assert ms("linear attention", 0, 2048) == ms("linear attention", 1 << 20, 2048)
    assert ms("launch-bound 0.5B", 0, 64) == ms("launch-bound 0.5B", 0, 1024)
    assert ms("padded graphs 8B", 0, 4160) == ms("padded graphs 8B", 0, 5120)
    assert ms("padded graphs 8B", 0, 5120) < ms("padded graphs 8B", 0, 5184)
    assert ms("attention waves 8B", 65_536, 1056) < 0.75 * ms("attention waves 8B", 65_536, 1088)
    # Attention to 64 tokens more costs next to nothing; keys and values of 65,536 made again do.
    assert ms("MLA 671B, TP 8", 65_536, 64) > 2 * ms("MLA 671B, TP 8", 0, 64)
    assert ms("dense 70B, TP 4", 0, 8192) > 2 * ms("dense 8B", 0, 8192)
    assert ms("fp8 8B", 0, 8192) < 0.7 * ms("dense 8B", 0, 8192)
    whole = [ms("sliding window", history, 2048) for history in (4096, 8192, 12_288)]
    assert whole[2] - whole[1] == pytest.approx(whole[1] - whole[0])  # the sixth layers, no more


@pytest.mark.parametrize("noise", NOISES | HARSH)
def test_the_same_seed_gives_the_same_timings(noise: str) -> None:
    def timings(seed: int) -> list[float]:
        engine = Engine(FAMILIES["dense 8B"].stage(2), noise, seed)
        return [engine.timer(lambda: engine.step(0, 8192)).latency_ms for _ in range(60)]

    assert timings(1) == timings(1)
    assert timings(1) != timings(2)
    truth = float(FAMILIES["dense 8B"].stage(2)(0, 8192))
    assert np.median(timings(1)) == pytest.approx(truth, rel=0.15)


def test_outliers_come_where_they_are_meant_to() -> None:
    def ratios(noise: str) -> np.ndarray:
        engine = Engine(lambda history, chunk: np.float64(1.0), noise, 3)
        return np.array([engine.ms(0, 64) for _ in range(400)])

    slow = ratios("slow start")
    assert (slow[:2] > 5).all()
    assert slow[3:].max() < 1.2
    assert 0.02 < (ratios("spikes") > 1.3).mean() < 0.12
    assert 0.2 < (ratios("bimodal") > 1.06).mean() < 0.4
    drift = ratios("drift")
    assert np.mean(drift[100:]) > np.mean(drift[:10]) + 0.015


# --- the optimum ----------------------------------------------------------------------------------


def covers(pages: int, largest: int) -> Iterator[list[int]]:
    if pages == 0:
        yield []
    for first in range(1, min(pages, largest) + 1):
        for rest in covers(pages - first, largest):
            yield [first * PAGE, *rest]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 3, 16])
def test_the_optimum_is_that_of_all_plans(family: str, ranks: int) -> None:
    surface = FAMILIES[family].stage(ranks)
    best = min(makespan(surface, plan, ranks) for plan in covers(9, 7))
    plan, bound = optimum(surface, 9 * PAGE, ranks, largest=7 * PAGE)
    assert sum(plan) == 9 * PAGE
    assert bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= makespan(surface, plan, ranks) <= best * 1.001


@pytest.mark.parametrize("family", ["attention waves 8B", "padded graphs 8B", "MoE 30B"])
def test_the_best_plan_within_a_cap_is_that_of_all_plans(family: str) -> None:
    surface = FAMILIES[family].stage(4)
    times = [chunk_times(surface, plan) for plan in covers(9, 4)]
    for cap in np.unique([ms.max() for ms in times]):
        best = min(ms.sum() for ms in times if ms.max() <= cap)
        assert least_ms_within(surface, 9 * PAGE, cap, 4 * PAGE) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_plan_beats_the_bound(data: st.DataObject) -> None:
    family, ranks = data.draw(st.sampled_from([*FAMILIES])), data.draw(st.sampled_from([2, 8]))
    surface, prompt = FAMILIES[family].stage(ranks), 16_384
    plan, left = [], prompt // PAGE
    while left:
        plan.append(data.draw(st.integers(1, left)))
        left -= plan[-1]
    found, bound = optimum(surface, prompt, ranks)
    assert bound <= makespan(surface, found, ranks) <= 1.0011 * bound
    assert makespan(surface, [pages * PAGE for pages in plan], ranks) >= bound * (1 - 1e-9)


def test_a_prompt_that_is_not_whole_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_len=1000 must be a multiple of 64"):
        optimum(FAMILIES["dense 8B"].stage(2), 1000, 2)


def test_equal_stages_take_all_chunks_and_a_bubble_of_the_slowest() -> None:
    surface, plan = FAMILIES["MoE 30B"].stage(8), [4096, 512, 8192, 64]
    times = surface(np.cumsum(plan) - plan, np.array(plan))
    assert makespan(surface, plan, 8) == pytest.approx(times.sum() + 7 * times.max())


# --- cells ----------------------------------------------------------------------------------------


def test_a_cell_comes_out_the_same_again_and_nothing_beats_its_optimum() -> None:
    first, again = parts.run_cells(SMALL, None), parts.run_cells(SMALL, None)
    for row in (first, again):
        del row["seconds"]
    assert first == again
    assert first["forwards"] <= parts.FORWARDS
    (cell,) = first["cells"]
    assert cell["ms"]["optimum"] == min(cell["ms"].values())
    assert cell["ms"]["optimum"] >= cell["bound_ms"]
    assert set(cell["ms"]) == {f"fixed {n}" for n in parts.FIXED} | {*study.PLANS, "optimum"}
    other = parts.run_cells(parts.Item("MLA 671B, TP 8", 4, "3 %", (16_384,), seed=1), None)
    assert other["errors"] != first["errors"]


def test_a_summary_compares_with_the_best_fixed_size_of_each_cell() -> None:
    def cell(**ms: float) -> dict[str, Any]:
        times = {f"fixed {size}": 200.0 for size in parts.FIXED} | dict.fromkeys(study.PLANS, 100.0)
        return {"ms": times | {"optimum": 90.0} | ms, "bound_ms": 89.0}

    rows = [
        {"family": "a", "error": {"p50": 0.01, "p95": 0.05}, "forwards": 40, "errors": [0.01, 0.2],
         "cells": [cell(**{"fixed 2048": 100.0, "choose": 98.0})]},
        {"family": "b", "error": {"p50": 0.04, "p95": 0.05}, "forwards": 48, "errors": [0.03, 0.04],
         "cells": [cell(**{"fixed 1024": 80.0, "choose": 84.0})]},
    ]  # fmt: skip
    found = study.summarise(rows)
    assert found["by_family"]["a"]["choose"]["vs_tuned_mean"] == -0.02
    assert found["by_family"]["b"]["choose"]["vs_tuned_worst"] == 0.05
    assert found["by_family"]["all"]["choose"]["vs_tuned_mean"] == pytest.approx(0.015)
    assert found["by_family"]["all"]["choose"]["vs_8192_worst"] == -0.51
    assert "sglang" not in found["by_family"]["all"]
    assert found["accuracy"]["profiles_within_both"] == 1
    assert found["accuracy"]["most_forwards"] == 48
    assert found["optimum_gap"] == pytest.approx(90 / 89 - 1, abs=1e-5)
    rows_of = {row["measure"]: row for row in study.targets(found)}
    alone = "first token, `choose`, predictions alone: against"
    assert not rows_of[f"{alone} tuned, worst cell"]["ok"]
    assert rows_of[f"{alone} 8,192, mean"]["ok"]
    for row in rows:
        row |= {"ranks": 4, "noise": "3 %"}
        row["cells"][0]["prompt"] = 32_768
    worst = study.losers(rows, "choose")
    assert worst == ["+5.00 %: b, 4 ranks, 32,768, 3 %", "-2.00 %: a, 4 ranks, 32,768, 3 %"]


def test_targets_of_the_other_parts_follow_their_rows() -> None:
    gate = [{"wrong": "accept"}, *[{"wrong": ""}] * 98, {"wrong": "reject"}]
    budget = [
        {"kind": "dense", "cap_ms": 80.0, "gain": 0.06},
        {"kind": "dense", "cap_ms": 40.0, "gain": -0.5},
        {"kind": "MoE", "cap_ms": 80.0, "gain": 0.2},
        {"kind": "MoE", "cap_ms": 80.0, "gain": None},
    ]
    designs = [{"noisy": True, "ok": True}, {"noisy": True, "ok": False}, {"noisy": False, "ok": 1}]
    blas = {"absent": "SkylakeX: -4"}
    result = {"gate": gate, "budget": budget, "designs": designs, "blas": blas}
    rows = study.targets(result)
    assert [row["value"] for row in rows] == [1.0, 1.0, 6.0, 20.0, 1, 1, None]
    assert [row["ok"] for row in rows] == [True, True, True, False, False, True, False]
    rows = study.targets({"blas": {"sent_differ": 1, "models": 9}})
    assert [(row["value"], row["ok"]) for row in rows] == [(1, False)]


# --- SGLang's predictor ---------------------------------------------------------------------------

STAND_IN = '''
class ChunkSizePredictor:
    """Halves the base chunk behind any history; refuses where short chunks are not quicker."""

    def fit(self, lengths, times):
        assert lengths[0] == 10240 and lengths[1] == 10160 and len(lengths) == 128
        if times[-1] > times[0]:
            raise ValueError("not positive")

    def set_target_latency(self, base):
        self.base = base

    def predict_next_chunk_size(self, history, base, page, context, largest):
        assert self.is_ready and context > history + base + 100
        return base if not history else None if history > 20000 else base // 2
'''


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    path = tmp_path / "sglang/srt/managers/scheduler_components/dynamic_chunk_sizer.py"
    path.parent.mkdir(parents=True)
    path.write_text(STAND_IN)
    return tmp_path


def test_a_predictor_of_another_project_is_fed_by_its_own_sweep(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    made = parts.sglang_class(stand_in)
    surface = FAMILIES["dense 8B"].stage(4)
    plan, refused = parts.sglang_plan(made(), Engine(surface, "1 %", 0), 32_768)
    assert plan == [8192, 4096, 4096, 4096, 8192, 4096]  # None keeps the static size
    assert refused == ""
    falling = Engine(lambda history, chunk: np.float64(20_000.0 - chunk), "1 %", 0)
    assert parts.sglang_plan(made(), falling, 20_000) == ([8192, 8192, 3616], "not positive")


def test_its_real_code_gives_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = [path for path in (Path(p) for p in sys.path) if (path / "sglang/srt").is_dir()]
    if not found:
        pytest.skip("SGLang is not installed")
    engine = Engine(FAMILIES["dense 8B"].stage(4), "1 %", 0)
    plan, refused = parts.sglang_plan(parts.sglang_class(found[0])(), engine, 131_072)
    assert refused == ""
    assert sum(plan) == 131_072
    assert 2048 <= min(plan[:-1]) < max(plan) <= 10_240
    assert Sources(found[0]).version("sglang") != "unknown"


# --- the other parts ------------------------------------------------------------------------------


def test_a_verdict_is_wrong_where_it_costs_more_than_a_percent() -> None:
    assert parts.wrong(accepted=True, gain=0.02) == "accept"
    assert parts.wrong(accepted=True, gain=0.005) == ""
    assert parts.wrong(accepted=True, gain=-0.3) == ""
    assert parts.wrong(accepted=False, gain=-0.02) == "reject"
    assert parts.wrong(accepted=False, gain=-0.005) == ""
    assert parts.wrong(accepted=False, gain=0.3) == ""


def test_a_broken_step_is_profiled_without_history_and_judged_with_it() -> None:
    item = parts.Item("dense 8B", 4, "3 %", (32_768,), broken=True)
    engine = item.engine("profile")
    assert engine.surface(100_000, 2048) == engine.surface(0, 2048)
    whole = parts.Item("dense 8B", 4, "3 %", (32_768,)).engine("profile")
    assert whole.surface(100_000, 2048) > 1.5 * whole.surface(0, 2048)
    row = parts.run_gate(item)
    assert row["error"] > 0.2  # of the true surface, not of the one it saw
    assert row["wrong"] == parts.wrong(accepted=row["accepted"], gain=row["plan_vs_8192"])


def test_a_cap_is_kept_and_compared_with_the_best_size_that_keeps_it() -> None:
    item = parts.Item("dense 8B", 2, "1 %", (32_768,))
    rows = parts.run_budget(item)
    assert [row["cap_ms"] for row in rows] == [40.0, 80.0]
    for row in rows:
        surface = FAMILIES["dense 8B"].stage(2)
        assert chunk_times(surface, fixed_chunks(row["fixed"], 32_768)).max() <= row["cap_ms"]
        assert row["slowest_ms"] <= 1.1 * row["cap_ms"]
        assert 0 < row["gain"] <= row["optimum_gain"] + 0.01  # a chunk may be over the cap
        assert row["tokens_per_s"] > row["fixed_tokens_per_s"]


def test_designs_are_drawn_anew_and_judged_by_the_target() -> None:
    rows = [parts.run_design(number, noisy=True) for number in range(3)]
    assert rows == [parts.run_design(number, noisy=True) for number in range(3)]
    assert len({row["target_error"] for row in rows}) > 1
    for row in rows:
        assert row["ok"] == (abs(row["target_error"]) <= 0.10 or not row["usable"])


def test_decisions_follow_the_model_that_was_sent() -> None:
    model = parts.profiled(SMALL.engine("blas"), 16_384)
    data = {"model": model.to_json(), "context": 16_384, "ranks": 4}
    found = parts.decisions(json.loads(json.dumps(data)))
    sizer: ChunkSizer = parts.sizer_of(model, 16_384)
    assert found["sent"][0] == sizer.plan(16_384)
    assert all(sum(plan) == 16_384 for plan in found["sent"])
    slower = model.to_json()
    slower["samples"] = [[h, c, 2 * ms, host] for h, c, ms, host in slower["samples"]]
    other = parts.decisions(data | {"model": slower})
    assert other["sent"] == found["sent"]
    assert other["form"] != found["form"]  # fitted here, from the samples


def test_noise_goes_round_families_and_ranks() -> None:
    items = study.cell_items(quick=False)
    assert len(items) == len(FAMILIES) * len(study.RANKS) * len(study.PROMPTS)
    for noise in NOISES:
        assert len({item.family for item in items if item.noise == noise}) >= 5
        assert len({item.ranks for item in items if item.noise == noise}) == len(study.RANKS)


def test_a_run_writes_figures_and_targets(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench.pp.surfaces", "--quick", "--parts", "designs"]
    done = subprocess.run(
        [*command, "--out", str(out), "--workers", "1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SGLang: absent" in done.stdout
    result = json.loads(out.read_text())
    assert result["benchmark"] == "pp_surfaces"
    assert result["sglang"] == "absent"
    assert len(result["designs"]) == 10
    assert [row["target"] for row in result["targets"]] == [">= 5", ">= 5"]


def test_samples_of_a_design_have_no_history_0(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sample] = []
    fit = parts.LatencyModel.fit

    def watched(samples: list[Sample]) -> Any:
        seen.extend(samples)
        return fit(samples)

    monkeypatch.setattr(parts.LatencyModel, "fit", watched)
    parts.run_design(0, noisy=True)
    assert len(seen) == 40
    assert min(sample.history_len for sample in seen) > 0
