"""The largest chunk that keeps a batch within a time, whatever the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pystage.pp.model import LatencyModel


class Piece(NamedTuple):
    """A request's part of a batch, in tokens: `chunk_len` new ones behind `history_len` cached. A
    decode is a piece of one token."""

    history_len: int
    chunk_len: int


class BudgetSizer:
    """Fills batches up to a time instead of a number of tokens.

    A token budget lets a batch take four times as long behind a long history as without one, and
    whoever decodes beside it waits. Here the budget is in ms, and a batch is what it is in an
    engine: parts of several requests, each behind its own history, and decodes.

        sizer = BudgetSizer(model, budget_ms=60.0, max_tokens=8192)
        decodes = [Piece(9_000, 1), Piece(700, 1)]
        batch = list(decodes)
        for request in waiting:                      # first come, first served
            room = sizer.next_chunk(request.done, beside=batch)
            take = min(room, request.left)
            if take == 0:
                break
            batch.append(Piece(request.done, take))

    or, all at once, `sizer.fill([(request.done, request.left) for request in waiting], decodes)`.

    Args:
        model: fitted, and usable (ValueError if not: then the engine's token budget stays).
        budget_ms: of a batch on one stage, as the model predicts it.
        page_size: sizes are multiples of it, unless they finish a request.
        min_chunk: a batch that has no prefill yet takes so many tokens even if they are over the
            budget, so that a prompt gets on: behind a long enough history nothing fits.
        max_tokens: of a batch, decodes included.
        decode_ms_per_token: of a cached token that a decode reads. The model has seen prefill only,
            whose attention works on many rows at once; a decode's is bound by reading the cache.
            Measure it, or leave 0 where decodes are few.
    """

    def __init__(
        self,
        model: LatencyModel,
        *,
        budget_ms: float,
        page_size: int = 64,
        min_chunk: int = 64,
        max_tokens: int = 8192,
        decode_ms_per_token: float = 0.0,
    ) -> None:
        if not model.report.usable:
            raise ValueError(f"the latency model is not usable: {model.report.reason}")
        if not budget_ms > 0:
            raise ValueError(f"budget_ms={budget_ms} must be positive")
        if page_size < 1 or not 0 < min_chunk <= max_tokens:
            raise ValueError(
                f"page_size={page_size} must be positive, "
                f"and 0 < min_chunk={min_chunk} <= max_tokens={max_tokens}"
            )
        self.model = model
        self.budget_ms = budget_ms
        self.page_size = page_size
        self.min_chunk = -(-min_chunk // page_size) * page_size
        self.max_tokens = max_tokens
        self.decode_ms_per_token = decode_ms_per_token

    def batch_ms(self, pieces: Sequence[tuple[int, int]]) -> float:
        """Predicted ms of one forward over all pieces; 0 for none.

        What a forward costs once (launches, weights) is counted once, the products see the sum of
        all tokens, attention each piece behind its own history.
        """
        if not pieces:
            return 0.0
        lengths = np.asarray(pieces, dtype=np.float64).reshape(-1, 2)
        decodes = lengths[lengths[:, 1] == 1, 0].sum()
        ms = self.model.form.predict_batch(lengths[:, 0], lengths[:, 1])
        return float(ms + decodes * self.decode_ms_per_token)

    def next_chunk(
        self,
        history_len: int,
        beside: Sequence[tuple[int, int]] = (),
        left: int | None = None,
    ) -> int:
        """Tokens of a request behind `history_len` that fit beside the other pieces; 0 if none.

        `left` is what the request still has: all of it, if it fits, else whole pages.
        """
        if history_len < 0:
            raise ValueError(f"history_len={history_len} must not be negative")
        others = list(beside)
        room = self.max_tokens - sum(chunk for _, chunk in others)
        most = room if left is None else min(room, left)
        if most <= 0:
            return 0
        if left is not None and left <= room and self._fits(others, history_len, left):
            return left
        low, high = 0, most // self.page_size  # pages; the time does not fall with them
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(others, history_len, middle * self.page_size):
                low = middle
            else:
                high = middle - 1
        size = low * self.page_size
        if size < self.min_chunk and all(chunk == 1 for _, chunk in others):
            size = min(self.min_chunk, most)
        return size

    def fill(
        self,
        waiting: Sequence[tuple[int, int]],
        beside: Sequence[tuple[int, int]] = (),
    ) -> list[int]:
        """Tokens to take of each waiting request, given as (history_len, tokens left), in order.

        One that does not get all it has left is the last that gets any.
        """
        batch = list(beside)
        takes = [0] * len(waiting)
        for i, (history_len, left) in enumerate(waiting):
            takes[i] = self.next_chunk(history_len, batch, left)
            if takes[i]:
                batch.append((history_len, takes[i]))
            if takes[i] < left:
                break
        return takes

    def _fits(self, others: list[tuple[int, int]], history_len: int, size: int) -> bool:
        return self.batch_ms([*others, (history_len, size)]) <= self.budget_ms
