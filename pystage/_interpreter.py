"""Refuses to be imported in a subinterpreter.

torch supports none: imported in one first it hangs, imported again it fails and the process crashes
at its end. So this comes before ``import torch``, and nothing is loaded yet when it raises.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec


def _is_subinterpreter() -> bool:
    for name in ("_interpreters", "_xxsubinterpreters"):  # Python 3.13 and later; before
        if find_spec(name):
            interpreters = import_module(name)
            return bool(interpreters.get_current() != interpreters.get_main())
    return False  # a Python without them makes none from Python code


if _is_subinterpreter():
    raise ImportError(
        "pystage does not work in a subinterpreter, because torch does not: import it in the main "
        "interpreter of a process of its own (multiprocessing, start method 'spawn')"
    )
