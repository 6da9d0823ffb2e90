"""Writes the figures of bench/results into the README and the docs, and draws the plots.

python -m bench.report          writes the tables of the pages, and the plots
python -m bench.report --check  fails if the tables do not match the results
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from bench.report import figures
from bench.suite import REGIMES, pages

ROOT = Path(__file__).resolve().parents[2]

PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/guarantees.md",
    "docs/scaling.md",
    "docs/pp.md",
    "docs/sglang.md",
)

MARK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, parts: dict[str, str], name: str) -> str:
    """Replaces the text between <!-- figures: NAME --> and <!-- end -->. ``name``: of the file.

    Exits if a mark has no figures, or occurs twice.
    """
    marks = [match[2] for match in MARK.finditer(text)]
    for mark in marks:
        if mark not in parts or marks.count(mark) > 1:
            sys.exit(f"{name} has {marks.count(mark)} places for the figures {mark!r}")
    return MARK.sub(lambda m: m[1] + parts[m[2]] + "\n" + m[3], text)


def suite_of(folder: Path) -> dict[str, Any] | None:
    """The last complete run of ``python -m bench`` on a GPU, or None. It has all regimes and came
    to its end."""
    runs = [figures.load(path) | {"file": path.name} for path in folder.glob("suite-*.json")]
    whole = [
        run
        for run in runs
        if run["devices"]
        and not run["quick"]
        and run["regimes"].keys() >= REGIMES.keys()
        and run.get("complete", True)  # older runs do not say
    ]
    return max(whole, key=lambda run: str(run["date"]), default=None)


def pages_with_figures(root: Path, parts: dict[str, str]) -> dict[Path, tuple[str, str]]:
    """For each page, its present text and the text that it should have."""
    found = {}
    for page in (root / name for name in PAGES):
        before = page.read_text()
        found[page] = (before, fill(before, parts, page.name))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    args = parser.parse_args(arguments)
    suite = suite_of(args.root / figures.RESULTS)
    parts = figures.sections(args.root) | pages.sections(suite)
    found = pages_with_figures(args.root, parts)
    if args.check:
        wrong = [page.name for page, (before, after) in found.items() if before != after]
        if wrong:
            sys.exit(
                f"{', '.join(wrong)}: not the figures of bench/results; run python -m bench.report"
            )
        print("as bench/results says:", *(page.name for page in found))
        return
    for page, (_, after) in found.items():
        page.write_text(after)
    plots = figures.draw(args.root)
    if suite is not None:
        from bench.suite import plots as suite_plots

        plots += suite_plots.draw(suite, plots[0].with_name("suite.json"))
    print("written:", *(path.relative_to(args.root) for path in [*found, *plots]))


if __name__ == "__main__":
    main()
