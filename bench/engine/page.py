"""The engine's table and plot for the pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.common import amount
from bench.engine.tables import VARIANTS
from bench.pages import indented, source, tabulate

LABELS = {"off": "without", "bypassed": "bypassed", "on": "with pystage"}
COLORS = {"off": "#d9822b", "on": "#1f6fb4"}
PANELS = {"": "nothing beside", "+stream": "two copies of 256 MiB always queued"}
BESIDE = {"stream": "weights streamed beside", "bursts": "adapters loaded beside"}


def newest(folder: Path) -> Path | None:
    """The newest run of the engine on a GPU in ``folder``, if there is one."""
    runs = {path: json.loads(path.read_text()) for path in folder.glob("engine*.json")}
    on_gpu = [path for path, run in runs.items() if run["devices"]]
    return max(on_gpu, key=lambda path: str(runs[path]["date"]), default=None)


def label(workload: str) -> str:
    """``prompt-2048+stream`` in words."""
    name, _, beside = workload.partition("+")
    kind, _, size = name.partition("-")
    text = {
        "prompt": f"a prompt of {int(size):,} ids" if size.isdigit() else "",
        "chat": f"a chat turn of {size} ids",
        "loadback": f"{size} ids behind KV that is loaded back",
        "beside": "a prompt of 2,048 ids beside another's load-back",
        "open": f"{size} requests of a trace".replace("/s", " a second,"),
    }[kind]
    return f"{text}, {BESIDE.get(beside, 'copies beside')}" if beside else text


def table(path: Path | None) -> str:
    """Each workload's time to first token, by variant, and what the run was to show."""
    if path is None:
        return "Not measured yet."
    result = json.loads(path.read_text())
    parts = []
    for name, plan in result["plans"].items():
        rows = [_row(row) for row in plan["rows"]]
        head = ["TTFT, ms, p50 / p99", *LABELS.values(), "sooner than without, ms"]
        parts += [f"`{name}`: {plan['about']}.", tabulate(head, rows)]
        parts += [f"Not whole: {cut}." for cut in plan["cut"]]
    met = {True: "yes", False: "no", None: "not measured"}
    rows = []
    for row in result["targets"]:
        noise = row["ok"] is False and row.get("within_noise")
        where = label(row["where"]) if "where" in row else ""
        told = "within the noise" if noise else met[row["ok"]]
        rows.append([indented(row["measure"]), row["target"], amount(row), told, where])
    parts.append(tabulate(["measure", "target", "measured", "met", "where"], rows))
    parts += [f"To disclose: {text}." for text in result["disclosed"]]
    return "\n\n".join([*parts, source(result, path.name)])


def _row(row: dict[str, Any]) -> list[str]:
    def cell(variant: str) -> str:
        ms, starved = row[variant]["ttft_ms"], row[variant]["starved"]
        text = f"{ms['p50']:,.1f} / {ms['p99']:,.1f}" if ms else ""
        if starved:
            late = f"{starved} not within {row[variant]['given_up_after_s']:g} s"
            text = f"{text}; {late}" if text else late
        return text or "not run"

    gain = ""
    if "sooner_than_off_ms" in row:
        low, high = row["sooner_than_off_interval"]
        gain = f"{row['sooner_than_off_ms']:.1f} ({low:.1f} to {high:.1f})"
    return [label(row["workload"]), *(cell(variant) for variant in VARIANTS), gain]


def draw(result: dict[str, Any], path: Path) -> None:
    """Prompts with nothing beside, and the same beside copies: p50, with a line to p99."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pystage"  # the same figures give the same file
    from matplotlib import pyplot as plt

    rows = {r["workload"]: r for plan in result["plans"].values() for r in plan["rows"]}
    sizes = sorted(
        {int(w[7:].partition("+")[0]) for w in rows if w.startswith("prompt-") and "+stream" in w}
    )
    shown = [
        row for n in sizes for tail in ("", "+stream") if (row := rows.get(f"prompt-{n}{tail}"))
    ]
    times = [r[v]["ttft_ms"]["p99"] for r in shown for v in COLORS if r[v]["ttft_ms"]]
    most = 1.25 * max(times, default=1.0)
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.6 * len(sizes) + 1.4), layout="constrained")
    for axis, tail, title in zip(
        axes,
        ("", "+stream"),
        ("nothing beside", "two copies of 256 MiB always queued"),
        strict=True,
    ):
        for at, size in enumerate(sizes):
            row = rows.get(f"prompt-{size}{tail}")
            for up, (variant, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
                ms = row[variant]["ttft_ms"] if row else None
                if row and row[variant]["starved"]:
                    after = row[variant]["given_up_after_s"]
                    axis.barh(at + up, most, 0.36, color="none", edgecolor=color, hatch="///")
                    text = f"{row[variant]['starved']} not within {after:g} s"
                    box = {"color": "white", "pad": 1}
                    axis.text(
                        most / 2, at + up, text, ha="center", va="center", fontsize=7, bbox=box
                    )
                elif ms:
                    axis.barh(at + up, ms["p50"], 0.36, color=color)
                    axis.plot([ms["p50"], ms["p99"]], [at + up] * 2, color="#444444", linewidth=1)
                    axis.text(ms["p99"], at + up, f" {ms['p50']:.1f}", va="center", fontsize=7)
        axis.set(
            title=title, xlim=(0, most), xlabel="time to first token, ms", yticks=range(len(sizes))
        )
        axis.set_yticklabels([f"{n:,} ids" for n in sizes])
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=7)
    handles = [mpl.patches.Patch(color=c, label=LABELS[v]) for v, c in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
