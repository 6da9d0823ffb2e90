"""Runs a function in a Python process of its own.

A fit is about a second of Python and NumPy. In a thread of the serving process it would take the
interpreter from the thread that launches forwards: each PyTorch call gives the interpreter up for a
moment, and then waits for it for up to 5 ms. In an engine on an H200, prompts of 32,768 tokens took
up to 1.9 s longer while a thread refitted.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


# Before anything is imported: what modules print must not get between.
_START = f"""
import os
results = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
from {__name__} import _main
_main(results)
"""


def apart(function: Callable[..., T], *args: Any) -> T:
    """Returns `function(*args)`, computed in a new Python process of low priority.

    The caller's thread waits without the interpreter. `function` must be at the top level of a
    module, and everything that is passed must be picklable. What the function logs is logged here
    at INFO. The process uses one core and no GPU, and costs about a second to start.

    Raises RuntimeError, with the process's last lines, if the function fails.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", _START],
        input=pickle.dumps((function, args)),
        capture_output=True,
        env={**os.environ, **threads, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    said = done.stderr.decode(errors="replace").splitlines()
    if done.returncode:
        raise RuntimeError(
            f"{function.__name__} failed in its process (exit status {done.returncode}): "
            + "\n".join(said[-8:])
        )
    for line in said:
        logger.info("%s", line)
    result: T = pickle.loads(done.stdout)
    return result


def _main(results: BinaryIO) -> None:
    os.nice(10)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    function, args = pickle.load(sys.stdin.buffer)
    with results:
        pickle.dump(function(*args), results)
