"""Code that the commands share: exit statuses, the file of ``--json``, the device, tables."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

EXIT_FAILED = 1
EXIT_CANNOT_RUN = 2
EXIT_INTERRUPTED = 130
EXIT_STATUS = (
    "Exit status: 0 done; 1 demo: ids differ, doctor: a check failed; "
    "2 wrong arguments, or the command cannot run here; 130 interrupted (Ctrl-C)."
)
JSON_HELP = "Write the figures to this file as JSON; - means standard output, without the tables."
DEVICE_HELP = "cpu, cuda or cuda:N. The default is the current GPU, or cpu without one."
_STYLES = {"ok": "green", "note": "yellow", "WRONG": "bold red"}
_NARROWEST_COLUMN = 12


class CannotRunError(Exception):
    """A command cannot run. The message says why."""


class MismatchError(Exception):
    """The pool and the plain path gave different ids for a batch."""


@dataclass
class Table:
    """Rows of text, shown by rich or as plain text.

    Attributes:
        title: the title above the table.
        columns: the column headings. Empty for a table without headings.
        rows: the cells of each row.
        numbers: whether all columns after the first contain numbers.
    """

    title: str = ""
    columns: Sequence[str] = ()
    rows: list[Sequence[str]] = field(default_factory=list)
    numbers: bool = False

    def add(self, *cells: str) -> None:
        self.rows.append(cells)


def show(*parts: Table | str) -> None:
    """Prints tables and paragraphs to standard output, with rich if it is installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        width = shutil.get_terminal_size().columns
        for part in parts:
            print(as_text(part, width) if isinstance(part, Table) else textwrap.fill(part, width))
        return
    # Tables contain system messages, and rich could take parts of them for markup.
    console = Console(markup=False, highlight=False)
    for part in parts:
        console.print(_as_rich(part) if isinstance(part, Table) else part)


def _as_rich(table: Table) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(
        title=table.title or None, title_justify="left", show_header=bool(table.columns)
    )
    count = max(map(len, table.rows), default=0)
    for at, name in zip_longest(range(count), table.columns, fillvalue=""):
        made.add_column(
            str(name),
            justify="right" if table.numbers and at else "left",
            no_wrap=at == 0,
            overflow="fold",
        )
    for row in table.rows:
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return made


def as_text(table: Table, width: int) -> str:
    """The table as aligned text, at most ``width`` characters wide if its columns allow that."""
    rows = [*([table.columns] if table.columns else []), *table.rows]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > _NARROWEST_COLUMN:
        widths[widths.index(max(widths))] -= 1
    lines = [table.title] if table.title else []
    for row in rows:
        cells = [textwrap.wrap(cell, w) or [""] for cell, w in zip(row, widths, strict=False)]
        for parts in zip_longest(*cells, fillvalue=""):
            aligned = (
                part.rjust(w) if table.numbers and at else part.ljust(w)
                for at, (part, w) in enumerate(zip(parts, widths, strict=False))
            )
            lines.append("  ".join(aligned).rstrip())
    return "\n".join([*lines, ""])


@contextmanager
def json_output(path: str | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Opens the file of ``--json`` before the work. Yields a function that writes the figures.

    An existing file keeps its contents until the figures are written. A new file is removed again
    if none are written. With None nothing is written; ``-`` writes to standard output.

    Raises:
        CannotRunError: the file cannot be written.
    """
    if path is None:
        yield lambda figures: None
        return
    if path == "-":
        yield lambda figures: print(_to_json(figures))
        return
    new = not os.path.lexists(path)
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise CannotRunError(f"--json: cannot write {path}: {error.strerror}") from error
    written = False

    def write(figures: Mapping[str, Any]) -> None:
        nonlocal written
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.truncate(0)
        file.write(_to_json(figures) + "\n")
        written = True

    try:
        with file:
            yield write
    finally:
        if new and not written:
            os.unlink(path)


def _to_json(figures: Mapping[str, Any]) -> str:
    return json.dumps(_finite(figures), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """Replaces NaN and infinity (an error that could not be measured) by None, because JSON has no
    numbers for them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_device(text: str | None) -> torch.device | None:
    """The device of ``--device``. None if the option was not given.

    Raises:
        CannotRunError: pystage does not support the device, or this machine does not have it.
    """
    if text is None:
        return None
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CannotRunError(f"--device: {text!r} is not cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise CannotRunError(
                f"--device: no {device} here: torch {torch.__version__} sees no CUDA device "
                "(pystage doctor says why)"
            )
        if (device.index or 0) >= count:
            raise CannotRunError(f"--device: no {device} here: torch sees {count} CUDA device(s)")
    return device


def size_text(size: int) -> str:
    """Formats a number of bytes in MiB or KiB."""
    return f"{size / (1 << 20):,.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):,.1f} KiB"
