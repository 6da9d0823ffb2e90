"""``python -m pystage demo``, ``info`` and ``doctor``.

Needs rich (extra ``cli``), and imports it only when a command runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import doctor, trace
from ._build import build_info
from ._replay import HostTime, MismatchError, Report, Workload, replay
from .errors import PystageError
from .pool import Issue, StagingPool
from .pp.profile import samples_to_json

if TYPE_CHECKING:
    from rich.table import Table

    from ._chunks import ChunkReport, Chunks

EXIT_DIFFERENT_IDS = 1
EXIT_NOT_WELL = 1
EXIT_CANNOT_RUN = 2
DEFAULT_BATCHES = 2000
_REFRESH_SECONDS = 0.1
_HOST_NOTE = (
    "On the host device a transfer is a worker thread's copy that resolve waits for, and the plain "
    "torch path transfers nothing: it is np.concatenate alone. These times tell nothing about a "
    "GPU; the run shows that the ids are right and the memory is bounded."
)
_PLAN_NOTE = (
    "Chunks of one size take longer the more tokens came before; a pipeline waits for its slowest. "
    "The plan's chunks are sized to take equal times, as predicted by the fit."
)
_CUDA_NOTE = (
    "Host time of the calls, which return before the transfer is done; the device was synchronized "
    "outside of what is timed."
)


class CannotRunError(Exception):
    """A command cannot do what it was asked to; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    0: done. 1: a batch's ids differ, or the doctor found something wrong. 2: wrong arguments, or
    the command cannot run here.
    """
    options = _parser().parse_args(arguments)
    try:
        if not (options.command is _doctor and options.json):
            _require_rich()
        status: int | None = options.command(options)
    except MismatchError as error:
        return _fail(f"wrong ids: {error}", EXIT_DIFFERENT_IDS)
    except (CannotRunError, trace.TraceError, PystageError, OSError) as error:
        return _fail(str(error), EXIT_CANNOT_RUN)
    return status or 0


def _fail(message: str, status: int) -> int:
    print(f"pystage: {message}", file=sys.stderr)
    return status


def _require_rich() -> None:
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        raise CannotRunError(
            "this command needs rich: pip install 'rich' (it is in pystage's extra `cli`)"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pystage", description="Staging of prefill token ids."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="replay a trace through a pool, checked and timed"))
    info = commands.add_parser("info", help="what this installation was built with")
    info.set_defaults(command=_info)
    _add_doctor(
        commands.add_parser("doctor", help="is all well here: device, pinned memory, SGLang, ids")
    )
    return parser


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.set_defaults(command=_demo)
    demo.description = (
        "Replays a length trace as prefill batches: each through a staging pool and by the plain "
        "torch path. Fails if the ids of any batch differ."
    )
    add = demo.add_argument
    add("--trace", metavar="FILE", help="CSV with Azure or Mooncake columns; default: a sample")
    add("--device", type=_device, metavar="D", help="cpu, cuda or cuda:N; default: a GPU, else cpu")
    add(
        "--batches",
        type=_from_one_to(10_000_000),
        default=DEFAULT_BATCHES,
        metavar="N",
        help="batches to measure; the trace repeats as needed (default %(default)s)",
    )
    add(
        "--chunk",
        type=_from_one_to(1 << 24),
        default=trace.DEFAULT_CHUNK_TOKENS,
        metavar="TOKENS",
        help="most tokens in a batch (default %(default)s)",
    )
    add(
        "--issue",
        choices=("deferred", "eager"),
        default="deferred",
        help="when the pool transfers: at resolve or at stage (default %(default)s)",
    )
    add(
        "--vocab",
        type=_from_one_to((1 << 63) - 1),
        default=trace.DEFAULT_VOCAB_SIZE,
        metavar="SIZE",
        help="ids are drawn from [0, SIZE) (default %(default)s)",
    )
    add("--no-profile", action="store_true", help="leave out the decoder and its chunk plan")
    add("--json", metavar="FILE", help="write the figures there too")


def _from_one_to(limit: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and 1 <= int(text) <= limit):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {limit}")
        return int(text)

    return parse


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    return device


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_doctor)
    parser.description = (
        "Looks at device, driver, toolkit, link, pinned memory, build and SGLang's hooks, and "
        f"stages for {doctor.SELF_TEST_SECONDS:g} seconds. Exit status 1: something is wrong."
    )
    device = "cpu, cuda or cuda:N; default: a GPU, else cpu"
    parser.add_argument("--device", type=_device, metavar="D", help=device)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def _doctor(options: argparse.Namespace) -> int:
    _require_device(options.device)
    checks = doctor.examine(options.device)
    well = all(check.ok for check in checks)
    if options.json:
        by_name = {check.name: dataclasses.asdict(check) for check in checks}
        print(json.dumps({"ok": well, "checks": by_name}, indent=2))
    else:
        _print(_doctor_table(checks))
    return 0 if well else EXIT_NOT_WELL


def _doctor_table(checks: Sequence[doctor.Check]) -> Table:
    table = _two_columns()
    table.add_column()
    for check in checks:
        table.add_row(check.name, check.found, "ok" if check.ok else "WRONG")
    return table


def _info(options: argparse.Namespace) -> None:
    _print(_info_table())


def _info_table() -> Table:
    table = _two_columns()
    for name, value in dataclasses.asdict(build_info()).items():
        table.add_row(name.replace("_", " "), _shown(value))
    return table


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        value = " ".join(value)
    return str(value) if value else "-"


def _demo(options: argparse.Namespace) -> None:
    requests = trace.read_trace(options.trace) if options.trace else trace.sample_trace()
    work = Workload(requests, options.batches, options.chunk, options.vocab)
    report = _run(work, options)
    _print_report(report, work)
    chunks = None if options.no_profile else _size_chunks(options)
    if options.json:
        _write_json(Path(options.json), report, chunks, options)


def _size_chunks(options: argparse.Namespace) -> ChunkReport | None:
    """Profiles a small decoder and shows its chunk plan."""
    from ._chunks import size_chunks  # its imports take a second, which other commands need not
    from .pp.model import scipy_optimize

    try:
        scipy_optimize()
    except ImportError as error:
        _print(f"no chunk plan: {error}")
        return None
    with _open_pool(options.device, options.issue, 1 << 16) as pool, _progress_of("forwards") as on:
        report = size_chunks(pool, on)
    _print(_profile_table(report), _plan_table(report), _PLAN_NOTE)
    return report


def _run(work: Workload, options: argparse.Namespace) -> Report:
    with (
        _open_pool(options.device, options.issue, work.chunk_tokens) as pool,
        _progress(work.warm_up_batches + work.batches) as on_batch,
    ):
        return replay(pool, work, options.issue, on_batch)


def _require_device(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise CannotRunError(f"no {device} here: torch {torch.__version__} sees no CUDA device")


def _open_pool(device: torch.device | None, issue: Issue, chunk_tokens: int) -> StagingPool:
    _require_device(device)
    capacity = max(64 << 20, 64 * chunk_tokens)  # some four batches at least, as int64
    return StagingPool(device, capacity, issue=issue)


@contextmanager
def _progress(batches: int) -> Iterator[Callable[[], None]]:
    with _progress_of("batches", batches) as on_batch:
        yield on_batch


@contextmanager
def _progress_of(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Shows a bar on stderr; yields what advances it. Without a total it only counts."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn()
    # Refreshed by hand: rich's own thread would take the GIL in the middle of a timed call.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=total)
        shown = time.monotonic()

        def advance() -> None:
            nonlocal shown
            progress.advance(task)
            if time.monotonic() - shown >= _REFRESH_SECONDS:
                progress.refresh()
                shown = time.monotonic()

        yield advance


def _print_report(report: Report, work: Workload) -> None:
    note = _HOST_NOTE if report.device == "cpu" else _CUDA_NOTE
    _print(_run_table(report, work), _time_table(report), _pool_table(report), note)


def _print(*parts: Table | str) -> None:
    from rich.console import Console

    # Messages of the system stand in the tables, and may hold what rich would take for markup.
    Console(markup=False, highlight=False).print(*parts, sep="\n")


def _run_table(report: Report, work: Workload) -> Table:
    table = _two_columns("replay")
    table.add_row("device", f"{report.device}, {report.device_name}")
    table.add_row("issue", report.issue)
    table.add_row("chunk", f"up to {work.chunk_tokens:,} tokens")
    table.add_row("batches", f"{report.batches:,} (after {report.warm_up_batches} of warm-up)")
    table.add_row("ids", "every batch equal to the plain torch path's")
    table.add_row("requests", f"{report.requests:,} (the trace has {len(work.requests):,})")
    table.add_row("tokens", f"{report.tokens:,}")
    return table


def _time_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(title="host time, us", title_justify="left")
    table.add_column("call")
    for column in ("p50", "p99", "max"):
        table.add_column(column, justify="right")
    _add_times(table, "stage", report.stage)
    _add_times(table, "resolve", report.resolve)
    _add_times(table, "stage + resolve", report.both)
    _add_times(table, "plain torch path", report.plain)
    table.add_section()
    table.add_row("plain / pystage", *(f"{ratio:.2f} x" for ratio in _ratios(report)))
    return table


def _add_times(table: Table, name: str, times: HostTime) -> None:
    table.add_row(name, f"{times.p50_us:.1f}", f"{times.p99_us:.1f}", f"{times.max_us:.1f}")


def _ratios(report: Report) -> tuple[float, float]:
    """Plain torch path to stage and resolve: of p50 and of p99. Of two maxima it says nothing."""
    plain, both = report.plain, report.both
    return plain.p50_us / both.p50_us, plain.p99_us / both.p99_us


def _pool_table(report: Report) -> Table:
    pool = report.pool
    table = _two_columns("pool")
    table.add_row("reserved", f"{_size(pool.reserved_bytes)} of {_size(pool.capacity_bytes)}")
    table.add_row("high-water mark", _size(pool.high_water_bytes))
    if pool.why_pageable:
        table.add_row("not pinned", f"{_size(pool.pageable_bytes)}: {pool.why_pageable}")
    table.add_row("allocations", f"{pool.allocations:,}")
    table.add_row("  after warm-up", f"{pool.allocations_after_warm_up:,}")
    table.add_row("fallbacks", f"{pool.fallbacks:,}")
    table.add_row("waits", f"{pool.waits:,}")
    table.add_row("on the wire", f"{_size(pool.wire_bytes)} ({_size(pool.int64_bytes)} as int64)")
    return table


def _profile_table(report: ChunkReport) -> Table:
    size, profile, fit = report.size, report.profile, report.fit
    table = _two_columns("prefill profile of a small decoder")
    table.add_row("decoder", f"{size.layers} layers, {report.parameters / 1e6:,.1f} M parameters")
    table.add_row("context", f"{size.context:,} tokens, base chunk {size.base_chunk:,}")
    table.add_row("profile", f"{profile.forwards} forwards in {profile.seconds:.1f} s")
    table.add_row("fit", str(fit))
    return table


def _plan_table(report: ChunkReport) -> Table:
    from rich.table import Table

    plans = {"one size": report.fixed, "equal time": report.planned}
    table = Table(title="chunks of one prompt", title_justify="left")
    table.add_column("")
    for name in plans:
        table.add_column(name, justify="right")
    for row, cell in _PLAN_ROWS.items():
        table.add_row(row, *(cell(chunks) for chunks in plans.values()))
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


def _two_columns(title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _size(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):,.1f} KiB"


def _write_json(
    path: Path, report: Report, chunks: ChunkReport | None, options: argparse.Namespace
) -> None:
    p50, p99 = _ratios(report)
    figures = {
        "build": dataclasses.asdict(build_info()),
        "trace": options.trace or "sample",
        "chunk_tokens": options.chunk,
        "vocab_size": options.vocab,
        **dataclasses.asdict(report),
        "plain_to_pystage": {"p50": p50, "p99": p99},
    }
    if chunks is not None:
        figures["chunks"] = {
            "profile_forwards": chunks.profile.forwards,
            "profile_seconds": chunks.profile.seconds,
            "samples": samples_to_json(chunks.profile.samples),
            "fit": dataclasses.asdict(chunks.fit),
            "equal time": {**dataclasses.asdict(chunks.planned), "spread": chunks.planned.spread},
            "one size": {**dataclasses.asdict(chunks.fixed), "spread": chunks.fixed.spread},
        }
    path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
