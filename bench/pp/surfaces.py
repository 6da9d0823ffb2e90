"""Chunk plans on simulated models with known latency: where the planners gain, and where they lose.

    python -m bench.pp.surfaces [--quick] [--sglang DIR]

Ten kinds of model, 2 to 16 ranks, prompts of 32k, 128k and 1M tokens. Each model is profiled as an
engine would be (`profile_prefill`, at most 48 noisy forwards). The plans are made from the fit, and
their time to first token is computed from the true surface (bench/pp/truth.py). Nothing here is
measured on a GPU: device work is a roofline, stages are equal, transfers between them are free.

Parts (`--parts`, default all):
  cells    time to first token of each plan, compared with the best fixed size and the true
           optimum; the error of the fit on points it has not seen
  gate     good, noisy and broken profiles: does the model's own verdict do harm?
  budget   throughput with a cap on the time of a chunk, compared with the best fixed size within it
  designs  samples without history 0, with outliers: is the target right, or is the fit refused?
  blas     decisions of one model under two sets of BLAS kernels

A whole run writes bench/results/pp_surfaces.json. --quick and single parts write to build/bench.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # set before importing NumPy: one thread in each of two processes
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import BUILD, amount, parts_of, write_result
from bench.device import Absent
from bench.pp.parts import (
    BASE,
    BUDGETS,
    CORE_TYPES,
    FIXED,
    FORWARDS,
    Item,
    compare_kernels,
    run_budget,
    run_cells,
    run_design,
    run_gate,
    run_model,
)
from bench.pp.sglang_sizes import sglang_class
from bench.pp.truth import FAMILIES, HARSH, NOISES
from bench.suite.peers import Sources

PARTS = ("cells", "gate", "budget", "designs", "blas")
RANKS = (2, 4, 8, 16)
PROMPTS = ((32_768, 131_072), (1_048_576,))  # each group shares one profile
DESIGNS = 60
PLANS = ("equal time", "fastest", "choose", "choose timed")


# --- the run --------------------------------------------------------------------------------------


def cell_items(quick: bool) -> list[Item]:
    """The items of the part `cells`. The kinds of noise rotate, so that each family and each number
    of ranks gets all of them."""
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
    """Jobs as (part, function, arguments), the longest first, so that none is left to the end."""
    jobs: list[Any] = []
    if "cells" in parts:
        items = sorted(cell_items(quick), key=lambda item: -max(item.prompts))
        jobs += [("cells", run_cells, (item, sglang)) for item in items]
    if "gate" in parts:
        jobs += [("gate", run_gate, (item,)) for item in gate_items(quick)]
    if "budget" in parts:
        jobs += [("budget", run_budget, (item,)) for item in budget_items(quick)]
    if "designs" in parts:
        numbers = range(5 if quick else DESIGNS)
        jobs += [("designs", run_design, (n, noisy)) for noisy in (True, False) for n in numbers]
    if "blas" in parts:
        items = [
            Item(f, r, "3 %", (131_072,), 3) for f in FAMILIES for r in ((4,) if quick else (2, 16))
        ]
        jobs += [("blas", run_model, (item,)) for item in items]
    return jobs


def run(
    parts: Sequence[str], quick: bool, sglang: Path | None, workers: int, progress: Any = None
) -> dict[str, Any]:
    """Runs all parts. The figures do not depend on the number of workers."""
    began = time.perf_counter()
    jobs = jobs_of(parts, quick, sglang)
    tick = progress(len(jobs)) if progress else lambda: None
    result: dict[str, Any] = {part: [] for part in parts}
    with multiprocessing.get_context("spawn").Pool(workers, _quiet) as pool:
        for part, row in pool.imap(_call, jobs):
            result[part] += row if isinstance(row, list) else [row]
            tick()
    if "blas" in parts:
        result["blas"] = compare_kernels(result["blas"])
    if "cells" in parts:
        result |= summarise(result["cells"])
    result["targets"] = targets(result)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def _quiet() -> None:
    logging.disable(logging.WARNING)  # hides one line per profile
    logging.getLogger("sglang").setLevel(logging.CRITICAL)  # hides the fits that SGLang refuses


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each family and overall: mean and worst of each plan relative to the tuned fixed size and
    to 8,192, and the pooled errors of the fits."""
    names = ("fixed 1024", "sglang", *PLANS, "optimum")
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
    """The planner's targets and whether it meets them, for the parts that ran."""
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
        label = f"tokens/s, chunks capped at 80 ms, against the best fixed size, {kind}, mean"
        row(label, ">=", limit, "%", 100 * float(np.mean(gains)))
    for noisy in (True, False) if "designs" in result else ():
        fits = [r["ok"] for r in result["designs"] if r["noisy"] is noisy]
        label = f"designs without history 0, {'10 % noise and outliers' if noisy else 'no noise'}"
        row(f"{label}: within 10 % or refused", ">=", len(fits), "", sum(fits))
    if "blas" in result:
        label = f"models whose plans differ between BLAS kernels ({' and '.join(CORE_TYPES)})"
        row(label, "<=", 0, "", result["blas"].get("sent_differ", math.nan))
        if "absent" in result["blas"]:  # a CPU without these instructions
            rows[-1] |= {"value": None, "ok": False}
    return rows


def losers(rows: Sequence[dict[str, Any]], plan: str) -> list[str]:
    """The five cells where a plan is worst relative to the best fixed size, worst first."""
    found = []
    for row in rows:
        for cell in row["cells"]:
            tuned = min(cell["ms"][f"fixed {size}"] for size in FIXED)
            where = f"{row['family']}, {row['ranks']} ranks, {cell['prompt']:,}, {row['noise']}"
            found.append((cell["ms"][plan] / tuned - 1.0, where))
    return [f"{100 * loss:+.2f} %: {where}" for loss, where in sorted(found, reverse=True)[:5]]


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "by_family" in result:
        names = [n for n in ("sglang", *PLANS, "optimum") if n in result["by_family"]["all"]]
        table = Table("against the tuned fixed size, mean / worst, %", *names)
        for family, row in result["by_family"].items():
            cells = [(row[n]["vs_tuned_mean"], row[n]["vs_tuned_worst"]) for n in names]
            table.add_row(family, *(f"{100 * a:+.1f} / {100 * b:+.1f}" for a, b in cells))
        console.print(table)
        for plan in ("choose timed", "choose"):
            console.print(f"worst cells of {plan}:", *losers(result["cells"], plan), sep="\n  ")
    table = Table("measure", "target", "measured", "met")
    for row in result["targets"]:
        table.add_row(row["measure"], row["target"], amount(row), "yes" if row["ok"] else "no")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few cells, under a minute")
    parser.add_argument("--parts", type=parts_of(PARTS), default=PARTS, help=",".join(PARTS))
    parser.add_argument("--sglang", type=Path, help="SGLang's wheel, or a folder with its package")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="draw the gains here (SVG; needs matplotlib)")
    args = parser.parse_args()
    _quiet()
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
        from bench.pp.pages import draw

        draw(body, args.plot)


if __name__ == "__main__":
    main()
