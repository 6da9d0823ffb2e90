"""Chunk sizes of equal predicted time, and the time that a pipeline takes over them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pystage.pp.choice import (
    Choice,
    Planner,
    Question,
    RunPlan,
    TimeChunks,
    cheapest_covers,
    grain_between,
    timed,
)
from pystage.pp.makespan import fixed_chunks, histories, makespan, stages_of
from pystage.pp.makespan import simulate_pipeline as simulate_pipeline  # noqa: PLC0414
from pystage.pp.model import LatencyModel
from pystage.pp.queue import QueueSizer

logger = logging.getLogger(__name__)

# All relative to the target time.
_OVER = 1.03  # a chunk may take this long: rounding to pages goes both ways
_UNDER, _FAR_OVER = 0.93, 1.08  # if a chunk would take less than the first, the limit is the second
_STRETCH = 1.10  # a whole plan may take this long, to avoid one more chunk for a small remainder
_STRETCHES = (_STRETCH, 1.2, 1.3, 1.4)  # tried in turn, where steps in the latency leave it uneven
_EVEN = 0.12  # a plan is even if its predicted times spread less: (max - min) / mean

_Known = dict[int, NDArray[np.float64]]
"""History to the times of all sizes. Making a plan needs most histories many times."""


class ChunkSizer:
    """Sizes prefill chunks so that each takes the time of `base_chunk` tokens without history.

    All sizes are in tokens. They are multiples of `page_size`, lie between `min_chunk` and
    `max_chunk` (default: twice the base chunk), and leave `context_margin` tokens of the context
    free. SGLang's minimum is a quarter of the base chunk; `min_chunk` replaces it, because late in
    a long prompt such a quarter takes a multiple of the target time. `smooth`, in (0, 1], is the
    share of the way from the base chunk to the equal-time size that a size moves.

    If the model's report is not usable, there are no sizes: `next_chunk` returns None, which means
    "keep the static size", and one warning is logged.
    """

    def __init__(
        self,
        model: LatencyModel,
        *,
        base_chunk: int,
        context_len: int,
        page_size: int = 64,
        min_chunk: int = 512,
        max_chunk: int | None = None,
        smooth: float = 1.0,
        context_margin: int = 0,
    ) -> None:
        limit = max_chunk if max_chunk is not None else 2 * base_chunk
        if page_size < 1:
            raise ValueError(f"page_size={page_size} must be positive")
        self._floor = _up(max(min_chunk, 1), page_size)
        self._cap = limit // page_size * page_size
        if not self._floor <= self._cap:
            raise ValueError(
                f"no multiple of page_size={page_size} between min_chunk={min_chunk} "
                f"and max_chunk={limit}"
            )
        if not 0.0 < smooth <= 1.0:
            raise ValueError(f"smooth={smooth} must be in (0, 1]")
        if base_chunk < 1 or context_len < 1:
            raise ValueError(
                f"base_chunk={base_chunk}, context_len={context_len}: both must be positive"
            )
        self.model = model
        self.base_chunk = base_chunk
        self.context_len = context_len
        self.page_size = page_size
        self.smooth = smooth
        self.context_margin = context_margin
        self._sizes = np.arange(self._floor, self._cap + 1, page_size, dtype=np.int64)
        self._told = False

    def __repr__(self) -> str:
        sizes = f"chunks of {self._floor:,} to {self._cap:,} tokens, pages of {self.page_size}"
        return (
            f"<ChunkSizer: base {self.base_chunk:,} of a context of {self.context_len:,}, {sizes}; "
            f"model {'usable' if self.model.report.usable else 'not usable'}>"
        )

    @property
    def target_ms(self) -> float:
        """The target time of every chunk, in ms: the time of a base chunk without history."""
        return float(self.model.predict(0, self.base_chunk))

    def next_chunk(self, history_len: int) -> int | None:
        """The size of the next chunk behind `history_len` tokens, for the time of a base chunk.

        Returns None if the model is not usable: keep the static size. Returns 0 if less than a page
        of the context is left.
        """
        if history_len < 0:
            raise ValueError(f"history_len={history_len} must not be negative")
        if not self._usable():
            return None
        room = self.context_len - history_len - self.context_margin
        room = room // self.page_size * self.page_size
        if room < self.page_size:
            return 0
        return min(self._equal_time(history_len, self.target_ms), room)

    def plan(self, prompt_len: int) -> list[int]:
        """Chunk sizes for a whole prompt, of equal predicted time, the last one included.

        The number of chunks is the smallest that stays within 10 % of the target. Their common time
        is the lowest that needs no more chunks. If the times still spread by more than 12 %,
        because one wave of the device is a large part of a chunk, longer chunks are tried, up to
        40 % over the target, and the evenest plan is returned. If the model is not usable, the plan
        is static chunks and a remainder.
        """
        self._check(prompt_len)
        if not self._usable():
            return fixed_chunks(self.base_chunk, prompt_len)
        plans = []
        known: _Known = {}
        for stretch in _STRETCHES:
            chunks = self._even_tail(self._fewest(prompt_len, self.target_ms * stretch, known))
            times = self._times(chunks)
            plans.append((float(np.ptp(times) / times.mean()), chunks))
            if plans[-1][0] <= _EVEN:
                return chunks
        return min(plans, key=lambda plan: plan[0])[1]

    def _fewest(self, prompt_len: int, high: float, known: _Known) -> list[int]:
        best = self._cover(prompt_len, high, prompt_len, known) or [prompt_len]
        low = 0.0
        for _ in range(24):
            middle = (low + high) / 2
            chunks = self._cover(prompt_len, middle, len(best), known)
            if chunks is None:
                low = middle
            else:
                best, high = chunks, middle
        return best

    def fastest_plan(self, prompt_len: int, ranks: int) -> list[int]:
        """Chunk sizes with the lowest predicted time to first token over `ranks` equal stages.

        On equal stages the last chunk leaves the pipeline after sum(t) + (ranks - 1) * max(t),
        whatever the order of the chunks (a proportionate flow shop). So a chunk that is faster than
        the slowest one costs nothing extra: only the slowest chunk matters, and how well each size
        uses the device. For each of a set of caps on the slowest chunk, this method finds the
        cheapest cover of the prompt (a shortest path over page boundaries), and then takes the best
        cap. It ignores `base_chunk` and `smooth`, and takes about 0.1 s.
        """
        self._check(prompt_len, ranks)
        if not self._usable():
            return self.plan(prompt_len)
        grain = self.page_size * max(1, round(prompt_len / (self.page_size * 1024)))
        grain = grain_between(self._floor, self._cap, grain, self.page_size)
        cells = -(-prompt_len // grain)
        least, most = -(-self._floor // grain), self._cap // grain
        sizes = np.arange(min(least, cells, most), min(most, cells) + 1)
        history = np.arange(cells) * grain
        ms = self.model.predict(history[:, None], sizes * grain)
        caps = np.geomspace(ms[:, 0].max(), ms.max(), 24)
        plans = []
        for cover in cheapest_covers(ms, sizes, caps):
            chunks = [size * grain for size in cover]
            chunks[-1] -= cells * grain - prompt_len
            plans.append((self.predicted_ms(chunks, ranks), chunks))
        return min(plans, key=lambda plan: plan[0])[1]

    def choose(
        self,
        prompt_len: int,
        ranks: int,
        *,
        time: TimeChunks | None = None,
        budget: int = 64,
        run: RunPlan | None = None,
        runs: int = 24,
        stage_factors: Sequence[float] | None = None,
        overhead_ms: float | Sequence[float] = 0.0,
    ) -> Choice:
        """The plan for one prompt that runs alone: a fixed size, unless another plan is faster by
        more than its margin of error.

        Args:
            prompt_len: length of the prompt in tokens.
            ranks: number of pipeline stages.
            time: runs chunks on the engine, given as (history_len, chunk_len), and returns the time
                of each in ms: `lambda points: time_chunks(step, points)`. If given, the finalists
                are timed. Otherwise predictions alone decide, and a plan must gain more.
            budget: the most forwards that timing may run.
            run: runs a whole prompt of `prompt_len` tokens, in the given chunks, through all
                stages, and returns its time to first token in ms. If given, these runs decide:
                they include what the stages do to each other, which single forwards do not.
            runs: the most prompts that may be run; none are if it is less than 4.
            stage_factors: time of each stage as a multiple of the model's, [ranks]; default all 1.
                `fit_stages` makes it and `overhead_ms` from measured times.
            overhead_ms: time that the engine adds to each chunk, in ms: one number for all stages,
                or [ranks].

        See Note [The best of many predictions] in choice.py. The base size is one of the
        candidates; `smooth` has no effect. The call takes 0.1 to 1 s of host time.
        """
        self._check(prompt_len, ranks)
        factors, more = stages_of(ranks, stage_factors, overhead_ms)
        planner = self._planner(prompt_len, factors, more)
        if not self._usable():
            return planner.static(f"the latency model is not usable: {self.model.report.reason}")
        return planner.choose(time, budget, run, runs)

    def for_queue(
        self,
        ranks: int,
        *,
        time: TimeChunks | None = None,
        repeats: int = 3,
        history_len: int | None = None,
        stage_factors: Sequence[float] | None = None,
        overhead_ms: float | Sequence[float] = 0.0,
    ) -> QueueSizer:
        """The sizer for prompts that wait behind each other.

        Args:
            ranks, stage_factors, overhead_ms: as for `choose`.
            time: as for `choose`. If given, the fixed sizes are timed, and the medians count.
                Otherwise the model's predictions do. If the model is not usable either, the only
                size is `base_chunk`.
            repeats: how often each size is timed; with 3, these are about 30 forwards.
            history_len: tokens in front of the chunks whose times count: about half of a usual
                prompt. Default: half of `base_chunk`.

        Raises:
            ValueError: an argument is out of range, no size fits into the context behind
                `history_len`, or `time` gave other than one positive time for each chunk.
        """
        self._check(1, ranks)
        if repeats < 1:
            raise ValueError(f"repeats={repeats} must be positive")
        history = self.base_chunk // 2 if history_len is None else history_len
        if not 0 <= history < self.context_len:
            raise ValueError(f"history_len={history} must be in 0..{self.context_len - 1}")
        stages = stages_of(ranks, stage_factors, overhead_ms)
        sizes = self._planner(self._cap, *stages).fixed_sizes()
        sizes = [n for n in sizes if history + n <= self.context_len]
        if not sizes:
            raise ValueError(
                f"no chunk fits behind history_len={history} into context_len={self.context_len}"
            )
        if time is not None:
            points = [(history, n) for _ in range(repeats) for n in sizes]
            ms = np.median(timed(time, points).reshape(repeats, len(sizes)), axis=0)
        else:
            sizes = sizes if self._usable() else [self.base_chunk]
            ms = np.asarray(self.model.predict(history, np.array(sizes)))
        times = dict(zip(sizes, ms.tolist(), strict=True))
        return QueueSizer(times, ranks, stage_factors=stages[0], overhead_ms=stages[1])

    def _planner(
        self, prompt_len: int, factors: tuple[float, ...], overhead_ms: tuple[float, ...]
    ) -> Planner:
        question = Question(
            prompt_len,
            factors,
            overhead_ms,
            self.page_size,
            smallest=min(self._floor, self.base_chunk),
            largest=max(self._cap, self.base_chunk),
            base=self.base_chunk,
        )
        return Planner(self.model, question)

    def predicted_ms(self, chunks: Sequence[int], ranks: int, overhead_ms: float = 0.0) -> float:
        """Predicted time to first token, in ms, of a prompt in these chunks over `ranks` equal
        stages."""
        return makespan(self._times(chunks), [1.0] * ranks, overhead_ms)

    def _check(self, prompt_len: int, ranks: int = 1) -> None:
        if ranks < 1:
            raise ValueError(f"ranks={ranks} must be positive")
        if not 0 < prompt_len <= self.context_len:
            raise ValueError(f"prompt_len={prompt_len} must be in 1..{self.context_len}")

    def _usable(self) -> bool:
        report = self.model.report
        if not report.usable and not self._told:
            self._told = True
            logger.warning(
                "static chunks of %d tokens: the latency model is not usable (%s)",
                self.base_chunk,
                report.reason,
            )
        return report.usable

    def _equal_time(self, history_len: int, target_ms: float, known: _Known | None = None) -> int:
        """The largest allowed size that is predicted to take at most 3 % more than the target.

        Where the time jumps with the size (a wave of the device is full), that size may be far
        under the target. Then the next size is taken if it is at most 8 % over. Otherwise the size
        below the jump stays: it uses the device well.
        """
        ms = None if known is None else known.get(history_len)
        if ms is None:
            ms = np.asarray(self.model.predict(history_len, self._sizes))
            if known is not None:
                known[history_len] = ms
        times = ms / target_ms
        at = max(int((times <= _OVER).sum()) - 1, 0)  # predictions never fall as size grows
        if times[at] < _UNDER and at + 1 < times.size and times[at + 1] <= _FAR_OVER:
            at += 1
        size = int(self._sizes[at])
        if self.smooth < 1.0:
            size = int(self.base_chunk + self.smooth * (size - self.base_chunk))
            size = size // self.page_size * self.page_size
        return min(max(size, self._floor), self._cap)

    def _cover(
        self, prompt_len: int, target_ms: float, at_most: int, known: _Known
    ) -> list[int] | None:
        chunks: list[int] = []
        done = 0
        while done < prompt_len:
            if len(chunks) == at_most:
                return None
            chunks.append(min(self._equal_time(done, target_ms, known), prompt_len - done))
            done += chunks[-1]
        return chunks

    def _even_tail(self, chunks: list[int]) -> list[int]:
        """Moves pages from the slowest chunks to a short last one, while that evens the times."""
        if len(chunks) < 2:
            return chunks
        for _ in range(len(chunks)):
            times = self._times(chunks)
            donor = int(np.argmax(times[:-1]))
            moved = list(chunks)
            moved[donor] -= self.page_size
            moved[-1] += self.page_size
            if moved[donor] < self._floor or moved[-1] > self._cap:
                break
            if np.ptp(self._times(moved)) >= np.ptp(times):
                break
            chunks = moved
        return chunks

    def _times(self, chunks: Sequence[int]) -> NDArray[np.float64]:
        return np.asarray(self.model.predict(histories(chunks), np.asarray(chunks)))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
