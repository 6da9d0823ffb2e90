"""``pystage demo``: replays a trace through a pool, then sizes the chunks of a small decoder."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import StagingPool, trace
from .._build import build_info
from ..pool import Issue
from .output import CannotRunError, Table, find_device, json_output, show, size_text
from .replay import HostTime, Report, Workload, replay

if TYPE_CHECKING:
    from .chunks import ChunkReport, Chunks

DEFAULT_BATCHES = 2000
# The largest values of the options.
MOST = {"batches": 10_000_000, "chunk_tokens": 1 << 24, "vocab_size": (1 << 63) - 1}
HELP = (
    "Replay a trace through a pool: every id checked, every call timed.\n\n"
    "Each prefill batch goes through a staging pool and by the plain torch path; the command fails "
    "if their ids differ. Then a small decoder is profiled, and its prefill chunks are sized to "
    "take equal times."
)
_REFRESH_SECONDS = 0.1
_CPU_NOTE = (
    "Without a GPU a worker thread stands in for it and copies the ids, so these times say nothing "
    "about a GPU, and there is no other path to compare them with. What the run does show: the ids "
    "are right, and the pool's memory stays within its capacity."
)
_CUDA_NOTE = (
    "Host time of the calls, which return before the transfer is done; the device was synchronized "
    "outside of what is timed."
)


@dataclass(frozen=True)
class Options:
    """The demo's options.

    Attributes:
        trace: the file to replay. None: the sample.
        device: the device as the user typed it. None: the default.
        batches: number of batches to measure.
        chunk_tokens: the most tokens in a batch.
        issue: the pool's ``issue``.
        vocab_size: ids are drawn from ``[0, vocab_size)``.
        profile: whether to profile the decoder and size its chunks.
        json: the file for the figures as JSON, as for ``--json``.
    """

    trace: Path | None
    device: str | None
    batches: int
    chunk_tokens: int
    issue: Issue
    vocab_size: int
    profile: bool
    json: str | None


def run(options: Options) -> int:
    """Runs the demo and returns the exit status.

    Raises:
        CannotRunError, TraceError: the command cannot run. Nothing has been replayed.
        MismatchError: ids differ.
    """
    device = find_device(options.device)
    requests = _read_trace(options.trace)
    work = Workload(requests, options.batches, options.chunk_tokens, options.vocab_size)
    with json_output(options.json) as write, _quiet_profiler():
        tell = _nothing if options.json == "-" else show
        report = _replay(work, device, options.issue)
        note = _CPU_NOTE if report.device == "cpu" else _CUDA_NOTE
        tell(run_table(report, work), time_table(report), pool_table(report), note)
        chunks = _size_chunks(device, options.issue, tell) if options.profile else None
        write(_figures(report, chunks, options))
    return 0


def _read_trace(path: Path | None) -> list[trace.Request]:
    if path is None:
        return trace.sample_trace()
    try:
        return trace.read_trace(path)
    except OSError as error:
        raise CannotRunError(f"--trace: cannot read {path}: {error.strerror}") from error


def _nothing(*parts: Table | str) -> None:
    return None


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Silences the log of `pystage.pp`: the demo reports the same itself, with a reason."""
    logger = logging.getLogger("pystage.pp")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _replay(work: Workload, device: torch.device | None, issue: Issue) -> Report:
    with (
        _open_pool(device, issue, work.chunk_tokens) as pool,
        _progress("batches", work.warm_up_batches + work.batches) as on_batch,
    ):
        return replay(pool, work, issue, on_batch)


def _size_chunks(
    device: torch.device | None, issue: Issue, tell: Callable[..., None]
) -> ChunkReport | None:
    """Profiles a small decoder and shows the results."""
    from ..pp.model import scipy_optimize
    from .chunks import size_chunks  # here: its imports take a second, and few commands need them

    try:
        scipy_optimize()
    except ImportError as error:
        tell(f"no chunk plan: {error}")
        return None
    with _open_pool(device, issue, 1 << 16) as pool, _progress("forwards") as on_forward:
        report = size_chunks(pool, on_forward)
    tell(profile_table(report), plan_table(report), verdict(report))
    return report


def _open_pool(device: torch.device | None, issue: Issue, chunk_tokens: int) -> StagingPool:
    capacity = max(64 << 20, 64 * chunk_tokens)  # room for at least four batches or so, as int64
    return StagingPool(device, capacity, issue=issue)


@contextmanager
def _progress(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Shows a progress bar if stderr is a terminal. Yields the function that advances it.

    While the bar is shown, rich puts other output to stderr above it. Without a total the bar shows
    a count. Without rich there is no bar.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ModuleNotFoundError:
        yield lambda: None
        return

    count = MofNCompleteColumn() if total else TextColumn("{task.completed}")
    console = Console(stderr=True)
    # advance() refreshes the bar, because rich's thread would take the GIL during a timed call.
    with Progress(
        TextColumn(what),
        BarColumn(),
        count,
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,  # else rich writes an empty line
    ) as progress:
        task = progress.add_task("", total=total)
        shown = time.monotonic()

        def advance() -> None:
            nonlocal shown
            progress.advance(task)
            if time.monotonic() - shown >= _REFRESH_SECONDS:
                progress.refresh()
                shown = time.monotonic()

        yield advance


def run_table(report: Report, work: Workload) -> Table:
    table = Table("replay")
    table.add("device", f"{report.device}, {report.device_name}")
    table.add("issue", report.issue)
    table.add("chunk", f"up to {work.chunk_tokens:,} tokens")
    table.add("batches", f"{report.batches:,} (after {report.warm_up_batches} of warm-up)")
    table.add("ids", "every batch equal to the plain torch path's")
    table.add("requests", f"{report.requests:,} (the trace has {len(work.requests):,})")
    table.add("tokens", f"{report.tokens:,}")
    return table


def time_table(report: Report) -> Table:
    """Host times. On a GPU also those of the plain torch path, and the ratios."""
    table = Table("host time, us", ("call", "p50", "p99", "max"), numbers=True)
    _add_times(table, "stage", report.stage)
    _add_times(table, "resolve", report.resolve)
    _add_times(table, "stage + resolve", report.both)
    if ratios := _ratios(report):
        _add_times(table, "plain torch path", report.plain)
        table.add("plain / pystage", *(f"{ratio:.2f} x" for ratio in ratios), "")
    return table


def _add_times(table: Table, name: str, times: HostTime) -> None:
    table.add(name, f"{times.p50_us:.1f}", f"{times.p99_us:.1f}", f"{times.max_us:.1f}")


def _ratios(report: Report) -> tuple[float, float] | None:
    """The plain path's host time divided by that of stage and resolve, for p50 and for p99. A ratio
    of two maxima has no meaning. On the host device there is none: its plain path transfers
    nothing."""
    if report.device == "cpu":
        return None
    plain, both = report.plain, report.both
    return plain.p50_us / both.p50_us, plain.p99_us / both.p99_us


def pool_table(report: Report) -> Table:
    pool = report.pool
    table = Table("pool")
    reserved, capacity = size_text(pool.reserved_bytes), size_text(pool.capacity_bytes)
    table.add("reserved", f"{reserved} of {capacity}")
    table.add("high-water mark", size_text(pool.high_water_bytes))
    if pool.why_pageable:
        table.add("not pinned", f"{size_text(pool.pageable_bytes)}: {pool.why_pageable}")
    table.add("allocations", f"{pool.allocations:,}")
    table.add("  after warm-up", f"{pool.allocations_after_warm_up:,}")
    table.add("fallbacks", f"{pool.fallbacks:,}")
    table.add("waits", f"{pool.waits:,}")
    wire, int64 = size_text(pool.wire_bytes), size_text(pool.int64_bytes)
    table.add("on the wire", f"{wire} ({int64} as int64)")
    return table


def profile_table(report: ChunkReport) -> Table:
    size, profile, fit = report.size, report.profile, report.fit
    table = Table("prefill profile of a small decoder")
    table.add("decoder", f"{size.layers} layers, {report.parameters / 1e6:,.1f} M parameters")
    table.add("context", f"{size.context:,} tokens, base chunk {size.base_chunk:,}")
    table.add("profile", f"{profile.forwards} forwards in {profile.seconds:.1f} s")
    table.add("fit", str(fit))
    return table


def plan_table(report: ChunkReport) -> Table:
    """The chunks of one prompt. Chunks of equal time are shown only if there is a plan."""
    plans = {"one size": report.fixed}
    if report.planned is not None:
        plans["equal time"] = report.planned
    table = Table("chunks of one prompt", ("", *plans), numbers=True)
    for row, cell in _PLAN_ROWS.items():
        table.add(row, *(cell(chunks) for chunks in plans.values()))
    return table


_PLAN_ROWS: dict[str, Callable[[Chunks], str]] = {
    "chunks": lambda c: f"{len(c.sizes)}",
    "tokens of the first": lambda c: f"{c.sizes[0]:,}",
    "tokens of the last": lambda c: f"{c.sizes[-1]:,}",
    "ms of the first": lambda c: f"{c.measured_ms[0]:.1f}",
    "ms of the last": lambda c: f"{c.measured_ms[-1]:.1f}",
    "  predicted": lambda c: f"{c.predicted_ms[-1]:.1f}",
    "spread, (max - min) / mean": lambda c: f"{c.spread:.0%}",
}


def verdict(report: ChunkReport) -> str:
    """The result of the profile, in words."""
    if report.planned is None:
        return (
            f"The fit is not usable: {report.fit.reason}. No plan was made, and a server would "
            f"keep its chunks of {report.size.base_chunk:,} tokens. Other work on the machine does "
            "this: the same chunk then takes a different time each time it is measured."
        )
    fixed, planned = report.fixed.spread, report.planned.spread
    measured = f"the times of its chunks spread by {planned:.0%}, those of one size by {fixed:.0%}"
    if planned < fixed:
        return (
            f"The fit is usable, and the plan was run: {measured}. Equal times bound the slowest "
            "chunk. For the lowest time to first token use ChunkSizer.choose (docs/pp.md)."
        )
    return (
        f"The fit is usable and the plan was run, but it did not help here: {measured}. Other work "
        "on the machine may have come between the profile and the run."
    )


def _figures(report: Report, chunks: ChunkReport | None, options: Options) -> dict[str, Any]:
    ratios = _ratios(report)
    figures: dict[str, Any] = {
        "build": dataclasses.asdict(build_info()),
        "trace": str(options.trace or "sample"),
        "chunk_tokens": options.chunk_tokens,
        "vocab_size": options.vocab_size,
        **dataclasses.asdict(report),
        "plain_to_pystage": ratios and {"p50": ratios[0], "p99": ratios[1]},
    }
    if chunks is not None:
        from ..pp.profile import samples_to_json

        figures["chunks"] = {
            "profile_forwards": chunks.profile.forwards,
            "profile_seconds": chunks.profile.seconds,
            "samples": samples_to_json(chunks.profile.samples),
            "fit": dataclasses.asdict(chunks.fit),
            "equal time": _plan_figures(chunks.planned),
            "one size": _plan_figures(chunks.fixed),
        }
    return figures


def _plan_figures(chunks: Chunks | None) -> dict[str, Any] | None:
    return None if chunks is None else {**dataclasses.asdict(chunks), "spread": chunks.spread}
