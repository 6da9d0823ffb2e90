"""Tables and the plot of the study of simulated models (pp_surfaces.py), from its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench import svg
from bench.pages import tabulate

# Keys of the result, and how the pages call them.
NAMES = {
    "sglang": "SGLang",
    "equal time": "equal time",
    "choose": "`choose`",
    "choose timed": "`choose`, timed",
    "optimum": "optimum",
}
COLORS = {
    "sglang": "#d9822b",
    "equal time": "#8c5fb4",
    "choose": "#7fb0dc",
    "choose timed": "#1f6fb4",
    "optimum": "#9a9a9a",
}


def families_table(result: dict[str, Any]) -> str:
    """Time to first token by kind of model: the mean of its cells, and the worst."""
    rows = []
    every = result["by_family"]
    for family in [*(name for name in every if name != "all"), "all"]:
        row = [f"{family} ({every[family]['cells']} cells)"]
        for base in ("tuned", "8192"):
            for name in NAMES:
                found = every[family].get(name)
                row.append(_shown(found, base) if found else "absent")
        rows.append(row)
    head = ["%, mean / worst"]
    head += [f"{label}, against tuned" for label in NAMES.values()]
    head += [f"{label}, against 8,192" for label in NAMES.values()]
    return tabulate(head, rows)


def budget_table(result: dict[str, Any]) -> str:
    """Throughput with a cap on the time of a chunk: over prompts and noise."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in result["budget"]:
        groups.setdefault((row["family"], row["cap_ms"]), []).append(row)
    rows = []
    for (family, cap), cells in groups.items():
        gains = [100 * row["gain"] for row in cells if row["gain"] is not None]
        sizes = sorted({row["fixed"] for row in cells if row["fixed"] is not None})
        rows.append(
            [
                family,
                f"{cap:.0f}",
                ", ".join(f"{size:,}" for size in sizes) or "none",
                f"{np.mean(gains):+.1f}%" if gains else "",
                f"{min(gains):+.1f}%" if gains else "",
                f"{100 * np.mean([row['over_cap_5%'] for row in cells]):.1f}%",
                f"{max(row['slowest_ms'] for row in cells):.0f}",
            ]
        )
    head = ["model, one stage", "cap, ms", "best fixed sizes within it", "tokens/s, mean", "worst"]
    return tabulate([*head, "chunks over the cap by 5%", "slowest, ms"], rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Each cell against the tuned fixed size, by kind of model; and by ranks against 8,192."""
    plt = svg.pyplot()
    every, rows = result["by_family"], result["cells"]
    names = [name for name in NAMES if name in every["all"]]
    families = [name for name in every if name != "all"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2)
    )
    for k, name in enumerate(names):
        at, values = [], []
        for row in rows:
            for cell in row["cells"]:
                at.append(families.index(row["family"]) + 0.2 * (k - (len(names) - 1) / 2))
                values.append(100 * (cell["ms"][name] / _tuned(cell) - 1.0))
        left.scatter(
            np.clip(values, None, 60), at, s=8, color=COLORS[name], label=NAMES[name].strip("`")
        )
    left.axvline(0, color="black", lw=0.5)
    left.set_yticks(range(len(families)), families)
    left.invert_yaxis()
    left.set_xlabel("time to first token against the tuned fixed size, % (right edge: 60 and more)")
    ours = every["all"]["choose timed"]
    left.set_title(
        f"choose: {100 * ours['vs_tuned_mean']:+.1f} % on average against the best fixed size, "
        f"worst cell {100 * ours['vs_tuned_worst']:+.1f} %"
    )
    ranks = sorted({row["ranks"] for row in rows})
    for name in (*names, "tuned"):
        means = []
        for count in ranks:
            cells = [c for row in rows if row["ranks"] == count for c in row["cells"]]
            times = [_tuned(c) if name == "tuned" else c["ms"][name] for c in cells]
            static = [c["ms"]["fixed 8192"] for c in cells]
            means.append(100 * float(np.mean(np.divide(times, static) - 1.0)))
        label = NAMES.get(name, "tuned fixed size").strip("`")
        style = ":" if name == "tuned" else "-"
        right.plot(
            ranks, means, style, marker="o", ms=3, color=COLORS.get(name, "black"), label=label
        )
    right.axhline(0, color="black", lw=0.5)
    right.set_xscale("log", base=2)
    right.set_xticks(ranks, [str(count) for count in ranks])
    right.set(xlabel="ranks", ylabel="time to first token against fixed 8,192, mean, %")
    right.set_title(f"against 8,192, choose gains {-100 * ours['vs_8192_mean']:.0f} % on average")
    for axis in (left, right):
        axis.legend(fontsize=7, frameon=False)
        svg.plain(axis)
    svg.save(figure, path)


def _shown(found: dict[str, float], base: str) -> str:
    mean, worst = (100 * found[f"vs_{base}_{which}"] for which in ("mean", "worst"))
    return f"{mean:+.1f} / {worst:+.1f}"


def _tuned(cell: dict[str, Any]) -> float:
    return min(float(ms) for name, ms in cell["ms"].items() if name.startswith("fixed "))
