"""The command line without typer. It has the same commands and options, in plain text."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import trace
from .._build import __version__
from . import demo, doctor, info
from .output import DEVICE_HELP, EXIT_STATUS, JSON_HELP


def run(arguments: Sequence[str]) -> int:
    """Runs a command and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="pystage",
        description="Stages prefill token ids in pinned memory and brings them to the GPU.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"pystage {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    replayed = commands.add_parser("demo", help=demo.HELP.partition("\n")[0], epilog=EXIT_STATUS)
    told = commands.add_parser("info", help=info.HELP, epilog=EXIT_STATUS)
    examined = commands.add_parser("doctor", help=doctor.HELP, epilog=EXIT_STATUS)
    for command in (replayed, examined):
        command.add_argument("--device", metavar="DEVICE", help=DEVICE_HELP)
    for command in (replayed, told, examined):
        command.add_argument("--json", metavar="PATH", help=JSON_HELP)
    _demo_options(replayed)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stopped:  # --help, --version or wrong arguments
        return int(stopped.code or 0)
    if options.command == "demo":
        names = vars(options).keys() - {"command"}
        return demo.run(demo.Options(**{name: getattr(options, name) for name in names}))
    if options.command == "info":
        return info.run(options.json)
    if options.command == "doctor":
        return doctor.run(options.device, options.json)
    parser.print_help()
    return 0


def _demo_options(parser: argparse.ArgumentParser) -> None:
    """Adds the same options as :mod:`pystage.cli.commands`."""
    parser.add_argument("--trace", type=Path, metavar="FILE", help="length trace to replay")
    for name, dest, default, help_text in (
        ("--batches", "batches", demo.DEFAULT_BATCHES, "batches to measure"),
        ("--chunk", "chunk_tokens", trace.DEFAULT_CHUNK_TOKENS, "tokens a batch has"),
        ("--vocab", "vocab_size", trace.DEFAULT_VOCAB_SIZE, "ids are below this"),
    ):
        parser.add_argument(
            name,
            dest=dest,
            type=_between(1, demo.MOST[dest]),
            default=default,
            metavar="N",
            help=help_text,
        )
    parser.add_argument("--issue", choices=("deferred", "eager"), default="deferred")
    parser.add_argument(
        "--no-profile", dest="profile", action="store_false", help="leave out the chunk plan"
    )


def _between(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between {least} and {most}")
        return value

    return number
