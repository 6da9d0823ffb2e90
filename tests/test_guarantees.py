"""The tests and commands that docs/guarantees.md names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from .test_stateful import STATES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/guarantees.md").read_text()
COMMANDS = re.findall(r"`((?:pytest|make|python|bench/gpu\.sh) [^`]+)`", TEXT)


def selected(words: list[str]) -> int:
    """Tests that pytest would take: of these files, whose names have the words of -k."""
    expression = words[words.index("-k") + 1] if "-k" in words else ""
    wanted = expression.split(" or ") if expression else [""]
    files = [ROOT / word for word in words if word.startswith("tests")]
    assert files and all(file.exists() for file in files), words
    sources = [f for file in files for f in (file.glob("test_*.py") if file.is_dir() else [file])]
    names = [n for f in sources for n in re.findall(r"def (test_\w+)", f.read_text())]
    for word in wanted:
        assert any(word in name for name in names), f"{word!r} selects nothing of {files}"
    return len(names)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_something(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "pytest":
        assert selected(words)
    elif program == "python":
        module = words[0] == "-m"
        assert (ROOT / (words[1].replace(".", "/") + ".py" if module else words[0])).exists()
    elif program == "make":
        folder = ROOT / (words[1] if words[0] == "-C" else "")
        rules = (folder / "Makefile").read_text()
        for target in words[2:] if words[0] == "-C" else [w for w in words if "=" not in w]:
            named = re.search(rf"^[\w .-]*\b{re.escape(target)}\b[\w .-]*:", rules, re.M)
            assert named, f"no rule for {target}"
    else:
        assert f"    {words[0]})" in (ROOT / "bench/gpu.sh").read_text()


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:tests|docs|bench)/[\w./]+)`", TEXT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\(`(test_\w+\.cpp)`\)", TEXT):
        assert (ROOT / "csrc/tests" / name).exists(), name


def test_states_of_the_model_are_those_of_the_test() -> None:
    listed = re.search(r"^```\n(.*?)^```", TEXT, re.M | re.S)
    assert listed and listed[1].split() == STATES.split()
