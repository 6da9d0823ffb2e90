"""The results of a profile: chunk lengths and times, and their JSON format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Point = tuple[int, int]
"""(history_len, chunk_len), both in tokens."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One timed forward, in ms. `latency_ms` is device time if there is a device clock."""

    latency_ms: float
    host_ms: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured chunk: lengths in tokens, times in ms."""

    history_len: int
    chunk_len: int
    latency_ms: float
    host_ms: float = math.nan

    def __post_init__(self) -> None:
        if self.history_len < 0 or self.chunk_len <= 0:
            raise ValueError(f"impossible lengths in {self}: history >= 0 and chunk > 0 are needed")


@dataclass(frozen=True)
class Profile:
    """The samples of a profiling run, and its cost. Iterating gives the samples."""

    samples: tuple[Sample, ...]
    forwards: int
    """Number of forwards run, warm-up and repeats included."""
    seconds: float
    """Wall time of the whole run, in seconds."""
    stop_reason: str
    warmup_ms: tuple[float, ...] = ()
    skipped: tuple[Point, ...] = ()
    """Points that were left out because the device ran out of memory there or at a smaller one."""

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": samples_to_json(self.samples),
            "forwards": self.forwards,
            "seconds": self.seconds,
            "stop_reason": self.stop_reason,
            "warmup_ms": list(self.warmup_ms),
            "skipped": [list(p) for p in self.skipped],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        return cls(
            samples=samples_from_json(data["samples"]),
            forwards=int(data["forwards"]),
            seconds=float(data["seconds"]),
            stop_reason=str(data["stop_reason"]),
            warmup_ms=tuple(float(v) for v in data["warmup_ms"]),
            skipped=tuple((int(h), int(c)) for h, c in data["skipped"]),
        )


def samples_to_json(samples: Sequence[Sample]) -> list[list[float | None]]:
    """Rows of [history_len, chunk_len, latency_ms, host_ms]. An unknown host time is null."""
    return [
        [s.history_len, s.chunk_len, s.latency_ms, s.host_ms if math.isfinite(s.host_ms) else None]
        for s in samples
    ]


def samples_from(samples: Any) -> tuple[Sample, ...]:
    """Converts samples, or rows of (history_len, chunk_len, latency_ms) with an optional host time
    in ms as the fourth column. Raises TypeError for anything else."""
    if isinstance(samples, np.ndarray):
        samples = samples.tolist()
    out = []
    for row in samples:
        sample = row
        if not isinstance(sample, Sample):
            try:
                history, chunk, ms, *host = row
                if len(host) > 1 or int(history) != history or int(chunk) != chunk:
                    raise ValueError("not whole numbers of tokens, or too many columns")
                sample = Sample(int(history), int(chunk), *map(float, (ms, *host)))
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"{row!r} is neither a Sample nor a row of (history_len, chunk_len, "
                    f"latency_ms): {error}"
                ) from error
        out.append(sample)
    return tuple(out)


def samples_from_json(rows: Sequence[Sequence[Any]]) -> tuple[Sample, ...]:
    return tuple(
        Sample(int(h), int(c), float(ms), math.nan if host is None else float(host))
        for h, c, ms, host in rows
    )
