"""Tables and plots of the parts (staging.py), of the plugin in SGLang (sglang_plugin.py) and of the
pipeline (pp_prefill.py), from their results. Those of the whole benchmark are in pages.py."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import svg
from bench.common import amount, load, newest_on_gpu
from bench.engine import page as engine
from bench.pages import indented, source, tabulate

RESULTS = Path("bench/results")  # below the repository's root, as all that follow
STAGING = RESULTS / "staging-nvidia-h100-80gb-hbm3.json"
SGLANG = RESULTS / "sglang-nvidia-h200.json"
PIPELINE = RESULTS / "pp_prefill-8b-2xnvidia-h100-80gb-hbm3.json"
EARLIER = RESULTS / "earlier"
PLOT = Path("docs/staging.svg")
PIPELINE_PLOT = Path("docs/pp-profile.svg")
FAULTS = RESULTS / "faults-nvidia-h200.json"
SUSTAINED_PLOT = Path("docs/sustained.svg")
ENGINE_PLOT = Path("docs/engine.svg")
SHAPES = ("1 x 128", "1 x 8192", "8 x 1024", "64 x 128", "1 x 16384", "1 x 131072")
EVENER = "equal time, base x 2"


def sections(root: Path) -> dict[str, str]:
    """What stands in the pages between marks, by the mark's name."""
    staging, pipeline = load(root / STAGING), load(root / PIPELINE)
    return {
        "host": host_table(staging),
        "floor": floor_table(staging),
        "stream": stream_table(staging),
        "latency": latency_table(staging),
        "targets": target_table(staging, without=IN_THE_SUITE),
        "source": source(staging, STAGING.name),
        "others": other_machines(root / EARLIER),
        "sglang": sglang_tables(root / SGLANG),
        "sglang-when": when_it_helps(
            engine.newest_runs(root / RESULTS).get("copies"), load(root / SGLANG)
        ),
        "sglang-in-place": in_place_table(root / SGLANG),
        "pp-errors": pipeline_errors(pipeline["results"]),
        "pp-plans": pipeline_plans(pipeline["results"]),
        "pp-targets": pipeline_targets(pipeline["results"]),
        "pp-source": source(pipeline, PIPELINE.name),
        "faults": faults_text(root / FAULTS),
        "sustained": sustained_table(newest_on_gpu(root / RESULTS, "sustained")),
        "engine": engine.table(engine.newest_runs(root / RESULTS)),
        "engine-first": engine.first_table(engine.newest_runs(root / RESULTS)),
    }


def draw(root: Path) -> list[Path]:
    """Draws the plots; returns their files."""
    plots = [root / PLOT, root / PIPELINE_PLOT]
    draw_staging(load(root / STAGING), plots[0])
    draw_pipeline(load(root / PIPELINE), plots[1])
    if run := newest_on_gpu(root / RESULTS, "sustained"):
        plots.append(root / SUSTAINED_PLOT)
        draw_sustained(load(run), plots[-1])
    if run := engine.newest_runs(root / RESULTS).get("copies"):
        plots.append(root / ENGINE_PLOT)
        engine.draw(run, plots[-1])
    return plots


def pair(cell: dict[str, float]) -> str:
    return f"{cell['p50']:,.1f} / {cell['p99']:,.1f}"


def microseconds(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # no -0.0


def other_machines(folder: Path) -> str:
    """Machines of one kind differ: what the main measure was on others."""
    lines = []
    for path in sorted(folder.glob("staging-*.json")):
        result = load(path)
        array, listed = result["host"]["1 x 8192 array"], result["host"]["1 x 8192 list"]
        ours, theirs = array["pystage"]["p50"], array["concatenate + pin + to"]["p50"]
        lines.append(
            f"- commit `{result['commit'][:7]}`: 1 x 8,192 from `array` {ours:.1f} against "
            f"{theirs:.1f} ({theirs / ours:.1f} x), from `list` {listed['pystage']['p50']:.1f} "
            f"against {listed['torch.tensor + pin + to']['p50']:,.0f}"
        )
    return "\n".join(lines)


def host_table(result: dict[str, Any]) -> str:
    rows = []
    for shape in SHAPES:
        cell = result["host"][f"{shape} array"]
        ours, theirs = cell["pystage, vocab checked"], cell["concatenate + pin + to"]
        requests, length = shape.split(" x ")
        rows.append(
            [
                f"{requests} x {int(length):,} from `array`",
                pair(ours),
                pair(theirs),
                f"{theirs['p50'] / ours['p50']:.1f} x",
            ]
        )
    cell = result["host"]["1 x 8192 list"]
    ours = cell["pystage"]
    theirs = cell.get("np.fromiter + pin + to", cell["torch.tensor + pin + to"])
    rows.append(
        ["1 x 8,192 from `list`", pair(ours), pair(theirs), f"{theirs['p50'] / ours['p50']:.0f} x"]
    )
    return tabulate(["host time, us, p50 / p99", "pystage", "torch", "p50"], rows)


def floor_table(result: dict[str, Any]) -> str:
    """What no way can do without, in C, beside both calls from Python."""
    rows = []
    for shape, floor in result["floor"].items():
        ours = result["host"][f"{shape} array"]["pystage"]["p50"]
        parts = ("memcpy", "allocation", "launch", "event", "sum")
        requests, length = shape.split(" x ")
        rows.append(
            [
                f"{requests} x {int(length):,}",
                *(f"{floor[part]['p50']:.1f}" for part in parts),
                f"{ours:.1f}",
                f"{ours / floor['sum']['p50']:.1f} x",
            ]
        )
    head = ["us, p50", "memcpy", "allocation", "launch", "event", "floor", "pystage", ""]
    return tabulate(head, rows)


def stream_table(result: dict[str, Any]) -> str:
    head = [
        "added to the compute stream, us, p50",
        "cudaMemcpyAsync",
        "deferred",
        "eager",
        "an empty kernel",
    ]
    names = ("cudaMemcpyAsync", "deferred", "eager", "empty kernel")
    rows = [
        [f"{int(count):,} ids", *(microseconds(cell[n]["p50"]) for n in names)]
        for count, cell in result["stream"].items()
    ]
    busy = result["busy"]
    rows.append(
        ["8,192 ids, between matrix products", *(microseconds(busy[n]["p50"]) for n in names)]
    )
    return tabulate(head, rows)


def latency_table(result: dict[str, Any]) -> str:
    rows = [
        [f"8,192 ids, {where}", pair(cell["cudaMemcpyAsync"]), pair(cell["deferred"])]
        for where, cell in result["latency"].items()
    ]
    return tabulate(
        ["call to ids on the device, us, p50 / p99", "cudaMemcpyAsync", "pystage"], rows
    )


# Measures of earlier staging runs that the suite holds to a stricter target or against a quicker
# peer: those count.
IN_THE_SUITE = (
    "stage + resolve, 1 x 8,192 list",
    "  against torch.tensor(pin) + to",
    "compute stream, eager, GPU busy",
)


def target_table(result: dict[str, Any], without: Sequence[str] = ()) -> str:
    targets = [row for row in result["targets"] if row["measure"] not in without]
    limits = any(r.get("limit") is not None for r in targets)
    rows = [
        [
            indented(r["measure"]),
            r["target"],
            amount(r),
            *([amount(r, "limit")] if limits else []),
            "yes" if r["ok"] else "no",
        ]
        for r in targets
    ]
    head = ["measure", "target", "measured", *(["at the floor"] if limits else []), "met"]
    return tabulate(head, rows)


def sglang_tables(path: Path) -> str:
    """The plugin in SGLang, with and without."""
    result = load(path)
    sides = ("with pystage", "without")
    cells = [
        (re.sub(r"(\d)(\d{3})\b", r"\1,\2", shape) + f": {part}", cell[part])
        for shape, cell in result.get("host", {}).items()
        for part in ("flatten + resolve", "prepare + resolve")
    ]
    cells += [
        ("8,192 behind 122,880: slice + flatten", c["us"])
        for c in result.get("history", {}).values()
    ]
    cells += [(f"8,192 ids ready, {w}", c["us"]) for w, c in result.get("latency", {}).items()]
    rows = [
        [name, *(pair(cell[side]) for side in sides), f"{cell['ratio']['p50']:.1f} x"]
        for name, cell in cells
    ]
    table = tabulate(["us, p50 / p99", *sides, "p50"], rows)
    return f"{table}\n\n{target_table(result)}\n\n{source(result, path.name)}"


def when_it_helps(run: engine.Run | None, plugin: dict[str, Any]) -> str:
    """What somebody who has SGLang wants to know first."""
    if run is None:
        return "Not measured yet."
    row = run.rows["prompt-4096+stream"]
    ms, patience = row["on"]["ttft_ms"]["p50"], row["off"]["given_up_after_s"]
    one, paged = (
        plugin["host"][shape]["prepare + resolve"]["saved_us"]["p50"] / 1e3
        for shape in ("1 x 8192", "64 x 128, pages of 64")
    )
    few, many = (len(plugin["launches"]["1 x 8192"][s]) for s in ("with pystage", "without"))
    bullets = (
        "**It helps** when copies to the GPU are queued on another stream without a pause: weights "
        "that are streamed or updated, LoRA loads, another tenant's offload. SGLang does not start "
        "prompts of 4,096 ids and more while the copies last. With pystage they start at once "
        f"({ms:.0f} ms against no answer in {patience:g} s, [below](#time-to-first-token)).",
        f"**It saves a little** elsewhere: {one:.1f} ms of the scheduler's time for a prefill of "
        f"one request, {paged:.1f} ms for 64 requests with pages of 64 tokens. On the schedule "
        f"stream {few} kernels are left of {many} kernels and copies. In the time to first token "
        "this is within the noise.",
        "**It does not help** with HiCache's load-back, by kernels (SGLang's default) or by "
        "copies: no batch waited there. It does nothing for decode, on a CPU, or where SGLang asks "
        "for memory that is not pinned.",
    )
    return "\n".join(
        textwrap.fill(f"- {text}", 100, subsequent_indent="  ", break_on_hyphens=False)
        for text in bullets
    )


def in_place_table(path: Path) -> str:
    """Where the time of a batch of 8,192 ids goes, in SGLang."""
    result = load(path)
    sides = ("with pystage", "without")
    parts = {
        "flatten_arrays_to_pinned_cpu": "flatten_arrays_to_pinned_cpu",
        "resolve_forward_inputs": "resolve_forward_inputs",
        "resolve, nothing to do": "&nbsp;&nbsp;of a batch that has its ids",
        "prepare_for_extend": "prepare_for_extend, all of it",
        "alloc_for_extend": "&nbsp;&nbsp;alloc_for_extend",
        "sampling info": "&nbsp;&nbsp;sampling info",
    }
    cell = result["host"]["1 x 8192"]
    rows = [[label, *(pair(cell[part][side]) for side in sides)] for part, label in parts.items()]
    below = [
        [f"{what}: {part}", pair(values)]
        for what, floor in result["floor"].items()
        for part, values in floor.items()
    ]
    tables = [
        tabulate(["us, p50 / p99", *sides], rows),
        tabulate(["the floor, us, p50 / p99", ""], below),
    ]
    return "\n\n".join([*tables, source(result, path.name)])


# --- driver calls that fail ---------------------------------------------------------------------


def faults_text(path: Path) -> str:
    """At how many places a driver call was made to fail."""
    result = load(path)
    return (
        f"Last run: {result['places']} places on an {result['device']}, driver "
        f"{result['driver']}, commit `{result['commit'][:9]}`, `bench/results/{path.name}`."
    )


# --- sustained ------------------------------------------------------------------------------------


def sustained_table(path: Path | None) -> str:
    """What a sustained run was to show, and its first and last minutes."""
    if path is None:
        return "Not measured yet."
    result = load(path)
    rows = result["rows"]
    batches, tokens = (sum(row[name] for row in rows) for name in ("batches", "tokens"))
    text = (
        f"{result['minutes']:.0f} minutes, {batches:,} batches, {tokens:,} ids, "
        f"{result['streams']} streams, beside copies of "
        f"{result['traffic_bytes'] / 2**20:.0f} MiB kept queued."
    )
    some = sorted({0, len(rows) // 2, len(rows) - 1})
    minutes = [
        [
            f"{rows[at]['minute']:.0f}",
            f"{rows[at]['batches']:,}",
            f"{rows[at]['wrong']}",
            pair(rows[at]["host"]),
            pair(rows[at]["ready"]),
            f"{rows[at]['resident_bytes'] / 2**20:,.0f}",
            f"{rows[at]['pool_bytes'] / 2**20:,.0f}",
        ]
        for at in some
    ]
    head = ["minute", "batches", "wrong ids", "stage + resolve, us, p50 / p99"]
    head += ["ready, us, p50 / p99", "resident, MiB", "pools, MiB"]
    parts = [text, target_table(result), tabulate(head, minutes), source(result, path.name)]
    return "\n\n".join([*parts, f"![figures of every minute]({SUSTAINED_PLOT.name})"])


# --- the pipeline ---------------------------------------------------------------------------------

PREDICTORS = {
    "ours": "profile ours",
    "sglang warm": "profile sglang warm",
    "sglang cold": "profile sglang cold",
}


def pipeline_errors(measured: dict[str, Any]) -> str:
    rows = []
    for name, profile in PREDICTORS.items():
        error = measured["heldout"][name]
        rows.append(
            [
                name.replace("sglang", "SGLang's sweep,"),
                f"{measured[profile]['forwards']}",
                f"{measured[profile]['seconds']:.1f}",
                f"{error['median']:.1%}",
                f"{error['p95']:.1%}",
                f"{error['worst']:.1%}",
            ]
        )
    return tabulate(["prediction", "forwards", "seconds", "median error", "p95", "worst"], rows)


def pipeline_plans(measured: dict[str, Any]) -> str:
    rows = []
    for name, plan in measured.items():
        if not name.startswith("ttft "):
            continue
        _, prompt, policy = name.split(" ", 2)
        by_ranks = plan["simulated_ms_by_ranks"]
        rows.append(
            [
                f"{int(prompt):,}",
                policy.replace("sglang", "SGLang,"),
                f"{len(plan['chunks'])}",
                f"{plan['spread']:.1%}",
                f"{plan['ttft_ms']:,.0f}",
                f"{plan['simulation_error']:+.1%}",
                f"{by_ranks['8']:,.0f}",
                f"{by_ranks['16']:,.0f}",
            ]
        )
    head = ["prompt", "chunks sized by", "chunks", "spread", "first token, ms"]
    return tabulate([*head, "simulated", "8 ranks, ms", "16 ranks, ms"], rows)


def pipeline_targets(measured: dict[str, Any]) -> str:
    heldout = measured["heldout"]["ours"]
    ours, theirs = measured["profile ours"], measured["profile sglang cold"]
    spreads = {n: measured[f"ttft 131072 {n}"]["spread"] for n in ("equal time", EVENER)}
    rows = [
        ["held-out error, median", "<= 3%", f"{heldout['median']:.1%}", heldout["median"] <= 0.03],
        ["held-out error, p95", "<= 10%", f"{heldout['p95']:.1%}", heldout["p95"] <= 0.10],
        ["forwards of a profile", "<= 64", f"{ours['forwards']}", ours["forwards"] <= 64],
        [
            "its wall time, of SGLang's",
            "< 1",
            f"{ours['seconds'] / theirs['seconds']:.2f} x",
            ours["seconds"] < theirs["seconds"],
        ],
    ]
    for name, value in spreads.items():
        label = f"spread of chunk times over 131,072 tokens, {name}"
        rows.append([label, "<= 15%", f"{value:.1%}", value <= 0.15])
    for prompt in ("65536", "131072"):
        times = {n: p["ttft_ms"] for n, p in measured.items() if n.startswith(f"ttft {prompt} ")}
        mine = min(times[f"ttft {prompt} {n}"] for n in ("equal time", EVENER, "fastest"))
        rest = min(t for n, t in times.items() if "fixed" in n or "sglang" in n)
        label = f"time to first token, {int(prompt):,} tokens, of the best other"
        rows.append([label, "< 1", f"{mine / rest:.3f} x", mine < rest])
    errors = [abs(p["simulation_error"]) for n, p in measured.items() if n.startswith("ttft ")]
    label = "simulation against the run, worst of the plans"
    rows.append([label, "<= 5%", f"{max(errors):.1%}", max(errors) <= 0.05])
    return tabulate(
        ["measure", "target", "measured", "met"],
        [[m, t, v, "yes" if ok else "no"] for m, t, v, ok in rows],
    )


# --- plots ---------------------------------------------------------------------------------------


def draw_staging(result: dict[str, Any], path: Path) -> None:
    plt = svg.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    grey, blue = "#9a9a9a", "#1f6fb4"
    cells = [result["host"][f"{s} array"] for s in SHAPES]
    at = range(len(SHAPES))
    left.bar(
        [i - 0.2 for i in at],
        [c["concatenate + pin + to"]["p50"] for c in cells],
        0.4,
        color=grey,
        label="concatenate + pin + to",
    )
    left.bar(
        [i + 0.2 for i in at],
        [c["pystage, vocab checked"]["p50"] for c in cells],
        0.4,
        color=blue,
        label="pystage",
    )
    left.set_xticks(
        list(at),
        [
            s.replace("131072", "128k")
            .replace("16384", "16k")
            .replace("8192", "8k")
            .replace("1024", "1k")
            for s in SHAPES
        ],
        fontsize=7,
    )
    left.set(title="host time of a batch, us", yscale="log")
    left.legend(fontsize=7, frameon=False)
    counts = [int(c) for c in result["stream"]]
    for name, color, label in (
        ("cudaMemcpyAsync", grey, "cudaMemcpyAsync"),
        ("deferred", blue, "deferred"),
        ("eager", "#5fb45f", "eager"),
    ):
        middle.plot(
            counts,
            [max(c[name]["p50"], 0.05) for c in result["stream"].values()],
            "o-",
            color=color,
            label=label,
            ms=3,
        )
    middle.set(title="added to the compute stream, us", xscale="log", yscale="log", xlabel="ids")
    middle.legend(fontsize=7, frameon=False)
    names = [("cudaMemcpyAsync", grey), ("deferred", blue)]
    where = list(result["latency"])
    for k, (name, color) in enumerate(names):
        values = [result["latency"][w][name]["p50"] for w in where]
        bars = right.bar(
            [i + (k - 0.5) * 0.4 for i in range(len(where))],
            values,
            0.4,
            color=color,
            label=name.replace("deferred", "pystage"),
        )
        right.bar_label(bars, [f"{v:,.0f}" for v in values], fontsize=7)
    right.set_xticks(range(len(where)), where, fontsize=7)
    right.set(title="8,192 ids: call to device, us", yscale="log")
    right.legend(fontsize=7, frameon=False, loc="upper left")
    for axis in (left, middle, right):
        svg.plain(axis)
    svg.save(figure, path)


def draw_pipeline(result: dict[str, Any], path: Path) -> None:
    """The profile's samples, its fit and the plan, from the figures of the run."""
    from pystage.pp import ChunkSizer, LatencyModel
    from pystage.pp.plot import plot_profile

    svg.pyplot()
    ours = result["results"]["profile ours"]
    model = LatencyModel.from_json({"version": 1, **ours})
    sizer = ChunkSizer(model, base_chunk=8192, context_len=131072, context_margin=0)
    svg.save(plot_profile(sizer, 131072), path)


def draw_sustained(result: dict[str, Any], path: Path) -> None:
    """Times and holdings of every minute."""
    plt = svg.pyplot()
    rows = result["rows"]
    minutes = [row["minute"] for row in rows]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for part, label, color in (
        ("host", "stage + resolve", "#1f6fb4"),
        ("ready", "until the ids are there", "#d9822b"),
    ):
        for percentile, style in (("p99", "-"), ("p50", ":")):
            values = [row[part][percentile] for row in rows]
            left.plot(minutes, values, style, color=color, label=f"{label}, {percentile}")
    left.set(title="us", yscale="log", xlabel="minute")
    for name, label in (
        ("resident_bytes", "the process"),
        ("device_bytes", "the GPU"),
        ("pool_bytes", "the pools"),
    ):
        if rows[0][name] is not None:
            middle.plot(minutes, [row[name] / 2**20 for row in rows], label=label)
    middle.set(title="memory, MiB", yscale="log", xlabel="minute")
    for name, label in (
        ("fds", "open files"),
        ("threads", "threads"),
        ("contexts", "CUDA contexts"),
        ("pool_allocations", "pinned allocations so far"),
        ("wrong", "wrong ids"),
    ):
        if rows[0][name] is not None:
            right.plot(minutes, [row[name] for row in rows], label=label)
    right.set(title="counts", xlabel="minute", ylim=(0, None))
    for axis in (left, middle, right):
        axis.legend(fontsize=6, frameon=False)
        svg.plain(axis)
    svg.save(figure, path)
