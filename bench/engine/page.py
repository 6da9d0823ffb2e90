"""The engine's table and plot for the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import svg
from bench.common import amount, load
from bench.engine.tables import HEADS, VARIANTS, cells, verdict
from bench.pages import indented, source, tabulate

COLORS = {"off": "#d9822b", "on": "#1f6fb4"}
PANELS = {"": "nothing beside", "+stream": "two copies of 256 MiB always queued"}
BESIDE = {"stream": "weights streamed beside", "bursts": "adapters loaded beside"}


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
    result = load(path)
    parts = []
    for name, plan in result["plans"].items():
        rows = [[label(row["workload"]), *cells(row)] for row in plan["rows"]]
        head = ["TTFT, ms, p50 / p99", *HEADS]
        parts += [f"`{name}`: {plan['about']}.", tabulate(head, rows)]
        parts += [f"Not whole: {cut}." for cut in plan["cut"]]
    rows = []
    for row in result["targets"]:
        where = label(row["where"]) if "where" in row else ""
        rows.append([indented(row["measure"]), row["target"], amount(row), verdict(row), where])
    parts.append(tabulate(["measure", "target", "measured", "met", "where"], rows))
    parts += [f"To disclose: {text}." for text in result["disclosed"]]
    return "\n\n".join([*parts, source(result, path.name)])


def draw(result: dict[str, Any], path: Path) -> None:
    """Prompts with nothing beside, and the same beside copies: p50, with a line to p99."""
    plt = svg.pyplot()
    rows = {r["workload"]: r for plan in result["plans"].values() for r in plan["rows"]}
    sizes = sorted(
        {int(w[7:].partition("+")[0]) for w in rows if w.startswith("prompt-") and "+stream" in w}
    )
    names = [f"prompt-{n}{tail}" for n in sizes for tail in PANELS]
    shown = [rows[name] for name in names if name in rows]
    times = [r[v]["ttft_ms"]["p99"] for r in shown for v in COLORS if r[v]["ttft_ms"]]
    most = 1.25 * max(times, default=1.0)
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.6 * len(sizes) + 1.4), layout="constrained")
    for axis, (tail, title) in zip(axes, PANELS.items(), strict=True):
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
        axis.set(title=title, xlim=(0, most), xlabel="time to first token, ms")
        axis.set_yticks(range(len(sizes)))
        axis.set_yticklabels([f"{n:,} ids" for n in sizes])
        axis.invert_yaxis()
        svg.plain(axis)
    names = dict(zip(VARIANTS, HEADS, strict=False))
    handles = [plt.Rectangle((0, 0), 1, 1, color=c, label=names[v]) for v, c in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    svg.save(figure, path)
