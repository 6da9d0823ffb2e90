"""README and docs: their code runs, their commands exist, and their links have a target."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import pystage
import pystage.pp

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r'--8<-- "([\w./-]+):([\w-]+)"')
GPU_ONLY = {"cuda_graph.py"}


def run(*command: str, ends: tuple[int, ...] = (0,)) -> str:
    """Its output. It must end with one of these exit statuses, without a warning."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in ends, done.stdout + done.stderr
    return done.stdout


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[str]:
    """What a page tells to type: lines of its blocks without a language, and code in its text that
    starts with the name of a program."""
    lines = [
        line.partition(" #")[0].strip() for b in blocks(page, "", "sh") for line in b.splitlines()
    ]
    prose = FENCE.sub("", page.read_text())
    # A result's source line has the command that made it, with the paths of that machine.
    prose = "\n".join(line for line in prose.splitlines() if "`bench/results/" not in line)
    lines += re.findall(r"`((?:make|python -m|pip) [^`]+)`", prose)
    return [line for line in lines if re.match(r"(make|pip|python|PYSTAGE_\w+=\S+ pip) ", line)]


COMMANDS = sorted({(page.name, line) for page in PAGES for line in commands(page)})


def targets(folder: Path = ROOT) -> set[str]:
    rules = re.findall(r"^([a-z][a-z -]*):(?!=)", (folder / "Makefile").read_text(), re.MULTILINE)
    return {name for rule in rules for name in rule.split()}


@cache
def usage() -> str:
    return run("-m", "pystage", "--help")


# --- code ----------------------------------------------------------------------------------------


def test_the_readmes_python_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(PAGES[0], "python")
    file = tmp_path / "readme.py"
    file.write_text(code)
    runpy.run_path(str(file))
    assert "capacity_bytes" in capsys.readouterr().out
    assert len(code.strip().splitlines()) <= 12


@pytest.mark.parametrize(
    "example",
    [pytest.param(e, marks=pytest.mark.gpu) if e.name in GPU_ONLY else e for e in EXAMPLES],
    ids=lambda e: e.name,
)
def test_an_example_runs(example: Path) -> None:
    if "mp.spawn" in example.read_text():  # its processes import it by its file
        run(str(example))
    else:
        runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_on_a_page_comes_from_an_example(page: Path) -> None:
    """All but the README's, which runs above, and code for other programs, which must parse."""
    for code in blocks(page, "python"):
        if "--8<--" not in code:
            compile(code, page.name, "exec")
            continue
        for file, section in INCLUDED.findall(code):
            text = (ROOT / file).read_text()
            for edge in ("start", "end"):
                assert len(re.findall(rf"# --8<-- \[{edge}:{section}\]$", text, re.M)) == 1
        assert INCLUDED.sub("", code).strip() == ""


def test_every_section_of_the_examples_is_shown() -> None:
    shown = {pair for page in PAGES for pair in INCLUDED.findall(page.read_text())}
    for example in EXAMPLES:
        for section in re.findall(r"# --8<-- \[start:([\w-]+)\]", example.read_text()):
            assert (f"examples/{example.name}", section) in shown, (example.name, section)


# --- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda x: x)
def test_a_command_exists(page: str, line: str) -> None:
    words = shlex.split(line)
    while "=" in words[0]:
        del words[0]
    program, *rest = words
    if program == "make":
        folder = ROOT
        if rest[0] == "-C":
            folder, rest = ROOT / rest[1], rest[2:]
        text = (folder / "Makefile").read_text()
        for word in rest:
            name, equals, _ = word.partition("=")
            assert (
                (f"$({name}" in text or name.startswith("PIP_"))
                if equals
                else word in targets(folder)
            )
    elif program == "pip":
        assert rest[0] in ("download", "install", "list", "uninstall", "wheel")
        extras = re.findall(r"\.\[([\w,]+)\]", line)
        assert all(f"\n{name} = [" in (ROOT / "pyproject.toml").read_text() for name in extras)
    elif rest[0] == "-m" and rest[1].startswith("sglang"):
        if not find_spec("sglang"):
            pytest.skip("SGLang is not installed")
        assert find_spec(rest[1])
    elif rest[0] == "-m" and rest[1] == "pystage":
        assert rest[2] in usage()
    elif rest[0] == "-m":
        module = ROOT / rest[1].replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), line
    else:
        assert (ROOT / rest[0]).exists(), line


@pytest.mark.parametrize("command", ["info", "doctor"])
def test_the_readmes_checks_run(command: str) -> None:
    # The doctor ends with 1 where something is wrong with the machine, which is no fault of it.
    assert "torch" in run("-m", "pystage", command, ends=(0, 1) if command == "doctor" else (0,))


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(
        # Within `make test`, make would also tell which directory it enters.
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[0] for line in listed.splitlines()} == targets()


# --- links, names, size --------------------------------------------------------------------------


def slug(title: str) -> str:
    """As GitHub and MkDocs make an anchor of a heading."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", FENCE.sub("", page.read_text())):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor and file.name != "api.md":
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, titles), target


def test_files_on_the_map_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:csrc|pystage|bench|tests|docs|examples)/[\w./*]*)`", text):
        assert list(ROOT.glob(name)), name


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text()
    listed = set(re.findall(r"^::: pystage\.(\S+)$", page, re.MULTILINE))
    assert set(pystage.__all__) - {"__version__", "batch", "ops"} <= listed
    assert {f"pp.{name}" for name in pystage.pp.__all__} <= listed
    for name in listed:
        value: object = pystage
        for part in name.split("."):
            if isinstance(value, type(pystage)) and not hasattr(value, part):
                __import__(f"{value.__name__}.{part}")
            value = getattr(value, part)
        assert value.__doc__, name


def test_the_site_shows_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert re.search(rf": {re.escape(page.name)}$", nav, re.MULTILINE), page.name


def test_the_readme_fits_a_screen_or_two() -> None:
    text = PAGES[0].read_text()
    assert len(text.encode()) <= 6000
    assert text.count("![") == 1 and text.count("<!-- figures:") == 1
