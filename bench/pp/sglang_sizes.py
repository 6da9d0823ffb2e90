"""SGLang's own chunk sizer, for comparison: its predictor from its package, and its sweep."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench.suite.peers import Sources


@cache
def sglang_class(folder: Path) -> Callable[[], Any]:
    """SGLang's `ChunkSizePredictor` from its wheel or package. Nothing else of it is run."""
    smooth = SimpleNamespace(get=lambda: 0.75)  # SGLang's default
    given = {"np": np, "math": math, "logger": logging.getLogger("sglang")}
    given["envs"] = SimpleNamespace(SGLANG_DYNAMIC_CHUNKING_SMOOTH_FACTOR=smooth)
    path, name = "srt/managers/scheduler_components/dynamic_chunk_sizer.py", "ChunkSizePredictor"
    made: Callable[[], Any] = Sources(folder).take("sglang", path, [name], given)[name]
    return made


def sweep_lengths(base: int) -> list[int]:
    """The lengths of SGLang's sweep, in tokens: 128 falling ones up to 1.25 base chunks, each
    measured once, without history."""
    top = base * 5 // 4
    return [n for n in (top - i * max(1, top // 128) for i in range(128)) if n > 0]


def chunks_of(prompt_len: int, next_size: Callable[[int], int]) -> list[int]:
    """The chunks of a prompt whose sizes are asked for one by one, by history."""
    chunks: list[int] = []
    done = 0
    while done < prompt_len:
        chunks.append(min(next_size(done), prompt_len - done))
        done += chunks[-1]
    return chunks
