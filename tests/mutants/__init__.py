"""Single faults that the tests have to notice. ``make mutants`` runs them; see ``__main__.py``."""

from __future__ import annotations

from typing import NamedTuple


class M(NamedTuple):
    """One fault.

    Attributes:
        original: text that stands exactly once in the file, white space and all. What is replaced
            is all of it, or what stands between ``<|`` and ``|>`` in it.
        replacement: what stands there in the faulty file.
        tests: run first, before those of the file: a command of ``TESTS``, such as
            ``pytest tests/test_pool.py -k fallback``.
        equivalent: why no test can see it; such a fault is not run.
    """

    original: str
    replacement: str
    tests: str = ""
    equivalent: str = ""


Mutants = dict[str, dict[str, M]]
"""By file, then by name."""
