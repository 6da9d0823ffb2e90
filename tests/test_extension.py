"""The error message if the extension is missing or does not load."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pystage
from pystage._extension import explain

ERROR = ImportError("undefined symbol: _ZN3c10")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source folder without a built extension; its package."""
    (tmp_path / "clone/csrc").mkdir(parents=True)
    shutil.copytree(
        Path(pystage.__file__).parent,
        tmp_path / "clone/pystage",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return tmp_path / "clone/pystage"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with an installed pystage, as far as the search for one looks."""
    (tmp_path / "site/pystage").mkdir(parents=True)
    (tmp_path / "site/pystage/_C.cpython-311-x86_64-linux-gnu.so").touch()
    return tmp_path / "site"


def test_in_the_source_folder_python_says_what_it_imported(source: Path, installed: Path) -> None:
    """``pip install .`` in the clone, and then Python started there."""
    code = (
        "import importlib.machinery as m, sys\n"
        # without those of editable installs, which would find the extension of theirs
        "sys.meta_path[:] = [m.BuiltinImporter, m.FrozenImporter, m.PathFinder]\n"
        "import pystage\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source.parent,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert f"ImportError: {source.parent} is pystage's source folder" in line
    assert f"It hides the pystage that is installed in {installed}," in line
    assert "Start Python in another folder" in line
    assert "pip install --no-build-isolation -e ." in line


def test_a_source_folder_that_was_never_built(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    text = explain(source, ["", str(source.parent), str(source.parent / "none")], ERROR)
    assert text.startswith(f"{source.parent} is pystage's source folder, and its extension is not")
    assert text.endswith("Build it in that folder: pip install --no-build-isolation -e .")


def test_an_extension_for_another_torch(source: Path, installed: Path) -> None:
    (source / "_C.cpython-310-x86_64-linux-gnu.so").touch()
    elsewhere = installed / "pystage"
    (elsewhere / "_C.cpython-311-x86_64-linux-gnu.so").unlink()  # no source folder, and damaged
    for package, what in ((source, "-e ."), (elsewhere, ".")):
        text = explain(package, [str(installed)], ERROR)
        assert "does not load (undefined symbol: _ZN3c10)" in text
        assert text.endswith(f"rebuild with: pip install --no-build-isolation {what}")


def test_a_package_without_metadata_says_how_to_install_it() -> None:
    code = (
        "from importlib import metadata\n"
        "def absent(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = absent\n"
        "import pystage\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"ImportError: pystage is imported from {Path(pystage.__file__).parent}")
    assert "pip install --no-build-isolation -e ." in line
