"""Parts of tables that all pages share, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.common import MET, amount


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
    """Keeps the indentation of a name, since Markdown drops leading spaces."""
    return measure.replace("  ", "&nbsp;&nbsp;")


def source(result: dict[str, Any], file: str = "") -> str:
    """The origin of the figures. ``file``: the result's file, if it is to be named."""
    gpus = f"{result['devices']} x " if result["devices"] > 1 else ""
    when = result["date"][:16].replace("T", " ")
    at = f", `bench/results/{file}`" if file else ""
    cores = f"{result['cores']}-core VM ({result['cpu']})"
    machine = f"{gpus}{result['device']}, {cores}, driver {result['driver']}"
    return (
        f"{machine if result['devices'] else cores}, torch {result['torch']}, {when} UTC, commit "
        f"`{result['commit'][:9]}`: `{result['command']}`{at}."
    )


def target_table(result: dict[str, Any]) -> str:
    """The targets of a result, and the values at the lower bound if it has any."""
    targets = result["targets"]
    limits = any(r.get("limit") is not None for r in targets)
    rows = [
        [
            indented(r["measure"]),
            r["target"],
            amount(r),
            *([amount(r, "limit")] if limits else []),
            MET[r["ok"]],
        ]
        for r in targets
    ]
    head = ["measure", "target", "measured", *(["at the lower bound"] if limits else []), "met"]
    return tabulate(head, rows)
