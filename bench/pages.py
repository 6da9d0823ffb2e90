"""The tables of docs/benchmarks.md and of the README, from a run of the suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.common import amount
from bench.contenders import BUFFER, DEFERRED, EMPTY, EVERYBODY, READY, RUNNER, SGLANG, TOTAL
from bench.suite.cells import SHAPES
from bench.suite.drift import DRIFTERS, NEW_SIZES
from bench.suite.latency import (
    BULK,
    DIRECTIONS,
    MOVERS,
    PIECES,
    UNPAUSED,
    UNPAUSED_IDS,
    WAITED,
    unpaused_name,
)
from bench.suite.mixed import KERNELS, PLAIN_MIXED
from bench.targets import Cells, Missing

NOT_YET = "Not measured yet: `make bench` on a GPU, then `make report`."
SHORT = ("1 x 128", "1 x 8192", "8 x 1024", "64 x 128", "1 x 16384", "1 x 131072")


def tabulate(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def indented(measure: str) -> str:
    """Markdown drops spaces in front."""
    return measure.replace("  ", "&nbsp;&nbsp;")


def sections(result: dict[str, Any] | None) -> dict[str, str]:
    """What stands at each mark, by its name. None: there is no run yet."""
    makers = {
        "suite": lambda r: _host_summary(r, [f"{shape} array" for shape in SHORT]),
        "suite-targets": _targets,
        "suite-source": source,
        "suite-host": lambda r: _host_summary(r, _cells(r, "host")),
        "suite-contenders": _host_contenders,
        "suite-stream": _stream,
        "suite-latency": _latency,
        "suite-calls": _calls,
        "suite-traffic": _traffic,
        "suite-unpaused": _unpaused,
        "suite-drift": _drift,
        "suite-new-sizes": _new_sizes,
        "suite-threads": lambda r: _totals_by_row(r, "threads"),
        "suite-processes": _processes,
        "suite-unpaused-short": lambda r: _unpaused(r, (DEFERRED, SGLANG, BUFFER, RUNNER)),
        "suite-history": lambda r: _totals(r, "history"),
        "suite-mixed": _mixed,
        "suite-notes": _notes,
        "suite-plots": _plots,
    }
    if result is None:
        return dict.fromkeys(makers, NOT_YET)
    return {name: make(result) for name, make in makers.items()}


def source(result: dict[str, Any], file: str = "") -> str:
    """Where figures come from. ``file``: that of the result, where it is to be named."""
    gpus = f"{result['devices']} x " if result["devices"] > 1 else ""
    when = result["date"][:16].replace("T", " ")
    at = f", `bench/results/{file}`" if file else ""
    return (
        f"{gpus}{result['device']}, {result['cores']}-core VM ({result['cpu']}), driver "
        f"{result['driver']}, torch {result['torch']}, {when} UTC, commit "
        f"`{result['commit'][:9]}`: `{result['command']}`{at}."
    )


def _cells(result: dict[str, Any], regime: str) -> dict[str, Any]:
    """The cells that have contenders."""
    cells = result["regimes"].get(regime, {})
    return {name: cell for name, cell in cells.items() if cell.get("contenders")}


def _pair(times: dict[str, float] | None) -> str:
    return f"{times['p50']:,.1f} / {times['p99']:,.1f}" if times else ""


def _half(times: dict[str, float] | None) -> str:
    return f"{times['p50'] + 0.0:,.1f}".replace("-0.0", "0.0") if times else ""


def _number(value: float | None, form: str = ",.1f") -> str:
    return "" if value is None else format(value, form)


def _label(cell: str) -> str:
    """Numbers of a cell's name with commas."""
    words = [f"{int(w):,}" if w.isdigit() else w for w in cell.split(" ")]
    return " ".join(words)


def _host_summary(result: dict[str, Any], names: Any) -> str:
    look, rows = Cells(result), []
    for name in names:
        cell = result["regimes"].get("host", {}).get(name, {})
        ours = cell.get("contenders", {}).get(DEFERRED, {})
        if "total" not in ours:
            continue
        try:
            ratio, where = look.best_peer(name)
            peer = where.removeprefix(f"{name}: ")
            theirs = cell["contenders"][peer]["total"]
            passes = zip(theirs.get("passes", ()), ours["total"].get("passes", ()), strict=True)
            ratios = [other / own for other, own in passes]
            between = f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else ""
        except Missing:
            ratio, peer, theirs, between = None, "", None, ""
        rows.append(
            [
                _label(name),
                _pair(ours["total"]),
                f"{_half(ours['stage'])} + {_half(ours['resolve'])}",
                _half(cell.get("bound", {}).get(TOTAL)),
                _pair(theirs),
                peer,
                "" if ratio is None else f"{ratio:.1f} x",
                between,
            ]
        )
    head = ["host time, us, p50 / p99", "pystage", "stage + resolve", "lower bound", "best peer"]
    head += ["", "", "passes"]
    return tabulate(head, rows)


def _host_contenders(result: dict[str, Any]) -> str:
    cells = _cells(result, "host")
    shapes = [shape for shape in SHAPES if f"{shape} array" in cells]
    rows = []
    for name in EVERYBODY:
        row = [cells[f"{s} array"]["contenders"].get(name, {}).get("total") for s in shapes]
        if any(row):
            rows.append([name, *map(_half, row)])
    return tabulate(["host time from array, us, p50", *map(_label, shapes)], rows)


def _by_contender(result: dict[str, Any], regime: str, kind: str, show: Any, title: str) -> str:
    """A row for each cell, a column for each contender."""
    cells = _cells(result, regime)
    names: dict[str, None] = {}
    for cell in cells.values():
        names |= {name: None for name, row in cell["contenders"].items() if kind in row}
    rows = [
        [_label(name), *(show(cell["contenders"].get(n, {}).get(kind)) for n in names)]
        for name, cell in cells.items()
    ]
    return tabulate([title, *names], rows)


def _stream(result: dict[str, Any]) -> str:
    return _by_contender(result, "stream", "added", _half, "added to the compute stream, us, p50")


def _totals(result: dict[str, Any], regime: str) -> str:
    return _by_contender(result, regime, "total", _pair, "host time, us, p50 / p99")


def _latency(result: dict[str, Any]) -> str:
    return _ready(result, ("alone", BULK), "p50 / p99", {"": ("ready", _pair)})


def _ready(
    result: dict[str, Any],
    wanted: Sequence[str],
    percentiles: str,
    shown: dict[str, tuple[str, Callable[[dict[str, float] | None], str]]],
) -> str:
    """Contenders by cells. ``shown``: the times under each title, which if empty is the cell's."""
    cells = {name: cell for name, cell in _cells(result, "latency").items() if name in wanted}
    names: dict[str, None] = {}
    for cell in cells.values():
        names |= dict.fromkeys(cell["contenders"])
    head = [title or name for name in cells for title in shown]
    rows = [
        [name]
        + [
            show(cell["contenders"].get(name, {}).get(kind))
            for cell in cells.values()
            for kind, show in shown.values()
        ]
        for name in names
    ]
    return tabulate([f"8,192 ids ready, us, {percentiles}", *head], rows)


def _calls(result: dict[str, Any]) -> str:
    """Until the ids are there, and what of it is the call's."""
    shown = {"": ("ready", _half), "of it the call": ("call", _half)}
    return _ready(result, (WAITED, BULK), "p50", shown)


def _traffic(result: dict[str, Any]) -> str:
    cells = _cells(result, "latency")
    head = ["8,192 ids ready, us, p50 / p99"]
    for mover in MOVERS:
        head += [f"by {mover}: cudaMemcpyAsync", "pystage"]
    rows = []
    for direction in DIRECTIONS:
        for piece in PIECES:
            row = [f"{direction}, pieces of {piece}"]
            for mover in MOVERS:
                cell = cells.get(f"{direction}, {piece} by {mover}", {}).get("contenders", {})
                row += [_pair(cell.get(name, {}).get("ready")) for name in (READY, DEFERRED)]
            rows.append(row)
    return tabulate(head, rows)


def _unpaused(result: dict[str, Any], only: Sequence[str] = ()) -> str:
    """Contenders by cells; who starved in one is said so."""
    cells, rows = _cells(result, "latency"), []
    names: dict[str, None] = {}
    for mib, depth in UNPAUSED:
        for ids in UNPAUSED_IDS:
            cell = cells.get(unpaused_name(mib, depth, ids), {}).get("contenders", {})
            names |= dict.fromkeys(n for n in cell if not only or n in only)
            if cell:
                rows.append((f"{depth} x {mib} MiB, {ids:,} ids", cell))
    if not rows:
        return NOT_YET

    def shown(row: dict[str, Any]) -> str:
        if "starved_after_s" in row:
            return f"none within {row['starved_after_s']:g} s"
        return _pair(row.get("ready"))

    table = [[label, *(shown(cell.get(name, {})) for name in names)] for label, cell in rows]
    return tabulate(["always queued; ready, us, p50 / p99", *names], table)


def _drift(result: dict[str, Any]) -> str:
    cells, rows = _cells(result, "drift"), []
    for name in DRIFTERS:
        row = cells.get(f"trace, {name}", {}).get("contenders", {}).get(name)
        if row:
            held = row["pinned_bytes"]
            rows.append(
                [
                    name,
                    _pair(row["total"]),
                    _number(row["first_call"], ",.0f"),
                    _number(row["worst_call"], ",.0f"),
                    _number(row["made"], ",.0f"),
                    _number(None if held is None else held / 2**20, ".1f"),
                    _number(row["allocations"], "d"),
                    _number(row["allocations_after_warm_up"], "d"),
                ]
            )
    head = ["us", "call, p50 / p99", "first", "worst", "to make it", "pinned MiB", "allocations"]
    return tabulate([*head, "after warm-up"], rows)


def _new_sizes(result: dict[str, Any]) -> str:
    cells, rows = _cells(result, "drift"), []
    for name in DRIFTERS:
        row = cells.get(f"new sizes, {name}", {}).get("contenders", {}).get(name)
        if row:
            first = row["first_call_of_a_size"]
            rows.append([name, *(_half(first.get(str(n))) for n in NEW_SIZES), _half(row["made"])])
    return tabulate(
        ["first call of a size, us, p50", *(f"{n:,}" for n in NEW_SIZES), "to make it"], rows
    )


def _totals_by_row(result: dict[str, Any], regime: str) -> str:
    rows = []
    for cell, measured in _cells(result, regime).items():
        for name, row in measured["contenders"].items():
            if "total" in row and result["roles"].get(name) != "reference":
                rate = row.get("batches_per_second")
                rows.append([_label(cell), name, _pair(row["total"]), _number(rate, ",.0f")])
    return tabulate(["host time, us, p50 / p99", "", "", "batches a second"], rows)


def _processes(result: dict[str, Any]) -> str:
    rows = [
        [_label(cell), name, _pair(row["total"]), _pair(row["ready"])]
        for cell, measured in _cells(result, "processes").items()
        for name, row in measured["contenders"].items()
        if "total" in row
    ]
    return tabulate(["us, p50 / p99", "", "host time", "ids ready"], rows)


def _mixed(result: dict[str, Any]) -> str:
    rows, cells = [], _cells(result, "mixed")
    counts = cells.pop(KERNELS, {}).get("contenders", {})
    for cell, measured in cells.items():
        plain = measured["contenders"].get(PLAIN_MIXED, {}).get("added")
        for name, row in measured["contenders"].items():
            if "total" not in row:
                continue
            share = ""
            if plain and plain["p50"] > 0 and "added" in row:
                share = f"{row['added']['p50'] / plain['p50']:.0%}"
            count = counts.get(name, {})
            rows.append(
                [
                    _label(cell),
                    name,
                    _pair(row["total"]),
                    _half(row.get("added")),
                    share,
                    _number(count.get("kernels"), "d"),
                    _number(count.get("copies"), "d"),
                ]
            )
    head = ["us", "", "host time, p50 / p99", "added to the stream, p50", "of the plain way"]
    return tabulate([*head, "kernels", "copies"], rows)


def _targets(result: dict[str, Any]) -> str:
    rows = [
        [
            indented(row["measure"]),
            row["target"],
            amount(row),
            {True: "yes", False: "no", None: "not measured"}[row["met"]],
            row["where"],
        ]
        for row in result["targets"]
    ]
    return tabulate(["measure", "target", "measured", "met", "where"], rows)


def _notes(result: dict[str, Any]) -> str:
    lines = [f"- {name}: {note}." for name, note in result["notes"].items() if note]
    lines += [f"- {name}: absent, {why}." for name, why in result["absent"].items()]
    lines += [f"- {where}: failed." for where in result["errors"]]
    lines.append(
        f"- {EMPTY}: `torch.cuda._sleep(0)`. Caches of the CPU: "
        f"{result['cpu_cache_bytes'] / 2**20:,.0f} MiB."
    )
    return "\n".join(lines)


def _plots(result: dict[str, Any]) -> str:
    return "\n".join(
        f"![{name}](suite-{name}.svg)"
        for name in ("host", "stream", "latency", "drift")
        if _cells(result, name)
    )
