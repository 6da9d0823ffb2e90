"""Runs pytest again and again, each time in a fork of a process that has imported torch.

Reads one JSON object per line: ``{"arguments": [...], "environment": {...}, "log": FILE,
"seconds": 60}``. Answers each with ``{"status": N}``: the exit status, or null after a timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import Any


def warm_up() -> None:
    """Imports everything that the tests need except pystage. None of it starts a thread."""
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch.testing  # noqa: F401


class Quick:
    """Hypothesis without shrinking, database and explanations: one failure is enough. The examples
    are the same each time, so that chance does not decide whether a fault is detected."""

    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile(
            "mutants", settings(), phases=phases, database=None, derandomize=True
        )
        settings.load_profile("mutants")


def run(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Runs pytest. Called in the forked child."""
    import pytest

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(out, number)
    os.environ.update(environment)
    return int(pytest.main(arguments, plugins=[Quick()]))


def run_forked(job: dict[str, Any]) -> int | None:
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = run(job["arguments"], job["environment"], job["log"])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    parent, deadline = os.getppid(), time.monotonic() + job["seconds"]
    status: int | None = None
    while time.monotonic() < deadline and os.getppid() == parent:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.02)
    # Processes that the tests started are in the child's session and are killed with it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


def main() -> None:
    sys.path[0] = os.getcwd()  # as with ``python -m pytest``
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm_up()
    for line in sys.stdin:
        print(json.dumps({"status": run_forked(json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
