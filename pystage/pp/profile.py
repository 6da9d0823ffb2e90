"""Timed prefill samples: which (history, chunk) points to run, and how to time them.

Chunked prefill under pipeline parallelism needs chunks of equal time. So the latency of a chunk
must be known as a function of two lengths: the tokens already in the KV cache (`history_len`) and
the new tokens (`chunk_len`). SGLang's profiler (PR 26883, PR 37674) varies only the second, once
per length and without warm-up. This profiler warms up until times are steady, and varies both
lengths. Then it measures the points that a sizer with the fit so far would use, points at the edges
of the device's waves that the fit has found, and again the points that the fit explains worst.
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch

from pystage.pp.model import LatencyModel, QualityGate
from pystage.pp.samples import Point, Profile, Sample, Timing
from pystage.pp.samples import samples_to_json as samples_to_json  # noqa: PLC0414
from pystage.pp.sizer import ChunkSizer

logger = logging.getLogger(__name__)

# Kronecker sequence of the plastic number. Any prefix of it covers the unit square evenly, so a
# profile that its budget cuts short has still sampled the whole region.
_PLASTIC = 1.324717957244746


class ProfileError(RuntimeError):
    """A forward failed during profiling. The cause is chained (`__cause__`)."""


class Step(Protocol):
    """Runs one prefill forward of `chunk_len` new tokens behind `history_len` cached ones.

    A step stages and resolves the ids and launches the forward on the current stream. It does not
    have to synchronize. It should free what it holds (KV slots, staging slots, a request) before it
    returns or raises. If a step owns something for the whole profile, pass a context manager whose
    `__enter__` returns the step: `profile_prefill` exits it also after an error.
    """

    def __call__(self, history_len: int, chunk_len: int, /) -> object: ...


Timer = Callable[[Callable[[], object]], Timing]
"""Runs a forward and returns its time."""

Clock = Callable[[Callable[[], object]], Callable[[], Timing]]
"""Starts a forward. What it returns gives the time, and waits for it if need be."""


@dataclass(frozen=True)
class SamplePlan:
    """Where to sample, and how much time to spend. Build one with `SamplePlan.spread`."""

    points: tuple[Point, ...]
    base: Point
    """The point whose time is the sizer's target. Warm-up runs here; its last two forwards are
    samples if they are steady, else its last one."""
    page_size: int = 64
    """All lengths are multiples of it, in tokens."""
    min_chunk: int = 512
    max_tokens: int = 131072
    """History plus chunk never exceeds this number of tokens."""
    max_forwards: int = 48
    max_seconds: float = 60.0
    max_warmup: int = 6
    steady: float = 0.05
    """Warm-up ends when two forwards in a row differ by at most this fraction."""
    on_policy: int = 5
    """Number of points added at sizes that a sizer with the fit so far would choose. 0 also leaves
    out the points at the edges of waves."""
    repeats: int = 14
    """Most points measured again at the end, those with the worst fit first. Two more forwards of
    the base point come before them."""
    target_error: float = 0.015
    """Early stop: once the median hold-out error is at most this and the 95th percentile at most
    four times this, only the on-policy points are still measured."""
    ranks: int = 4
    """Number of pipeline stages of the plans that `decided` compares."""
    decided: float = 0.005
    """The same early stop, because the decision no longer changes. Each check chooses a plan for a
    prompt of `max_tokens`; the stop comes once the previous check's plan is predicted to take at
    most this fraction longer than the current one. 0 turns this off."""
    min_samples: int = 24
    check_every: int = 8

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a sample plan needs at least one point")
        if self.max_forwards < 3:
            raise ValueError(f"max_forwards={self.max_forwards}: at least 3 (warm-up and a sample)")

    @classmethod
    def spread(
        cls,
        *,
        base_chunk: int,
        context_len: int,
        page_size: int = 64,
        min_chunk: int = 512,
        max_chunk: int | None = None,
        max_tokens: int | None = None,
        count: int = 36,
        **limits: Any,
    ) -> SamplePlan:
        """Points over the region that a sizer with a base chunk of `base_chunk` tokens uses.

        Chunks of equal time shrink as history grows, so the largest sampled chunk shrinks too: from
        `max_chunk` (default 1.25 x base, as in SGLang) at history 0, by the factor
        1 / (1 + L / (2 base)) behind L tokens. Full-size chunks behind long histories would cost
        most of the time and are needed least. Two such points are kept as anchors for models whose
        latency does not grow with history. `max_tokens` caps history plus chunk (KV slots). All
        lengths are multiples of `page_size`.
        """
        for name, value in (
            ("base_chunk", base_chunk),
            ("context_len", context_len),
            ("page_size", page_size),
            ("min_chunk", min_chunk),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1 token")
        top = min(context_len, max_tokens or context_len)
        largest = min(max_chunk or base_chunk * 5 // 4, base_chunk * 5 // 4, top)
        smallest = max(page_size, min(min_chunk, largest))

        def align(tokens: float) -> int:
            return max(0, int(tokens) // page_size * page_size)

        points: list[Point] = []

        def add(history: float, chunk: float) -> None:
            size = max(align(chunk), page_size)
            point = (align(min(history, top - size)), size)
            if point not in points:
                points.append(point)

        base = (0, max(align(min(base_chunk, top)), page_size))
        deepest = top - smallest
        for chunk in (largest, base[1] / 2, base[1] / 4, smallest):
            add(0, max(chunk, smallest))
        add(deepest, smallest)
        add(deepest / 2, max(base[1] / 4, smallest))
        add(deepest / 2, base[1])
        add(deepest, base[1] / 2)
        index = 0
        while len(points) < count and index < 8 * count:
            index += 1
            u, v = (0.5 + index / _PLASTIC) % 1.0, (0.5 + index / _PLASTIC**2) % 1.0
            history = u * deepest
            ceiling = max(largest / (1 + history / (2 * base_chunk)), 2 * smallest)
            ceiling = min(ceiling, largest)
            add(history, smallest * (ceiling / smallest) ** v)
        return cls(
            points=tuple(points),
            base=base,
            page_size=page_size,
            min_chunk=smallest,
            max_tokens=top,
            **limits,
        )


def random_token_ids(count: int, vocab_size: int, seed: int = 0) -> array[int]:
    """`count` ids drawn uniformly from [0, vocab_size), in an int64 array as engines use it."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, size=count, dtype=np.int64)
    return array("q", ids.tobytes())


def host_timer(run: Callable[[], object]) -> Timing:
    """Times a synchronous call with the host clock, for CPU forwards."""
    start = time.perf_counter()
    run()
    ms = (time.perf_counter() - start) * 1e3
    return Timing(ms, ms)


Started = tuple[Point, Callable[[], Timing]]
"""A forward that was started, and what waits for its time."""


class DeviceClock:
    """Times forwards on the current stream that follow each other as in an engine: the host starts
    the next one while the device still works on the last.

    A device that rests between two forwards runs the second at a higher clock. On an H200, a chunk
    of 8,192 tokens took 6 % less time after a pause than amid a prompt, while a chunk of 1,024
    tokens took as long. So times with pauses make long chunks look better than they are.
    """

    AHEAD = 2  # forwards in flight when the next one starts

    def __init__(self) -> None:
        self._ends: deque[torch.cuda.Event] = deque()

    def __call__(self, run: Callable[[], object]) -> Callable[[], Timing]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        self._ends.append(end)
        if len(self._ends) > self.AHEAD:
            self._ends.popleft().synchronize()

        def ready() -> Timing:
            end.synchronize()
            return Timing(float(begin.elapsed_time(end)), math.nan)

        return ready


def _at_once(timer: Timer) -> Clock:
    def clock(run: Callable[[], object]) -> Callable[[], Timing]:
        timing = timer(run)
        return lambda: timing

    return clock


def _clock_of(device: torch.device | str | None) -> tuple[Clock, bool]:
    """The clock of a device, and whether it is a CUDA device. None: CUDA if it is available."""
    kind = torch.device(device).type if device is not None else None
    on_cuda = kind == "cuda" or (kind is None and torch.cuda.is_available())
    return (DeviceClock() if on_cuda else _at_once(host_timer)), on_cuda


def time_chunks(
    step: Step, points: Sequence[Point], device: torch.device | str | None = None
) -> list[float]:
    """Times of forwards of a step, given as (history_len, chunk_len), in ms.

    For the argument `time` of `ChunkSizer.choose`: `lambda points: time_chunks(step, points)`. On a
    CUDA device the forwards follow each other without a pause (`DeviceClock`). There each size also
    runs once before, untimed and without history, because the first forward of a size may load
    kernels.
    """
    clock, on_cuda = _clock_of(device)
    if on_cuda:
        for size in sorted({chunk_len for _, chunk_len in points}):
            step(0, size)
    started = [clock(lambda p=point: step(*p)) for point in points]  # type: ignore[misc]
    return [ready().latency_ms for ready in started]


@dataclass
class _Run:
    """The state of one profile: budget, samples, progress."""

    step: Step
    plan: SamplePlan
    clock: Clock
    tick: Callable[[], None]
    started: float = field(default_factory=time.perf_counter)
    samples: list[Sample] = field(default_factory=list)
    in_flight: list[Started] = field(default_factory=list)
    warmup_ms: list[float] = field(default_factory=list)
    skipped: list[Point] = field(default_factory=list)
    forwards: int = 0
    fitted: LatencyModel | None = None
    chosen: tuple[int, ...] = ()
    """The chunks of the plan chosen at the last check."""

    def spent(self) -> str | None:
        """Says which budget is used up; None if none is."""
        if self.forwards >= self.plan.max_forwards:
            return f"all {self.plan.max_forwards} forwards used"
        if time.perf_counter() - self.started >= self.plan.max_seconds:
            return f"all {self.plan.max_seconds:g} s used"
        return None

    def start(self, point: Point) -> None:
        self.forwards += 1
        self.in_flight.append((point, self.clock(lambda: self.step(*point))))
        self.tick()

    def collect(self) -> None:
        """Makes samples of the forwards that were started."""
        self.samples += map(self.sample_of, self.in_flight)
        self.in_flight.clear()

    @staticmethod
    def sample_of(started: Started) -> Sample:
        point, ready = started
        timing = ready()
        if not (math.isfinite(timing.latency_ms) and timing.latency_ms > 0):
            raise ProfileError(f"the timer gave {timing.latency_ms} ms at {point}")
        return Sample(*point, timing.latency_ms, timing.host_ms)

    def start_if_it_fits(self, point: Point) -> None:
        """Starts the point, unless one no larger has run out of device memory before."""
        if any(point[0] >= h and point[1] >= c for h, c in self.skipped):
            self.skipped.append(point)
            return
        try:
            self.start(point)
        except torch.OutOfMemoryError:
            logger.warning("out of device memory at history %d, chunk %d: skipped", *point)
            self.skipped.append(point)
            torch.cuda.empty_cache()

    def warm_up(self) -> None:
        """Runs the base point until two forwards in a row agree. These two become samples."""
        last: Sample | None = None
        while len(self.warmup_ms) < self.plan.max_warmup and self.spent() is None:
            self.start(self.plan.base)
            sample = self.sample_of(self.in_flight.pop())
            self.warmup_ms.append(sample.latency_ms)
            if last is not None:
                gap = abs(sample.latency_ms - last.latency_ms)
                if gap <= self.plan.steady * min(sample.latency_ms, last.latency_ms):
                    self.samples += [last, sample]
                    return
            last = sample
        if last is not None:
            self.samples.append(last)
            logger.warning(
                "warm-up did not get steady within %d forwards: %s ms",
                len(self.warmup_ms),
                ", ".join(f"{ms:.1f}" for ms in self.warmup_ms),
            )

    def sample(self) -> str:
        """Measures the plan's points, then the sizer's, then repeats. Returns why it stopped."""
        steps = (
            self.planned_points(),
            self.spoiled_points(),
            self.on_policy_points(),
            self.worst_points(),
        )
        for points in steps:
            for point in points:
                if reason := self.spent():
                    return reason
                self.start_if_it_fits(point)
            if points not in steps[:2] and (reason := self.settled()):
                return reason
        return "every point and repeat measured"

    def settled(self) -> str:
        """Why sampling may stop: the hold-out error is small enough, or the chosen plan no longer
        changes. Empty if it may not."""
        self.collect()
        if len(self.samples) < self.plan.min_samples:
            return ""
        report = self.fit().report
        small = (
            report.holdout_median <= self.plan.target_error
            and report.holdout_p95 <= 4 * self.plan.target_error
            and len(report.rejected) <= 0.05 * len(self.samples)
        )
        if small:
            return f"hold-out error {report.holdout_median:.1%}"
        return "the chosen plan no longer changes" if self.decided() else ""

    def decided(self) -> bool:
        """Whether the plan chosen at the last check is as good as the one chosen now."""
        model, plan = self.fit(), self.plan
        if not plan.decided or not model.report.usable:
            return False
        sizer = self.sizer(model)
        now = sizer.choose(plan.max_tokens, plan.ranks)
        before, self.chosen = self.chosen, now.chunks
        return bool(before) and (
            sizer.predicted_ms(before, plan.ranks) <= (1.0 + plan.decided) * now.predicted_ms
        )

    def sizer(self, model: LatencyModel) -> ChunkSizer:
        plan = self.plan
        return ChunkSizer(
            model,
            base_chunk=plan.base[1],
            context_len=plan.max_tokens,
            page_size=plan.page_size,
            min_chunk=min(plan.min_chunk, plan.base[1]),
            max_chunk=max(plan.base[1], *(chunk for _, chunk in plan.points)),
        )

    def fit(self) -> LatencyModel:
        """The model of the samples so far. It leaves out the form that is slowest to fit, because
        it runs between forwards."""
        self.collect()
        if self.fitted is None or len(self.fitted.samples) != len(self.samples):
            self.fitted = LatencyModel._fit(
                self.samples, ("linear", "law", "waves"), QualityGate(), seed=0
            )
        return self.fitted

    def planned_points(self) -> Iterator[Point]:
        for i, point in enumerate(self.plan.points):
            if i and i % self.plan.check_every == 0 and self.settled():
                return
            yield point

    def spoiled_points(self) -> Iterator[Point]:
        """The points without history whose samples the fit rejects. They are the first of their
        sizes, and the first forward of a size may load kernels."""
        if len(self.samples) >= self.plan.min_samples:
            for sample, _ in self.fit().report.rejected:
                if not sample.history_len:
                    yield sample.history_len, sample.chunk_len

    def on_policy_points(self) -> Iterator[Point]:
        """Points that a sizer would choose, and both sides of the wave edges where it stops: a
        misplaced edge costs a whole wave there, and one measurement moves it."""
        plan = self.plan
        if len(self.samples) < 2 * plan.check_every or not plan.on_policy:
            return
        model = self.fit()
        if not model.report.usable:
            return
        largest = max(plan.base[1], *(chunk for _, chunk in plan.points))
        sizer = self.sizer(model)
        page, deepest = plan.page_size, plan.max_tokens - plan.min_chunk
        for k in range(1, plan.on_policy + 1):
            history = int(k / plan.on_policy * deepest) // page * page
            size = sizer.next_chunk(history)
            if size:
                yield history, size
        wave = self.fit().form.wave
        for k in range(1, 4 if wave > page else 1):
            below = k * wave // page * page
            for size in (below, below + page):
                if plan.min_chunk <= size <= largest:
                    yield min(deepest // 2, plan.max_tokens - size) // page * page, size

    def worst_points(self) -> Iterator[Point]:
        if not self.plan.repeats or len(self.samples) < self.plan.check_every:
            return
        yield from (self.plan.base, self.plan.base)  # all sizes depend on its time
        errors = self.fit().errors(self.samples)
        for i in np.argsort(-np.abs(errors), kind="stable")[: self.plan.repeats]:
            sample = self.samples[int(i)]
            yield sample.history_len, sample.chunk_len


def profile_prefill(
    step: Step | AbstractContextManager[Step],
    plan: SamplePlan,
    *,
    device: torch.device | str | None = None,
    timer: Timer | None = None,
    progress: bool = False,
) -> Profile:
    """Runs `step` over `plan` and returns the timed samples.

    If `device` is a CUDA device (default: if CUDA is available), CUDA events measure the time, and
    the next forward is launched while the last one runs (`DeviceClock`). Otherwise the host clock
    measures it. `timer` replaces both. `progress` shows a rich progress bar (extra `cli`), or logs
    if rich is missing. If sampling runs out of device memory, it leaves out that point and all
    larger ones, and goes on.

    Raises:
        ProfileError: the step failed for another reason, or during warm-up. If the step is a
            context manager, it has been exited.
    """
    clock, on_cuda = _clock_of(device) if timer is None else (_at_once(timer), False)
    with ExitStack() as stack:
        tick = _progress_bar(stack, plan.max_forwards) if progress else _no_tick
        entered = hasattr(step, "__enter__") and hasattr(step, "__exit__")
        call = (
            stack.enter_context(cast("AbstractContextManager[Step]", step))
            if entered
            else cast(Step, step)
        )
        run = _Run(call, plan, clock, tick)
        try:
            run.warm_up()
            reason = run.sample()
            run.collect()
        except Exception as error:
            # The step's exit frees memory that the device may still read. Waiting for a broken
            # device fails too; then the first error is the one to report.
            with suppress(RuntimeError, AssertionError):  # AssertionError: torch has no CUDA
                if on_cuda:
                    torch.cuda.synchronize()
                run.collect()
            raise ProfileError(
                f"profiling failed after {run.forwards} forwards and {len(run.samples)} samples: "
                f"{type(error).__name__}: {error}"
            ) from error
        profile = Profile(
            samples=tuple(run.samples),
            forwards=run.forwards,
            seconds=time.perf_counter() - run.started,
            stop_reason=reason,
            warmup_ms=tuple(run.warmup_ms),
            skipped=tuple(run.skipped),
        )
    logger.info(
        "profiled %d samples with %d forwards in %.1f s: %s",
        len(profile),
        profile.forwards,
        profile.seconds,
        profile.stop_reason,
    )
    return profile


def _no_tick() -> None:
    return None


def _progress_bar(stack: ExitStack, total: int) -> Callable[[], None]:
    try:
        from rich.progress import Progress
    except ImportError:
        logger.info("no progress bar: rich is missing (pip install 'pystage-h2d[cli]')")
        return _no_tick
    bar = stack.enter_context(Progress(transient=True))
    task = bar.add_task("profiling prefill", total=total)
    return lambda: bar.advance(task)
