"""Shows the results of `make coverage`: python tests/measure_coverage.py FOLDER [--without-sglang]

Python: every file of pystage, over all environments and the processes that tests start. C++: the
code between Python and the pool. Exits with status 1 if coverage is below the limits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from coverage import Coverage

ROOT = Path(__file__).resolve().parent.parent
PYTHON_LIMIT = 92.0  # per cent of lines, of the package
CPP_LIMIT = 92.0  # of each of these
CPP_FILES = (
    *("ids_view.cpp", "ops.cpp", "output_memory.cpp", "python.cpp", "python_parcel.cpp"),
    *("python_rows.cpp", "python_small_tensors.cpp", "python_stage.cpp"),
    *("python_staged_tokens.cpp", "requests.cpp", "small_tensors.cpp", "staging.cpp"),
)
PLUGIN = "pystage/integrations/sglang/*"  # runs in SGLang's environment alone
EXCLUDED = re.compile(r"GCOV_EXCL_(?:START|LINE): (.*)|GCOV_EXCL_(STOP)")


def main(folder: Path, with_sglang: bool) -> int:
    problems = [*python(folder, with_sglang), *cpp(folder)]
    print("\n".join(problems or ["coverage: at or above the limits"]))
    return 1 if problems else 0


def python(folder: Path, with_sglang: bool) -> list[str]:
    omit = [] if with_sglang else [str(ROOT / PLUGIN)]
    merged = Coverage(data_file=str(folder / "merged"), config_file=str(ROOT / "pyproject.toml"))
    merged.combine([str(path) for path in folder.glob("data.*")], keep=True)
    merged.save()
    print(f"Python{'' if with_sglang else f', without {PLUGIN}: SGLang is not here'}", flush=True)
    total = merged.report(omit=omit, show_missing=True)
    return below("pystage", total, PYTHON_LIMIT)


def cpp(folder: Path) -> list[str]:
    # Closing braces are left out: gcov counts them for what unwinds an exception.
    command = [sys.executable, "-m", "gcovr", "--root", str(ROOT), "--merge-lines"]
    command += ["--exclude-noncode-lines"]
    # One file a line of the filter: gcovr takes regular expressions.
    for name in CPP_FILES:
        command += ["--filter", re.escape(str(ROOT / "csrc" / name))]
    command += ["--json-summary", str(folder / "cpp.json"), "--txt", "-", str(folder / "objects")]
    subprocess.run(command, check=True)
    found = json.loads((folder / "cpp.json").read_text())["files"]
    covered = {Path(file["filename"]).name: float(file["line_percent"]) for file in found}
    print("Left out, as only a GPU reaches it:")
    for name in CPP_FILES:
        for count, reason in left_out((ROOT / "csrc" / name).read_text()):
            print(f"  {name}: {count} lines, {reason}")
    problems = []
    for name in CPP_FILES:
        problems += below(f"csrc/{name}", covered.get(name, 0.0), CPP_LIMIT)
    return problems


def left_out(text: str) -> list[tuple[int, str]]:
    """The marked parts: how many lines, and why."""
    parts: list[tuple[int, str]] = []
    begin, reason = 0, ""
    for number, line in enumerate(text.splitlines()):
        if match := EXCLUDED.search(line):
            if match[2]:
                parts.append((number - begin, reason))
            else:
                begin, reason = number, match[1]
                if "GCOV_EXCL_LINE" in line:
                    parts.append((1, reason))
    return parts


def below(name: str, found: float, limit: float) -> list[str]:
    return [f"coverage: {name} has {found:.1f} %, {limit:g} % needed"] if found < limit else []


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or sys.argv[2:] not in ([], ["--without-sglang"]):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), with_sglang=len(sys.argv) == 2))
