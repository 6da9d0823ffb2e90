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
EARLIER = ROOT / "bench/results/earlier"
README = ROOT / "README.md"
DOCS = ROOT / "docs/benchmarks.md"
PLOT = ROOT / "docs/staging.svg"
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


def source(result: dict[str, Any], path: Path = RESULT) -> str:
    return (
        f"{result['device']}, {result['cores']}-core VM ({result['cpu']}), "
        f"driver {result['driver']}, torch {result['torch']}, {result['date'][:10]}, "
        f"commit `{result['commit'][:9]}`: "
        f"`{result['command']}`, `bench/results/{path.name}`."
    )


def sections(result: dict[str, Any]) -> dict[str, str]:
    return {
        "host": host_table(result),
        "stream": stream_table(result),
        "latency": latency_table(result),
        "targets": target_table(result),
        "source": source(result),
        "others": other_machines(),
        "sglang": sglang_tables(),
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
    for page in (root / README.name, root / DOCS.relative_to(ROOT)):
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
    if (suite := newest_suite(args.root / RESULT.parent.relative_to(ROOT))) is not None:
        from bench import plots as suite_plots

        plots += suite_plots.draw(suite, plots[0].with_name("suite.json"))
    print("written:", *(path.relative_to(args.root) for path in [*found, *plots]))


if __name__ == "__main__":
    main()
