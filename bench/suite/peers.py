"""Runs code of other projects, taken at run time from an installed package or a wheel.

Importing one of their functions would import most of an engine. Instead, only the definitions that
are needed are taken from their source, unchanged, and run with the names they use. This project
contains none of their code.
"""

from __future__ import annotations

import ast
import importlib.util
import linecache
import sys
import zipfile
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import CodeType
from typing import Any

from bench.device import Absent


def installed(package: str) -> list[Path]:
    """The folders that Python would import the package from, without importing it."""
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(root) for root in spec.submodule_search_locations or ()]


class Sources:
    """Finds packages in a folder of wheels or unpacked packages (or in one wheel), and then on
    Python's own path."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None and folder.suffix != ".whl":
            if not folder.is_dir():
                raise SystemExit(f"--peers {folder}: no such folder")
            sys.path.append(str(folder))  # for packages that are imported, such as CuPy

    def _wheel(self, package: str) -> Path | None:
        if self.folder is not None and self.folder.suffix == ".whl":
            return self.folder
        wheels = [] if self.folder is None else sorted(self.folder.glob(f"{package}-*.whl"))
        return wheels[-1] if wheels else None

    def _roots(self, package: str) -> list[Path]:
        carried = [] if self.folder is None else [self.folder / package]
        return [root for root in [*carried, *installed(package)] if root.is_dir()]

    def read(self, package: str, path: str) -> str:
        """The text of a package's file, ``path`` as in ``v1/utils.py``.

        Raises:
            Absent: there is no such package or file here.
        """
        wheel = self._wheel(package)
        if wheel is not None:
            with zipfile.ZipFile(wheel) as archive:
                try:
                    return archive.read(f"{package}/{path}").decode()
                except KeyError:
                    raise Absent(f"{wheel.name} has no {package}/{path}") from None
        roots = self._roots(package)
        if not roots:
            raise Absent(f"{package} is neither installed nor in --peers")
        for root in roots:
            if (root / path).is_file():
                return (root / path).read_text()
        raise Absent(f"{package} is there, but without {path}")

    def version(self, package: str) -> str:
        """The version from its wheel or its metadata. ``"unknown"`` if there is neither."""
        wheel = self._wheel(package)
        if wheel is None and self.folder is not None:
            wheel = next(self.folder.glob(f"{package}-*.dist-info"), None)
        if wheel is not None:
            return wheel.name.removesuffix(".dist-info").split("-")[1]
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "unknown"

    def take(
        self, package: str, path: str, names: Sequence[str], given: dict[str, Any]
    ) -> dict[str, Any]:
        """Runs the definitions ``names`` of a file. A method is named ``"Class.method"``.

        Args:
            given: the names that these definitions use from the rest of their package.

        Raises:
            Absent: there is no such file, or it has no such definition.
        """
        namespace = {"__name__": f"{package}.{path.removesuffix('.py').replace('/', '.')}", **given}
        exec(self._compiled(package, path, tuple(names)), namespace)
        return {name: namespace[name.rpartition(".")[2]] for name in names}

    @cache  # noqa: B019  (one object per run)
    def _compiled(self, package: str, path: str, names: tuple[str, ...]) -> CodeType:
        text = self.read(package, path)
        file = f"{package}/{path}"
        # Triton compiles a function from its source, and looks for it here.
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        tree = ast.parse(text)
        found: list[ast.stmt] = []
        for name in names:
            body: list[ast.stmt] = tree.body
            for part in name.split("."):
                match = [n for n in body if getattr(n, "name", None) == part]
                if not match:
                    version = self.version(package)
                    raise Absent(f"{package} {version} has no {name} in {path}")
                body = getattr(match[0], "body", [])
            found.append(match[0])
        # Annotations stay text, so that the names in them are not needed.
        future = ast.parse("from __future__ import annotations").body
        module = ast.Module(body=[*future, *found], type_ignores=[])
        return compile(module, file, "exec")
