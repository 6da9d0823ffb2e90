"""The parts of the study of simulated models (surfaces.py). Each function runs one item.

Run as a script, it is the child process of the BLAS part: it reads models as JSON from stdin and
writes their decisions to stdout.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.pp.sglang_sizes import chunks_of, sglang_class, sweep_lengths
from bench.pp.truth import (
    FAMILIES,
    LARGEST,
    PAGE,
    Engine,
    Surface,
    chunk_times,
    least_ms_within,
    makespan,
    optimum,
    seed_of,
)
from pystage.pp import BudgetSizer, ChunkSizer, LatencyModel, Sample, SamplePlan, profile_prefill
from pystage.pp.budget import TILE
from pystage.pp.makespan import fixed_chunks

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
CORE_TYPES = ("Haswell", "SkylakeX")


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
    """The chunks that `ChunkSizer.choose` would run. With an `engine` it times its finalists,
    otherwise it uses predictions alone."""
    time = None if engine is None else lambda points: [engine.ms(*point) for point in points]
    return list(sizer.choose(prompt_len, ranks, time=time).chunks)


def within(model: LatencyModel, prompt_len: int, cap_ms: float, tile: int) -> list[int]:
    """The chunks of `BudgetSizer`: each is the largest of whole tiles that is predicted to stay
    within the cap."""
    sizer = BudgetSizer(
        model, budget_ms=cap_ms, page_size=PAGE, min_chunk=PAGE, max_tokens=BASE, tile=tile
    )
    return chunks_of(prompt_len, lambda done: sizer.next_chunk(done, left=prompt_len - done))


def sglang_plan(predictor: Any, engine: Engine, prompt_len: int) -> tuple[list[int], str]:
    """Chunk sizes of SGLang's predictor, fitted to its own sweep: 128 falling lengths, once each,
    without history. Also the reason if its fit refused, in which case the static size is used."""
    lengths = sweep_lengths(BASE)
    try:
        predictor.fit(lengths, [engine.ms(0, length) for length in lengths])
        predictor.set_target_latency(BASE)
    except ValueError as error:
        return fixed_chunks(BASE, prompt_len), str(error)
    predictor.is_ready = True
    # The context is longer than the prompt, so its margin has no effect.
    next_size = predictor.predict_next_chunk_size
    return chunks_of(
        prompt_len, lambda done: next_size(done, BASE, PAGE, 2 * prompt_len, LARGEST) or BASE
    ), ""


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
    """Relative prediction errors on 200 random points of 1,024 to 10,240 tokens."""
    rng = np.random.default_rng(seed)
    chunk = np.exp(rng.uniform(math.log(1024), math.log(10240), 200)).astype(int) // PAGE * PAGE
    history = (rng.random(200) * (context - chunk)).astype(int) // PAGE * PAGE
    predicted = np.asarray(model.predict(history, chunk))
    return [round(float(e), 5) for e in np.abs(predicted / surface(history, chunk) - 1.0)]


def run_cells(item: Item, sglang: Path | None) -> dict[str, Any]:
    """Makes one profile. For each prompt, gives every plan's time to first token under the true
    surface."""
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
        plans = {f"fixed {size}": fixed_chunks(size, prompt) for size in FIXED}
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
        ms["optimum"] = min(ms.values())  # the search stops within 0.1 % of the lower bound
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


def wrong(*, accepted: bool, gain: float) -> str:
    """How a verdict was wrong, if it was. Either it accepted a plan that takes over 1 % more time
    than 8,192, or it rejected one that takes over 1 % less. `gain` is the time of the plan divided
    by that of 8,192, minus 1."""
    harm = gain > 0.01 if accepted else gain < -0.01
    return ("accept" if accepted else "reject") if harm else ""


def run_gate(item: Item) -> dict[str, Any]:
    """The effect of the verdict on one profile: the plan if it accepts the model, else 8,192."""
    surface = FAMILIES[item.family].stage(item.ranks)
    prompt = max(item.prompts)
    engine = item.engine("profile")
    model = profiled(engine, prompt)
    errors = accuracy(model, surface, prompt, seed_of(item.family, "held out"))
    usable = model.report.usable
    if not usable:  # the plan that it would have run
        model.report = replace(model.report, usable=True)
    plan = choose(sizer_of(model, prompt), prompt, item.ranks, engine)
    static = makespan(surface, fixed_chunks(BASE, prompt), item.ranks)
    gain = makespan(surface, plan, item.ranks) / static - 1.0
    return {
        **{name: vars(item)[name] for name in ("family", "ranks", "noise", "seed", "broken")},
        "accepted": usable,
        "reason": model.report.reason,
        "error": round(float(np.median(errors)), 4),
        "plan_vs_8192": round(gain, 4),
        "wrong": wrong(accepted=usable, gain=gain),
    }


def run_budget(item: Item) -> list[dict[str, Any]]:
    """Makes one profile, and returns the result of `capped` for each cap."""
    model = profiled(item.engine("budget"), max(item.prompts), base=2048, least=128)
    return [capped(item, model, cap_ms) for cap_ms in CAPS_MS]


def capped(item: Item, model: LatencyModel, cap_ms: float) -> dict[str, Any]:
    """Tokens per second of one stage with no chunk over the cap, with fixed and predicted sizes.

    If the model is not usable, the fixed size is kept. No gain is given where not even chunks of
    one page stay within the cap.
    """
    surface, prompt = FAMILIES[item.family].stage(item.ranks), max(item.prompts)
    keeps: dict[int, float] = {}
    for size in range(PAGE, BASE + 1, PAGE):
        times = chunk_times(surface, fixed_chunks(size, prompt))
        if times.max() <= cap_ms:
            keeps[size] = float(times.sum())
    best = min(keeps, key=lambda size: keeps[size], default=None)
    usable = model.report.usable
    kind = BUDGETS[item.family][0]
    tile = 1 if kind == "MoE" else TILE  # as the SGLang plugin does
    chunks = within(model, prompt, cap_ms, tile) if usable else fixed_chunks(best or PAGE, prompt)
    times = chunk_times(surface, chunks)
    took = float(times.sum())
    least = least_ms_within(surface, prompt, cap_ms, BASE)
    return {
        **{name: vars(item)[name] for name in ("family", "ranks", "noise", "seed")},
        "kind": kind,
        "prompt": prompt,
        "cap_ms": cap_ms,
        "usable": usable,
        "fixed": best,
        "fixed_tokens_per_s": None if best is None else round(prompt / keeps[best] * 1e3, 1),
        "tokens_per_s": round(prompt / took * 1e3, 1),
        "gain": None if best is None else round(keeps[best] / took - 1.0, 4),
        "optimum_gain": None if best is None else round(keeps[best] / least - 1.0, 4),
        "chunks": len(chunks),
        "over_cap_5%": round(float((times > 1.05 * cap_ms).mean()), 4),
        "slowest_ms": round(float(times.max()), 2),
    }


def run_design(number: int, noisy: bool) -> dict[str, Any]:
    """Fits 40 points that all have some history. Checks whether the predicted time of a base chunk
    without history is right, or the fit is refused."""
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
    """The plans of a fitted model that was received, and of a fit of its samples made here."""
    context, ranks = data["context"], data["ranks"]

    def plans(model: LatencyModel) -> list[list[int]]:
        sizer = sizer_of(model, context)
        chosen = choose(sizer, context, ranks, None)
        return [sizer.plan(context), sizer.fastest_plan(context, ranks), chosen]

    sent = LatencyModel.from_json(data["model"])
    fitted = LatencyModel.fit(sent.samples)
    return {"sent": plans(sent), "fitted": plans(fitted), "form": fitted.to_json()["form"]}


def run_model(item: Item) -> dict[str, Any]:
    """A fitted model in the form in which rank 0 sends it."""
    context = max(item.prompts)
    model = profiled(item.engine("blas"), context)
    return {"model": model.to_json(), "context": context, "ranks": item.ranks}


def compare_kernels(models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The decisions of the same models in a process for each core type, and those of fits that each
    process makes from the samples. Such fits can differ, which is why ranks are sent the model and
    not the samples."""
    found: dict[str, list[dict[str, Any]]] = {}
    for core in CORE_TYPES:
        child = subprocess.run(
            [sys.executable, "-m", "bench.pp.parts"],
            input=json.dumps(models),
            env=os.environ | {"OPENBLAS_CORETYPE": core},
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:  # as on a CPU that lacks these instructions
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


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    json.dump([decisions(data) for data in json.load(sys.stdin)], sys.stdout)
