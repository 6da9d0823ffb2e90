"""Types and helpers that all regimes share.

A regime is a dict of cells. A cell is a callable that returns a result for JSON. Cells do not
depend on each other: if one fails, its error is recorded and the next one runs.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from bench.common import VOCAB, arriving, two_calls_time
from bench.device import Host
from bench.suite.contenders import (
    Batch,
    Contender,
    Contenders,
    count_of,
)
from pystage.trace import draw_ids, sample_trace

Cell: TypeAlias = "Callable[[], dict[str, Any]]"


class Once(partial[Any]):
    """A cell that is measured with all its samples in a single pass, the last one."""


CallsOf: TypeAlias = "Callable[[], Sequence[Callable[[], Any]]]"
T = TypeVar("T")
MIB = 1 << 20
LIST_ID_BYTES = 40  # the list's pointer and the int object


@dataclass
class Bench:
    """The device, the contenders and the inputs that all regimes share."""

    device: Host
    contenders: Contenders
    samples: int  # for each cell
    warmup: int
    quick: bool
    trace_batches: int
    cache_bytes: int

    def __post_init__(self) -> None:
        self._order = random.Random(5)

    def shuffled(self, contenders: list[T]) -> list[T]:
        """In a new random order, so that no contender always runs after the same one."""
        return self._order.sample(contenders, len(contenders))

    @property
    def few_samples(self) -> int:
        """Number of samples for cells whose rounds take tens of milliseconds."""
        return -(-self.samples // 4) if self.quick else self.samples

    @cached_property
    def arena(self) -> np.ndarray[Any, Any]:
        """Random ids, 25 % more than fit into the CPU's largest cache."""
        size = max(int(1.25 * self.cache_bytes), 16 * MIB)
        return np.random.default_rng(7).integers(0, VOCAB, size // 8)

    @cached_property
    def trace(self) -> list[list[array[int]]]:
        """Batches of the trace, cut to the ids that each prefills, one array for each request."""
        requests = sample_trace()
        batches = []
        for batch in islice(arriving(requests), self.trace_batches):
            cut = zip(batch.requests, batch.starts, batch.stops, strict=True)
            batches.append([draw_ids(stop - start, VOCAB, (r, start)) for r, start, stop in cut])
        return batches

    def requests(self, kind: str, lengths: Sequence[int], at: int) -> Batch:
        """One batch in memory of its own. ``at`` decides which ids it has."""
        size = self.arena.size
        batch: list[Any] = []
        for length in lengths:
            at = at % (size - length)
            ids = self.arena[at : at + length].copy()
            at += length
            if kind == "array":
                batch.append(array("q", b""))
                batch[-1].frombytes(ids.tobytes())
            elif kind == "list":
                batch.append(ids.tolist())
            else:
                batch.append(torch.from_numpy(ids) if kind == "tensor" else ids)
        return batch

    def inputs(
        self, kind: str, lengths: Sequence[int], cold: bool, calls: int
    ) -> tuple[Callable[[int], Batch], int]:
        """Inputs for that many calls, and the size in bytes of the set that they rotate through.

        Warm inputs rotate through up to 64 batches and 4 MiB, but at least two batches. Cold inputs
        rotate through more than the caches hold, or each is used only once. The caches are
        overwritten before the calls.
        """
        count = sum(lengths)
        size = count * (LIST_ID_BYTES if kind == "list" else 8)
        batches = min(64, max(2, 4 * MIB // size))
        if cold:
            batches = min(calls, self.arena.nbytes // size + 1)
        made = [self.requests(kind, lengths, k * count) for k in range(batches)]
        if cold:
            self.arena[:: 64 // 8] += 0  # touches every line and evicts what was made above
        return (lambda k: made[k % batches]), batches * size


def budget(bench: Bench, count: int) -> tuple[int, int]:
    """Number of samples and of warm-up calls for host times: twice the samples for short calls."""
    if count <= 16384:
        return 2 * bench.samples, bench.warmup
    return bench.samples, bench.warmup if count <= 1 << 17 else min(bench.warmup, 10)


SHAPES = {
    **{f"1 x {n}": (n,) for n in (128, 1024, 8192, 16384, 65536, 131072, 1048576)},
    "8 x 1024": (1024,) * 8,
    "64 x 128": (128,) * 64,
    "256 x 64": (64,) * 256,
    "1000 x 8": (8,) * 1000,
    "4000 x 2": (2,) * 4000,
}


def two_calls(
    bench: Bench,
    everybody: list[Contender],
    whole: Callable[[int], Batch],
    ragged: Callable[[int], Batch],
    inputs: Callable[[int], Batch],
    samples: int,
    warmup: int,
    settle: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Times all contenders and the lower bound, in turn. ``whole`` gives the n-th array for the
    lower bound, ``ragged`` the same ids in parts."""
    bound = bench.contenders.bound(max(8192, count_of(whole(0)), count_of(ragged(0))))
    number = itertools.count()

    def once() -> Sequence[float]:
        k = next(number)
        return bound.once(whole(k)[0], ragged(k))

    try:
        rows = two_calls_time(
            {c.name: (c.stage, c.resolve) for c in everybody},
            inputs,
            samples,
            warmup,
            settle or bench.device.synchronize,
            {"bound": once},
        )
    finally:
        bound.close()
        for contender in everybody:
            contender.close()
    below = rows.pop("bound")
    if isinstance(below, dict):  # the lower bound failed: this is its error
        return {"contenders": rows | {"bound": below}}
    return {"contenders": rows, "bound": dict(zip(bound.parts, below, strict=True))}
