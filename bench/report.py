"""Puts the figures of bench/results into the README and the docs, and draws them.

python bench/report.py          writes the tables of README.md and docs/benchmarks.md, and the plots
python bench/report.py --check  fails if these tables are not those of the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

from bench import pages  # noqa: E402
from bench.pages import tabulate  # noqa: E402

RESULT = ROOT / "bench/results/staging-nvidia-h100-80gb-hbm3.json"
SGLANG = ROOT / "bench/results/sglang-nvidia-h100-80gb-hbm3.json"
IN_PLACE = ROOT / "bench/results/sglang-in-place-nvidia-h100-80gb-hbm3.json"
PIPELINE = ROOT / "bench/results/pp_prefill-8b-2xnvidia-h100-80gb-hbm3.json"
EARLIER = ROOT / "bench/results/earlier"
README = ROOT / "README.md"
DOCS = ROOT / "docs/benchmarks.md"
PIPELINE_DOCS = ROOT / "docs/pp.md"
SGLANG_DOCS = ROOT / "docs/sglang.md"
PLOT = ROOT / "docs/staging.svg"
PIPELINE_PLOT = ROOT / "docs/pp-profile.svg"
SHAPES = ("1 x 128", "1 x 8192", "8 x 1024", "64 x 128", "1 x 16384", "1 x 131072")


def pair(cell: dict[str, float]) -> str:
    return f"{cell['p50']:,.1f} / {cell['p99']:,.1f}"


def microseconds(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # no -0.0


def other_machines() -> str:
    """Machines of one kind differ: what the main measure was on others."""
    lines = []
    for path in sorted(EARLIER.glob("staging-*.json")):
        result = json.loads(path.read_text())
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
    ours, theirs = cell["pystage"], cell["torch.tensor + pin + to"]
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


def target_table(result: dict[str, Any]) -> str:
    rows = [
        [
            r["measure"].replace("  ", "&nbsp;&nbsp;"),
            r["target"],
            f"{r['value']:,.2f} {r['unit']}".strip(),
            "yes" if r["ok"] else "no",
        ]
        for r in result["targets"]
    ]
    return tabulate(["measure", "target", "measured", "met"], rows)


def sglang_tables() -> str:
    """The plugin in SGLang, from a file of its own; a sentence where it has not been measured."""
    if not SGLANG.exists():
        return "Not measured on a GPU yet (`bench/sglang_plugin.py`)."
    result = json.loads(SGLANG.read_text())
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
    return f"{table}\n\n{target_table(result)}\n\n{source(result, SGLANG)}"


def in_place_table() -> str:
    """Where the time of a batch of 8,192 ids goes, in SGLang."""
    result = json.loads(IN_PLACE.read_text())
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
    return f"{tabulate(['us, p50 / p99', *sides], rows)}\n\n{source(result, IN_PLACE)}"


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


EVENER = "equal time, base x 2"


def draw_pipeline(result: dict[str, Any], path: Path) -> None:
    """The profile's samples, its fit and the plan, from the figures of the run."""
    import matplotlib as mpl

    from pystage.pp import ChunkSizer, LatencyModel
    from pystage.pp.plot import plot_profile

    mpl.rcParams["svg.hashsalt"] = "pystage"  # the same figures give the same file
    ours = result["results"]["profile ours"]
    model = LatencyModel.from_json({"version": 1, **ours})
    sizer = ChunkSizer(model, base_chunk=8192, context_len=131072, context_margin=0)
    plot_profile(sizer, 131072).savefig(path, metadata={"Date": None})


def source(result: dict[str, Any], path: Path = RESULT) -> str:
    gpus = f"{result['devices']} x " if result["devices"] > 1 else ""
    return (
        f"{gpus}{result['device']}, {result['cores']}-core VM ({result['cpu']}), "
        f"driver {result['driver']}, torch {result['torch']}, {result['date'][:10]}, "
        f"commit `{result['commit'][:9]}`: "
        f"`{result['command']}`, `bench/results/{path.name}`."
    )


def sections(result: dict[str, Any]) -> dict[str, str]:
    pipeline = json.loads(PIPELINE.read_text())
    return {
        "pp-errors": pipeline_errors(pipeline["results"]),
        "pp-plans": pipeline_plans(pipeline["results"]),
        "pp-targets": pipeline_targets(pipeline["results"]),
        "pp-source": source(pipeline, PIPELINE),
        "host": host_table(result),
        "floor": floor_table(result),
        "stream": stream_table(result),
        "latency": latency_table(result),
        "targets": target_table(result),
        "source": source(result),
        "others": other_machines(),
        "sglang": sglang_tables(),
        "sglang-in-place": in_place_table(),
    }


MARK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, parts: dict[str, str], name: str) -> str:
    """Replaces what stands between <!-- figures: NAME --> and <!-- end -->; ``name``: the file's.

    Exits if there is a mark without figures, or one twice.
    """
    marks = [match[2] for match in MARK.finditer(text)]
    for mark in marks:
        if mark not in parts or marks.count(mark) > 1:
            sys.exit(f"{name} has {marks.count(mark)} places for the figures {mark!r}")
    return MARK.sub(lambda m: m[1] + parts[m[2]] + "\n" + m[3], text)


def newest_suite(folder: Path) -> dict[str, Any] | None:
    """The last whole run of ``python -m bench`` on a GPU; None if there is none yet."""
    runs = [json.loads(path.read_text()) for path in folder.glob("suite-*.json")]
    whole = [run for run in runs if run["devices"] and not run["quick"]]
    return max(whole, key=lambda run: str(run["date"]), default=None)


def pages_with_figures(root: Path) -> dict[Path, tuple[str, str]]:
    """Each page, as it is and as the results say."""
    staging = json.loads((root / RESULT.relative_to(ROOT)).read_text())
    suite = newest_suite(root / RESULT.parent.relative_to(ROOT))
    parts = sections(staging) | pages.sections(suite)
    found = {}
    for page in (
        root / page.relative_to(ROOT) for page in (README, DOCS, PIPELINE_DOCS, SGLANG_DOCS)
    ):
        before = page.read_text()
        found[page] = (before, fill(before, parts, page.name))
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "pystage"  # the same figures give the same file
    from matplotlib import pyplot as plt

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
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    args = parser.parse_args(arguments)
    found = pages_with_figures(args.root)
    if args.check:
        wrong = [page.name for page, (before, after) in found.items() if before != after]
        if wrong:
            sys.exit(
                f"{', '.join(wrong)}: other figures than bench/results has; run bench/report.py"
            )
        print("as bench/results says:", *(page.name for page in found))
        return
    for page, (_, after) in found.items():
        page.write_text(after)
    plots = [args.root / PLOT.relative_to(ROOT)]
    draw(json.loads((args.root / RESULT.relative_to(ROOT)).read_text()), plots[0])
    plots.append(args.root / PIPELINE_PLOT.relative_to(ROOT))
    draw_pipeline(json.loads(PIPELINE.read_text()), plots[-1])
    if (suite := newest_suite(args.root / RESULT.parent.relative_to(ROOT))) is not None:
        from bench import plots as suite_plots

        plots += suite_plots.draw(suite, plots[0].with_name("suite.json"))
    print("written:", *(path.relative_to(args.root) for path in [*found, *plots]))


if __name__ == "__main__":
    main()
