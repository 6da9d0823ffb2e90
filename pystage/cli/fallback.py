"""The command line without typer: ``info`` and ``doctor``, in plain text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .._build import __version__
from . import doctor, info
from .output import DEVICE_HELP, EXIT_STATUS, JSON_HELP, CannotRunError

_NEEDS = "needs typer: pip install 'typer>=0.19' (pystage's extra `cli`)"


def run(arguments: Sequence[str]) -> int:
    """Runs a command and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="pystage",
        description=f"Stages prefill token ids in pinned memory. The demo {_NEEDS}.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"pystage {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("demo", help=_NEEDS, add_help=False)
    told = commands.add_parser("info", help=info.HELP, epilog=EXIT_STATUS)
    examined = commands.add_parser("doctor", help=doctor.HELP, epilog=EXIT_STATUS)
    examined.add_argument("--device", metavar="DEVICE", help=DEVICE_HELP)
    for command in (told, examined):
        command.add_argument("--json", metavar="PATH", help=JSON_HELP)
    if list(arguments[:1]) == ["demo"]:  # whatever its options are
        raise CannotRunError(f"the demo {_NEEDS}")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stopped:  # help, the version, or arguments that are wrong
        return int(stopped.code or 0)
    if options.command == "info":
        return info.run(options.json)
    if options.command == "doctor":
        return doctor.run(options.device, options.json)
    parser.print_help()
    return 0
