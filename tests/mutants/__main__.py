"""``make mutants``: puts single faults into pystage, one at a time, and runs the tests on each.

A fault that no test detects *survives*, which means that a test is missing. The exit status is 1 if
the tests detect less than 95 % of the faults.

    make mutants                                    all faults; under half an hour on two cores
    make mutants ARGS='--only pool.h,model.py/gate'  faults whose names begin with these words
    make mutants ARGS='--list'                      names, files, and which are equivalent

The faults are in ``core.py`` (csrc), ``package.py`` (pystage), ``pp.py`` and ``plugin.py``. To add
one, add a line there: ``"name": M(original text, replacement)``. The original text must occur
exactly once in its file. If the source has changed since, the run stops with an error that names
the fault, and its line must be updated. A fault that no test can detect has the reason beside it
and is not run.

How it works: the project is copied to ``build/mutants``. A Python fault is written into the copy,
tested, and removed. C++ faults go into the copy all at once: each site becomes ``chosen(n) ?
(fault) : (original)``, which reads the environment variable PYSTAGE_MUTANT, so the extension and
the C++ tests are built only once. Sites that overlap need another build. A site is an expression,
or whole statements if it ends with ``;`` or ``}``; it cannot be a declaration. pytest runs in forks
of a process that has imported torch. A fault counts as detected if its run takes several times as
long as a run without a fault. ``build/mutants/results.json`` keeps which test detected each fault.
That test runs first the next time, so later runs are much shorter than the first.

The plugin's faults that show only in the real SGLang need its environment (``make sglang-env``).
Without it they are not run and not counted.

This is one file because it is one program: each step works on the sites of the step before.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from . import M, Mutants
from .core import MUTANTS as CORE
from .package import MUTANTS as PACKAGE
from .plugin import MUTANTS as PLUGIN
from .pp import MUTANTS as PP

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("PYSTAGE_MUTANTS_BUILD", ROOT / "build/mutants"))
ALL: Mutants = {**CORE, **PACKAGE, **PP, **PLUGIN}
WANTED = 0.95
HEADER = "pystage_mutant.h"

# The tests to run on a fault of each file, in this order. "cpp" (the C++ tests) and "schedules"
# (the pool under all interleavings) take doctest's options. "sglang" is pytest in SGLang's
# environment.
KINDS = {"cpp", "schedules", "pytest", "sglang"}
PYTHON_TESTS = "pytest tests/test_stage.py tests/test_staged_tokens.py tests/test_pool.py tests/test_figures.py"
BATCHES = "pytest tests/test_batch.py tests/test_ops.py -k 'not equals_cat and not opcheck'"
LIVES = "pytest tests/test_races.py tests/test_process.py"
HOSTILE = "pytest tests/test_hostile.py tests/test_bindings.py tests/test_gil.py"
STATES = "pytest tests/test_stateful.py"
SMALL = "pytest tests/test_small_tensors.py"
CLI = "pytest tests/test_cli.py"
POOL = ("cpp -tce=*stress*", "schedules", "pytest tests/test_pool.py", "cpp", LIVES, STATES)
MODEL = "pytest tests/test_pp_model.py"
QUICK_FITS = "-k 'not spikes and not never_fall and not waves'"
SLOW_FITS = "-k 'spikes or never_fall or waves'"
TESTS: dict[str, tuple[str, ...]] = {
    "csrc/gather.cpp": ("cpp -sf=*test_gather.cpp", "pytest tests/test_stage.py"),
    "csrc/host_device.cpp": ("cpp -sf=*test_host_device.cpp", BATCHES, "cpp -tce=*stress*", LIVES),
    "csrc/pool.cpp": POOL,
    "csrc/pool.h": POOL,
    "csrc/requests.h": (PYTHON_TESTS,),
    "csrc/requests.cpp": (PYTHON_TESTS, HOSTILE),
    "csrc/staging.cpp": (PYTHON_TESTS, BATCHES, HOSTILE, LIVES),
    "csrc/output_memory.cpp": (PYTHON_TESTS, BATCHES, HOSTILE, LIVES),
    "csrc/python.cpp": (PYTHON_TESTS, BATCHES, HOSTILE, LIVES),
    "csrc/python_stage.cpp": (PYTHON_TESTS, BATCHES, HOSTILE, LIVES),
    "csrc/python_staged_tokens.cpp": (PYTHON_TESTS, BATCHES, HOSTILE, LIVES),
    "csrc/small_tensors.cpp": (SMALL,),
    "csrc/python_parcel.cpp": (SMALL,),
    "csrc/python_rows.cpp": (SMALL,),
    "csrc/python_small_tensors.cpp": (SMALL,),
    "csrc/ids_view.cpp": ("pytest tests/test_integrations.py -k view", PYTHON_TESTS),
    "csrc/ops.cpp": ("pytest tests/test_ops.py", PYTHON_TESTS),
    "pystage/pool.py": (PYTHON_TESTS, BATCHES, LIVES),
    "pystage/_tensor_like.py": (PYTHON_TESTS, BATCHES, LIVES),
    "pystage/stats.py": ("pytest tests/test_figures.py",),
    "pystage/batch.py": (
        "pytest tests/test_batch.py -k 'not equals_cat'",
        "pytest tests/test_batch.py -k equals_cat",
    ),
    "pystage/ops.py": ("pytest tests/test_ops.py", PYTHON_TESTS),
    "pystage/errors.py": (PYTHON_TESTS, BATCHES),
    "pystage/testing.py": (PYTHON_TESTS, "pytest tests/test_testing.py tests/test_races.py"),
    "pystage/_build.py": ("pytest tests/test_process.py tests/test_build.py tests/test_doctor.py",),
    "pystage/_extension.py": ("pytest tests/test_extension.py",),
    "pystage/cli/replay.py": (CLI,),
    "pystage/cli/chunks.py": (CLI, "pytest tests/test_pp_pipeline.py"),
    "pystage/trace.py": ("pytest tests/test_trace.py", CLI),
    "pystage/cli/__init__.py": (CLI,),
    "pystage/cli/demo.py": (CLI,),
    "pystage/cli/doctor.py": ("pytest tests/test_doctor.py", CLI),
    "pystage/cli/output.py": (CLI,),
    "pystage/pp/forms.py": (f"{MODEL} {QUICK_FITS}", f"{MODEL} {SLOW_FITS}"),
    "pystage/pp/fitting.py": (f"{MODEL} {QUICK_FITS}", f"{MODEL} {SLOW_FITS}"),
    "pystage/pp/model.py": (f"{MODEL} {QUICK_FITS}", f"{MODEL} {SLOW_FITS}"),
    "pystage/pp/makespan.py": (
        "pytest tests/test_pp_sizer.py -k 'simulation or stages'",
        "pytest tests/test_pp_choose.py -k 'chunks_of_one_size or stage'",
    ),
    "pystage/pp/budget.py": ("pytest tests/test_pp_budget.py",),
    "pystage/pp/correction.py": ("pytest tests/test_pp_correction.py",),
    "pystage/pp/apart.py": ("pytest tests/test_pp_correction.py",),
    "pystage/pp/choice.py": ("pytest tests/test_pp_choose.py tests/test_pp_sizer.py",),
    "pystage/pp/samples.py": ("pytest tests/test_pp_profile.py -k 'not importing'",),
    "pystage/pp/sizer.py": (
        "pytest tests/test_pp_queue.py -k 'not study and not as_good'",
        "pytest tests/test_pp_sizer.py -k 'not plans_cover_any'",
        "pytest tests/test_pp_sizer.py -k plans_cover_any",
    ),
    "pystage/pp/profile.py": ("pytest tests/test_pp_profile.py -k 'not importing'",),
    "pystage/pp/queue.py": ("pytest tests/test_pp_queue.py -k 'not study and not as_good'",),
    "pystage/pp/share.py": ("pytest tests/test_pp_share.py",),
    **{
        f"pystage/integrations/sglang/{name}.py": (
            "pytest tests/test_integrations.py",
            "sglang tests/test_sglang.py",
        )
        for name in (
            *(
                "budget",
                "entry",
                "hooks",
                "metrics",
                "pp",
                "process",
                "resolving",
                "settings",
                "sizer",
            ),
            *("staging", "symbols", "validation", "verification"),
        )
    },
    "pystage/integrations/sglang/correction.py": (
        "sglang tests/test_sglang.py -k 'a_correction or are_timed'",
        "sglang tests/test_engine_runs.py -k two_stages",
    ),
    "pystage/integrations/sglang/small.py": (
        SMALL,
        "sglang tests/test_sglang.py -k 'small or rows or same_with or leaves_torch'",
    ),
}


class MutantError(Exception):
    """The list of faults or the copy is invalid, or the tests fail without any fault."""


@dataclass
class Site:
    """A fault and where it goes."""

    name: str
    file: str
    mutant: M
    start: int
    stop: int
    batch: int = 0
    kinds: tuple[str, ...] = ()
    hint: str = ""  # the test that detected it last time

    @property
    def number(self) -> int:
        """The value of PYSTAGE_MUTANT for this fault. It depends on the name alone, so adding or
        removing other faults does not recompile sources that have not changed."""
        return zlib.crc32(self.name.encode()) >> 1

    @property
    def tests(self) -> tuple[str, ...]:
        return self.tests_of(self.kinds)

    def tests_of(self, kinds: tuple[str, ...]) -> tuple[str, ...]:
        """The tests to run on it, limited to these kinds if any are given."""
        tests = filter(None, (self.hint, self.mutant.tests, *TESTS[self.file]))
        return tuple(t for t in tests if not kinds or t.split()[0] in kinds)


@dataclass
class Result:
    """The outcome of a fault: ``killed``, ``survived``, ``equivalent`` or ``not run``."""

    name: str
    file: str
    outcome: str
    by: str = ""
    seconds: float = 0.0


# --- the list ------------------------------------------------------------------------------------


def find_sites(root: Path, only: tuple[str, ...] = ("",)) -> list[Site]:
    """The faults whose names begin with one of ``only``. Raises MutantError, which names each fault
    whose original text does not occur exactly once, and each file whose tests are not there."""
    sites, stale = [], []
    for file, mutants in ALL.items():
        text = (root / file).read_text(encoding="utf-8")
        named = [name for tests in TESTS.get(file, ()) for name in re.findall(r"tests/\S+", tests)]
        if file not in TESTS or not all((root / name).exists() for name in named):
            stale.append(f"{file}: its tests in TESTS are {named or 'missing'}")
        for short, mutant in mutants.items():
            name = f"{Path(file).name}/{short}"
            if not name.startswith(only):
                continue
            before, inner, after = _parts(mutant.original)
            whole = before + inner + after
            if (found := text.count(whole)) != 1:
                stale.append(f"{name}: its original stands {found} times in {file}:\n{whole}")
                continue
            start = text.index(whole) + len(before)
            sites.append(Site(name, file, mutant, start, start + len(inner)))
    if stale:
        raise MutantError("the list is older than the code:\n" + "\n".join(stale))
    return sites


def _parts(original: str) -> tuple[str, str, str]:
    """The text before, between and after the marks. Without marks, all of it is between them."""
    if match := re.fullmatch(r"(.*)<\|(.*?)\|>(.*)", original, re.DOTALL):
        before, inner, after = match.groups()
        return before, inner, after
    return "", original, ""


# --- C++: all faults in one build ----------------------------------------------------------------


def assign_batches(sites: list[Site]) -> int:
    """Assigns C++ sites that partly overlap to different builds. Returns the number of builds."""
    batches: list[list[Site]] = [[]]
    for site in sites:
        for batch in range(len(batches) + 1):
            if batch == len(batches):
                batches.append([])
            if not any(_cross(site, other) for other in batches[batch]):
                site.batch = batch
                batches[batch].append(site)
                break
    return len(batches)


def _cross(a: Site, b: Site) -> bool:
    """Whether they overlap without one being within the other."""
    if a.file != b.file or a.stop <= b.start or b.stop <= a.start:
        return False
    within = (a.start <= b.start and b.stop <= a.stop) or (b.start <= a.start and a.stop <= b.stop)
    return not within


def schema(text: str, sites: list[Site]) -> str:
    """The source with every fault in it. Each is switched on by its number."""

    def render(start: int, stop: int, inside: list[Site]) -> str:
        """text[start:stop] with the sites inside it replaced, the outermost first."""
        out, at = "", start
        outer = [s for s in inside if not any(_contains(o, s) for o in inside if o is not s)]
        for first in sorted({(s.start, s.stop) for s in outer}):
            same = [s for s in inside if (s.start, s.stop) == first]
            nested = [s for s in inside if _contains(same[0], s) and s not in same]
            original = render(first[0], first[1], nested)
            for site in same:
                original = _choice(site, original, text[site.start : site.stop])
            out += text[at : first[0]] + original
            at = first[1]
        return out + text[at:stop]

    return f'#include "{HEADER}"\n' + render(0, len(text), sites)


def _contains(outer: Site, inner: Site) -> bool:
    """Whether ``inner`` is within ``outer``. Of two equal ranges neither contains the other."""
    return (
        outer.start <= inner.start
        and inner.stop <= outer.stop
        and (outer.start, outer.stop) != (inner.start, inner.stop)
    )


def _choice(site: Site, original: str, raw: str) -> str:
    chosen = f"pystage_mutant({site.number})"
    if raw.rstrip().endswith((";", "}")):
        return f"{{ if ({chosen}) {{ {site.mutant.replacement} }} else {{ {original} }} }}"
    if site.mutant.replacement in ("true", "false"):
        original = f"static_cast<bool>({original})"
    return f"({chosen} ? ({site.mutant.replacement}) : ({original}))"


CHOSEN = """#pragma once
#include <cstdlib>
// Whether this fault is the one that the environment asks for.
inline bool pystage_mutant(int number) {
  static const int chosen = [] {
    const char* text = std::getenv("PYSTAGE_MUTANT");
    return text ? std::atoi(text) : 0;
  }();
  return chosen == number;
}
"""


# --- the copies ----------------------------------------------------------------------------------


def copy_project(to: Path, less: Collection[str] = ()) -> None:
    """Copies all files that git tracks or would add, except ``less``."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    wanted = {name for name in listed if (ROOT / name).is_file()}
    for name in wanted - set(less):
        source, target = ROOT / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)
    for folder in ("csrc", "pystage", "tests"):
        for path in (to / folder).rglob("*"):
            stale = path.is_file() and str(path.relative_to(to)) not in wanted
            if stale and path.suffix in (".py", ".pyc"):
                path.unlink()


def write(path: Path, text: str) -> None:
    """Writes the file only if its text changes, so that nothing is rebuilt without need."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def build_extension(tree: Path, python: str) -> None:
    environment = {**os.environ, "PYSTAGE_CUDA": "0"}
    _checked([python, "setup.py", "build_ext", "--inplace"], tree, environment)


def build_cpp_tests(tree: Path) -> dict[str, Path]:
    folder = tree / "build/cpp"
    (folder / "scheduled").mkdir(parents=True, exist_ok=True)
    programs = {"cpp": folder / "tests", "schedules": folder / "schedules"}
    flags = [f"BUILD={folder}", "FLAGS=-std=c++17 -pthread -O2", "CXXFLAGS="]
    targets = [str(program) for program in programs.values()]
    _checked(["make", "-C", "csrc/tests", *flags, *targets], tree, dict(os.environ))
    return programs


def _checked(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise MutantError("\n".join([f"{shlex.join(command)} in {folder} failed:", *errors[-40:]]))


# --- running tests -------------------------------------------------------------------------------


@dataclass
class Runner:
    """One worker's copies of the project and the processes that run the tests in them."""

    trees: dict[str, Path]
    sglang: str
    programs: dict[str, Path] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def run(self, tests: str, number: int, seconds: float) -> int | None:
        """Runs a command of TESTS with the C++ fault ``number`` (0: none). Returns its exit status,
        or None if it took longer than ``seconds``."""
        kind, _, arguments = tests.partition(" ")
        environment = {"PYSTAGE_MUTANT": str(number)}
        if kind in self.programs:
            command = [str(self.programs[kind]), "-aa=1", *shlex.split(arguments)]
            return _run_program(command, environment, self.log, seconds)
        job = {
            "arguments": ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly",
                          *shlex.split(arguments)],
            "environment": environment,
            "log": str(self.log),
            "seconds": seconds,
        }  # fmt: skip
        process = self.process(kind)
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(job), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise MutantError(f"the process that runs {tests} ended; see {self.log}")
        status = json.loads(answer)["status"]
        return None if status is None else int(status)

    @property
    def log(self) -> Path:
        return self.trees["pytest"] / "build/log.txt"

    def process(self, kind: str) -> subprocess.Popen[str]:
        if kind not in self.processes:
            environment = {
                **os.environ,
                "PYTHONPATH": str(self.trees[kind]),
                # Python detects a changed file by its size and the second of its modification
                # time. A fault may change neither.
                "PYTHONDONTWRITEBYTECODE": "1",
            }
            self.processes[kind] = subprocess.Popen(
                [self.sglang if kind == "sglang" else sys.executable,
                 str(ROOT / "tests/mutants/worker.py")],
                cwd=self.trees[kind], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        return self.processes[kind]

    def close(self) -> None:
        for process in self.processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def _run_program(
    command: list[str], environment: dict[str, str], log: Path, seconds: float
) -> int | None:
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Baseline:
    """How long each command takes without a fault. Measured once, on first use."""

    def __init__(self) -> None:
        self._locks: dict[str, threading.Lock] = {}
        self._seconds: dict[str, float | None] = {}
        self._guard = threading.Lock()

    def limit(self, runner: Runner, tests: str, batch: int) -> float | None:
        """Seconds after which a run with a fault counts as hung. None: it fails without a fault."""
        key = f"{tests} #{batch}"
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._seconds:
                start = time.monotonic()
                status = runner.run(tests, 0, 900)
                self._seconds[key] = time.monotonic() - start if status == 0 else None
            seconds = self._seconds[key]
        return None if seconds is None else 20 + 5 * seconds


def test_site(runner: Runner, site: Site, baseline: Baseline) -> Result:
    """Runs a fault's tests until one fails."""
    begin = time.monotonic()
    is_python = site.file.endswith(".py")
    tests = [t for t in site.tests if t.split()[0] in (*runner.programs, *runner.trees)]
    for command in tests:
        limit = baseline.limit(runner, command, site.batch)
        if limit is None:
            if command == site.hint:
                continue  # the test has been renamed
            tail = runner.log.read_text(errors="replace").splitlines()[-15:]
            raise MutantError("\n".join([f"{command} fails without any fault:", *tail]))
        path = runner.trees["sglang" if command.startswith("sglang") else "pytest"] / site.file
        text = path.read_text(encoding="utf-8")
        try:
            if is_python:
                fault = text[: site.start] + site.mutant.replacement + text[site.stop :]
                path.write_text(fault, encoding="utf-8")
            status = runner.run(command, 0 if is_python else site.number, limit)
        finally:
            if is_python:
                path.write_text(text, encoding="utf-8")
        if status != 0:
            by = _first_failure(runner.log, status)
            return Result(site.name, site.file, "killed", by, time.monotonic() - begin)
    if len(tests) < len(site.tests):
        return Result(site.name, site.file, "not run", "only the real SGLang can tell")
    return Result(site.name, site.file, "survived", seconds=time.monotonic() - begin)


def _first_failure(log: Path, status: int | None) -> str:
    """The test that detected the fault: the first one that failed, if the log shows it."""
    if status is None:
        return "a hang"
    text = log.read_text(errors="replace")
    if match := re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE):
        return match.group(1)
    if match := re.search(r"^TEST CASE:\s+(.*)", text, re.MULTILINE):
        return match.group(1)
    return f"exit status {status}"


# --- all of it -----------------------------------------------------------------------------------


def prepare(
    sites: list[Site], workers: int, sglang: str | None, progress: Progress
) -> Iterator[tuple[list[Site], list[Runner]]]:
    """Builds a copy for each batch of C++ faults. Python faults go with the first batch."""
    built = [site for site in find_sites(ROOT, ("",)) if not site.file.endswith(".py")]
    batches = assign_batches([site for site in built if not site.mutant.equivalent])
    batch_of = {site.name: site.batch for site in built}
    for site in sites:
        site.batch = batch_of.get(site.name, 0)
    for batch in range(batches):
        here = [s for s in sites if s.batch == batch]
        if not here:
            continue
        folder = BUILD / f"{batch}"
        task = progress.add_task(f"building batch {batch + 1} of {batches}", total=None)
        copy_project(folder, {site.file for site in built})
        write(folder / "csrc" / HEADER, CHOSEN)
        for file in {site.file for site in built}:
            inside = [s for s in built if s.file == file and s.batch == batch]
            text = (ROOT / file).read_text(encoding="utf-8")
            wanted = [s for s in inside if not s.mutant.equivalent]
            write(folder / file, schema(text, wanted) if wanted else text)
        if any(t.startswith("pytest") for s in here for t in s.tests):
            build_extension(folder, sys.executable)
        needs_cpp = any(t.startswith(("cpp", "schedules")) for s in here for t in s.tests)
        programs = build_cpp_tests(folder) if needs_cpp else {}
        plugin = sglang is not None and any(t.startswith("sglang") for s in here for t in s.tests)
        if plugin:
            build_for_sglang(BUILD / "sglang", sglang or "")
        runners = []
        for worker in range(workers):
            trees = {"pytest": copy_of(folder, BUILD / f"{batch}-{worker}")}
            if plugin:
                trees["sglang"] = copy_of(BUILD / "sglang", BUILD / f"sglang-{worker}")
            runners.append(Runner(trees, sglang or "", programs))
        progress.remove_task(task)
        yield here, runners


def copy_of(built: Path, tree: Path) -> Path:
    """A worker's own copy of the project, including the build results."""
    copy_project(tree)
    for extension in (built / "pystage").glob("*.so"):
        shutil.copyfile(extension, tree / "pystage" / extension.name)
    for entry_points in built.glob("*.egg-info"):
        shutil.copytree(entry_points, tree / entry_points.name, dirs_exist_ok=True)
    (tree / "build").mkdir(exist_ok=True)
    return tree


def build_for_sglang(folder: Path, python: str) -> None:
    """Builds it without faults for the torch of SGLang's environment, with the plugin's entry
    point."""
    copy_project(folder)
    build_extension(folder, python)
    _checked([python, "setup.py", "-q", "egg_info"], folder, dict(os.environ))


def run_all(sites: list[Site], workers: int, sglang: str | None, console: Console) -> list[Result]:
    results: list[Result] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("faults", total=len(sites))
        baseline = Baseline()
        for here, runners in prepare(sites, workers, sglang, progress):
            todo: queue.SimpleQueue[Site] = queue.SimpleQueue()
            for site in here:
                todo.put(site)
            errors: list[BaseException] = []
            tell = functools.partial(_tell, progress, task, results)
            threads = [
                threading.Thread(target=_work, args=(runner, todo, baseline, tell, errors))
                for runner in runners
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for runner in runners:
                runner.close()
            if errors:
                raise errors[0]
    return results


def _work(
    runner: Runner,
    todo: queue.SimpleQueue[Site],
    baseline: Baseline,
    tell: Callable[[Result], None],
    errors: list[BaseException],
) -> None:
    """One worker: takes faults until none are left or another worker has failed."""
    try:
        while not errors:
            try:
                site = todo.get_nowait()
            except queue.Empty:
                return
            tell(test_site(runner, site, baseline))
    except BaseException as error:
        errors.append(error)


def _tell(progress: Progress, task: TaskID, results: list[Result], result: Result) -> None:
    results.append(result)
    progress.advance(task)
    if result.outcome == "survived" or not progress.console.is_terminal:
        text = f"{result.outcome}: {result.name} {result.by} ({result.seconds:.0f} s)"
        progress.console.print(text, highlight=False, soft_wrap=True)


def read_hints(path: Path) -> dict[str, str]:
    """For each fault, the test that detected it in the last run. It is likely to do so again."""
    if not path.exists():
        return {}
    return {
        result["name"]: f"pytest {shlex.quote(result['by'])}"
        for result in json.loads(path.read_text(encoding="utf-8"))
        if result["outcome"] == "killed" and result["by"].startswith("tests/")
    }


def report(results: list[Result], console: Console) -> float:
    """Prints the faults that survived. Returns the share that was detected."""
    count = {o: sum(r.outcome == o for r in results) for o in
             ("killed", "survived", "equivalent", "not run")}  # fmt: skip
    survivors = [r for r in results if r.outcome == "survived"]
    if survivors:
        table = Table(title="survivors", title_justify="left")
        for column in ("fault", "original", "replacement"):
            table.add_column(column, overflow="fold")
        for r in survivors:
            mutant = ALL[r.file][r.name.partition("/")[2]]
            table.add_row(r.name, mutant.original.strip(), mutant.replacement.strip())
        console.print(table, markup=False)
    run = count["killed"] + count["survived"]
    share = count["killed"] / run if run else 1.0
    console.print(
        f"{count['killed']} of {run} noticed ({share:.1%}); {count['equivalent']} equivalent, "
        f"{count['not run']} not run",
        highlight=False,
    )
    return share


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names, or how they begin, with commas between")
    parser.add_argument("--tests", default="", help="cpp,schedules: those tests and no others")
    parser.add_argument("--list", action="store_true", help="tell them and run none")
    parser.add_argument(
        "--json", type=Path, default=BUILD / "results.json", help="results go there"
    )
    parser.add_argument("--jobs", type=int, default=2, help="tests run at a time (default 2)")
    parser.add_argument(
        "--sglang", default=str(ROOT / ".venv-sglang/bin/python"), help="Python that has SGLang"
    )
    options = parser.parse_args()
    console = Console(markup=False, stderr=True)
    try:
        sites = find_sites(ROOT, tuple(options.only.split(",")))
        if options.list:
            for s in sites:
                print(f"{s.name}  ({s.file})  {s.mutant.equivalent}")
            return 0
        if not sites:
            raise MutantError(f"no fault is called {options.only}")
        equivalent = [s for s in sites if s.mutant.equivalent]
        results = [Result(s.name, s.file, "equivalent", s.mutant.equivalent) for s in equivalent]
        sglang = options.sglang if Path(options.sglang).exists() else None
        kinds = tuple(filter(None, options.tests.split(",")))
        if unknown := set(kinds) - KINDS:
            raise MutantError(f"no tests are called {', '.join(unknown)}, only {', '.join(KINDS)}")
        sites = [s for s in sites if not s.mutant.equivalent and s.tests_of(kinds)]
        hints = read_hints(options.json)
        for site in sites:
            site.kinds, site.hint = kinds, hints.get(site.name, "")
        results += run_all(sites, options.jobs, sglang, console)
    except MutantError as error:
        console.print(f"mutants: {error}", highlight=False)
        return 2
    share = report(results, console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(options.json.read_text()) if options.only and options.json.exists() else []
    new = {r.name: asdict(r) for r in results}
    kept = [r for r in old if r["name"] not in new]
    options.json.write_text(json.dumps([*kept, *new.values()], indent=1) + "\n")
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
