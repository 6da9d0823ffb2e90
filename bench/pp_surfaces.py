"""Chunk plans on simulated models whose latency is known: what the planners gain, and where not.

    python bench/pp_surfaces.py [--quick] [--sglang DIR]

Ten kinds of model, 2 to 16 ranks, prompts of 32k to 1M tokens. Each model is profiled the way an
engine is (`profile_prefill`, at most 48 noisy forwards), the plans are made from the fit, and their
time to first token is that of the true surface (bench/pp_truth.py). Nothing here is a measurement
of a GPU: device work is a roofline, stages are equal, and transfers between them cost nothing.

Parts (`--parts`, default all):
  cells    time to first token of each plan, against the best fixed size and the true optimum; the
           error of the fit on points it has not seen
  gate     profiles that are good, noisy and broken: does the model's own verdict do harm?
  budget   throughput with a cap on the time of a chunk, against the best fixed size within it
  designs  samples without history 0, with outliers: a right target or a refusal?
  blas     decisions of one model under two sets of BLAS kernels

A whole run writes bench/results/pp_surfaces.json, --quick and single parts go to build/bench.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two processes on two cores, and no more
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import logging
import math
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

from bench.common import BUILD, write_result
from bench.device import Absent
from bench.peers import Sources
from bench.pp_truth import (
    FAMILIES,
    HARSH,
    LARGEST,
    NOISES,
    PAGE,
    Engine,
    Surface,
    chunk_times,
    fixed,
    makespan,
    optimum,
    seed_of,
)
from pystage.pp import ChunkSizer, LatencyModel, Sample, SamplePlan, profile_prefill

PARTS = ("cells", "gate", "budget", "designs", "blas")
RANKS = (2, 4, 8, 16)
PROMPTS = ((32_768, 131_072), (524_288, 1_048_576))  # of one profile each
BASE = 8192
FIXED = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
FORWARDS = 48
CAPS_MS = (40.0, 80.0)
BUDGETS = {
    "dense 8B": ("dense", 1),
    "dense 70B, TP 4": ("dense", 1),
    "MoE 30B": ("MoE", 1),
    "MLA 671B, TP 8": ("MoE", 4),
}
"""Kind, and the ranks of which one is looked at: a stage that has chunks within the caps."""
DESIGNS = 60
CORE_TYPES = ("Haswell", "SkylakeX")
PLANS = ("equal time", "fastest", "choose", "choose timed")


# --- what is compared -----------------------------------------------------------------------------


def sizer_of(model: LatencyModel, context: int, base: int = BASE, least: int = 512) -> ChunkSizer:
    return ChunkSizer(
        model,
        base_chunk=base,
        context_len=context,
        page_size=PAGE,
        min_chunk=least,
        max_chunk=LARGEST,
        context_margin=0,
    )


def choose(sizer: ChunkSizer, prompt_len: int, ranks: int, engine: Engine | None) -> list[int]:
    """What `ChunkSizer.choose` would run: by predictions alone, or with its finalists timed."""
    time = None if engine is None else lambda points: [engine.ms(*point) for point in points]
    return list(sizer.choose(prompt_len, ranks, time=time).chunks)


def budget_chunk(sizer: ChunkSizer, history: int, cap_ms: float) -> int:
    """The largest chunk predicted to stay within the cap; a page at least."""
    sizes = np.arange(PAGE, BASE + 1, PAGE)
    fits = sizes[np.asarray(sizer.model.predict(history, sizes)) <= cap_ms]
    return int(fits.max(initial=PAGE))


@cache
def sglang_class(folder: Path) -> Callable[[], Any]:
    """SGLang's `ChunkSizePredictor` from its package; nothing else of it is run."""
    smooth = SimpleNamespace(get=lambda: 0.75)  # its default
    logger = logging.getLogger("sglang")
    logger.setLevel(logging.CRITICAL)
    given = {"np": np, "math": math, "logger": logger}
    given["envs"] = SimpleNamespace(SGLANG_DYNAMIC_CHUNKING_SMOOTH_FACTOR=smooth)
    path, name = "srt/managers/scheduler_components/dynamic_chunk_sizer.py", "ChunkSizePredictor"
    made: Callable[[], Any] = Sources(folder).take("sglang", path, [name], given)[name]
    return made


def sglang_plan(predictor: Any, engine: Engine, prompt_len: int) -> tuple[list[int], str]:
    """Sizes of SGLang's predictor, fed by its own sweep: 128 falling lengths, once each, without
    history; and why its fit refused, if it did, which keeps the static size."""
    top = BASE * 5 // 4
    lengths = [top - i * (top // 128) for i in range(128)]
    try:
        predictor.fit(lengths, [engine.ms(0, length) for length in lengths])
        predictor.set_target_latency(BASE)
    except ValueError as error:
        return fixed(BASE, prompt_len), str(error)
    predictor.is_ready = True
    chunks: list[int] = []
    done = 0
    while done < prompt_len:  # the context is longer than the prompt: its margin cuts nothing off
        size = predictor.predict_next_chunk_size(done, BASE, PAGE, 2 * prompt_len, LARGEST)
        chunks.append(min(size or BASE, prompt_len - done))
        done += chunks[-1]
    return chunks, ""


# --- one profile, and what follows from it --------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """A profile of one stage, and the prompts that are planned with it."""

    family: str
    ranks: int
    noise: str
    prompts: tuple[int, ...]
    seed: int = 0
    broken: bool = False
    """The step it is profiled with ignores history."""

    def engine(self, *words: object) -> Engine:
        surface = FAMILIES[self.family].stage(self.ranks)
        if self.broken:
            whole = surface
            surface = lambda history, chunk: whole(0 * history, chunk)  # noqa: E731
        return Engine(surface, self.noise, seed_of(*vars(self).values(), *words))


def profiled(engine: Engine, context: int, base: int = BASE, least: int = 512) -> LatencyModel:
    plan = SamplePlan.spread(
        base_chunk=base,
        context_len=context,
        page_size=PAGE,
        min_chunk=least,
        max_forwards=FORWARDS,
    )
    return LatencyModel.fit(profile_prefill(engine.step, plan, timer=engine.timer))


def accuracy(model: LatencyModel, surface: Surface, context: int, seed: int) -> list[float]:
    """Relative errors on 200 random points of 1,024 to 10,240 tokens."""
    rng = np.random.default_rng(seed)
    chunk = np.exp(rng.uniform(math.log(1024), math.log(10240), 200)).astype(int) // PAGE * PAGE
    history = (rng.random(200) * (context - chunk)).astype(int) // PAGE * PAGE
    predicted = np.asarray(model.predict(history, chunk))
    return [round(float(e), 5) for e in np.abs(predicted / surface(history, chunk) - 1.0)]


def run_cells(item: Item, sglang: Path | None) -> dict[str, Any]:
    """One profile; by prompt, the time to first token of each plan under the truth."""
    began = time.perf_counter()
    surface = FAMILIES[item.family].stage(item.ranks)
    context = max(item.prompts)
    engine = item.engine("profile")
    model = profiled(engine, context)
    forwards = engine.forwards
    errors = accuracy(model, surface, context, seed_of(item.family, "held out"))
    sizer = sizer_of(model, context)
    cells = []
    for prompt in item.prompts:
        plans = {f"fixed {size}": fixed(size, prompt) for size in FIXED}
        plans["equal time"] = sizer.plan(prompt)
        plans["fastest"] = sizer.fastest_plan(prompt, item.ranks)
        plans["choose"] = choose(sizer, prompt, item.ranks, None)
        plans["choose timed"] = choose(sizer, prompt, item.ranks, engine)
        refused = ""
        if sglang is not None:
            own = item.engine("sglang")
            plans["sglang"], refused = sglang_plan(sglang_class(sglang)(), own, prompt)
        best, bound = optimum(surface, prompt, item.ranks)
        plans["optimum"] = best
        ms = {name: makespan(surface, chunks, item.ranks) for name, chunks in plans.items()}
        ms["optimum"] = min(ms.values())  # the search stops within 0.1 % of the bound
        cells.append(
            {
                "prompt": prompt,
                "ms": {name: round(value, 3) for name, value in ms.items()},
                "bound_ms": round(bound, 3),
                "chunks": {name: len(plans[name]) for name in plans},
                "sglang_refused": refused,
            }
        )
    return {
        **{name: vars(item)[name] for name in ("family", "ranks", "noise", "seed")},
        "form": model.report.form,
        "usable": model.report.usable,
        "reason": model.report.reason,
        "forwards": forwards,
        "timed": engine.forwards - forwards,
        "error": {
            q: round(float(np.percentile(errors, p)), 5) for q, p in (("p50", 50), ("p95", 95))
        },
        "errors": errors,
        "cells": cells,
        "seconds": round(time.perf_counter() - began, 2),
    }


def run_gate(item: Item) -> dict[str, Any]:
    """What the verdict on one profile does: the plan where it accepts, 8,192 where it does not."""
    surface = FAMILIES[item.family].stage(item.ranks)
    prompt = max(item.prompts)
    engine = item.engine("profile")
    model = profiled(engine, prompt)
    errors = accuracy(model, surface, prompt, seed_of(item.family, "held out"))
    usable = model.report.usable
    if not usable:  # what it would have done
        model.report = replace(model.report, usable=True)
    plan = choose(sizer_of(model, prompt), prompt, item.ranks, engine)
    static = makespan(surface, fixed(BASE, prompt), item.ranks)
    gain = makespan(surface, plan, item.ranks) / static - 1.0
    harm = gain > 0.01 if usable else gain < -0.01
    wrong = ("accept" if usable else "reject") if harm else ""
    return {
        **{name: vars(item)[name] for name in ("family", "ranks", "noise", "seed", "broken")},
        "accepted": usable,
        "reason": model.report.reason,
        "error": round(float(np.median(errors)), 4),
        "plan_vs_8192": round(gain, 4),
        "wrong": wrong,
    }


def run_budget(item: Item) -> list[dict[str, Any]]:
    """One profile; by cap, what `within_cap` says."""
    prompt = max(item.prompts)
    model = profiled(item.engine("budget"), prompt, base=2048, least=128)
    sizer = sizer_of(model, prompt, base=2048, least=PAGE)
    return [within_cap(item, sizer, prompt, cap_ms) for cap_ms in CAPS_MS]


def within_cap(item: Item, sizer: ChunkSizer, prompt: int, cap_ms: float) -> dict[str, Any]:
    """Tokens per second of one stage with no chunk over the cap, by fixed and by predicted size."""
    surface = FAMILIES[item.family].stage(item.ranks)
    within = {}
    for size in range(PAGE, BASE + 1, PAGE):
        times = chunk_times(surface, fixed(size, prompt))
        if times.max() <= cap_ms:
            within[size] = float(times.sum())
    chunks: list[int] = []
    done = 0
    while done < prompt:
        chunks.append(min(budget_chunk(sizer, done, cap_ms), prompt - done))
        done += chunks[-1]
    times = chunk_times(surface, chunks)
    best = min(within, key=lambda size: within[size], default=None)
    return {
        **{name: vars(item)[name] for name in ("family", "ranks", "noise", "seed")},
        "kind": BUDGETS[item.family][0],
        "prompt": prompt,
        "cap_ms": cap_ms,
        "fixed": best,
        "fixed_tokens_per_s": None if best is None else round(prompt / within[best] * 1e3, 1),
        "tokens_per_s": round(prompt / float(times.sum()) * 1e3, 1),
        "gain": None if best is None else round(within[best] / float(times.sum()) - 1.0, 4),
        "chunks": len(chunks),
        "over_cap_5%": round(float((times > 1.05 * cap_ms).mean()), 4),
        "slowest_ms": round(float(times.max()), 2),
    }


def run_design(number: int, noisy: bool) -> dict[str, Any]:
    """A fit of 40 points, all behind some history: is the time of a base chunk without history
    right, or refused?"""
    rng = np.random.default_rng(seed_of("design", number, noisy))
    history = rng.integers(1, 131_072 // PAGE, 40) * PAGE
    chunk = np.exp(rng.uniform(math.log(512), math.log(10_240), 40)).astype(int) // PAGE * PAGE

    def truth(past: Any, new: Any) -> Any:
        return 3.0 + 0.02 * new + 2e-7 * (2.0 * past + new) * new

    ms = truth(history, chunk)
    if noisy:
        ms = ms * np.exp(0.10 * rng.standard_normal(40))
        ms[rng.choice(40, 3, replace=False)] *= rng.uniform(1.5, 4.0, 3)
        ms[:2] *= (6.7, 5.3)
    samples = [Sample(int(a), int(b), float(c)) for a, b, c in zip(history, chunk, ms, strict=True)]
    model = LatencyModel.fit(samples)
    error = model.predict(0, BASE) / truth(0.0, BASE) - 1.0
    right = abs(error) <= 0.10
    return {
        "design": number,
        "noisy": noisy,
        "target_error": round(float(error), 4),
        "usable": model.report.usable,
        "reason": model.report.reason,
        "ok": bool(right or (not model.report.usable and model.report.reason)),
    }


# --- BLAS kernels ---------------------------------------------------------------------------------


def decisions(data: dict[str, Any]) -> dict[str, Any]:
    """The plans of a fitted model that was sent, and of a fit of its samples made here."""
    context, ranks = data["context"], data["ranks"]

    def plans(model: LatencyModel) -> list[list[int]]:
        sizer = sizer_of(model, context)
        return [sizer.plan(context), sizer.fastest_plan(context, ranks)]

    sent = LatencyModel.from_json(data["model"])
    fitted = LatencyModel.fit(sent.samples)
    return {"sent": plans(sent), "fitted": plans(fitted), "form": fitted.to_json()["form"]}


def run_blas(items: Sequence[Item], tick: Callable[[], None]) -> dict[str, Any]:
    """The same models in a process of each core type; the child is this file with --decide."""
    given = []
    for item in items:
        model = profiled(item.engine("blas"), max(item.prompts))
        given.append({"model": model.to_json(), "context": max(item.prompts), "ranks": item.ranks})
        tick()
    found: dict[str, list[dict[str, Any]]] = {}
    for core in CORE_TYPES:
        child = subprocess.run(
            [sys.executable, __file__, "--decide"],
            input=json.dumps(given),
            env=os.environ | {"OPENBLAS_CORETYPE": core},
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:  # a CPU that lacks these instructions ends it
            return {"absent": f"{core}: {child.stderr[-500:] or child.returncode}"}
        found[core] = json.loads(child.stdout)
    pairs = list(zip(*found.values(), strict=True))
    return {
        "core_types": list(found),
        "models": len(pairs),
        "sent_differ": sum(a["sent"] != b["sent"] for a, b in pairs),
        "fits_differ": sum(a["form"] != b["form"] for a, b in pairs),
        "plans_of_fits_differ": sum(a["fitted"] != b["fitted"] for a, b in pairs),
    }


# --- the run --------------------------------------------------------------------------------------


def cell_items(quick: bool) -> list[Item]:
    """Noise goes round, so that each family and each number of ranks sees all kinds of it."""
    noises, items = list(NOISES), []
    for i, family in enumerate(FAMILIES):
        for j, ranks in enumerate((4,) if quick else RANKS):
            for k, prompts in enumerate(((32_768, 131_072),) if quick else PROMPTS):
                noise = noises[(i + 2 * j + 3 * k) % len(noises)]
                items.append(Item(family, ranks, noise, prompts))
    return items


def gate_items(quick: bool) -> list[Item]:
    prompts = (131_072,)
    kinds = [*NOISES, *HARSH]
    some = [Item(f, 4, n, prompts, seed=1) for f in FAMILIES for n in kinds]
    some += [Item(f, 4, "3 %", prompts, seed=1, broken=True) for f in FAMILIES]
    return some[::9] if quick else some


def budget_items(quick: bool) -> list[Item]:
    noises = ("3 %",) if quick else ("1 %", "3 %", "10 %")
    prompts = (131_072,) if quick else (32_768, 131_072)
    return [
        Item(family, ranks, noise, (prompt,), seed=2)
        for family, (_, ranks) in BUDGETS.items()
        for prompt in prompts
        for noise in noises
    ]


def _call(job: tuple[str, Callable[..., Any], tuple[Any, ...]]) -> tuple[str, Any]:
    part, run, arguments = job
    return part, run(*arguments)


def jobs_of(parts: Iterable[str], quick: bool, sglang: Path | None) -> list[Any]:
    """(part, function, arguments), the longest first: nothing long is left to the end."""
    jobs: list[Any] = []
    if "cells" in parts:
        items = sorted(cell_items(quick), key=lambda item: -max(item.prompts))
        jobs += [("cells", run_cells, (item, sglang)) for item in items]
    if "gate" in parts:
        jobs += [("gate", run_gate, (item,)) for item in gate_items(quick)]
    if "budget" in parts:
        jobs += [("budget", run_budget, (item,)) for item in budget_items(quick)]
    if "designs" in parts:
        numbers = range(10 if quick else DESIGNS)
        jobs += [("designs", run_design, (n, noisy)) for noisy in (True, False) for n in numbers]
    return jobs


def run(
    parts: Sequence[str], quick: bool, sglang: Path | None, workers: int, progress: Any = None
) -> dict[str, Any]:
    """All parts; the same figures whatever the number of workers."""
    began = time.perf_counter()
    jobs = jobs_of(parts, quick, sglang)
    blas = cell_items(True) if "blas" in parts else []
    tick = progress(len(jobs) + len(blas)) if progress else lambda: None
    result: dict[str, Any] = {part: [] for part in parts if part != "blas"}
    with multiprocessing.get_context("spawn").Pool(workers, _quiet) as pool:
        for part, row in pool.imap(_call, jobs):
            result[part] += row if isinstance(row, list) else [row]
            tick()
    if "blas" in parts:
        result["blas"] = run_blas(blas, tick)
    if "cells" in parts:
        result |= summarise(result["cells"])
    result["targets"] = targets(result)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def _quiet() -> None:
    logging.disable(logging.WARNING)  # one line a profile


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By family and over all: mean and worst of each plan against the tuned fixed size and 8,192;
    and the errors of the fits, pooled."""
    names = ("sglang", *PLANS, "optimum")
    ratios: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for cell in row["cells"]:
            ms = cell["ms"]
            tuned = min(ms[f"fixed {size}"] for size in FIXED)
            for name in names:
                if name in ms:
                    pair = (ms[name] / tuned - 1.0, ms[name] / ms[f"fixed {BASE}"] - 1.0)
                    for family in (row["family"], "all"):
                        ratios.setdefault(family, {}).setdefault(name, []).append(pair)
    by_family: dict[str, Any] = {}
    for family, plans in ratios.items():
        by_family[family] = {"cells": len(plans["optimum"])}
        for name, pairs in plans.items():
            tuned_all, static_all = zip(*pairs, strict=True)
            by_family[family][name] = {
                "vs_tuned_mean": round(float(np.mean(tuned_all)), 5),
                "vs_tuned_worst": round(max(tuned_all), 5),
                "vs_8192_mean": round(float(np.mean(static_all)), 5),
                "vs_8192_worst": round(max(static_all), 5),
            }
    pooled = np.concatenate([row.pop("errors") for row in rows])
    medians, highs = ([row["error"][q] for row in rows] for q in ("p50", "p95"))
    worst_gap = max(c["ms"]["optimum"] / c["bound_ms"] - 1.0 for row in rows for c in row["cells"])
    return {
        "by_family": by_family,
        "accuracy": {
            "profiles": len(rows),
            "points": int(pooled.size),
            "p50": round(float(np.percentile(pooled, 50)), 5),
            "p95": round(float(np.percentile(pooled, 95)), 5),
            "profiles_within_both": sum(
                a <= 0.03 and b <= 0.10 for a, b in zip(medians, highs, strict=True)
            ),
            "worst_p50": max(medians),
            "worst_p95": max(highs),
            "most_forwards": max(row["forwards"] for row in rows),
        },
        "optimum_gap": round(worst_gap, 5),
    }


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the planner is to reach, and whether it does; only of the parts that ran."""
    rows: list[dict[str, Any]] = []

    def row(measure: str, sign: str, limit: float, unit: str, value: float) -> None:
        met = value <= limit if sign == "<=" else value >= limit
        rows.append(
            {
                "measure": measure,
                "target": f"{sign} {limit:g} {unit}".strip(),
                "value": round(value, 3),
                "unit": unit,
                "ok": bool(met),
            }
        )

    if "by_family" in result:
        for name, how in (("choose timed", "finalists timed"), ("choose", "predictions alone")):
            chosen = {k: 100 * v for k, v in result["by_family"]["all"][name].items()}
            label = f"first token, `choose`, {how}:"
            row(f"{label} against tuned, mean", "<=", -1, "%", chosen["vs_tuned_mean"])
            row(f"{label} against tuned, worst cell", "<=", 1, "%", chosen["vs_tuned_worst"])
            row(f"{label} against 8,192, mean", "<=", -18, "%", chosen["vs_8192_mean"])
        found = result["accuracy"]
        row("held-out error, median over all points", "<=", 3, "%", 100 * found["p50"])
        row("held-out error, p95 over all points", "<=", 10, "%", 100 * found["p95"])
        row("forwards of a profile, most", "<=", FORWARDS, "", found["most_forwards"])
    if "gate" in result:
        for kind in ("accept", "reject"):
            wrong = [r["wrong"] == kind for r in result["gate"]]
            row(
                f"wrong {kind}s of {len(wrong)} profiles", "<=", 2, "%", 100 * float(np.mean(wrong))
            )
    for kind, limit in (("dense", 5), ("MoE", 30)) if "budget" in result else ():
        gains = [
            r["gain"]
            for r in result["budget"]
            if r["kind"] == kind and r["cap_ms"] == 80.0 and r["gain"] is not None
        ]
        label = f"tokens/s with no chunk over 80 ms, against the best fixed size, {kind}, mean"
        row(label, ">=", limit, "%", 100 * float(np.mean(gains)))
    for noisy in (True, False) if "designs" in result else ():
        fits = [r["ok"] for r in result["designs"] if r["noisy"] is noisy]
        label = f"designs without history 0, {'10 % noise and outliers' if noisy else 'no noise'}"
        row(f"{label}: within 10 % or refused", ">=", len(fits), "", sum(fits))
    if "models" in result.get("blas", {}):
        cores = " and ".join(result["blas"]["core_types"])
        label = f"models whose plans differ between BLAS kernels ({cores})"
        row(label, "<=", 0, "", result["blas"]["sent_differ"])
    return rows


def parts_of(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := set(chosen) - set(PARTS):
        raise argparse.ArgumentTypeError(f"unknown parts: {', '.join(sorted(unknown))}")
    return chosen


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from bench.common import amount

    console = Console()
    if "by_family" in result:
        names = [n for n in ("sglang", *PLANS, "optimum") if n in result["by_family"]["all"]]
        table = Table("against the tuned fixed size, mean / worst, %", *names)
        for family, row in result["by_family"].items():
            cells = [(row[n]["vs_tuned_mean"], row[n]["vs_tuned_worst"]) for n in names]
            table.add_row(family, *(f"{100 * a:+.1f} / {100 * b:+.1f}" for a, b in cells))
        console.print(table)
    table = Table("measure", "target", "measured", "met")
    for row in result["targets"]:
        table.add_row(row["measure"], row["target"], amount(row), "yes" if row["ok"] else "no")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few cells, under a minute")
    parser.add_argument("--parts", type=parts_of, default=PARTS, help=",".join(PARTS))
    parser.add_argument("--sglang", type=Path, help="SGLang's wheel, or a folder with its package")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="draw the gains here (SVG; needs matplotlib)")
    parser.add_argument("--decide", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    _quiet()
    if args.decide:
        json.dump([decisions(data) for data in json.load(sys.stdin)], sys.stdout)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    version = "absent"
    if args.sglang is not None:
        try:
            sglang_class(args.sglang)
            version = Sources(args.sglang).version("sglang")
        except Absent as absent:
            raise SystemExit(f"--sglang {args.sglang}: {absent}") from None
    columns = (TextColumn("surfaces"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:

        def start(total: int) -> Callable[[], None]:
            task = bar.add_task("", total=total)
            return lambda: bar.advance(task)

        result = run(args.parts, args.quick, args.sglang, args.workers, start)
    body = {"quick": args.quick, "sglang": version, **result}
    whole = not args.quick and set(args.parts) == set(PARTS)
    out = args.out or (None if whole else BUILD / "pp_surfaces.json")
    show(result)
    if version == "absent":
        print("SGLang: absent (give its wheel or a folder with --sglang)")
    print("written to", write_result("pp_surfaces", body, out), f"in {result['seconds']:.0f} s")
    if args.plot and "by_family" in result:
        from bench.pp_pages import draw

        draw(body, args.plot)


if __name__ == "__main__":
    main()
