"""Makes an environment with SGLang for the CPU: python tests/install_sglang.py FOLDER

SGLang requires CUDA packages of several GB. This script installs it without its dependencies. The
packages that its code needs on a CPU are in sglang-requirements.txt. Two older releases are
installed into FOLDER/releases.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "sglang-requirements.txt"
TORCH = "torch==2.13.0"  # pinned: the newest may be a CUDA build of several GB
TOOLS = ["numpy", "setuptools>=77", "wheel", "ninja", "pybind11", "pytest", "hypothesis", "rich"]
TOOLS += ["scipy", "prometheus-client", "coverage>=7.10"]
SGLANG = "sglang==0.5.23"
RELEASES = ("0.5.13.post1", "0.5.20")
GRAMMAR = "xgrammar==0.2.8"  # the older releases import it; SGLang's own packages are without


def main(folder: Path) -> None:
    print(f"installing SGLang for the CPU into {folder}: some minutes, 3 GB", flush=True)
    venv.create(folder, with_pip=True)
    python = str(folder / "bin/python")
    releases = folder / "releases"
    steps = [
        [TORCH, *TOOLS],
        ["--no-deps", "-r", str(REQUIREMENTS), SGLANG],
        ["--no-deps", "--target", str(releases / "extra"), GRAMMAR],
        *(["--no-deps", "--target", str(releases / r), f"sglang=={r}"] for r in RELEASES),
    ]
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] pip install {' '.join(step)}", flush=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            sys.exit(
                f"SGLang could not be installed; is there a network and a package index?\n"
                f"pip install {' '.join(step)}\n" + "\n".join(errors or [done.stderr[-2000:]])
            )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
