"""Plots a profile: samples, fit, residuals, chunk plan. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pystage.pp.makespan import histories
from pystage.pp.model import LatencyModel
from pystage.pp.sizer import ChunkSizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_profile(sizer: ChunkSizer, prompt_len: int, path: str | Path | None = None) -> Figure:
    """Draws the sizer's model and its plan for a prompt; writes `path` (PNG, SVG, PDF) if given."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pystage-h2d[plot]'") from error
    figure = Figure(figsize=(12.0, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw_fit(axes[0, 0], sizer.model)
    _draw_residuals(axes[0, 1], sizer.model)
    _draw_plan(axes[1, 0], axes[1, 1], sizer, prompt_len)
    figure.suptitle(str(sizer.model.report), fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _draw_fit(ax: Axes, model: LatencyModel) -> None:
    samples = model.samples
    history = np.array([s.history_len for s in samples])
    chunk = np.array([s.chunk_len for s in samples])
    grid = np.arange(max(int(chunk.min()), 1), int(chunk.max()) + 1, 16)
    for level in np.unique(np.quantile(history, [0.0, 0.25, 0.5, 0.75, 1.0]).astype(int)):
        ax.plot(grid, model.predict(int(level), grid), lw=1, label=f"history {level:,}")
    dots = ax.scatter(chunk, [s.latency_ms for s in samples], c=history, s=14, cmap="viridis")
    ax.figure.colorbar(dots, ax=ax, label="history, tokens")
    ax.set(title="samples and fit", xlabel="chunk, tokens", ylabel="ms", xscale="log", yscale="log")
    ax.legend(fontsize=7)


def _draw_residuals(ax: Axes, model: LatencyModel) -> None:
    rejected = {sample for sample, _ in model.report.rejected}
    errors = 100 * np.expm1(model.errors(model.samples))
    for wanted, label in ((False, "used"), (True, "rejected")):
        picked = [i for i, s in enumerate(model.samples) if (s in rejected) == wanted]
        if picked:
            ax.scatter(
                [model.samples[i].chunk_len for i in picked], errors[picked], s=14, label=label
            )
    ax.axhline(0.0, color="black", lw=0.5)
    ax.set(title="residuals", xlabel="chunk, tokens", ylabel="measured over predicted, %")
    ax.set_xscale("log")
    ax.legend(fontsize=7)


def _draw_plan(sizes: Axes, times: Axes, sizer: ChunkSizer, prompt_len: int) -> None:
    plan = sizer.plan(prompt_len)
    static = [sizer.base_chunk] * (prompt_len // sizer.base_chunk)
    for chunks, label in ((plan, "equal time"), (static, f"static {sizer.base_chunk:,}")):
        if chunks:
            start = histories(chunks)
            sizes.step(start, chunks, where="post", label=label)
            times.step(
                start, sizer.model.predict(start, np.array(chunks)), where="post", label=label
            )
    sizes.set(title="chunk plan", xlabel="history, tokens", ylabel="chunk, tokens")
    times.set(title="predicted time", xlabel="history, tokens", ylabel="ms", ylim=(0, None))
    sizes.legend(fontsize=7)
    times.legend(fontsize=7)
