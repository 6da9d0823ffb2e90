"""``pystage info``: shows what this installation was built with."""

from __future__ import annotations

import dataclasses

from .._build import build_info
from .output import Table, json_output, show

HELP = "Show what this installation was built with."


def run(json_path: str | None) -> int:
    """Shows the result of :func:`pystage.build_info`; returns the exit status."""
    info = dataclasses.asdict(build_info())
    with json_output(json_path) as write:
        if json_path != "-":
            table = Table()
            for name, value in info.items():
                table.add(name.replace("_", " "), _shown(value))
            show(table)
        write(info)
    return 0


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        value = " ".join(value)
    return str(value) if value else "-"
