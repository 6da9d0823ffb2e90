"""Builds pystage for every pair of Python and torch versions, and runs a part of the tests in each.

    python tests/matrix.py [--python 3.10 3.12] [--torch 2.11.0] [--cuda auto]

Each pair gets a separate environment, made by uv (`pip install uv`) and removed afterwards. The
package is built there from the sdist, as a user would build it, and the tests run against the
installed wheel. The default torch of the index is a CUDA build: it downloads 3 GB for each version,
which uv's cache keeps. Prints the rows of the table in docs/install.md. Exits with 1 if a pair
failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TORCHES = ["2.11.0", "2.12.1", "2.13.0", "2.14.1"]
TESTS = ["stage", "ops", "staged_tokens", "small_tensors"]
SKIP = ["-k", "not inductor"]  # minutes of g++ for each pair
TOOLS = ["ninja", "pybind11>=2.12", "setuptools>=77,<82", "numpy", "pytest", "hypothesis"]
INFO = (
    "import pystage, torch; info = pystage.build_info(); "
    "print(torch.__version__, info.cuda_runtime or 'without CUDA code', pystage.__file__)"
)


@dataclass(frozen=True)
class Outcome:
    python: str
    torch: str
    step: str  # where it ended: "tested", or what failed
    detail: str  # the last line that was printed
    seconds: float


def run(command: list[str], log: Path, cwd: Path, environment: dict[str, str]) -> str:
    """The last line printed; raises CalledProcessError with everything in the log."""
    with log.open("a+") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        subprocess.run(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=cwd, env=environment,
            check=True,
        )  # fmt: skip
    return log.read_text().rstrip().rsplit("\n", 1)[-1]


def one(python: str, torch: str, sdist: Path, mode: str, logs: Path) -> Outcome:
    began = time.monotonic()
    log = logs / f"python{python}-torch{torch}.log"
    log.unlink(missing_ok=True)
    step, detail = "the environment", ""
    with tempfile.TemporaryDirectory(prefix="pystage-matrix-") as folder:
        work = Path(folder)
        with tarfile.open(sdist) as archive:
            archive.extractall(work / "source")  # our own archive, made a moment ago
        (source,) = (work / "source").iterdir()
        # The tests without the sources beside them, which would be imported in place of the wheel.
        shutil.copytree(source / "tests", work / "run/tests")
        shutil.copytree(source / "bench", work / "run/bench")
        shutil.copy(source / "pyproject.toml", work / "run")
        interpreter = work / "env/bin/python"
        environment = {
            "TORCH_CUDA_ARCH_LIST": "9.0", **os.environ, "PYSTAGE_CUDA": mode,
            "PATH": f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)
        install = ["uv", "pip", "install", "--quiet", "--python", str(interpreter)]
        tests = [f"tests/test_{name}.py" for name in TESTS]
        steps = [
            ("the environment", ["uv", "venv", "--quiet", "--python", python, str(work / "env")]),
            ("the environment", [*install, f"torch=={torch}", *TOOLS]),
            ("the build", [*install, "--no-build-isolation", "--no-deps", str(source)]),
            ("the import", [str(interpreter), "-c", INFO]),
            ("the tests", [str(interpreter), "-m", "pytest", "-q", "-r", "fE", *SKIP, *tests]),
        ]
        try:
            for step, command in steps:  # noqa: B007
                detail = run(command, log, work / "run", environment)
        except subprocess.CalledProcessError:
            return Outcome(python, torch, f"failed: {step}", str(log), time.monotonic() - began)
    return Outcome(python, torch, "tested", detail, time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="as uv finds them")
    parser.add_argument("--torch", nargs="+", default=TORCHES)
    parser.add_argument("--cuda", default="auto", choices=["auto", "0", "1"], help="PYSTAGE_CUDA")
    parser.add_argument("--logs", type=Path, default=ROOT / "build/matrix")
    arguments = parser.parse_args()
    if shutil.which("uv") is None:
        parser.error("needs uv on the path: pip install uv")
    arguments.logs.mkdir(parents=True, exist_ok=True)
    logs = arguments.logs.resolve()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(logs)], cwd=ROOT, check=True
    )
    (sdist,) = logs.glob("pystage_h2d-*.tar.gz")
    failed = 0
    for torch in arguments.torch:
        for python in arguments.python:
            outcome = one(python, torch, sdist, arguments.cuda, logs)
            failed += outcome.step != "tested"
            print(
                f"| {outcome.python} | {outcome.torch} | {outcome.step} | {outcome.detail} | "
                f"{outcome.seconds:.0f} s |",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
