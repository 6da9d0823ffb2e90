"""The engine's table and plot for the pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import svg
from bench.common import amount, load
from bench.engine.plans import PLANS
from bench.engine.tables import HEADS, VARIANTS, cells, targets, verdict
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


@dataclass(frozen=True)
class Run:
    """A plan's newest run on a GPU."""

    plan: str
    found: dict[str, Any]
    result: dict[str, Any]
    file: str

    @property
    def source(self) -> str:
        """Without what the command discloses: that stands on the page by itself."""
        command = self.result["command"].partition(" --disclose ")[0]
        return source({**self.result, "command": command}, self.file)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["workload"]: row for row in self.found["rows"]}


def newest_runs(folder: Path) -> dict[str, Run]:
    """By plan, in their order; runs of plans that are no more are left out."""
    files = [(load(path), path.name) for path in folder.glob("engine*.json")]
    files = [(result, name) for result, name in files if result["devices"]]
    files.sort(key=lambda file: str(file[0]["date"]))
    newest = {
        plan: Run(plan, found, result, name)
        for result, name in files
        for plan, found in result["plans"].items()
        if found["rows"]
    }
    return {plan: newest[plan] for plan in PLANS if plan in newest}


def table(runs: dict[str, Run]) -> str:
    """Each workload's time to first token, by variant, and what the runs were to show."""
    if not runs:
        return "Not measured yet."
    parts = []
    for run in runs.values():
        rows = [[label(row["workload"]), *cells(row)] for row in run.found["rows"]]
        parts += [
            f"`{run.plan}`: {run.found['about']}.",
            tabulate(["TTFT, ms, p50 / p99", *HEADS], rows),
        ]
        parts += [f"Not whole: {cut}." for cut in run.found["cut"]]
    rows = []
    every = [row for run in runs.values() for row in run.found["rows"]]
    traces = {f"{r.plan}: {w}": t for r in runs.values() for w, t in r.found["traces"].items()}
    for row in targets(every, traces):
        where = label(row["where"]) if "where" in row else ""
        rows.append([indented(row["measure"]), row["target"], amount(row), verdict(row), where])
    parts.append(tabulate(["measure", "target", "measured", "met", "where"], rows))
    disclosed = dict.fromkeys(text for run in runs.values() for text in run.result["disclosed"])
    parts += [f"To disclose: {text}." for text in disclosed]
    sources = dict.fromkeys(run.source for run in runs.values())
    return "\n\n".join([*parts, *sources])


def first_table(runs: dict[str, Run]) -> str:
    """Of the README: prompts with nothing beside, and the same beside copies."""
    if "copies" not in runs:
        return "Not measured yet."
    run = runs["copies"]
    rows = []
    for name, row in run.rows.items():
        if name.startswith("prompt") and not name.endswith("+bursts"):
            off, _, on, _ = cells(row)
            rows.append([label(name).replace("weights streamed", "copies"), off, on])
    head = ["time to first token, ms, p50 / p99", "SGLang", "with pystage"]
    return "\n\n".join([tabulate(head, rows), run.source])


def draw(run: Run, path: Path) -> None:
    """Prompts with nothing beside, and the same beside copies: p50, with a line to p99."""
    plt = svg.pyplot()
    rows = run.rows
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
                    text = f"no answer in {after:g} s"
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
