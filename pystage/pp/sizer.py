"""Chunk sizes of equal predicted time, and what they give a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pystage.pp.model import LatencyModel

logger = logging.getLogger(__name__)

_OVER = 1.03  # a chunk may run this much over its target: rounding to pages goes both ways
_UNDER, _FAR_OVER = 0.93, 1.08  # and this much over, if it would else be this far under
_STRETCH = 1.10  # and a whole plan this much, rather than add a chunk for a small rest
_STRETCHES = (_STRETCH, 1.2, 1.3, 1.4)  # or this much, where steps in the latency leave it uneven
_EVEN = 0.12  # spread of a plan's predicted times, (max - min) / mean, that is even enough


class ChunkSizer:
    """Sizes prefill chunks so that each takes the time of `base_chunk` tokens without history.

    All sizes in tokens. Sizes are multiples of `page_size`, between `min_chunk` and `max_chunk`,
    and leave `context_margin` of the context free, as SGLang's sizer does (PR 37674); its floor of
    a quarter of the base chunk is replaced by `min_chunk`, because late in a long prompt that
    quarter takes a multiple of the target. `smooth` below 1 moves only that share of the way from
    the base chunk to the equal-time size.

    With a model whose report is not usable there are no sizes: `next_chunk` returns None, which
    means "keep the static size", and says so once in the log.
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
        context_margin: int = 100,
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
            raise ValueError(f"base_chunk={base_chunk}, context_len={context_len}: positive needed")
        self.model = model
        self.base_chunk = base_chunk
        self.context_len = context_len
        self.page_size = page_size
        self.smooth = smooth
        self.context_margin = context_margin
        self._sizes = np.arange(self._floor, self._cap + 1, page_size, dtype=np.int64)
        self._told = False

    @property
    def target_ms(self) -> float:
        """The time every chunk aims at, in ms: a base chunk without history."""
        return float(self.model.predict(0, self.base_chunk))

    def next_chunk(self, history_len: int) -> int | None:
        """The next chunk behind `history_len` tokens, or None to keep the static size.

        None where the model is not usable, and where less than a page of the context is left.
        """
        if history_len < 0:
            raise ValueError(f"history_len={history_len} must not be negative")
        if not self._usable():
            return None
        room = self.context_len - history_len - self.context_margin
        room = room // self.page_size * self.page_size
        if room < self.page_size:
            return None
        return min(self._equal_time(history_len, self.target_ms), room)

    def plan(self, prompt_len: int) -> list[int]:
        """Chunk sizes for a whole prompt, of equal predicted time, the last one included.

        First the fewest chunks that stay within 10 % of the target, then the lowest common time
        that still needs no more of them. If their times spread by more than 12 %, because a wave
        of the device more or less is a large part of a chunk, longer chunks are tried, up to 40 %
        over the target, and the evenest plan is taken. Where the model is not usable: static
        chunks and a rest.
        """
        if not 0 < prompt_len <= self.context_len:
            raise ValueError(f"prompt_len={prompt_len} must be in 1..{self.context_len}")
        if not self._usable():
            whole, rest = divmod(prompt_len, self.base_chunk)
            return [self.base_chunk] * whole + [rest] * bool(rest)
        plans = []
        for stretch in _STRETCHES:
            chunks = self._even_tail(self._fewest(prompt_len, self.target_ms * stretch))
            times = self._times(chunks)
            plans.append((float(np.ptp(times) / times.mean()), chunks))
            if plans[-1][0] <= _EVEN:
                return chunks
        return min(plans, key=lambda plan: plan[0])[1]

    def _fewest(self, prompt_len: int, high: float) -> list[int]:
        best = self._cover(prompt_len, high, at_most=prompt_len) or [prompt_len]
        low = 0.0
        for _ in range(24):
            middle = (low + high) / 2
            chunks = self._cover(prompt_len, middle, at_most=len(best))
            if chunks is None:
                low = middle
            else:
                best, high = chunks, middle
        return best

    def fastest_plan(self, prompt_len: int, ranks: int) -> list[int]:
        """Chunk sizes with the lowest predicted time to first token over `ranks` equal stages.

        On equal stages the last chunk leaves the pipeline after sum(t) + (ranks - 1) * max(t),
        whatever the order (a proportionate flow shop), so a chunk faster than the slowest one costs
        nothing: what counts is the slowest, and how well each size uses the device. For a set of
        caps on the slowest this finds the cheapest cover of the prompt (a shortest path over page
        boundaries), then takes the best cap. Ignores `base_chunk` and `smooth`; about 0.1 s.
        """
        if ranks < 1:
            raise ValueError(f"ranks={ranks} must be positive")
        if not 0 < prompt_len <= self.context_len:
            raise ValueError(f"prompt_len={prompt_len} must be in 1..{self.context_len}")
        if not self._usable():
            return self.plan(prompt_len)
        grain = self.page_size * max(1, round(prompt_len / (self.page_size * 1024)))
        cells = -(-prompt_len // grain)
        least, most = -(-self._floor // grain), max(self._cap // grain, 1)
        sizes = np.arange(min(least, cells, most), min(most, cells) + 1)
        history = np.arange(cells) * grain
        ms = self.model.predict(history[:, None], sizes * grain)
        caps = np.geomspace(ms[:, 0].max(), ms.max(), 24)
        cost = np.full((caps.size, cells + 1), np.inf)
        cost[:, 0] = 0.0
        came_from = np.zeros((caps.size, cells + 1), dtype=np.int64)
        for cell in range(cells):
            # The last chunk may be shorter than its size: what lies beyond the prompt is cut off.
            ends = np.minimum(cell + sizes, cells)
            total = np.where(ms[cell] <= caps[:, None] * 1.0001, ms[cell] + cost[:, [cell]], np.inf)
            keep = slice(0, int(np.searchsorted(ends, cells)) + 1)
            ends, total = ends[keep], total[:, keep]
            better = total < cost[:, ends]
            cost[:, ends] = np.where(better, total, cost[:, ends])
            came_from[:, ends] = np.where(better, cell, came_from[:, ends])
        best = int(np.argmin(cost[:, -1] + (ranks - 1) * caps))
        chunks: list[int] = []
        cell = cells
        while cell:
            before = int(came_from[best, cell])
            chunks.append((cell - before) * grain)
            cell = before
        chunks[0] -= cells * grain - prompt_len
        return chunks[::-1]

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

    def _equal_time(self, history_len: int, target_ms: float) -> int:
        """The largest allowed size that is predicted to stay at the target, give or take 3 %.

        Where the time jumps with size (a wave of the device is full) that may leave it far under:
        then the next size, if it is less than 8 % over, and else the efficient one below the jump.
        """
        times = np.asarray(self.model.predict(history_len, self._sizes)) / target_ms
        at = max(int((times <= _OVER).sum()) - 1, 0)  # predictions do not fall with size
        if times[at] < _UNDER and at + 1 < times.size and times[at + 1] <= _FAR_OVER:
            at += 1
        size = int(self._sizes[at])
        if self.smooth < 1.0:
            size = int(self.base_chunk + self.smooth * (size - self.base_chunk))
            size = size // self.page_size * self.page_size
        return min(max(size, self._floor), self._cap)

    def _cover(self, prompt_len: int, target_ms: float, at_most: int) -> list[int] | None:
        chunks: list[int] = []
        done = 0
        while done < prompt_len:
            if len(chunks) == at_most:
                return None
            chunks.append(min(self._equal_time(done, target_ms), prompt_len - done))
            done += chunks[-1]
        return chunks

    def _even_tail(self, chunks: list[int]) -> list[int]:
        """Moves pages to a short last chunk from the slowest ones, while that evens the times."""
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
        return np.asarray(self.model.predict(_histories(chunks), np.asarray(chunks)))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _histories(chunks: Sequence[int]) -> NDArray[np.int64]:
    sizes = np.asarray(chunks, dtype=np.int64)
    return np.cumsum(sizes) - sizes


def simulate_pipeline(
    stage_ms: Sequence[Sequence[float]], transfer_ms: Sequence[float] | None = None
) -> float:
    """Time in ms until the last stage has finished the last chunk.

    `stage_ms[s][i]` is the time of chunk i on stage s, `transfer_ms[i]` that of its hidden states
    between two stages. A stage starts a chunk when it is done with the one before and the hidden
    states are there; transfers overlap with compute.
    """
    times = np.asarray(stage_ms, dtype=np.float64)
    if times.ndim != 2 or times.size == 0:
        raise ValueError(f"stage_ms must be stages x chunks, got shape {times.shape}")
    hops = np.zeros(times.shape[1]) if transfer_ms is None else np.asarray(transfer_ms, np.float64)
    arrived = np.zeros(times.shape[1])
    for stage, row in enumerate(times):
        if stage:
            arrived = arrived + hops
        done = 0.0
        for i, ms in enumerate(row):
            done = max(done, arrived[i]) + ms
            arrived[i] = done
    return float(arrived[-1])
