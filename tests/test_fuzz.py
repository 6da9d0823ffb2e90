"""Runs fuzz.py on its stored corpus and on random bytes. `make fuzz` searches for new failures."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from . import fuzz
from .conftest import SCALE


@pytest.fixture(scope="module")
def reached() -> Counter[str]:
    """What the corpus and random bytes met."""
    met: Counter[str] = Counter()
    for data in fuzz.corpus():
        feed(data, met, "the corpus")
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(max(int(3000 * SCALE), 100)):
        feed(rng.randbytes(rng.choice([8, 30, 100])), met, f"seed {seed}")
    return met


def feed(data: bytes, met: Counter[str], source: str) -> None:
    try:
        fuzz.one_input(data, met)
    except Exception as error:
        raise AssertionError(f"{source}, the input {data.hex()}") from error


def test_hostile_input_ends_as_it_should_and_all_kinds_were_met(reached: Counter[str]) -> None:
    """What is never taken, or never refused, is not tested."""
    taken = {state.split(": ")[0] for state in reached if state.endswith(": taken")}
    refused = {state.split(": ")[0] for state in reached if not state.endswith(": taken")}
    assert taken >= fuzz.REQUESTS.keys() - fuzz.REFUSED
    assert refused >= fuzz.REFUSED | fuzz.HOSTILE
    for kind in ("array q", "array i", "strided", "list", "lies", "view", "bytes"):
        assert f"view of {kind}" in taken
    for kind in ("array q", "array i", "strided", "view"):
        assert f"buffer of a view of {kind}" in taken & refused
    for what in ("resolve into", "mixed with", "transfer of", "transfer into", "copy_ to"):
        assert any(state.startswith(what) for state in taken), what
        assert any(state.startswith(what) for state in refused), what


@pytest.mark.parametrize(
    ("parts", "bad", "says"),
    [
        ([(0, [1, 2])], None, r"\[1, 3\] instead of \[1, 2\]"),
        ([(0, [1, 3])], ValueError("no"), "were refused"),
        ([(0, [1, -3])], None, r"\(0, 1, -3\) is outside 9"),
    ],
)
def test_a_wrong_answer_is_a_finding(parts: list, bad: Exception | None, says: str) -> None:
    class Staged:
        def tolist(self) -> list[int]:
            return [1, 3]

    with pytest.raises(fuzz.Finding, match=says):
        fuzz.judge(parts, False, 9, Staged(), bad)
