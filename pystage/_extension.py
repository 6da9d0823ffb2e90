"""Loads the compiled extension. If that fails, the error says why and what to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_BUILD_HERE = "pip install --no-build-isolation -e ."
_REBUILD = "pip install --no-build-isolation ."


def explain(package: Path, path: Sequence[str], error: ImportError) -> str:
    """Explains an import error of the extension.

    Args:
        package: the folder that was imported as ``pystage``.
        path: the folders in which Python looks for packages, like ``sys.path``.
        error: the error that importing the extension raised.
    """
    is_source = (package.parent / "csrc").is_dir()
    if not is_source or any(package.glob("_C*.so")):
        command = _BUILD_HERE if is_source else _REBUILD
        return (
            f"pystage's extension does not load ({error}). It is built for one Python and one "
            f"torch: after installing another, rebuild with: {command}"
        )
    source = f"{package.parent} is pystage's source folder, and its extension is not built there"
    installed = _built(path)
    if installed is None:
        return f"{source}. Build it in that folder: {_BUILD_HERE}"
    return (
        f"{source}. It hides the pystage that is installed in {installed.parent}, because Python "
        "looks in the current folder and in PYTHONPATH first. Start Python in another folder, or, "
        f"to work on the sources, build the extension in that folder: {_BUILD_HERE}"
    )


def _built(path: Sequence[str]) -> Path | None:
    """The first pystage on the path that has an extension."""
    packages = (Path(entry).resolve() / "pystage" for entry in path)
    return next((package for package in packages if any(package.glob("_C*.so"))), None)


try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(explain(Path(__file__).parent, sys.path, error)) from error
