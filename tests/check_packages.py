"""Builds the sdist and the wheels as for a release, and checks what a user of them gets.

    python tests/check_packages.py [--cuda] [--out build/packages]

The sdist is made from the source folder. The wheels (one for the CPU and, with --cuda, one with
CUDA code) are built from the unpacked sdist, so that a missing file is detected. Each wheel is
installed into a separate environment, which can use torch and numpy of the running one but nothing
of the source folder. Needs git, binutils, and an environment of `make build EXTRAS=dev`.
"""

from __future__ import annotations

import argparse
import email.parser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_IN_SDIST = {
    ".ci",
    ".clang-format",
    ".clang-tidy",
    ".gitignore",
    ".github",
    ".pre-commit-config.yaml",
}
MADE_BY_SETUPTOOLS = ("PKG-INFO", "setup.cfg", "pystage_h2d.egg-info/")
MAX_WHEEL = 4 << 20
# What a wheel may ask of the system: torch's libraries, found since torch is imported first.
LIBRARIES = re.compile(
    r"lib(c10|torch|torch_cpu|torch_python|stdc\+\+|gcc_s|m|c|rt|dl|pthread)\.so(\.\d+)?"
    r"|ld-linux-(x86-64|aarch64)\.so\.\d|libcudart\.so\.\d+"
)

# Runs in the new environment, in an empty folder: argv[1] is that environment, argv[2] 1 for CUDA.
USE = """
import sys
from array import array
from importlib import metadata, resources
import torch
import pystage

assert pystage.__file__.startswith(sys.argv[1]), pystage.__file__
info = pystage.build_info()
print(info)
assert info.version == metadata.version("pystage-h2d") and info.torch_built == info.torch
assert info.cuda == (sys.argv[2] == "1")
assert not info.cuda or info.cuda_architectures[-1].endswith("+PTX")
with pystage.StagingPool("cpu", 1 << 20) as pool:
    staged = pool.stage([array("q", range(100)), [7, 8]], vocab_size=128)
    assert staged.to("cpu").tolist() == [*range(100), 7, 8]
assert resources.files("pystage").joinpath("py.typed").is_file()
plugins = metadata.entry_points(group="sglang.srt.plugins")
assert callable(plugins["pystage"].load())
"""
TYPES = """
import pystage
pool = pystage.StagingPool("cpu", 1 << 20)
reveal_type(pool)
pool.stage(1)
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked(*paths: str) -> set[str]:
    """What git knows or would add: all but what .gitignore names."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *paths)
    return set(listed.splitlines())


def same(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        sys.exit(
            f"{what}: missing {sorted(expected - found)}, not expected {sorted(found - expected)}"
        )


def check_sdist(sdist: Path, out: Path) -> Path:
    """Every file that git knows is in it, and no other. Returns the folder it is unpacked to."""
    with tarfile.open(sdist) as archive:
        archive.extractall(out)  # our own archive, made a moment ago
    source = out / sdist.name.removesuffix(".tar.gz")
    found = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    same(
        sdist.name,
        {name for name in found if not name.startswith(MADE_BY_SETUPTOOLS)},
        {name for name in tracked() if name.split("/")[0] not in NOT_IN_SDIST},
    )
    return source


def check_wheel(wheel: Path) -> None:
    """Its files are the package's, with stubs and data; its binary asks and shows what it may."""
    if wheel.stat().st_size > MAX_WHEEL:
        sys.exit(f"{wheel.name} has {wheel.stat().st_size} bytes, {MAX_WHEEL} are the limit")
    binary = f"pystage/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        same(
            wheel.name,
            {name for name in names if not name.startswith(f"{info}/")},
            {*tracked("pystage"), binary},
        )
        for name in ("METADATA", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"):
            if f"{info}/{name}" not in names:
                sys.exit(f"{wheel.name} has no {name}")
        metadata = email.parser.Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        if metadata["Name"] != "pystage-h2d" or not metadata["Requires-Python"]:
            sys.exit(f"{wheel.name}: {metadata.items()}")
        extracted = Path(archive.extract(binary, wheel.parent / "binary"))
    exported = {
        line.split()[-1] for line in run("nm", "-D", "--defined-only", extracted).splitlines()
    }
    same(f"symbols that {wheel.name} exports", exported, {"PyInit__C"})
    dynamic = run("readelf", "-d", "-W", extracted)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    if strange := [name for name in needed if not LIBRARIES.fullmatch(name)]:
        sys.exit(f"{wheel.name} needs {strange}")
    if paths := re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic):
        sys.exit(
            f"{wheel.name} looks for libraries in {paths}: folders of the machine it was built on"
        )
    sizes = f"{wheel.stat().st_size >> 10} KiB, extension {extracted.stat().st_size >> 10} KiB"
    print(f"{wheel.name}: {sizes}")


def check_installed(wheel: Path, out: Path, cuda: bool) -> None:
    """The wheel in a new environment: imported and used from an empty folder."""
    env, empty = out / "env", out / "empty"
    shutil.rmtree(env, ignore_errors=True)
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    venv.create(env, symlinks=True)
    python = env / "bin/python"
    # A path in a .pth file adds a folder, not what the .pth files in that folder add: the editable
    # install of the running environment is not seen.
    scheme = {"base": str(env), "platbase": str(env)}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    print(run(python, "-c", USE, env, "1" if cuda else "0", cwd=empty), end="")
    run(python, "-m", "pystage", "info", cwd=empty)


def check_types(python: str, out: Path) -> None:
    """mypy, in another folder, knows the classes of the pystage that `python` has installed."""
    (out / "use.py").write_text(TYPES)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", python, "--follow-imports", "silent",
         "--cache-dir", str(ROOT / ".mypy_cache"), "use.py"],
        capture_output=True, text=True, cwd=out, check=False,
    )  # fmt: skip
    if "pystage.pool.StagingPool" not in done.stdout or "[arg-type]" not in done.stdout:
        sys.exit(f"mypy does not see the types of pystage in {python}:\n{done.stdout}{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuda", action="store_true", help="the wheel with CUDA code too")
    parser.add_argument("--out", type=Path, default=ROOT / "build/packages")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out)
    (sdist,) = out.glob("*.tar.gz")
    print(f"{sdist.name}: {sdist.stat().st_size >> 10} KiB")
    source = check_sdist(sdist, out)
    packages = [sdist]
    for cuda in (False, True) if arguments.cuda else (False,):
        folder = out / ("cuda" if cuda else "cpu")
        run(
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps",
            "--wheel-dir", folder, source,
            PYSTAGE_CUDA=str(int(cuda)), CCACHE_BASEDIR=str(source / "csrc"),
        )  # fmt: skip
        (wheel,) = folder.glob("*.whl")
        packages.append(wheel)
        check_wheel(wheel)
        check_installed(wheel, out, cuda)
    check_types(str(out / "env/bin/python"), out)
    check_types(sys.executable, out)  # as `make build` installs it: editable
    print(run(sys.executable, "-m", "twine", "check", "--strict", *packages), end="")


if __name__ == "__main__":
    main()
