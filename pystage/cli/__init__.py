"""The command line: ``pystage demo``, ``info`` and ``doctor``, or ``python -m pystage``.

It uses typer and rich if they are installed (extra ``cli``). If not, or if they are too old,
:mod:`pystage.cli.fallback` runs the same commands in plain text, so all commands work without
additional packages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .. import trace
from ..errors import PystageError
from .output import (
    EXIT_CANNOT_RUN,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    CannotRunError,
    MismatchError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status. ``pystage.cli.output`` defines the statuses.

    Args:
        arguments: the command and its arguments. Default: ``sys.argv[1:]``.
    """
    if sys.stdout is None:  # closed by who started this
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    try:
        status = _run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()  # inside this try, so that an error in flushing is handled
    except MismatchError as error:
        return _fail(f"wrong ids: {error}", EXIT_FAILED)
    except BrokenPipeError:  # the reader of our output has closed the pipe; exit without a message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CANNOT_RUN
    except (CannotRunError, trace.TraceError, PystageError, OSError) as error:
        return _fail(str(error), EXIT_CANNOT_RUN)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return status


def _run(arguments: list[str]) -> int:
    try:
        from . import commands
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        from . import fallback

        return fallback.run(arguments)
    return commands.run(arguments)


def _fail(message: str, status: int) -> int:
    print(f"pystage: {message}", file=sys.stderr)
    return status
