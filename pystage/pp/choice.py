"""Chooses the plan to run: compares fixed sizes, equal times and cheapest covers.

Note [The best of many predictions]
The lowest of many predictions tends to be too low: it is the lowest partly because of its error.
The more candidates there are, and the more freely their sizes are chosen, the larger this effect.
Three things limit it. First, candidates are made of a few sizes (eight per octave), not of any
number of pages. Second, each candidate is judged by its predicted gain over the best fixed size,
less two margins: the standard error of that gain between the fits that leave out a fifth of the
samples each, and a share of the model's hold-out error that grows with the freedom of the plan.
Third, if the engine is available, the finalists are timed. The timed forwards of a plan are spread
over its chunks in proportion to their predicted time, so a few of them are enough to measure the
ratio of its true work to the predicted work. Mostly the model misjudges single sizes: on two H200s
chunks of 1,536 took 16 % more than predicted, those of 1,024 took 5 % less. So a size is corrected
by all timings of it, also those of other finalists. How far the ratios are believed depends on how
much they differ between sizes beyond the noise. If the model misjudges some sizes, the timings
decide; if they are only noisy, the predictions do. A plan that is still not clearly better than the
best fixed size is dropped in favour of that size.

Forwards that are timed on one stage do not show what the stages do to each other. On two H200s that
was more than what the plans differ by (docs/pp.md). So if a whole prompt can be run, that decides:
from the best predicted fixed size, the search goes to smaller and larger ones as long as they are
faster. One slower size does not end it, but two do: attention works in waves of rows, so every
second size may be slow. There, 1,024 was the fastest, 2,048 came next, and 1,536 was slower than
both.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pystage.pp.fitting import jackknife
from pystage.pp.forms import Floats
from pystage.pp.makespan import fixed_chunks, histories, makespan
from pystage.pp.model import LatencyModel
from pystage.pp.samples import Point

TimeChunks = Callable[[Sequence[Point]], Sequence[float]]
"""Runs each (history_len, chunk_len) on the engine as one forward; returns the ms of each. The
forwards should follow each other without a pause, as those of a prompt do (`time_chunks`)."""

RunPlan = Callable[[Sequence[int]], float]
"""Runs a prompt in these chunks through all stages; returns its time to first token in ms."""

Ratio = tuple[int, float]
"""A timed chunk: its place in the plan, and log(measured / predicted)."""

_CAPS = 24
_CELLS = 2048
_PER_OCTAVE = 8
_FREEDOM = {"fixed": 0.0, "steps": 0.1, "equal time": 0.15, "fastest": 0.3}
"""By kind of plan: the share of the hold-out error that is subtracted from its predicted gain."""
_LEAST_GAIN = 0.002
_CLOSE = 1.12  # fixed sizes up to this multiple of the best predicted time may be finalists
_FEWEST_RUNS = 4  # two plans, twice each
_CLEARLY = 2.0  # standard errors by which another fixed size must be faster, since several compete
_FEWEST_OF_SIZE = 4  # timings that correct a size; with fewer, one spike would decide
_SPIKE = 1.35  # timings over this multiple of the plan's median ratio count as the median


@dataclass(frozen=True)
class Compared:
    """A plan that was timed or run. Times in ms, the size of its first chunk in tokens."""

    kind: str
    first: int
    chunks: int
    """Number of chunks."""
    predicted_ms: float
    measured_ms: float
    """The predicted time corrected by timings, or the median of the runs."""
    error: float
    """Standard error of `measured_ms`, relative."""
    runs_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A plan for prompts of one length, and the reasons for it. Times in ms, sizes in tokens."""

    kind: str
    """"fixed", "steps", "equal time" or "fastest"; "static" if the model is not usable."""
    chunks: tuple[int, ...]
    predicted_ms: float
    """Predicted time to first token of a prompt that runs alone, corrected by any timings."""
    fixed_size: int
    """The best fixed size; `fixed_ms` is its time."""
    fixed_ms: float
    base_ms: float
    """The time with chunks of the base size."""
    error: float
    """Standard error of `gain`."""
    forwards: int
    """Number of forwards that were run to time the finalists."""
    why: str
    runs: int = 0
    """Number of prompts that were run through the pipeline."""
    compared: tuple[Compared, ...] = ()
    """The plans that were timed or run, the fastest first."""

    @property
    def gain(self) -> float:
        """The share of the best fixed size's time that the plan saves: 0.02 is 2 %."""
        return 1.0 - self.predicted_ms / self.fixed_ms if self.fixed_ms else 0.0

    def size_at(self, history_len: int) -> int:
        """The plan's next chunk size behind `history_len` tokens; see the function `size_at`."""
        return size_at(self.chunks, history_len)

    def __str__(self) -> str:
        sizes = [f"{n} x {size:,}" for size, n in _runs(self.chunks)]
        shown = ", ".join(sizes[:6]) + (", ..." if len(sizes) > 6 else "")
        return (
            f"{self.kind}: {self.predicted_ms:.1f} ms, {self.gain:+.1%} (+-{self.error:.1%}) "
            f"of fixed {self.fixed_size:,} ({self.fixed_ms:.1f} ms), base {self.base_ms:.1f} ms; "
            f"{self.why}; {shown}"
        )


def size_at(chunks: Sequence[int], history_len: int) -> int:
    """The plan's next chunk size, in tokens, for a request with `history_len` tokens done.

    The request need not be at the start of one of the plan's chunks: it may have begun behind a
    cached prefix, or beside other requests. The size is what is left of the plan's chunk at
    `history_len`. If less than half of that chunk is left, the next chunk is added. Behind the end
    of the plan, the size is the longer of its last two, because the last may be a remainder.
    """
    ends = list(itertools.accumulate(chunks))
    at = bisect.bisect_right(ends, history_len)
    if at == len(ends):
        return max(chunks[-2:])
    left = ends[at] - history_len
    if 2 * left < chunks[at] and at + 1 < len(ends):
        return left + chunks[at + 1]
    return left


def _runs(chunks: Sequence[int]) -> list[tuple[int, int]]:
    return [(size, len(list(group))) for size, group in itertools.groupby(chunks)]


@dataclass(eq=False)
class Candidate:
    """A plan and its times, as predicted by the model and by each fit of its committee."""

    kind: str
    chunks: tuple[int, ...]
    ms: Floats
    total: float
    """The makespan that the model predicts."""
    totals: Floats
    """The makespans that the committee predicts, [members]."""
    work: list[Ratio] = field(default_factory=list)
    slowest: list[Ratio] = field(default_factory=list)
    """Timed chunks: `work` is spread over the plan's predicted time, `slowest` are its slowest."""
    timed: float = 0.0
    """The makespan corrected by timing (0: not timed); `timed_error` is the standard error of its
    logarithm."""
    timed_error: float = 0.0
    took: list[float] = field(default_factory=list)
    """Times in ms of prompts that were run."""

    def along(self) -> list[float]:
        """The timed ratios in the order of the plan."""
        return _logs(sorted(self.work + self.slowest))

    @property
    def expected(self) -> float:
        """The makespan as known without a run."""
        return self.timed or self.total

    def compared(self) -> Compared:
        return Compared(
            self.kind,
            self.chunks[0],
            len(self.chunks),
            self.total,
            self.timed,
            self.timed_error,
            tuple(self.took),
        )


@dataclass(frozen=True)
class Question:
    """What to plan for: a prompt, the stages of the pipeline, and the allowed sizes in tokens."""

    prompt_len: int
    factors: tuple[float, ...]
    overhead_ms: tuple[float, ...]
    page_size: int
    smallest: int
    largest: int
    base: int

    @property
    def grain(self) -> int:
        """Tokens of a cell: plans other than fixed sizes are made of whole cells."""
        pages = -(-self.prompt_len // self.page_size)
        grain = self.page_size * -(-pages // _CELLS)
        return grain_between(self.smallest, self.largest, grain, self.page_size)

    @property
    def overhead(self) -> float:
        """The overhead of the slowest stage, in ms of the first."""
        return max(zip(self.factors, self.overhead_ms, strict=True))[1] / max(self.factors)

    @property
    def bubbles(self) -> float:
        """How many times the slowest chunk counts on top of the sum of all chunks."""
        return sum(self.factors) / max(self.factors) - 1.0


class _Runs:
    """Runs plans through the pipeline, at most `most` times in all."""

    def __init__(self, run: RunPlan, most: int) -> None:
        self._run, self._most, self.spent = run, most, 0

    @property
    def left(self) -> int:
        return self._most - self.spent

    def fastest(self, plan: Candidate, times: int = 2) -> float:
        """The shortest time of the plan after `times` runs in all. The first run of a plan may load
        kernels, so it takes two to know it."""
        while len(plan.took) < times:
            ms = float(self._run(list(plan.chunks)))
            self.spent += 1
            if not (math.isfinite(ms) and ms > 0):
                raise ValueError(f"run gave {ms} ms for chunks {list(plan.chunks)}")
            plan.took.append(ms)
        return min(plan.took)


class Planner:
    """Makes the candidates for one question and chooses among them."""

    def __init__(self, model: LatencyModel, question: Question) -> None:
        self.model, self.q = model, question

    # --- candidates --------------------------------------------------------------------------

    def candidate(self, kind: str, chunks: Sequence[int]) -> Candidate:
        sizes = np.asarray(chunks, dtype=np.float64)
        history = histories(chunks).astype(np.float64)
        forms = (self.model.form, *self.model.committee)
        times = [form.predict(history, sizes) for form in forms]
        totals = [makespan(ms, self.q.factors, self.q.overhead_ms) for ms in times]
        return Candidate(kind, tuple(chunks), times[0], totals[0], np.array(totals[1:]))

    def fixed(self, size: int) -> Candidate:
        return self.candidate("fixed", fixed_chunks(size, self.q.prompt_len))

    def fixed_sizes(self) -> list[int]:
        """The base size, and all allowed sizes of 64 tokens or a page times 2^k or 3 x 2^k."""
        q = self.q
        sizes = {unit * m << k for unit in (64, q.page_size) for m in (1, 3) for k in range(24)}
        most = max(q.smallest, min(q.largest, q.prompt_len))
        return sorted(
            {s for s in sizes if s % q.page_size == 0 and q.smallest <= s <= most} | {q.base}
        )

    def covers(self) -> Iterator[tuple[str, list[int]]]:
        """Kind and plan (in cells), for each of a range of caps on the time of a chunk.

        "equal time" takes the largest size under the cap at each step, from a fine ladder of sizes.
        "steps" does so from a coarse ladder. "fastest" is the cheapest cover under the cap.
        """
        q, grain = self.q, self.q.grain
        cells = -(-q.prompt_len // grain)
        ladder = _ladder(-(-q.smallest // grain), q.largest // grain, _PER_OCTAVE)
        sizes = np.array([s for s in ladder if s <= cells] or ladder[:1])
        history = np.arange(cells) * grain
        forms = self.model.committee or (self.model.form,)
        at = np.repeat(history, sizes.size).astype(np.float64)
        chunk = np.tile(sizes * grain, cells).astype(np.float64)
        ms = sum((f.predict(at, chunk) for f in forms), np.zeros(at.shape)) / len(forms)
        ms = ms.reshape(cells, sizes.size) + q.overhead
        caps = np.geomspace(ms[:, 0].max(), max(ms[:, 0].max() * 1.001, ms.max()), _CAPS)
        coarse = np.isin(sizes, _ladder(int(sizes[0]), int(sizes[-1]), 2))
        for cap in caps:
            yield "equal time", _greedy(ms, sizes, cap, cells)
            yield "steps", _greedy(ms[:, coarse], sizes[coarse], cap, cells)
        for cells_of_plan in cheapest_covers(ms, sizes, caps):
            yield "fastest", cells_of_plan

    def candidates(self) -> list[Candidate]:
        seen: dict[tuple[int, ...], Candidate] = {}
        for kind, plan in self.covers():
            chunks = [size * self.q.grain for size in plan]
            chunks[-1] -= sum(chunks) - self.q.prompt_len
            key = tuple(chunks)
            if key not in seen:
                seen[key] = self.candidate(kind, chunks)
        return list(seen.values())

    # --- judgement ---------------------------------------------------------------------------

    def believed(self, plan: Candidate, fixed: Candidate) -> tuple[float, float]:
        """Relative gain of `plan` over `fixed` less the margins, and the error of the gain."""
        gain = -math.log(plan.total / fixed.total)
        error = 0.0
        if plan.totals.size:
            logs = np.log(plan.totals / fixed.totals)
            error = float(jackknife(logs))
        doubt = _FREEDOM[plan.kind] * min(self.model.report.holdout_median, 0.2)
        return gain - error - doubt, math.hypot(error, doubt)

    def choose(
        self,
        time: TimeChunks | None = None,
        budget: int = 0,
        run: RunPlan | None = None,
        runs: int = 0,
    ) -> Choice:
        sizes = self.fixed_sizes()
        fixed = {size: self.fixed(size) for size in sizes}
        best = min(fixed.values(), key=lambda c: c.total)
        others = self.candidates()
        ranked = sorted(others, key=lambda c: -self.believed(c, best)[0])
        timed = None
        if time is not None and budget > 0:
            timed = self._timed(fixed, ranked, time, budget)
        if run is not None and runs >= _FEWEST_RUNS:
            return self._run(fixed, ranked, run, runs, timed.forwards if timed else 0)
        if timed is not None:
            return timed
        chosen, why = best, "no other plan gains more than it may err"
        gain, error = self.believed(ranked[0], best) if ranked else (0.0, 0.0)
        if ranked and gain > _LEAST_GAIN:
            chosen = ranked[0]
            why = f"gains {-math.expm1(-gain):.1%} of the best fixed size after its margin"
        return self._choice(chosen, best, fixed, error if chosen is not best else 0.0, 0, why)

    def static(self, why: str) -> Choice:
        """Chunks of the base size."""
        base = self.fixed(self.q.base)
        ms = base.total
        return Choice("static", base.chunks, ms, self.q.base, ms, ms, 0.0, 0, why)

    def _choice(
        self,
        chosen: Candidate,
        best: Candidate,
        fixed: dict[int, Candidate],
        error: float,
        forwards: int,
        why: str,
        measured: Sequence[Candidate] = (),
    ) -> Choice:
        return Choice(
            kind=chosen.kind,
            chunks=chosen.chunks,
            predicted_ms=chosen.expected,
            fixed_size=next(size for size, c in fixed.items() if c is best),
            fixed_ms=best.expected,
            base_ms=fixed[self.q.base].expected,
            error=error,
            forwards=forwards,
            why=why,
            compared=tuple(c.compared() for c in sorted(measured, key=lambda c: c.timed)),
        )

    # --- timing the finalists ----------------------------------------------------------------

    def _timed(
        self, fixed: dict[int, Candidate], ranked: list[Candidate], time: TimeChunks, budget: int
    ) -> Choice:
        """Spends half of the budget on all finalists, and the other half on the best of them."""
        tried = finalists = self._finalists(fixed, ranked, int(0.5 * budget))
        forwards = 0
        for _ in range(2):
            each = int(0.5 * budget) // len(finalists)
            if each < 2:
                break
            forwards += self._time(finalists, time, each)
            ratios = _by_size(tried)
            noise = _noise([np.asarray(c.along()) for c in tried])
            misfit = _misfit(list(ratios.values()), noise)
            misfit = max(self.model.report.misfit_median / 0.6745, misfit, 0.01)
            for plan in finalists:
                self._correct(plan, ratios, noise, misfit)
            quickest = sorted(finalists, key=lambda c: c.timed)
            free = [c for c in quickest if c.kind != "fixed"]
            sizes = [c for c in quickest if c.kind == "fixed"]
            # Another size may be faster, but not clearly: then both are timed again.
            finalists = [*dict.fromkeys([_best_fixed(sizes), sizes[0]]), *free[:1]]
        measured = [c for c in tried if c.timed]
        if not measured:
            return self.choose()
        best = _best_fixed(measured)
        free = [c for c in measured if c.kind != "fixed"]
        chosen = _surest(free) if free else best
        error = math.hypot(chosen.timed_error, best.timed_error)
        gain = -math.log(chosen.timed / best.timed)
        saved = -math.expm1(-gain)
        if chosen is best or gain <= max(error, _LEAST_GAIN):
            why = f"timed: the best other plan gains {saved:.1%}, within the noise of {error:.1%}"
            return self._choice(best, best, fixed, 0.0, forwards, why, measured)
        why = f"timed: gains {saved:.1%}, noise {error:.1%}"
        return self._choice(chosen, best, fixed, error, forwards, why, measured)

    def _finalists(
        self, fixed: dict[int, Candidate], ranked: list[Candidate], forwards: int
    ) -> list[Candidate]:
        """Up to three of the other plans, and at least four fixed sizes: more if each finalist
        still gets three of the `forwards`."""
        kinds: list[Candidate] = []
        for plan in ranked:
            close = any(abs(math.log(plan.total / k.total)) < 1e-3 for k in kinds)
            if not close and len(kinds) < 3:
                kinds.append(plan)
        by_total = sorted(fixed.values(), key=lambda c: c.total)
        near = [c for c in by_total if c.total <= _CLOSE * by_total[0].total]
        # The smallest, because on two H200s the model put small chunks too high, by up to 12 %. The
        # base size, in case the predictions are useless.
        smallest = min(near, key=lambda c: c.chunks[0])
        near = list(dict.fromkeys([*near[:2], smallest, fixed[self.q.base], *near[2:]]))
        return near[: max(4, forwards // 3 - len(kinds))] + kinds

    # --- running the finalists ---------------------------------------------------------------

    def _run(
        self,
        fixed: dict[int, Candidate],
        ranked: list[Candidate],
        run: RunPlan,
        most: int,
        forwards: int,
    ) -> Choice:
        """Chooses by runs: at most `most`, of which the search of the plans to compare takes a
        part, and repeats of these plans the rest."""
        runs = _Runs(run, most)
        sizes = list(fixed.values())
        free = sorted((c for c in ranked if c.timed), key=lambda c: c.timed) or ranked
        tried = self._searched(sizes, free, runs)
        while runs.left >= len(tried):
            for plan in tried:
                runs.fastest(plan, len(plan.took) + 1)
            tried.reverse()  # so that a drift of the engine's speed meets all of them
        noise = _noise([np.log(c.took[1:]) for c in (*sizes, *ranked)])
        ran = [c for c in (*sizes, *ranked) if c.took]
        for plan in ran:
            steady = plan.took[1:] or plan.took
            plan.timed = float(np.median(steady))
            plan.timed_error = max(noise, 0.002) / math.sqrt(len(steady))
        best = min((c for c in tried if c.kind == "fixed"), key=lambda c: c.timed)
        other = min((c for c in tried if c.kind != "fixed"), key=lambda c: c.timed, default=best)
        error = math.hypot(best.timed_error, other.timed_error)
        saved = 1.0 - other.timed / best.timed
        better = saved > max(error, _LEAST_GAIN)
        why = f"run: the best other plan gains {saved:.1%}, within the noise of {error:.1%}"
        if better:
            why = f"run: gains {saved:.1%}, noise {error:.1%}"
        chosen = other if better else best
        choice = self._choice(chosen, best, fixed, error if better else 0.0, forwards, why, ran)
        return replace(choice, runs=runs.spent)

    def _searched(
        self, sizes: list[Candidate], free: list[Candidate], runs: _Runs
    ) -> list[Candidate]:
        """The two best fixed sizes of those that were run, and the best of the other plans."""
        at = min(range(len(sizes)), key=lambda i: sizes[i].expected)
        for step in (-1, 1):
            ahead = 1
            while ahead <= 2 and 0 <= at + ahead * step < len(sizes) and runs.left >= 4:
                if runs.fastest(sizes[at + ahead * step]) < runs.fastest(sizes[at]):
                    at, ahead = at + ahead * step, 1
                else:
                    ahead += 1
        runs.fastest(sizes[at])  # also where it has no neighbour
        for plan in free[:2]:
            if runs.left >= 2:
                runs.fastest(plan)
        tried = sorted((c for c in sizes if c.took), key=lambda c: min(c.took))[:2] or [sizes[at]]
        return tried + sorted((c for c in free if c.took), key=lambda c: min(c.took))[:1]

    # --- timing parts of a plan --------------------------------------------------------------

    def _time(self, plans: Sequence[Candidate], time: TimeChunks, each: int) -> int:
        """Times `each` chunks of every plan, in turn, so that a drift of the engine's speed meets
        all plans."""
        slow = each // 3
        places = [self._places(plan, each - slow, slow) for plan in plans]
        turns = [
            (plan, int(at[k])) for k in range(each) for plan, at in zip(plans, places, strict=True)
        ]
        points = [(sum(plan.chunks[:i]), plan.chunks[i]) for plan, i in turns]
        took = timed(time, points)
        for turn, ((plan, i), ms) in enumerate(zip(turns, took.tolist(), strict=True)):
            of = plan.work if turn < (each - slow) * len(plans) else plan.slowest
            of.append((i, math.log(ms / float(plan.ms[i]))))
        return len(points)

    def _places(self, plan: Candidate, spread: int, slow: int) -> NDArray[np.int64]:
        """The chunks of the plan to time: `spread` of them evenly over its predicted time, and
        `slow` of its slowest."""
        share = np.cumsum(plan.ms) / plan.ms.sum()
        spots = (np.arange(spread) + 0.5 + 0.25 * len(plan.work) % 1) / spread
        top = np.argsort(-plan.ms, kind="stable")
        slowest = np.resize(top[: max(1, min(slow, len(top) // 8))], slow)
        evenly = np.searchsorted(share, np.minimum(spots, 1.0 - 1e-9))
        return np.concatenate([evenly, slowest]).astype(np.int64)

    def _correct(
        self, plan: Candidate, ratios: dict[int, list[float]], noise: float, misfit: float
    ) -> None:
        """Corrects the plan's makespan by the timings, in `ratios` those of all finalists by size.
        `noise` is that of one timing, `misfit` the model's own error for a size: both relative, one
        sigma."""
        q, sizes = self.q, np.array(plan.chunks)
        # The model errs by size, so timings of few of the plan's sizes say little about the others.
        timed = {plan.chunks[i] for i, _ in plan.work}
        between = 0.0
        if len(set(plan.chunks)) > 1:
            between = misfit * math.sqrt(len(plan.work) / len(timed))
        own, own_error = _shrunk(_logs(plan.work), 0.0, misfit, math.hypot(noise, between))
        log, shares = np.full(sizes.size, own), plan.ms / plan.ms.sum()
        error, rest = 0.0, 1.0  # the rest of the plan's time shares one correction
        for size in set(plan.chunks):
            if len(ratios.get(size, ())) >= _FEWEST_OF_SIZE:
                at = sizes == size
                log[at], of_size = _shrunk(ratios[size], own, misfit, noise)
                share = float(shares[at].sum())
                error, rest = math.hypot(error, of_size * share), rest - share
        error = math.hypot(error, own_error * rest)
        ms = plan.ms * np.exp(log)
        bubbles = q.bubbles * max(q.factors) * float(ms.max())
        slow, slow_error = 0.0, error
        if plan.slowest:
            left = [ratio - float(log[i]) for i, ratio in plan.slowest]
            slow, slow_error = _shrunk(left, 0.0, misfit, noise)
        plan.timed = makespan(ms, q.factors, q.overhead_ms) + bubbles * math.expm1(slow)
        weight = min(bubbles / plan.timed, 1.0)
        plan.timed_error = math.hypot((1 - weight) * error, weight * slow_error)


def timed(time: TimeChunks, points: Sequence[Point]) -> Floats:
    """The times of the chunks in ms. Raises ValueError if they are not one positive time each."""
    took = np.asarray(time(points), dtype=np.float64)
    if took.shape != (len(points),) or not (np.isfinite(took).all() and (took > 0).all()):
        raise ValueError(f"time gave {took.tolist()} for {len(points)} chunks")
    return took


def _by_size(plans: Sequence[Candidate]) -> dict[int, list[float]]:
    """All timed ratios by chunk size."""
    found: dict[int, list[float]] = {}
    for plan in plans:
        for i, log in plan.work + plan.slowest:
            found.setdefault(plan.chunks[i], []).append(log)
    return found


def _logs(ratios: Sequence[Ratio]) -> list[float]:
    return [log for _, log in ratios]


def _best_fixed(plans: Sequence[Candidate]) -> Candidate:
    """The fixed size with the lowest predicted time, unless another was clearly faster."""
    sizes = sorted((c for c in plans if c.kind == "fixed"), key=lambda c: c.total)
    best = sizes[0]
    for other in sizes[1:]:
        error = math.hypot(best.timed_error, other.timed_error)
        if math.log(best.timed / other.timed) > _CLEARLY * error:
            best = other
    return best


def _surest(plans: Sequence[Candidate]) -> Candidate:
    """The fastest, with its error counted against it: few timings may make a plan look fast."""
    return min(plans, key=lambda c: c.timed * math.exp(c.timed_error))


def _noise(groups: Sequence[Floats]) -> float:
    """The standard deviation of one timing, in log, from the differences of neighbours. `groups`
    are the logarithms of timings along one plan, or of repeats. The model's own error changes
    slowly along most plans, so it hardly counts as noise. All plans run on one engine, so the noise
    is estimated from all: the timings of one plan are so few that they may agree by chance."""
    steps = [np.abs(np.diff(values)) for values in groups if len(values) > 1]
    if not steps:
        return 0.0
    return 1.4826 / math.sqrt(2.0) * float(np.median(np.concatenate(steps)))


def _misfit(ratios: Sequence[Sequence[float] | Floats], noise: float) -> float:
    """The standard deviation of the model's own error between sizes, in log: how much the medians
    of their timings differ beyond the noise."""
    if len(ratios) < 2:
        return 0.0
    medians = [float(np.median(values)) for values in ratios]
    by_noise = noise**2 * float(np.mean([1.0 / len(values) for values in ratios]))
    return math.sqrt(max(float(np.var(medians, ddof=1)) - by_noise, 0.0))


def _shrunk(
    ratios: Sequence[float] | Floats, towards: float, prior: float, noise: float
) -> tuple[float, float]:
    """The mean of log ratios without spikes, shrunk towards `towards` by its share of noise; its
    error.

    `prior` is how far the mean may be from there, one sigma. A mean far outside of both the noise
    and that is not shrunk: there the model is wrong, so its prediction carries no information.
    """
    values = np.asarray(ratios, dtype=np.float64)
    centre = float(np.median(values))
    spikes = values > centre + math.log(_SPIKE)
    if spikes.mean() <= 0.2:
        values = np.where(spikes, centre, values)
    mean = float(values.mean())
    error = max(noise, 0.003) / math.sqrt(values.size)
    if abs(mean - towards) > 3.0 * math.hypot(prior, error):
        return mean, error
    keep = prior**2 / (prior**2 + error**2)
    return towards + keep * (mean - towards), math.sqrt(keep) * error


def grain_between(smallest: int, largest: int, grain: int, page_size: int) -> int:
    """The largest number of whole pages, up to `grain` tokens, that has a multiple between the two
    sizes."""
    while -(-smallest // grain) > largest // grain:
        grain -= page_size
    return grain


def _ladder(smallest: int, largest: int, per_octave: int) -> list[int]:
    """Sizes from `smallest` to `largest`: at most `per_octave` in an octave, in even steps."""
    sizes = {smallest, largest}
    octave = 1
    while octave <= largest:
        sizes |= {octave + octave * j // per_octave for j in range(per_octave)}
        octave *= 2
    return sorted(s for s in sizes if smallest <= s <= largest)


def _greedy(ms: Floats, sizes: NDArray[np.int64], cap: float, cells: int) -> list[int]:
    """A cover with the largest size under the cap at each step; the smallest if none is under."""
    chunks: list[int] = []
    done = 0
    while done < cells:
        at = max(int((ms[done] <= cap * 1.0001).sum()) - 1, 0)
        chunks.append(min(int(sizes[at]), cells - done))
        done += chunks[-1]
    return chunks


def cheapest_covers(ms: Floats, sizes: NDArray[np.int64], caps: Floats) -> list[list[int]]:
    """For each cap on the time of a chunk, the cover of all cells with the least total time.

    `ms[cell, i]` is the time of a chunk of `sizes[i]` cells that begins at `cell`. If the last
    chunk reaches beyond the end, it is cut off there. The method is a shortest path over cells, for
    all caps at once.
    """
    cells = len(ms)
    cost = np.full((caps.size, cells + 1), np.inf)
    cost[:, 0] = 0.0
    came_from = np.zeros((caps.size, cells + 1), dtype=np.int64)
    for cell in range(cells):
        ends = np.minimum(cell + sizes, cells)
        total = np.where(ms[cell] <= caps[:, None] * 1.0001, ms[cell] + cost[:, [cell]], np.inf)
        keep = slice(0, int(np.searchsorted(ends, cells)) + 1)
        ends, total = ends[keep], total[:, keep]
        better = total < cost[:, ends]
        cost[:, ends] = np.where(better, total, cost[:, ends])
        came_from[:, ends] = np.where(better, cell, came_from[:, ends])
    plans = []
    for row in came_from:
        chunks: list[int] = []
        cell = cells
        while cell:
            before = int(row[cell])
            chunks.append(cell - before)
            cell = before
        plans.append(chunks[::-1])
    return plans
