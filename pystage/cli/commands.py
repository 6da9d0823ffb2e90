"""The commands and their options, defined with typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import rich  # noqa: F401  (typer imports it late; missing, it would fail in help and errors)
import typer

from .. import trace
from .._build import __version__
from ..pool import Issue
from . import demo as demo_command
from . import doctor as doctor_command
from . import info as info_command
from .output import DEVICE_HELP, EXIT_STATUS, JSON_HELP

if [int(part) for part in typer.__version__.split(".")[:2]] < [0, 19]:  # it knows no Literal
    raise ImportError(f"typer {typer.__version__} is older than 0.19", name="typer")

app = typer.Typer(
    help="Stages prefill token ids in pinned memory and brings them to the GPU. "
    "These commands try it, and look at this machine and at the build.",
    epilog=EXIT_STATUS,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Json = Annotated[str | None, typer.Option("--json", metavar="PATH", help=JSON_HELP)]
_Device = Annotated[str | None, typer.Option(metavar="DEVICE", help=DEVICE_HELP)]


def run(arguments: list[str]) -> int:
    """Runs a command and returns the exit status."""
    try:
        app(arguments)
    except SystemExit as done:  # typer always ends this way, with or without an error
        if isinstance(done.__context__, BrokenPipeError):  # from typer or rich; main handles it
            raise done.__context__ from None
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pystage {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _pystage(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog=EXIT_STATUS, help=demo_command.HELP)
def demo(
    trace_path: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Length trace: CSV with the columns of Azure or Mooncake, or JSON Lines with the "
            "same fields or Mooncake's hash_ids. The default is a sample of 1,000 requests.",
        ),
    ] = None,
    device: _Device = None,
    batches: Annotated[
        int,
        typer.Option(
            min=1,
            max=demo_command.MOST["batches"],
            metavar="N",
            help="Batches to measure; the trace repeats.",
        ),
    ] = demo_command.DEFAULT_BATCHES,
    chunk: Annotated[
        int,
        typer.Option(
            min=1,
            max=demo_command.MOST["chunk_tokens"],
            metavar="TOKENS",
            help="Tokens a batch has at most.",
        ),
    ] = trace.DEFAULT_CHUNK_TOKENS,
    issue: Annotated[
        Issue, typer.Option(help="When the pool starts the transfer: at resolve, or at stage.")
    ] = "deferred",
    vocab: Annotated[
        int,
        typer.Option(
            min=1,
            max=demo_command.MOST["vocab_size"],
            metavar="N",
            help="Ids are drawn from 0 to N - 1.",
        ),
    ] = trace.DEFAULT_VOCAB_SIZE,
    no_profile: Annotated[
        bool, typer.Option("--no-profile", help="Leave out the decoder and its chunk plan.")
    ] = False,
    json: _Json = None,
) -> None:
    options = demo_command.Options(
        trace=trace_path,
        device=device,
        batches=batches,
        chunk_tokens=chunk,
        issue=issue,
        vocab_size=vocab,
        profile=not no_profile,
        json=json,
    )
    raise typer.Exit(demo_command.run(options))


@app.command(epilog=EXIT_STATUS, help=info_command.HELP)
def info(json: _Json = None) -> None:
    raise typer.Exit(info_command.run(json))


@app.command(epilog=EXIT_STATUS, help=doctor_command.HELP)
def doctor(device: _Device = None, json: _Json = None) -> None:
    raise typer.Exit(doctor_command.run(device, json))
