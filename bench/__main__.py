"""Runs all regimes of the benchmark: python -m bench

The cells of each regime run one after the other. In a cell all contenders take turns, call by call,
on the same inputs. The results so far are written after every cell.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.common import (
    BUILD,
    RESULTS,
    amount,
    collector_off,
    cpu_cache_bytes,
    merged,
    provenance,
    save,
)
from bench.device import Absent, Host, find, own_stream
from bench.suite import REGIMES, Bench
from bench.suite.cells import Cell, Once
from bench.suite.contenders import Contenders
from bench.suite.peers import Sources
from bench.suite.targets import targets

FULL_SAMPLES, QUICK_SAMPLES, REHEARSAL_SAMPLES = 500, 20, 3
# The number of passes over the cells of these regimes. With several passes no figure depends on
# what the machine did during a few seconds.
PASSES, REPEATED = 3, ("host", "stream", "latency", "history", "mixed")
PERCENTILES = ("p50", "p90", "p99", "p99.9", "max")
HOST_MEANS = (
    "The host device: ids move by a worker thread within the host's memory. Its host times say "
    "what staging costs this CPU; they are no measure of a GPU, so no target applies, and regimes "
    "that need streams are left out."
)
REHEARSAL_MEANS = (
    "A rehearsal on stand-ins for a GPU: it shows that all runs. Its figures mean nothing."
)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark. Returns the result that was written."""
    args = parse(arguments)
    console = Console(width=120)
    device = find(args.device, args.rehearse)
    samples = args.samples or (
        REHEARSAL_SAMPLES if args.rehearse else QUICK_SAMPLES if args.quick else FULL_SAMPLES
    )
    quick = args.quick or args.rehearse
    bench = Bench(
        device,
        Contenders(device, Sources(args.peers)),
        samples,
        warmup=min(50, max(2, samples // 6)),
        quick=quick,
        cache_bytes=1 << 20 if args.rehearse else cpu_cache_bytes(),
        trace_batches=args.trace_batches or (200 if quick else 12_000),
    )
    result: dict[str, Any] = {
        "benchmark": "suite",
        **provenance(),
        "device_name": device.name,
        "means": REHEARSAL_MEANS if args.rehearse else "" if device.cuda else HOST_MEANS,
        "samples": samples,
        "quick": quick,
        "passes": 1 if quick else PASSES,
        "cpu_cache_bytes": bench.cache_bytes,
        "regimes": {},
        "roles": bench.contenders.roles,
        "notes": bench.contenders.notes,
        "absent": bench.contenders.absent,
        "errors": bench.contenders.errors,
        "targets": [],
        "complete": False,
    }
    path = args.out or default_path(device, args)
    with own_stream(device):
        measure(bench, args.regimes, result, path, console)
    result["complete"] = True
    save(path, result)
    for name in args.regimes:
        console.print(regime_table(name, result["regimes"][name]))
    show(result, console)
    plots = [] if args.no_plots else plot(result, path, console)
    console.print("written:", *map(str, [path, *plots]))
    return result


def default_path(device: Host, args: argparse.Namespace) -> Path:
    """Only a whole run on a GPU goes where the pages take their figures from. All others go to
    build/."""
    whole = device.cuda and not (args.quick or args.rehearse or args.samples or args.trace_batches)
    whole = whole and set(args.regimes) == set(REGIMES)
    return (RESULTS if whole else BUILD) / f"suite-{device.name.lower().replace(' ', '-')}.json"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", help="cuda:N or cpu; default: the GPU there is, or cpu")
    parser.add_argument("--quick", action="store_true", help="under a minute, a look only")
    parser.add_argument("--samples", type=int, help=f"of each cell (default {FULL_SAMPLES})")
    parser.add_argument(
        "--regimes",
        type=lambda text: text.split(","),
        default=list(REGIMES),
        help=f"some of {','.join(REGIMES)}",
    )
    parser.add_argument(
        "--peers", type=Path, help="folder of wheels or unpacked packages of peers not installed"
    )
    parser.add_argument("--trace-batches", type=int, help="batches of the trace (default 12,000)")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON; default: bench/results for a whole run on a GPU, build/bench for all else",
    )
    parser.add_argument("--no-plots", action="store_true", help="bench.report draws them too")
    parser.add_argument(
        "--rehearse", action="store_true", help="every cell on stand-ins for a GPU, to see it run"
    )
    args = parser.parse_args(arguments)
    unknown = set(args.regimes) - set(REGIMES)
    if unknown:
        parser.error(
            f"no such regime: {', '.join(sorted(unknown))}; there are {', '.join(REGIMES)}"
        )
    for name in ("samples", "trace_batches"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def measure(
    bench: Bench, regimes: list[str], result: dict[str, Any], path: Path, console: Console
) -> None:
    """Fills ``result["regimes"]``. If a cell fails, records the error and runs the next one."""
    plan = {name: REGIMES[name](bench) for name in regimes}
    columns = (
        TextColumn("{task.description:48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        samples, total = bench.samples, 0
        for regime, cells in plan.items():
            repeated = PASSES if regime in REPEATED and not bench.quick else 1
            total += sum(1 if isinstance(cell, Once) else repeated for cell in cells.values())
        bar = progress.add_task("", total=total)
        for regime, cells in plan.items():
            begin = time.perf_counter()
            gc.collect()  # not for each cell: with torch loaded it takes 0.3 s
            measured: dict[str, Any] = {}
            result["regimes"][regime] = measured
            done: dict[str, list[Any]] = {name: [] for name in cells}
            seconds = dict.fromkeys(cells, 0.0)
            passes = 1 if bench.quick or regime not in REPEATED else PASSES
            for turn in range(passes):
                for name, cell in cells.items():
                    once = isinstance(cell, Once)
                    if once and turn < passes - 1:
                        continue
                    which = "" if once or passes == 1 else f" ({turn + 1} of {passes})"
                    progress.update(bar, description=f"{regime}: {name}{which}")
                    bench.samples = samples if once else -(-samples // passes)
                    start = time.perf_counter()
                    done[name].append(outcome(cell))
                    seconds[name] += time.perf_counter() - start
                    measured[name] = merged(done[name]) | {"seconds": round(seconds[name], 3)}
                    for where, text in failures(name, done[name][-1]):
                        result["errors"][f"{regime}, {where}"] = text
                        console.print(f"{regime}, {where} failed:\n{text}", markup=False)
                    progress.advance(bar)
                    save(path, result)
            bench.samples = samples
            if bench.device.cuda:
                result["targets"] = targets(result)
                save(path, result)
            took = time.perf_counter() - begin
            progress.print(f"{regime}: {len(cells)} cells, {took:.1f} s")


def outcome(cell: Cell) -> dict[str, Any]:
    """A cell's result. If it is absent or has failed, the result says so."""
    try:
        with collector_off():
            return cell()
    except Absent as why:
        return {"absent": str(why)}
    except Exception:
        return {"error": traceback.format_exc()}


def failures(cell: str, measured: dict[str, Any]) -> list[tuple[str, str]]:
    """The tracebacks of a cell and of its contenders."""
    found = [(cell, measured["error"])] if "error" in measured else []
    for name, row in measured.get("contenders", {}).items():
        if "error" in row:
            found.append((f"{cell}, {name}", row["error"]))
    return found


def regime_table(regime: str, cells: dict[str, Any]) -> Table:
    """A table in microseconds. Where there are two calls, it has their sum."""
    table = Table(title=f"{regime}, us", title_justify="left")
    for head in ("", "", *PERCENTILES):
        table.add_column(head, justify="right" if head else "left")
    table.add_column("", justify="right")
    for cell, measured in cells.items():
        for name, row in measured.get("contenders", {}).items():
            for kind, times, extra in measures(row):
                label = name if kind == "total" else f"{name}, {kind}"
                table.add_row(cell, label, *(f"{times[p]:,.1f}" for p in PERCENTILES), extra)
            if "kernels" in row:
                remark = f"{row['kernels']} kernels, {row['copies']} copies"
                table.add_row(cell, name, *[""] * 5, remark)
            if "bytes_per_id" in row:
                table.add_row(cell, name, *[""] * 5, f"{row['bytes_per_id']:g} bytes an id")
            if "starved_after_s" in row:
                table.add_row(cell, name, *[""] * 5, f"none within {row['starved_after_s']:g} s")
            if "error" in row or "absent" in row:
                table.add_row(cell, name, *[""] * 5, "failed" if "error" in row else "absent")
        for name, times in measured.get("bound", {}).items():
            table.add_row(cell, f"bound: {name}", *(f"{times[p]:,.1f}" for p in PERCENTILES), "")
        if "absent" in measured or "error" in measured:
            table.add_row(cell, "", *[""] * 5, "failed" if "error" in measured else "absent")
        table.add_section()
    return table


def measures(row: dict[str, Any]) -> list[tuple[str, dict[str, float], str]]:
    """The table entries of a contender's row: kind, times, and a remark."""
    found: list[tuple[str, dict[str, float], str]] = []
    remark = ""
    if row.get("pinned_bytes") is not None:
        remark = f"{row['pinned_bytes'] / 2**20:.1f} MiB, {row['allocations']} allocations"
    if "batches_per_second" in row:
        remark = f"{row['batches_per_second']:,.0f} batches/s"
    if row.get("behind_traffic"):
        remark = f"{row['behind_traffic']:.0%} behind"
    for kind in ("total", "added", "ready"):
        if kind in row:
            found.append((kind, row[kind], remark))
    for size, times in row.get("first_call_of_a_size", {}).items():
        found.append((f"first of {int(size):,}", times, ""))
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """Prints what is absent, what failed, and the targets."""
    for name, why in result["absent"].items():
        console.print(f"absent: {name}: {why}", markup=False)
    for where, text in result["errors"].items():
        console.print(f"failed: {where}: {text.strip().splitlines()[-1]}", markup=False)
    if result["means"]:
        console.print(result["means"])
    if not result["targets"]:
        return
    table = Table("measure", "target", "measured", "met", "where", title=result["device_name"])
    for row in result["targets"]:
        met = {True: "yes", False: "NO", None: "?"}[row["met"]]
        table.add_row(row["measure"], row["target"], amount(row), met, row["where"])
    console.print(table)


def plot(result: dict[str, Any], path: Path, console: Console) -> list[Path]:
    """Draws plots beside the JSON if matplotlib is installed."""
    try:
        from bench.suite.plots import draw
    except ImportError as error:
        console.print(f"no plots: {error}; pip install matplotlib", markup=False)
        return []
    try:
        return draw(result, path)
    except Exception:
        console.print(f"the plots failed:\n{traceback.format_exc()}", markup=False)
        return []


if __name__ == "__main__":
    main()
