"""Tables and plots of the study of simulated models, made from the result of surfaces.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.common import load
from bench.report import svg
from bench.report.tables import tabulate, target_table

# Keys of the result, and their names on the pages.
NAMES = {
    "fixed 1024": "fixed 1,024",
    "sglang": "SGLang",
    "equal time": "equal time",
    "choose": "`choose`",
    "choose timed": "`choose`, timed",
    "optimum": "optimum",
}
COLORS = {
    "sglang": "#d9822b",
    "equal time": "#8c5fb4",
    "choose timed": "#1f6fb4",
    "optimum": "#555555",
}


def sections(path: Path) -> dict[str, str]:
    """The text to put between the marks of docs/pp.md, by the name of the mark."""
    if not path.exists():
        text = "Not run yet: `make pp-surfaces`, then `make report`."
        return dict.fromkeys(("pp-surfaces", "pp-surfaces-budget", "pp-surfaces-targets"), text)
    result = load(path)
    return {
        "pp-surfaces": families_table(result),
        "pp-surfaces-budget": budget_table(result),
        "pp-surfaces-targets": f"{target_table(result)}\n\n{spread(result)}\n\n"
        f"{origin(result, path.name)}",
    }


def queues_table(path: Path) -> str:
    """Prompts in a queue: the mean time to first token of each rule against the best fixed size."""
    if not path.exists():
        return "Not run yet: `python -m bench.pp.queues`, then `make report`."
    result = load(path)
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["ranks"], row["arrivals"]), []).append(row)
    rows = []
    for (ranks, arrivals), queues in groups.items():
        times = [queue["ttft_mean_ms"] for queue in queues]
        fixed = [name for name in times[0] if name.startswith("fixed")]
        best = [min(ms[name] for name in fixed) for ms in times]
        sizes = sorted({int(min(fixed, key=ms.__getitem__).split()[1]) for ms in times})
        against = {
            rule: [100 * (ms[rule] / b - 1) for ms, b in zip(times, best, strict=True)]
            for rule in ("queue", "choose", "fixed 8192")
        }
        rows.append(
            [
                str(ranks),
                arrivals,
                " or ".join(f"{size:,}" for size in sizes),
                f"{np.mean(best):,.0f}",
                *(f"{np.mean(a):+.1f} / {max(a):+.1f}" for a in against.values()),
            ]
        )
    head = ["stages", "prompts arrive", "best fixed size", "its mean, ms", "`QueueSizer`, %"]
    of = ", ".join(f"`{name}`" for name in result["profiles"])
    return (
        f"{tabulate([*head, '`choose`, %', 'fixed 8,192, %'], rows)}\n\n"
        f"Simulated from the profiles in {of}, commit `{result['commit'][:9]}`: "
        f"`{result['command']}`, `bench/results/{path.name}`."
    )


def measured_sizes(path: Path) -> str:
    """The sizes for queues of so many tokens, from the chunk times that the runs measured."""
    if not path.exists():
        return "Not run yet: `python -m bench.pp.queues`, then `make report`."
    found = load(path)["by_measured_chunks"]
    rows = [
        [str(run["ranks"]), f"{run['prompt']:,}", *(f"{size:,}" for size in run["sizes"].values())]
        for run in found
    ]
    tokens = [f"{int(n):,} tokens wait" for n in found[0]["sizes"]]
    return tabulate(["stages", "chunks of a prompt of", *tokens], rows)


def spread(result: dict[str, Any]) -> str:
    """The spread of the results, which means and totals do not show."""
    found, gate, blas = result["accuracy"], result["gate"], result["blas"]
    most: dict[str, list[float]] = {}
    for row in result["budget"]:
        if row["cap_ms"] == 80.0 and row["fixed"] is not None:
            most.setdefault(row["kind"], []).append(row["optimum_gain"])
    capped = " and ".join(f"{100 * np.mean(gains):.1f} % ({kind})" for kind, gains in most.items())
    broken = [row for row in gate if row["broken"]]
    far = sum(row["accepted"] and row["error"] > 0.25 for row in gate)
    differ = "not compared" if "absent" in blas else f"{blas['plans_of_fits_differ']} would"
    return (
        f"Of {found['profiles']} profiles {found['profiles_within_both']} have both a median error "
        f"up to 3 % and a p95 up to 10 %; the worst median is {found['worst_p50']:.1%}, the worst "
        f"p95 {found['worst_p95']:.1%}. Of {len(gate)} verdicts, {len(broken)} are on steps that "
        f"ignore history; {far} models are accepted with a median error over 25 %. Had the ranks "
        f"fitted the samples themselves under other BLAS kernels, of {blas.get('models', 0)} "
        f"models {differ} give other plans. With the truth known, the best plan that keeps to the "
        f"cap of 80 ms gains {capped}."
    )


def origin(result: dict[str, Any], file: str) -> str:
    """The origin of the figures. It says that nothing was measured on a device."""
    quick = (
        "This is the quick run: 4 ranks, prompts of 32,768 and 131,072. " if result["quick"] else ""
    )
    where = f"{result['cores']} cores ({result['cpu']})"
    return (
        f"{quick}Simulated in {result['seconds']:.0f} s on {where}, SGLang {result['sglang']}, "
        f"commit `{result['commit'][:9]}`: `{result['command']}`, `bench/results/{file}`."
    )


def families_table(result: dict[str, Any]) -> str:
    """Time to first token by kind of model: the mean of its cells, and the worst cell."""
    rows = []
    every = result["by_family"]
    for family in [*(name for name in every if name != "all"), "all"]:
        for base, label in (("tuned", "the best fixed size"), ("8192", "fixed 8,192")):
            shown = [_shown(every[family].get(name), base) for name in NAMES]
            rows.append([f"{family}, {every[family]['cells']} cells", label, *shown])
    return tabulate(["model", "%, mean / worst, against", *NAMES.values()], rows)


def budget_table(result: dict[str, Any]) -> str:
    """Throughput with a cap on the time of a chunk, over all kinds of noise."""
    prompts = sorted({row["prompt"] for row in result["budget"]})
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in result["budget"]:
        groups.setdefault((row["family"], row["cap_ms"]), []).append(row)
    rows = []
    for (family, cap), runs in groups.items():
        cells = [row for row in runs if row["fixed"] is not None]
        shown = [family, f"{cap:.0f}"]
        for prompt in prompts:
            here = [row for row in cells if row["prompt"] == prompt]
            means = [np.mean([row[k] for row in here]) for k in ("gain", "optimum_gain") if here]
            gain = " / ".join(f"{100 * mean:+.1f}%" for mean in means)
            shown += [f"{here[0]['fixed']:,}" if here else "none", gain]
        if cells:
            shown += [
                f"{100 * min(row['gain'] for row in cells):+.1f}%",
                f"{100 * np.mean([row['over_cap_5%'] for row in cells]):.1f}%",
                f"{max(row['slowest_ms'] for row in cells):.0f}",
            ]
        rows.append(shown + [""] * (5 + 2 * len(prompts) - len(shown)))
    head = ["model, one stage", "cap, ms"]
    for prompt in prompts:
        head += [f"{prompt:,} ids: best fixed size", "tokens/s, mean / optimum"]
    return tabulate([*head, "worst", "chunks over the cap by 5%", "slowest, ms"], rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws each cell relative to the tuned fixed size by kind of model, and relative to 8,192 by
    number of ranks."""
    plt = svg.pyplot()
    every, rows = result["by_family"], result["cells"]
    names = [name for name in COLORS if name in every["all"]]
    families = [name for name in every if name != "all"]
    figure, (cells, means) = plt.subplots(
        2, 1, figsize=(svg.WIDTH, 8.5), layout="constrained", height_ratios=(5, 3)
    )
    most = 60.0
    for k, name in enumerate(names):
        at, values = [], []
        for row in rows:
            for cell in row["cells"]:
                at.append(families.index(row["family"]) + 0.2 * (k - (len(names) - 1) / 2))
                values.append(min(100 * (cell["ms"][name] / _tuned(cell) - 1.0), most))
        cells.scatter(values, at, s=12, color=COLORS[name], label=_label(name), alpha=0.8)
    cells.axvline(0, color="black", lw=0.7)
    cells.set_yticks(range(len(families)), families)
    cells.invert_yaxis()
    cells.set_xlabel(f"time to first token against the best fixed size, % ({most:.0f}: and more)")
    ranks = sorted({row["ranks"] for row in rows})
    for name in (*names, "tuned"):
        values = []
        for count in ranks:
            some = [cell for row in rows if row["ranks"] == count for cell in row["cells"]]
            times = [_tuned(cell) if name == "tuned" else cell["ms"][name] for cell in some]
            static = [cell["ms"]["fixed 8192"] for cell in some]
            values.append(100 * float(np.mean(np.divide(times, static) - 1.0)))
        color, style = COLORS.get(name, "black"), ":" if name == "tuned" else "-"
        means.plot(ranks, values, style, marker="o", ms=4, color=color, label=_label(name))
    means.axhline(0, color="black", lw=0.7)
    means.set_xscale("log", base=2)
    means.set_xticks(ranks, [str(count) for count in ranks])
    means.set(xlabel="ranks", ylabel="against fixed 8,192, mean, %")
    for axis in (cells, means):
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        svg.plain(axis)
    ours = every["all"]["choose timed"]
    finding = (
        f"choose, finalists timed: {100 * ours['vs_tuned_mean']:+.1f} % against the best fixed "
        f"size ({100 * ours['vs_tuned_worst']:+.1f} % at worst), "
        f"{100 * ours['vs_8192_mean']:+.0f} % against 8,192"
    )
    svg.tell(figure, finding, f"{every['all']['cells']} simulated cells; no GPU was measured.")
    svg.save(figure, path)


def _label(name: str) -> str:
    return NAMES.get(name, "best fixed size").replace("`", "")


def _shown(found: dict[str, float] | None, base: str) -> str:
    if found is None:
        return "absent"
    mean, worst = (100 * found[f"vs_{base}_{which}"] for which in ("mean", "worst"))
    return f"{mean:+.1f} / {worst:+.1f}"


def _tuned(cell: dict[str, Any]) -> float:
    return min(float(ms) for name, ms in cell["ms"].items() if name.startswith("fixed "))
