"""Draws the plots of a run of the suite beside its JSON. Each title states what the run found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.report import svg
from bench.suite.cells import SHAPES
from bench.suite.contenders import (
    BATCH,
    BUFFER,
    CUPY,
    DEFERRED,
    EAGER,
    EMPTY,
    ENGINE,
    READY,
    READY_BATCH,
    RUNNER,
    SGLANG,
    TORCH,
    TOTAL,
    UVA,
    WIDE,
)
from bench.suite.drift import DRIFTERS
from bench.suite.latency import DIRECTIONS, ENGINE_MOVER, KERNEL_MOVER, MOVERS, PIECES
from bench.suite.stream import STREAM_COUNTS

COLORS = {
    DEFERRED: "#1f6fb4",
    EAGER: "#2c8c2c",
    WIDE: "#6aa3d5",
    TORCH: "#777777",
    SGLANG: "#c2660c",
    BUFFER: "#8c5fb4",
    READY: "#b03226",
    ENGINE: "#123a5c",
    UVA: "#a8860f",
    RUNNER: "#c24f8e",
    CUPY: "#2f8f83",
    BATCH: "#5c4033",
    READY_BATCH: "#e07b70",
    EMPTY: "#999999",
}
POINTS = "o^v<>sDPX*ph"
OPEN = {"ms": 7, "mfc": "none", "mew": 1.5}  # hollow, so that points that coincide stay visible


def draw(result: dict[str, Any], path: Path) -> list[Path]:
    """One file for each regime that has something to draw."""
    plt = svg.pyplot()
    written = []
    for name, draw_regime in (
        ("host", _host),
        ("stream", _stream),
        ("latency", _latency),
        ("drift", _drift),
    ):
        cells = result["regimes"].get(name, {})
        if any(cell.get("contenders") for cell in cells.values()):
            figure, finding, note = draw_regime(plt, cells)
            svg.tell(figure, finding, f"{result['device_name']}. {note}")
            out = path.with_name(f"{path.stem}-{name}.svg")
            svg.save(figure, out)
            written.append(out)
    return written


def _p50(cells: dict[str, Any], cell: str, name: str, kind: str) -> float:
    row = cells.get(cell, {}).get("contenders", {}).get(name, {})
    return float(row[kind]["p50"]) if kind in row else float("nan")


def _span(values: Any) -> str:
    """A range such as ``2.1 to 10.6``, or one number if both ends round to the same."""
    least, most = f"{np.nanmin(values):.1f}", f"{np.nanmax(values):.1f}"
    return least if least == most else f"{least} to {most}"


def _comma(shape: str) -> str:
    return " ".join(f"{int(w):,}" if w.isdigit() else w for w in shape.split(" "))


def _host(plt: Any, cells: dict[str, Any]) -> tuple[Any, str, str]:
    """Each peer's host time divided by pystage's, on a linear axis."""
    shapes = [s for s in SHAPES if f"{s} array" in cells]  # older runs lack newer shapes
    ours = {s: _p50(cells, f"{s} array", DEFERRED, "total") for s in shapes}
    peers = (SGLANG, TORCH, BUFFER, UVA, CUPY, BATCH)
    figure, axis = plt.subplots(figsize=(svg.WIDTH, 0.42 * len(shapes) + 1.9), layout="constrained")
    best = {s: float("inf") for s in shapes}
    for name, point in zip(peers, POINTS, strict=False):
        ratios = [_p50(cells, f"{s} array", name, "total") / ours[s] for s in shapes]
        best |= {s: min(best[s], r) for s, r in zip(shapes, ratios, strict=True) if r == r}  # noqa: PLR0124
        axis.plot(ratios, range(len(shapes)), point, color=COLORS[name], label=name, **OPEN)
    bounds = [
        cells[f"{s} array"].get("bound", {}).get(TOTAL, {}).get("p50", float("nan")) / ours[s]
        for s in shapes
    ]
    axis.plot(bounds, range(len(shapes)), "|", color="black", ms=11, mew=2, label="lower bound")
    axis.axvline(1, color=COLORS[DEFERRED], lw=2, label="pystage")
    axis.set_yticks(range(len(shapes)), [f"{_comma(s)}\n{ours[s]:,.1f} us" for s in shapes])
    axis.set(
        xlabel="host time of stage + resolve, as a multiple of pystage's (p50)", xlim=(0, None)
    )
    axis.set_ylim(len(shapes) - 0.5, -0.5)
    axis.grid(axis="x", color="#dddddd")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    found = [ratio for ratio in best.values() if np.isfinite(ratio)]
    finding = "Host time of a batch, by contender"
    if found:
        finding = f"The best peer takes {_span(found)} times the host time of pystage"
    return figure, finding, "Requests x ids, from arrays; below them pystage's time."


def _stream(plt: Any, cells: dict[str, Any]) -> tuple[Any, str, str]:
    """Time on the stream in microseconds. Below 1 the axis is linear, so that it can show zero."""
    figure, axis = plt.subplots(figsize=(svg.WIDTH, 4.6), layout="constrained")
    names: dict[str, None] = {}
    for cell in cells.values():
        names |= dict.fromkeys(n for n, row in cell.get("contenders", {}).items() if "added" in row)
    for name, point in zip(names, POINTS, strict=False):
        values = [_p50(cells, f"idle, {n} ids", name, "added") for n in STREAM_COUNTS]
        color = COLORS.get(name, "#444444")
        axis.plot(range(len(values)), values, f"{point}-", lw=1, color=color, label=name, **OPEN)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_xticks(range(len(STREAM_COUNTS)), [f"{n:,}" for n in STREAM_COUNTS])
    axis.minorticks_off()
    axis.set_yticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1,000"])
    axis.set(xlabel="ids", ylabel="added to the compute stream, us (p50)", ylim=(-0.3, 3000))
    axis.grid(axis="y", color="#dddddd")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    at = [n for n in STREAM_COUNTS if n >= 1024]
    shares = [
        _p50(cells, f"idle, {n} ids", READY, "added")
        / _p50(cells, f"idle, {n} ids", DEFERRED, "added")
        for n in at
    ]
    finding = "Time added to the compute stream, by contender"
    if np.isfinite(shares).any():
        finding = (
            f"From 1,024 ids on, cudaMemcpyAsync occupies the stream {_span(shares)} times as "
            "long as pystage; an eager pool adds next to nothing"
        )
    return (
        figure,
        finding,
        "Between small kernels on an idle GPU. Linear up to 1 us, then logarithmic.",
    )


def _latency(plt: Any, cells: dict[str, Any]) -> tuple[Any, str, str]:
    """A panel for each way to move data, since waiting times differ by orders of magnitude."""
    figure, axes = plt.subplots(
        1, len(MOVERS), figsize=(svg.WIDTH, 4.4), layout="constrained", sharey=True
    )
    at, ratios = range(len(PIECES)), {}
    for axis, mover in zip(axes, MOVERS, strict=True):
        for direction, style in zip(DIRECTIONS, ("o-", "s--", "^:"), strict=True):
            times = {
                name: [_p50(cells, f"{direction}, {p} by {mover}", name, "ready") for p in PIECES]
                for name in (READY, DEFERRED)
            }
            for name, values in times.items():
                label = "cudaMemcpyAsync" if name == READY else "pystage"
                axis.plot(
                    at, values, style, ms=5, color=COLORS[name], label=f"{label}, {direction}"
                )
            ratios[mover, direction] = np.divide(times[READY], times[DEFERRED])
        axis.set_yscale("log")
        axis.set_xticks(at, PIECES, rotation=30)
        axis.set(title=f"by {mover}".replace("Memcpy", "Memcpy\n"), xlabel="size of each copy")
        axis.grid(axis="y", color="#dddddd")
    axes[0].set_ylabel("until 8,192 ids are on the GPU, us (p50)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    queued = ratios[ENGINE_MOVER, "H2D"]
    free = [ratios[mover, way] for mover, way in ratios if mover == KERNEL_MOVER or way == "D2H"]
    finding = "Until 8,192 ids are on the GPU, beside other traffic"
    if np.isfinite(queued).any() and np.isfinite(free).any():
        finding = (
            "Behind host-to-device copies of the copy engine, cudaMemcpyAsync takes "
            f"{np.nanmin(queued):.0f} to {np.nanmax(queued):.0f} times as long as pystage; where "
            f"nothing queues, {_span(free)} times"
        )
    return figure, finding, "H2D: to the device; D2H: from it. Logarithmic."


def _drift(plt: Any, cells: dict[str, Any]) -> tuple[Any, str, str]:
    """Memory held at the start and at the end. Lines over time would mostly cover each other."""
    held, without = {}, []
    for name in DRIFTERS:
        row = cells.get(f"trace, {name}", {}).get("contenders", {}).get(name)
        if row and row.get("pinned_bytes_over_batches"):
            held[name] = [b / 2**20 for _, b in row["pinned_bytes_over_batches"]]
        elif row:
            without.append(name)
    figure, axis = plt.subplots(figsize=(svg.WIDTH, 0.4 * len(held) + 1.7), layout="constrained")
    for at, (name, mib) in enumerate(held.items()):
        axis.barh(at, max(mib), 0.6, color=COLORS.get(name, "#444444"))
        axis.text(
            max(mib), at, f" {mib[0]:.2f} at the start, {mib[-1]:.2f} at the end", va="center"
        )
    axis.set_yticks(range(len(held)), list(held))
    axis.set_ylim(max(len(held), 1) - 0.5, -0.5)
    most = max((max(mib) for mib in held.values()), default=1.0)
    axis.set(xlabel="most pinned memory held during the trace, MiB", xlim=(0, 1.45 * most))
    finding = "Pinned memory over a trace, by contender"
    ours, rest = (
        [max(mib) for name, mib in held.items() if name.startswith("pystage") == own]
        for own in (True, False)
    )
    if ours and rest:
        finding = (
            f"pystage pins {_span(ours)} MiB when it is made, and no more; peers come to "
            f"{_span(rest)} MiB in this trace"
        )
    absent = f" {', '.join(without)}: pinned memory is not its own." if without else ""
    return figure, finding, f"Batches of a serving trace.{absent}"
