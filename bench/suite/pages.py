"""Makes the tables of docs/benchmarks.md from a run of the suite. Each table answers one question
of a reader. The JSON has every cell and every contender."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bench.common import MET, amount
from bench.report.tables import indented, source, tabulate
from bench.suite.contenders import (
    BUFFER,
    DEFERRED,
    EAGER,
    EMPTY,
    ENGINE,
    READY,
    RUNNER,
    SGLANG,
    TORCH,
    TOTAL,
    UVA,
    WIDE,
)
from bench.suite.drift import DRIFTERS
from bench.suite.history import CUT
from bench.suite.latency import BULK, UNPAUSED, UNPAUSED_IDS, unpaused_name
from bench.suite.mixed import FUSED, KERNELS, MIXED_SGLANG
from bench.suite.targets import Cells, Missing

NOT_YET = "Not measured yet: `make bench` on a GPU, then `make report`."
HOST = (
    *(f"{shape} array" for shape in ("1 x 128", "1 x 8192", "1 x 131072", "1 x 1048576")),
    *(f"{shape} array" for shape in ("8 x 1024", "64 x 128", "1000 x 8")),
    "1 x 8192 array, cold",
    *(f"1 x 8192 {kind}" for kind in ("list", "numpy", "tensor")),
)
BASELINES = (SGLANG, BUFFER, UVA, RUNNER)
HEADS = {DEFERRED: "pystage", SGLANG: "baseline: SGLang"}  # contenders as column heads


def sections(result: dict[str, Any] | None) -> dict[str, str]:
    """The text for each mark, by the name of the mark. None: there is no run yet."""
    makers = {
        "suite-source": lambda r: source(r | {"devices": 1}, r.get("file", "")),  # it uses one GPU
        "suite-notes": _notes,
        "suite-targets": _targets,
        "suite-host": _host_summary,
        "suite-stream": _stream,
        "suite-latency": _latency,
        "suite-unpaused": _unpaused,
        "suite-drift": _drift,
        "suite-threads": lambda r: _totals(r, "threads"),
        "suite-processes": _processes,
        "suite-history": lambda r: _totals(r, "history"),
        "suite-mixed": _mixed,
    }
    if result is None:
        return dict.fromkeys(makers, NOT_YET)
    return {name: make(result) for name, make in makers.items()}


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
    """A readable name of a cell: numbers with commas, and a singular after one."""
    words = [f"{int(w):,}" if w.isdigit() else w for w in cell.split(" ")]
    text = " ".join(words).replace("Python thread beside", "beside a Python thread")
    return re.sub(r"^1 (thread|process)(?:es|s)", r"1 \1", text)


def _host_summary(result: dict[str, Any]) -> str:
    """Host times: both calls together, each call alone, and the best peer."""
    look, rows = Cells(result), []
    for name in HOST:
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
    head = ["host time, us, p50 / p99", "pystage", "stage + resolve", "lower bound"]
    head += ["baseline: best peer", "which", "baseline / pystage", "in the three passes"]
    return tabulate(head, rows)


def _by_contender(
    result: dict[str, Any], regime: str, kind: str, show: Any, title: str, only: Sequence[str]
) -> str:
    """A row for each cell, and a column for each contender of ``only`` that was measured."""
    cells = _cells(result, regime)
    names = [n for n in only if any(kind in c["contenders"].get(n, {}) for c in cells.values())]
    rows = [
        [_label(name), *(show(cell["contenders"].get(n, {}).get(kind)) for n in names)]
        for name, cell in cells.items()
    ]
    return tabulate([title, *(HEADS.get(n, n) for n in names)], rows)


def _stream(result: dict[str, Any]) -> str:
    only = (DEFERRED, EAGER, ENGINE, WIDE, *BASELINES, READY, EMPTY)
    return _by_contender(
        result, "stream", "added", _half, "added to the compute stream, us, p50", only
    )


def _totals(result: dict[str, Any], regime: str) -> str:
    only = (DEFERRED, TORCH, CUT, *BASELINES)
    return _by_contender(result, regime, "total", _pair, "host time, us, p50 / p99", only)


def _latency(result: dict[str, Any]) -> str:
    """Latency: a row for each contender, a column for each cell."""
    cells = {n: cell for n, cell in _cells(result, "latency").items() if n in ("alone", BULK)}
    names: dict[str, None] = {}
    for cell in cells.values():
        names |= dict.fromkeys(cell["contenders"])
    rows = [
        [name, *(_pair(cell["contenders"].get(name, {}).get("ready")) for cell in cells.values())]
        for name in names
    ]
    return tabulate(["8,192 ids on the GPU, us, p50 / p99", *cells], rows)


def _unpaused(result: dict[str, Any]) -> str:
    """Latency beside copies without a pause, by contender. The table says which ones starved."""
    cells, rows = _cells(result, "latency"), []
    only = (DEFERRED, *BASELINES, READY)
    names: dict[str, None] = {}
    for mib, depth in UNPAUSED:
        for ids in UNPAUSED_IDS:
            cell = cells.get(unpaused_name(mib, depth, ids), {}).get("contenders", {})
            names |= dict.fromkeys(n for n in only if n in cell)
            if cell:
                rows.append((f"{ids:,} ids, {depth} x {mib} MiB queued", cell))
    if not rows:
        return NOT_YET

    def shown(row: dict[str, Any]) -> str:
        if "starved_after_s" not in row:
            return _pair(row.get("ready"))
        late = f"within {row['starved_after_s']:g} s"
        if not row["answered"]:
            return f"none {late}"
        return f"{_pair(row.get('ready'))}; 1 of {row['answered'] + 1} not {late}"

    table = [[label, *(shown(cell.get(name, {})) for name in names)] for label, cell in rows]
    return tabulate(["ids on the GPU, us, p50 / p99", *(HEADS.get(n, n) for n in names)], table)


def _drift(result: dict[str, Any]) -> str:
    cells, rows = _cells(result, "drift"), []
    for name in DRIFTERS:
        row = cells.get(f"trace, {name}", {}).get("contenders", {}).get(name)
        if row:
            held = row["pinned_bytes"]
            other = cells.get(f"new sizes, {name}", {}).get("contenders", {}).get(name, {})
            made = other.get("made", {})  # made many times there, and once for the trace
            rows.append(
                [
                    name,
                    _pair(row["total"]),
                    _number(row["first_call"], ",.0f"),
                    _number(row["worst_call"], ",.0f"),
                    _number(made.get("p50"), ",.0f"),
                    _number(None if held is None else held / 2**20, ".1f"),
                    _number(row["allocations"], "d"),
                    _number(row["allocations_after_warm_up"], "d"),
                ]
            )
    head = ["us", "call, p50 / p99", "first call", "worst call", "to make it", "pinned, MiB"]
    return tabulate([*head, "pinned allocations", "after warm-up"], rows)


def _processes(result: dict[str, Any]) -> str:
    only = (ENGINE, DEFERRED, TORCH, *BASELINES)
    return _by_contender(result, "processes", "ready", _pair, "ids on the GPU, us, p50 / p99", only)


def _mixed(result: dict[str, Any]) -> str:
    """Compares one kernel of pystage with SGLang's copy, gather and ``torch.cat``."""
    rows, cells = [], _cells(result, "mixed")
    cells.pop(KERNELS, None)
    for cell, measured in cells.items():
        sides = [measured["contenders"].get(name, {}) for name in (FUSED, MIXED_SGLANG)]
        rows.append(
            [
                _label(cell),
                *(_pair(side.get("total")) for side in sides),
                *(_half(side.get("added")) for side in sides),
            ]
        )
    head = ["us", "pystage: host time, p50 / p99", "baseline: host time", "pystage: stream, p50"]
    return tabulate([*head, "baseline: stream"], rows)


RATIO = re.compile(
    r",? of (the lower bound|its p50|an empty kernel|cudaMemcpyAsync|int64's|the best peer's|"
    r"copy \+ gather \+ cat|without)\b"
)


def _measure(name: str) -> str:
    """A target's recorded name, with the words that the page uses."""
    name = re.sub(r"\bours\b", "pystage's", name).replace(" over ", " / ")
    return indented(RATIO.sub(r" / \1", name).replace("ids ready", "ids on the GPU"))


def _targets(result: dict[str, Any]) -> str:
    rows = [
        [
            _measure(row["measure"]),
            row["target"],
            amount(row),
            MET[row["met"]],
            row["where"] if "worst" in row["measure"] else "",
        ]
        for row in result["targets"]
    ]
    return tabulate(["measure", "target", "measured", "met", "where"], rows)


def _notes(result: dict[str, Any]) -> str:
    lines = [f"- {name}: {note}." for name, note in result["notes"].items() if note]
    lines += [f"- {name}: absent, {why}." for name, why in result["absent"].items()]
    lines += [f"- {where}: failed." for where in result["errors"]]
    lines.append(f"- {EMPTY}: `torch.cuda._sleep(0)`.")
    lines.append(f"- The CPU has {result['cpu_cache_bytes'] / 2**20:,.0f} MiB of caches.")
    return "\n".join(lines)
