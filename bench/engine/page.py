"""The engine's table and plot for the pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import amount, load
from bench.engine.plans import PLANS
from bench.engine.tables import HEADS, VARIANTS, cells, p99_of, requests, targets, verdict
from bench.report import svg
from bench.report.tables import indented, source, tabulate

COLORS = {"off": "#c2660c", "on": "#1f6fb4"}
SIDES = {"off": "baseline: SGLang", "on": "pystage in SGLang"}
PANELS = {"": "no other copies", "+stream": "two copies of 256 MiB always queued"}
BESIDE = {"stream": "while copies are always queued", "bursts": "while LoRA adapters are loaded"}
AS_LONG = 1.05  # times to first token up to this ratio count as "as long as"


def label(workload: str) -> str:
    """``prompt-2048+stream`` in words."""
    name, _, beside = workload.partition("+")
    kind, _, size = name.partition("-")
    text = {
        "prompt": f"a prompt of {int(size):,} ids" if size.isdigit() else "",
        "chat": f"a chat turn of {size} ids",
        "loadback": f"{int(size):,} ids, after KV cache is loaded back" if size.isdigit() else "",
        "beside": "a prompt of 2,048 ids, while another's KV cache is loaded back",
        "open": f"requests of a trace, {size}".replace("/s", " a second"),
    }[kind]
    return f"{text}, {BESIDE.get(beside, 'while copies run')}" if beside else text


def measure(name: str) -> str:
    """A target's name, with the words of the table's column heads."""
    for short, words in (
        ("TTFT ", "time to first token, "),
        (", with / ", ", pystage / "),
        ("/ off", "/ baseline"),
        ("/ bypassed", "/ pool off"),
        ("p99 with pystage, copies / none", "p99, pystage, with copies / without"),
    ):
        name = name.replace(short, words)
    return name


@dataclass(frozen=True)
class Run:
    """A plan's newest run on a GPU."""

    plan: str
    found: dict[str, Any]
    result: dict[str, Any]
    file: str

    @property
    def source(self) -> str:
        """The run's source, without the parts that the page states itself."""
        command = self.result["command"].partition(" --disclose ")[0]
        command = command.replace("-m bench/engine", "-m bench.engine")  # in older runs
        return source({**self.result, "command": command}, self.file)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["workload"]: row for row in self.found["rows"]}


def newest_runs(folder: Path) -> dict[str, Run]:
    """The newest run of each plan, in the order of the plans. Skips plans that no longer exist."""
    runs = [run for path in folder.glob("engine*.json") for run in runs_of(path).values()]
    runs.sort(key=lambda run: str(run.result["date"]))
    newest = {run.plan: run for run in runs}
    return {plan: newest[plan] for plan in PLANS if plan in newest}


def runs_of(path: Path) -> dict[str, Run]:
    """The runs of a file, by plan. Empty if no GPU was measured."""
    result = load(path)
    name = f"earlier/{path.name}" if path.parent.name == "earlier" else path.name
    return {
        plan: Run(plan, found, result, name)
        for plan, found in result["plans"].items()
        if found["rows"] and result["devices"]
    }


def table(runs: dict[str, Run]) -> str:
    """Each workload's time to first token by variant, and the targets of the runs."""
    if not runs:
        return "Not measured yet."
    parts = []
    for run in runs.values():
        rows = [[label(row["workload"]), *cells(row), requests(row)] for row in run.found["rows"]]
        parts += [
            f"`{run.plan}`: {run.found['about']}.",
            tabulate(["time to first token, ms, p50 / p99", *HEADS, "requests"], rows),
        ]
        if gaps := [gap_cells(row) for row in run.found["rows"] if "itl_ms" in row["on"]]:
            head = ["between two tokens, ms, p50 / p99 / longest", *HEADS[:3]]
            parts.append(tabulate(head, gaps))
        parts += [
            f"Longest forward of {label(workload)}: {off:,.1f} ms in the baseline, {on:,.1f} ms "
            "with pystage."
            for workload, (off, on) in longest_forwards(run).items()
        ]
        if corrections := run.found.get("sizing", {}).get("corrections"):
            parts.append(f"The latency model was corrected {corrections} times during the run.")
        parts += cuts(run)
    rows = []
    judged = [run for run in runs.values() if PLANS[run.plan].same_chunks]
    every = [{**row, "plan": run.plan} for run in judged for row in run.found["rows"]]
    traces = {f"{r.plan}: {w}": t for r in judged for w, t in r.found["traces"].items()}
    for row in targets(every, traces):
        where = f"`{row['plan']}`: {label(row['where'])}" if "where" in row else ""
        measured = amount(row)
        if "interval" in row:
            low, high = row["interval"]
            measured = f"{row['value']:.3f} x ({low:.3f} to {high:.3f})"
        several = ""
        if row.get("undecided_of", [0])[0]:
            (above, count), (largest, plan, name) = row["undecided_of"], row["largest"]
            several = f"{above} of {count}, up to {largest:.2f} x (`{plan}`: {label(name)})"
        shown = [indented(measure(row["measure"])), row["target"], measured, verdict(row)]
        rows.append([*shown, where, several])
    head = ["measure", "target", "most certainly above", "met", "where", "above, not certainly"]
    parts.append(tabulate(head, rows))
    if others := [f"`{run.plan}`" for run in runs.values() if run not in judged]:
        parts.append(f"Not judged, because the chunks are not SGLang's: {', '.join(others)}.")
    disclosed = dict.fromkeys(text for run in runs.values() for text in run.result["disclosed"])
    parts += [f"What differs from a usual installation: {text}." for text in disclosed]
    sources = dict.fromkeys(run.source for run in runs.values())
    return "\n\n".join([*parts, *sources])


def gap_cells(row: dict[str, Any]) -> list[str]:
    """A workload's gaps between tokens in the three variants."""
    told = [label(row["workload"])]
    for variant in VARIANTS:
        ms = row[variant]["itl_ms"]
        told.append(f"{ms['p50']:,.1f} / {p99_of(ms)} / {ms['max']:,.1f}")
    return told


def budget_table(run: Run) -> str:
    """The two sides of a time budget per batch: gaps between tokens, and the time to the first."""
    rows = [
        [f"between two tokens (and the longest), {name}", off, on]
        for name, off, _, on in (gap_cells(r) for r in run.rows.values() if "itl_ms" in r["on"])
    ]
    for row in run.rows.values():
        off, _, on, _ = cells(row)
        rows.append([f"first token, {label(row['workload'])}", off, on])
    for workload, (off, on) in longest_forwards(run).items():
        rows.append([f"longest forward, {label(workload)}", f"{off:,.1f}", f"{on:,.1f}"])
    table = tabulate(["ms, p50 / p99", "baseline", "with a budget"], rows)
    return "\n\n".join([table, *cuts(run), run.source])


def sized_table(run: Run) -> str:
    """Prompts in chunks of SGLang's dynamic sizes and of pystage's."""
    rows = []
    for row in run.rows.values():
        off, _, on, sooner = cells(row)
        rows.append([label(row["workload"]), off, on, sooner, requests(row)])
    head = ["first token, ms, p50 / p99", "SGLang's sizes", "pystage's sizes", "sooner, ms"]
    head.append("requests")
    return "\n\n".join([tabulate(head, rows), *cuts(run), run.source])


def cuts(run: Run) -> list[str]:
    return [f"This run is not complete: {cut}." for cut in run.found["cut"]]


def longest_forwards(run: Run) -> dict[str, tuple[float, float]]:
    """The longest forward of traced prefills in ms, in the baseline and with pystage, by workload,
    where the plan changes the chunks."""
    if PLANS[run.plan].same_chunks:
        return {}
    return {
        workload: (traced["off"]["longest_forward_ms"], traced["on"]["longest_forward_ms"])
        for workload, traced in run.found["traces"].items()
        if all(side and side.get("longest_forward_ms") for side in traced.values())
    }


def first_table(runs: dict[str, Run]) -> str:
    """The README's table: prompts without other copies, and the same prompts beside copies."""
    if "copies" not in runs:
        return "Not measured yet."
    run = runs["copies"]
    rows = []
    for name, row in run.rows.items():
        if name.startswith("prompt") and not name.endswith("+bursts"):
            off, _, on, _ = cells(row)
            rows.append([label(name), off, on])
    head = ["time to first token in SGLang, ms, p50 / p99", "baseline", "pystage"]
    return "\n\n".join([tabulate(head, rows), *cuts(run), run.source])


def finding(rows: dict[str, dict[str, Any]], sizes: list[int]) -> str:
    """What the plot shows, in one sentence. It claims only what these rows support."""
    beside = {n: rows[f"prompt-{n}+stream"] for n in sizes}
    late = [f"{n:,}" for n, row in beside.items() if row["off"]["starved"]]
    calm = {n: rows.get(f"prompt-{n}", {}).get("on", {}).get("ttft_ms") for n in sizes}
    as_long = all(
        row["on"]["ttft_ms"]
        and (alone := calm[n])
        and not row["on"]["starved"]
        and row["on"]["ttft_ms"]["p50"] <= AS_LONG * alone["p50"]
        for n, row in beside.items()
    )
    if not late:
        return "Time to first token in SGLang, with and without pystage"
    text = f"While copies are queued, SGLang does not start prompts of {' and '.join(late)} ids"
    return f"{text}; with pystage every prompt takes as long as without copies" if as_long else text


def draw(run: Run, path: Path) -> None:
    """Draws prompts without other copies and the same beside copies: p50, with a line to p99."""
    plt = svg.pyplot()
    rows = run.rows
    sizes = sorted(
        {int(w[7:].partition("+")[0]) for w in rows if w.startswith("prompt-") and "+stream" in w}
    )
    names = [f"prompt-{n}{tail}" for n in sizes for tail in PANELS]
    shown = [rows[name] for name in names if name in rows]
    times = [r[v]["ttft_ms"]["p99"] for r in shown for v in COLORS if r[v]["ttft_ms"]]
    most = 1.25 * max(times, default=1.0)
    height = 0.75 * len(sizes) + 2.0
    figure, axes = plt.subplots(1, 2, figsize=(svg.WIDTH, height), layout="constrained")
    for axis, (tail, title) in zip(axes, PANELS.items(), strict=True):
        for at, size in enumerate(sizes):
            row = rows.get(f"prompt-{size}{tail}")
            for up, (variant, color) in zip((-0.2, 0.2), COLORS.items(), strict=True):
                ms = row[variant]["ttft_ms"] if row else None
                if row and row[variant]["starved"]:
                    text = f"no answer in {row[variant]['given_up_after_s']:g} s"
                    axis.text(0, at + up, f" {text}", va="center", color=color, fontweight="bold")
                elif ms:
                    axis.barh(at + up, ms["p50"], 0.36, color=color)
                    axis.plot([ms["p50"], ms["p99"]], [at + up] * 2, color="#444444", linewidth=1)
                    axis.text(ms["p99"], at + up, f" {ms['p50']:.1f}", va="center")
        axis.set(title=title, xlim=(0, most), xlabel="time to first token, ms")
        axis.set_yticks(range(len(sizes)))
        axis.set_yticklabels([f"{n:,} ids" for n in sizes])
        axis.set_ylim(len(sizes) - 0.5, -0.5)
        svg.plain(axis)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c, label=SIDES[v]) for v, c in COLORS.items()]
    axes[0].legend(handles=handles, loc="upper right", frameon=False)
    device, about = run.result["device"], run.found["about"].partition(",")[0]
    svg.tell(figure, finding(rows, sizes), f"{device}, {about}. Bars: p50; lines: to p99.")
    svg.save(figure, path)
