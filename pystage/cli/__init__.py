"""The command line: ``pystage demo``, ``info`` and ``doctor``, or ``python -m pystage``.

With typer, which brings rich (extra ``cli``). Without them :mod:`pystage.cli.fallback` runs the
same commands in plain text, so that all can be tried, and looked at, with what a machine has.
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
    """Runs a command and returns the exit status; ``pystage.cli.output`` names them.

    Args:
        arguments: as in ``sys.argv[1:]``, which is the default.
    """
    try:
        status = _run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()  # here, where an error of it is seen
    except MismatchError as error:
        return _fail(f"wrong ids: {error}", EXIT_FAILED)
    except BrokenPipeError:  # whoever read our output has left: nothing to say, and nobody to hear
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
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        from . import fallback

        return fallback.run(arguments)
    return commands.run(arguments)


def _fail(message: str, status: int) -> int:
    print(f"pystage: {message}", file=sys.stderr)
    return status
