"""The targets of pystage on an H100 or H200, compared with what a run measured. Most are ratios
within one run, the others times and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from bench.suite.contenders import (
    BUFFER,
    BUFFERS,
    DEFERRED,
    EAGER,
    EMPTY,
    RAGGED,
    READY,
    SGLANG,
    TORCH,
    TOTAL,
)
from bench.suite.latency import BULK, WAITED
from bench.suite.mixed import FUSED, KERNELS, PLAIN_MIXED

LINK = "bytes over the link"
Found = tuple[float, str]  # a value, and the cell it is from


class Missing(Exception):
    """The run lacks a cell. The message says which."""


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each target.

    Returns:
        Dicts of ``measure``, ``target``, ``value`` (None if not measured), ``unit``, ``where`` (the
        cell that decided, or why there is none) and ``met`` (None if not measured).
    """
    rows: list[dict[str, Any]] = []

    def row(measure: str, sign: str, limit: float, unit: str, find: Callable[[], Found]) -> None:
        target = f"{sign} {limit:g}".removeprefix("= ")
        value: float | None
        met: bool | None
        try:
            value, where = find()
        except Missing as missing:
            value, where, met = None, str(missing), None
        else:
            met = {"<=": value <= limit, ">=": value >= limit, ">": value > limit}.get(
                sign, value == limit
            )
            value = round(value, 3)
        rows.append(
            {
                "measure": measure,
                "target": f"{target} {unit}".strip(),
                "value": value,
                "unit": unit,
                "where": where,
                "met": met,
            }
        )

    cells = Cells(result)
    row(
        "stage + resolve, of the lower bound, worst shape from array",
        "<=",
        1.5,
        "x",
        lambda: worst(cells.above_bound(cell) for cell in cells.host("array")),
    )
    row(
        "  lowest of all cells: under 1, it is no bound",
        ">=",
        1,
        "x",
        lambda: least(cells.above_bound(cell) for cell in cells.host("")),
    )
    row(
        "  its p99 of its p50, worst shape from array",
        "<=",
        2,
        "x",
        lambda: worst(cells.tail(cell) for cell in cells.host("array")),
    )
    row(
        "the best peer's host time over ours, worst of all cells",
        ">",
        1,
        "x",
        lambda: least(cells.best_peer(cell) for cell in cells.host("")),
    )
    for peer, limit, cell in (
        (BUFFER, 1.8, "1 x 8192 array"),
        (TORCH, 2, "1 x 8192 array"),
        (SGLANG, 2.5, "1 x 8192 array"),
        (TORCH, 3, "64 x 128 array"),
        (TORCH, 2, "1 x 8192 list"),
    ):
        row(
            f"  {peer} over ours, {cell.replace('8192', '8,192')}",
            ">=",
            limit,
            "x",
            lambda peer=peer, cell=cell: (
                cells.time("host", cell, peer, "total")
                / cells.time("host", cell, DEFERRED, "total"),
                cell,
            ),
        )
    row(
        "stage + resolve, 1 x 8,192 array",
        "<=",
        15,
        "us",
        lambda: (cells.time("host", "1 x 8192 array", DEFERRED, "total"), "1 x 8192 array"),
    )
    row(
        "  behind 131,072 ids of history, of without",
        "<=",
        1.2,
        "x",
        lambda: (
            cells.time("history", "8192 behind 131072", DEFERRED, "total")
            / cells.time("history", "8192 behind 0", DEFERRED, "total"),
            "history",
        ),
    )
    row(
        "compute stream, deferred, of an empty kernel, up to 16,384 ids",
        "<=",
        2.5,
        "x",
        lambda: worst(cells.added_ratio(n, EMPTY) for n in (128, 1024, 8192, 16384)),
    )
    row(
        "  of cudaMemcpyAsync, 1,024 to 131,072 ids",
        "<=",
        1,
        "x",
        lambda: worst(cells.added_ratio(n, READY) for n in (1024, 8192, 16384, 131072)),
    )
    for count, limit in ((8192, 0.45), (1048576, 0.6)):
        row(
            f"  {count:,} ids",
            "<=",
            limit,
            "x",
            lambda count=count: cells.added_ratio(count, READY),
        )
    row(
        "compute stream, eager, GPU busy",
        "<=",
        0.5,
        "us",
        lambda: worst(
            (cells.time("stream", cell, EAGER, "added"), cell)
            for cell in cells.of("stream", "busy")
        ),
    )
    for percentile, limit in (("p50", 50), ("p99", 200)):
        row(
            f"ids ready behind bulk H2D, 8,192 ids, {percentile}",
            "<=",
            limit,
            "us",
            lambda percentile=percentile: cells.ready_behind(BULK, percentile),
        )
    row(
        "bytes over the link, of int64's",
        "<=",
        0.5,
        "x",
        lambda: (cells.value("host", LINK, DEFERRED, "bytes_per_id") / 8, "trace batches"),
    )
    trace = f"trace, {DEFERRED}"
    row(
        "pinned allocations after warm-up, trace",
        "=",
        0,
        "",
        lambda: (cells.value("drift", trace, DEFERRED, "allocations_after_warm_up"), trace),
    )
    row(
        "worst call of the trace, cold start included, of the best peer's",
        "<=",
        1,
        "x",
        lambda: cells.worst_call(),
    )
    row(
        "stage + resolve, list input, 8,192 ids",
        "<=",
        20,
        "us",
        lambda: cells.list_time("1 x 8192 list"),
    )
    row(
        "mixed batch, kernels and copies",
        "=",
        1,
        "",
        lambda: (
            sum(cells.value("mixed", KERNELS, FUSED, kind) for kind in ("kernels", "copies")),
            KERNELS,
        ),
    )
    for kind, label in (("total", "host time"), ("added", "compute stream")):
        row(
            f"  {label} of copy + gather + cat, worst",
            "<=",
            0.6,
            "x",
            lambda kind=kind: worst(
                (
                    ratio(
                        cells.time("mixed", cell, FUSED, kind),
                        cells.time("mixed", cell, PLAIN_MIXED, kind),
                    ),
                    cell,
                )
                for cell in cells.of("mixed", "")
                if cell != KERNELS
            ),
        )
    return rows


def ratio(ours: float, theirs: float) -> float:
    """The ratio of two times."""
    if theirs <= 0:
        raise Missing(f"the other one took {theirs:g} us: no ratio")
    return ours / theirs


def worst(values: Iterable[Found]) -> Found:
    """The largest value."""
    return max([*values] or _none())


def least(values: Iterable[Found]) -> Found:
    """The smallest value."""
    return min([*values] or _none())


def _none() -> list[Found]:
    raise Missing("not measured in this run")


class Cells:
    """Looks up cells in a result."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.regimes = result["regimes"]
        self.roles = result["roles"]

    def of(self, regime: str, prefix: str) -> list[str]:
        return [name for name in self.regimes.get(regime, {}) if name.startswith(prefix)]

    def host(self, kind: str) -> list[str]:
        """Cells of the host regime with requests of that kind."""
        return [name for name in self.of("host", "") if kind in name and name != LINK]

    def value(self, regime: str, cell: str, contender: str, key: str) -> Any:
        rows = self.regimes.get(regime, {}).get(cell, {}).get("contenders", {})
        found = rows.get(contender, {}).get(key)
        if found is None:
            raise Missing(f"{regime}, {cell}: {contender} has no {key}")
        return found

    def time(self, regime: str, cell: str, contender: str, key: str, part: str = "p50") -> float:
        return float(self.value(regime, cell, contender, key)[part])

    def bound(self, cell: str) -> dict[str, Any]:
        below: dict[str, Any] | None = self.regimes.get("host", {}).get(cell, {}).get("bound")
        if below is None:
            raise Missing(f"host, {cell}: no lower bound")
        return below

    def above_bound(self, cell: str) -> Found:
        ours, below = self.time("host", cell, DEFERRED, "total"), self.bound(cell)
        where = cell
        if BUFFERS in below and not cell.startswith("1 x"):  # what many arrays add to one
            parts = (BUFFERS, RAGGED, "memory", "launch")
            ragged = sum(below[part]["p50"] for part in parts)
            where += f"; {ours / ragged:.2f} x where its arrays are asked and read one by one, cold"
        return ours / below[TOTAL]["p50"], where

    def tail(self, cell: str) -> Found:
        """The 99th percentile divided by the median, with the same ratio of the lower bound and of
        the best peer."""
        below, peer = self.bound(cell)[TOTAL], self.peers(cell)[0]
        time = partial(self.time, "host", cell)
        theirs = time(peer, "total", "p99") / time(peer, "total")
        bound = below["p99"] / below["p50"]
        where = f"{cell}; {theirs:.1f} x {peer}, {bound:.1f} x the lower bound"
        return time(DEFERRED, "total", "p99") / time(DEFERRED, "total"), where

    def peers(self, cell: str) -> list[str]:
        """The peers measured in a cell of the host regime, the fastest first."""
        rows = self.regimes["host"][cell].get("contenders", {})
        peers = [n for n, row in rows.items() if self.roles.get(n) == "peer" and "total" in row]
        if not peers:
            raise Missing(f"host, {cell}: no peer was measured")
        return sorted(peers, key=lambda name: float(rows[name]["total"]["p50"]))

    def best_peer(self, cell: str) -> Found:
        name = self.peers(cell)[0]
        theirs, ours = (self.time("host", cell, n, "total") for n in (name, DEFERRED))
        return theirs / ours, f"{cell}: {name}"

    def added_ratio(self, count: int, other: str) -> Found:
        cell = f"idle, {count} ids"
        ours = self.time("stream", cell, DEFERRED, "added")
        return ratio(ours, self.time("stream", cell, other, "added")), cell

    def ready_behind(self, cell: str, part: str) -> Found:
        """The time until ids are ready behind copies. The text has the part that the call took, the
        time without copies if it was measured, and the other contenders."""
        ready = self.time("latency", cell, DEFERRED, "ready", part)
        rows = self.regimes["latency"][cell]["contenders"]
        where = ", ".join(
            f"{name} {row['ready'][part]:,.0f}"
            for name, row in rows.items()
            if name != DEFERRED and "ready" in row
        )
        where += " us"
        if "contenders" in self.regimes["latency"].get(WAITED, {}):
            call, waited = (
                self.time("latency", at, DEFERRED, kind, part)
                for at, kind in ((cell, "call"), (WAITED, "ready"))
            )
            where = f"{call:.0f} us in the call; {waited:.0f} us as late without copies; {where}"
        return ready, where

    def list_time(self, cell: str) -> Found:
        ours, below = self.time("host", cell, DEFERRED, "total"), self.bound(cell)[TOTAL]
        return ours, f"{cell}; the lower bound of an array is {below['p50']:.1f} us"

    def worst_call(self) -> Found:
        calls = {
            name: self.value("drift", cell, name, "worst_call")
            for cell in self.of("drift", "trace, ")
            for name, row in self.regimes["drift"][cell].get("contenders", {}).items()
            if "worst_call" in row and self.roles.get(name) == "peer"
        }
        if not calls:
            raise Missing("drift: no peer was measured")
        best = min(calls, key=lambda name: calls[name])
        ours = self.value("drift", f"trace, {DEFERRED}", DEFERRED, "worst_call")
        return ours / calls[best], f"{best} {calls[best]:,.0f} us, ours {ours:,.0f} us"
