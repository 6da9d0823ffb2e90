"""Puts the figures of bench/results into the README, and draws them.

python bench/report.py          writes the README's tables and docs/staging.svg
python bench/report.py --check  fails if the README's tables are not those of the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench/results/staging-nvidia-h100-80gb-hbm3.json"
SGLANG = ROOT / "bench/results/sglang-nvidia-h100-80gb-hbm3.json"
EARLIER = ROOT / "bench/results/earlier"
README = ROOT / "README.md"
PLOT = ROOT / "docs/staging.svg"
SHAPES = ("1 x 128", "1 x 8192", "8 x 1024", "64 x 128", "1 x 16384", "1 x 131072")


def tabulate(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


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


def fill(text: str, parts: dict[str, str]) -> str:
    """Replaces what stands between <!-- figures: NAME --> and <!-- end -->."""
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- figures: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, part=part: m[1] + part + "\n" + m[2], text)
        if count != 1:
            sys.exit(f"README.md has {count} places for the figures {name!r}, not 1")
    return text


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    args = parser.parse_args()
    result = json.loads(RESULT.read_text())
    before = README.read_text()
    after = fill(before, sections(result))
    if args.check:
        if after != before:
            sys.exit("README.md has other figures than bench/results: run python bench/report.py")
        print("README.md has the figures of", RESULT.relative_to(ROOT))
        return
    README.write_text(after)
    draw(result, PLOT)
    print("written:", README.relative_to(ROOT), PLOT.relative_to(ROOT))


if __name__ == "__main__":
    main()
