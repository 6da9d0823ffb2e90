"""Raises an error if it is imported in a subinterpreter.

torch does not support subinterpreters. If its first import is in one, it hangs. If it was imported
before, the second import fails and the process crashes when it exits. So this module is imported
before torch, and nothing is loaded yet when it raises.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec


def _is_subinterpreter() -> bool:
    for name in ("_interpreters", "_xxsubinterpreters"):  # from Python 3.13 on; before 3.13
        if find_spec(name):
            interpreters = import_module(name)
            return bool(interpreters.get_current() != interpreters.get_main())
    return False  # without these modules, Python code cannot make a subinterpreter


if _is_subinterpreter():
    raise ImportError(
        "pystage does not work in a subinterpreter, because torch does not: import it in the main "
        "interpreter of a process of its own (multiprocessing, start method 'spawn')"
    )
