"""Compiles the small C files of the benchmarks when they are needed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any, TypeAlias

Bind: TypeAlias = "Callable[..., Callable[[], None]]"
HERE = Path(__file__).resolve().parent


def compiled(source: str, folder: Path, *flags: str) -> Path:
    """``bench/source`` as a shared library in ``folder``.

    Raises:
        FileNotFoundError: there is no C compiler.
        subprocess.CalledProcessError: the compiler rejects the file, and has printed why.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError(f"no C compiler for bench/{source}: install one, or set CC")
    library = folder / Path(source).with_suffix(".so")
    usual = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *usual, *flags, "-o", library, HERE / source], check=True)
    return library


@cache
def binder() -> Bind:
    """``bind(address, *arguments)`` of calls.c. It makes the C function at ``address`` a callable
    without parameters, which raises RuntimeError if the function does not return 0."""
    with tempfile.TemporaryDirectory() as folder:
        include = f"-I{sysconfig.get_paths()['include']}"
        library = compiled("calls.c", Path(folder), include)
        loader = ExtensionFileLoader("calls", str(library))
        spec = importlib.util.spec_from_loader("calls", loader)
        assert spec is not None
        module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    bind: Bind = module.bind
    return bind
