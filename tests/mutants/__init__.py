"""Single faults that the tests must detect. ``make mutants`` runs them; see ``__main__.py``."""

from __future__ import annotations

from typing import NamedTuple


class M(NamedTuple):
    """One fault.

    Attributes:
        original: text that occurs exactly once in the file, including its white space. All of it
            is replaced, or only the part between ``<|`` and ``|>`` if it has these marks.
        replacement: the text that replaces it in the faulty file.
        tests: a command of ``TESTS`` to run before those of the file, such as
            ``pytest tests/test_pool.py -k fallback``.
        equivalent: the reason why no test can detect the fault. Such a fault is not run.
    """

    original: str
    replacement: str
    tests: str = ""
    equivalent: str = ""


Mutants = dict[str, dict[str, M]]
"""By file, then by name."""
