"""Plots of a run of the suite, beside its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.contenders import (
    BUFFER,
    CUPY,
    DEFERRED,
    EAGER,
    EMPTY,
    ENGINE,
    READY,
    SGLANG,
    TORCH,
    TOTAL,
    UVA,
    WIDE,
)
from bench.suite.cells import SHAPES
from bench.suite.latency import DIRECTIONS, ENGINE_MOVER, MOVERS, PIECES
from bench.suite.stream import STREAM_COUNTS

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "pystage"  # the same figures give the same file
mpl.rcParams.update({"axes.titlesize": 9, "axes.labelsize": 8})
COLORS = {
    DEFERRED: "#1f6fb4",
    EAGER: "#5fb45f",
    WIDE: "#7fb0dc",
    TORCH: "#9a9a9a",
    SGLANG: "#d9822b",
    BUFFER: "#8c5fb4",
    READY: "#c0392b",
    ENGINE: "#123a5c",
    UVA: "#c9a227",
    CUPY: "#2f8f83",
    EMPTY: "#cccccc",
}


def draw(result: dict[str, Any], path: Path) -> list[Path]:
    """One file for each regime that has something to draw."""
    written = []
    for name, figure in (
        ("host", _host),
        ("stream", _stream),
        ("latency", _latency),
        ("drift", _drift),
    ):
        cells = result["regimes"].get(name, {})
        if any(cell.get("contenders") for cell in cells.values()):
            out = path.with_name(f"{path.stem}-{name}.svg")
            shape = figure(cells)
            shape.suptitle(f"{result['device_name']}, commit {result['commit'][:9]}", fontsize=8)
            shape.savefig(out, metadata={"Date": None})
            plt.close(shape)
            written.append(out)
    return written


def _p50(cells: dict[str, Any], cell: str, name: str, kind: str, part: str = "p50") -> float:
    row = cells.get(cell, {}).get("contenders", {}).get(name, {})
    return float(row[kind][part]) if kind in row else float("nan")


def _axes(columns: int) -> tuple[Any, list[Axes]]:
    figure, axes = plt.subplots(
        1, columns, figsize=(4.6 * columns, 3.6), layout="constrained", squeeze=False, sharey=True
    )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    return figure, list(axes[0])


def _log(axis: Axes, x: bool = False) -> None:
    """Logarithmic, where there is anything to show."""
    if np.isfinite(axis.dataLim.minposy):
        axis.set_yscale("log")
    if x and np.isfinite(axis.dataLim.minposx):
        axis.set_xscale("log")


def _legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6, frameon=False)


def _host(cells: dict[str, Any]) -> Any:
    figure, (axis,) = _axes(1)
    figure.set_size_inches(9, 3.8)
    shapes = [s for s in SHAPES if f"{s} array" in cells]  # a run before a shape was added lacks it
    names = [DEFERRED, BUFFER, TORCH, SGLANG]
    for k, name in enumerate(names):
        at = [i + (k - 1.5) * 0.2 for i in range(len(shapes))]
        values = [_p50(cells, f"{s} array", name, "total") for s in shapes]
        axis.bar(at, values, 0.2, color=COLORS[name], label=name)
    bounds = [
        cells.get(f"{s} array", {}).get("bound", {}).get(TOTAL, {}).get("p50", float("nan"))
        for s in shapes
    ]
    axis.plot(range(len(shapes)), bounds, "_", color="black", ms=22, label="the lower bound")
    axis.set_xticks(range(len(shapes)), shapes, fontsize=7)
    axis.set(title="host time of a batch from array, us, p50")
    _log(axis)
    _legend(axis)
    return figure


def _stream(cells: dict[str, Any]) -> Any:
    figure, (axis,) = _axes(1)
    for name in (READY, WIDE, DEFERRED, EAGER, EMPTY):
        values = [_p50(cells, f"idle, {n} ids", name, "added") for n in STREAM_COUNTS]
        # A log axis has no zero, which is about what an eager pool adds.
        axis.plot(
            STREAM_COUNTS,
            [max(v, 0.05) if v == v else v for v in values],  # noqa: PLR0124  (NaN stays)
            "o-",
            ms=3,
            color=COLORS[name],
            label=name,
        )
    axis.set(title="added to the compute stream, us", xlabel="ids")
    _log(axis, x=True)
    _legend(axis)
    return figure


def _latency(cells: dict[str, Any]) -> Any:
    figure, axes = _axes(len(MOVERS))
    sizes = [size >> 10 for size in PIECES.values()]
    for axis, mover in zip(axes, MOVERS, strict=True):
        for direction, style in zip(DIRECTIONS, ("o-", "s--", "^:"), strict=True):
            for name in (READY, DEFERRED):
                values = [
                    _p50(cells, f"{direction}, {label} by {mover}", name, "ready")
                    for label in PIECES
                ]
                axis.plot(
                    sizes, values, style, ms=3, color=COLORS[name], label=f"{name}, {direction}"
                )
        axis.set(
            title=f"8,192 ids ready, us; traffic by {mover}",
            xlabel="pieces, KiB",
        )
        _log(axis, x=True)
        if mover == ENGINE_MOVER:
            _legend(axis)
    return figure


def _drift(cells: dict[str, Any]) -> Any:
    figure, (axis,) = _axes(1)
    for cell in cells.values():
        for name, row in cell.get("contenders", {}).items():
            if row.get("pinned_bytes_over_batches"):
                at, held = zip(*row["pinned_bytes_over_batches"], strict=True)
                axis.plot(at, [h / 2**20 for h in held], color=COLORS.get(name), label=name, lw=1)
    axis.set(title="pinned memory held over the trace, MiB", xlabel="batches")
    _legend(axis)
    return figure
