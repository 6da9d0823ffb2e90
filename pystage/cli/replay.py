"""Replays a trace through a pool and through the plain torch path, and compares every batch."""

from __future__ import annotations

import platform
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from time import perf_counter_ns

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .. import StagingPool, StagingStats, resolve, trace
from ..pool import Issue
from .output import MismatchError

WARM_UP_BATCHES = 20
_ID_BYTES = 8


@dataclass(frozen=True)
class Workload:
    """What to replay.

    Attributes:
        requests: the requests of the trace. The replay starts over when they run out.
        batches: number of measured batches, after those of the warm-up.
        chunk_tokens: the most tokens in a batch.
        vocab_size: ids are in ``[0, vocab_size)``.
        warm_up_batches: number of batches that are replayed and checked first, but not measured.
    """

    requests: Sequence[trace.Request]
    batches: int
    chunk_tokens: int = trace.DEFAULT_CHUNK_TOKENS
    vocab_size: int = trace.DEFAULT_VOCAB_SIZE
    warm_up_batches: int = WARM_UP_BATCHES


@dataclass(frozen=True)
class HostTime:
    """Host time of one step over the measured batches, in microseconds."""

    p50_us: float
    p99_us: float
    max_us: float


@dataclass(frozen=True)
class PoolFigures:
    """The pool's figures for a replay: bytes and counts.

    Attributes:
        capacity_bytes, reserved_bytes, high_water_bytes, pageable_bytes: as in
            :class:`pystage.StagingStats`, at the end of the replay.
        why_pageable: why memory is not pinned. Empty if it is, and on the host device.
        allocations: pieces of memory allocated from the device, in all.
        allocations_after_warm_up: pieces allocated during the measured batches.
        fallbacks: measured batches that were staged outside the pool.
        waits: measured batches that waited for a slot.
        wire_bytes: bytes transferred for the measured batches.
        int64_bytes: size of their ids as int64, which is what the plain path transfers.
    """

    capacity_bytes: int
    reserved_bytes: int
    high_water_bytes: int
    pageable_bytes: int
    why_pageable: str
    allocations: int
    allocations_after_warm_up: int
    fallbacks: int
    waits: int
    wire_bytes: int
    int64_bytes: int


@dataclass(frozen=True)
class Report:
    """The results of a replay. A report exists only if every batch was right.

    Attributes:
        device: the device that received the ids.
        device_name: the name of that device.
        issue: the pool's ``issue``.
        batches: number of measured batches.
        warm_up_batches: number of batches before them. Of all figures, only ``pool.allocations``
            includes them.
        requests: number of different requests in the measured batches.
        tokens: number of ids in the measured batches.
        stage: time of ``pool.stage``.
        resolve: time of ``pystage.resolve``, and of dropping the staged tokens.
        both: time of the two together, for each batch.
        plain: time of the plain torch path. On the host device that path transfers nothing, so its
            time cannot be compared with the others.
        pool: the pool's figures.
    """

    device: str
    device_name: str
    issue: str
    batches: int
    warm_up_batches: int
    requests: int
    tokens: int
    stage: HostTime
    resolve: HostTime
    both: HostTime
    plain: HostTime
    pool: PoolFigures


class Paths:
    """The two ways to get a batch onto the device, and their times in ns, for each batch."""

    def __init__(self, pool: StagingPool, vocab_size: int) -> None:
        self._pool = pool
        self._vocab_size = vocab_size
        self.stage_ns: list[int] = []
        self.resolve_ns: list[int] = []
        self.plain_ns: list[int] = []

    def forget(self) -> None:
        """Drops the times measured so far."""
        for times in (self.stage_ns, self.resolve_ns, self.plain_ns):
            times.clear()

    def through_pool(self, batch: trace.Batch, ids: Sequence[array[int]]) -> Tensor:
        """Stages and resolves the batch; returns its ids on the device."""
        begin = perf_counter_ns()
        staged = self._pool.stage(ids, batch.starts, batch.stops, self._vocab_size)
        between = perf_counter_ns()
        on_device = resolve(staged)
        del staged  # timed, because the plain path's time includes freeing its pinned memory
        end = perf_counter_ns()
        self.stage_ns.append(between - begin)
        self.resolve_ns.append(end - between)
        _synchronize(self._pool.device)
        return on_device

    def plain(self, batch: trace.Batch, ids: Sequence[array[int]]) -> Tensor:
        """Does the same as SGLang: concatenates slices, copies them to pinned memory, and from
        there to the device.

        The slices here are views. SGLang's are copies, which would make this path slower.
        """
        device = self._pool.device
        begin = perf_counter_ns()
        slices = [
            np.frombuffer(whole, dtype=np.int64)[start:stop]
            for whole, start, stop in zip(ids, batch.starts, batch.stops, strict=True)
        ]
        flat = torch.from_numpy(np.concatenate(slices))
        if device.type == "cuda":
            flat = flat.pin_memory()
        on_device = flat.to(device, non_blocking=True)
        del flat
        end = perf_counter_ns()
        self.plain_ns.append(end - begin)
        _synchronize(device)
        return on_device


def replay(pool: StagingPool, work: Workload, issue: Issue, on_batch: Callable[[], None]) -> Report:
    """Sends each batch both ways and compares the ids on the device.

    The two ways take turns at going first. The device is idle whenever a timed call begins, so only
    the time of the calls is measured.

    Args:
        pool: an open pool. Its device receives the ids.
        work: the batches.
        issue: the pool's ``issue``, for the report.
        on_batch: called after each batch, including warm-up batches. It is not timed.

    Raises:
        MismatchError: the ids of a batch differ. Raised for the first such batch.
    """
    wanted = work.warm_up_batches + work.batches
    batches = trace.prefill_batches(cycle(work.requests), work.chunk_tokens)
    with_ids = trace.with_token_ids(batches, work.requests, work.vocab_size)
    paths = Paths(pool, work.vocab_size)
    seen, tokens, warm = set[int](), 0, pool.stats()
    with _current(pool.device):
        for number, (batch, ids) in enumerate(islice(with_ids, wanted)):
            if number == work.warm_up_batches:
                paths.forget()
                seen, tokens, warm = set(), 0, pool.stats()
            if number % 2:
                plain, ours = paths.plain(batch, ids), paths.through_pool(batch, ids)
            else:
                ours, plain = paths.through_pool(batch, ids), paths.plain(batch, ids)
            if not torch.equal(ours, plain):
                difference = _describe_difference(batch, ours.cpu(), plain.cpu())
                raise MismatchError(f"batch {number}: {difference}")
            seen.update(batch.requests)
            tokens += batch.tokens
            on_batch()
    return Report(
        device=str(pool.device),
        device_name=_device_name(pool.device),
        issue=issue,
        batches=work.batches,
        warm_up_batches=work.warm_up_batches,
        requests=len(seen),
        tokens=tokens,
        stage=_host_time(paths.stage_ns),
        resolve=_host_time(paths.resolve_ns),
        both=_host_time(np.add(paths.stage_ns, paths.resolve_ns)),
        plain=_host_time(paths.plain_ns),
        pool=_pool_figures(pool, warm, tokens),
    )


def _describe_difference(batch: trace.Batch, ours: Tensor, plain: Tensor) -> str:
    if ours.shape != plain.shape:
        return f"{len(ours)} ids came through the pool, {len(plain)} by the plain path"
    at = int((ours != plain).nonzero()[0])
    request, position = _request_of(batch, at)
    return (
        f"id {at} (request {request}, position {position}) is {int(ours[at])} through the pool "
        f"and {int(plain[at])} by the plain path"
    )


def _request_of(batch: trace.Batch, at: int) -> tuple[int, int]:
    """The request that id ``at`` of a batch belongs to, and the id's position in that request."""
    for request, start, stop in zip(batch.requests, batch.starts, batch.stops, strict=True):
        if at < stop - start:
            return request, start + at
        at -= stop - start
    raise IndexError("past the end of the batch")


def _host_time(nanoseconds: ArrayLike) -> HostTime:
    microseconds = np.asarray(nanoseconds) / 1000
    p50, p99 = np.percentile(microseconds, [50, 99])
    return HostTime(float(p50), float(p99), float(microseconds.max()))


def _pool_figures(pool: StagingPool, warm: StagingStats, tokens: int) -> PoolFigures:
    now = pool.stats()
    return PoolFigures(
        capacity_bytes=now.capacity_bytes,
        reserved_bytes=now.reserved_bytes,
        high_water_bytes=now.high_water_bytes,
        pageable_bytes=now.pageable_bytes,
        why_pageable=pool.why_pageable,
        allocations=now.allocations,
        allocations_after_warm_up=now.allocations - warm.allocations,
        fallbacks=now.fallbacks - warm.fallbacks,
        waits=now.waits - warm.waits,
        wire_bytes=now.wire_bytes - warm.wire_bytes,
        int64_bytes=_ID_BYTES * tokens,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"host device ({platform.machine()})"


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device current: ``resolve`` launches on that device's current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
