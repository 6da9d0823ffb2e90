"""The largest chunk that keeps a batch within a time budget, for any engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pystage.pp.model import LatencyModel

TILE = 128
"""Rows of a tile of matrix products on today's GPUs, in tokens."""


class Piece(NamedTuple):
    """A request's part of a batch: `chunk_len` new tokens behind `history_len` cached tokens. A
    decode is a piece of one token."""

    history_len: int
    chunk_len: int


@dataclass
class Load:
    """The sums over a batch's pieces that its predicted time depends on. Adding a piece takes the
    same time however many there are."""

    tokens: int = 0
    area: int = 0
    history: int = 0
    behind: int = 0
    decoded: int = 0
    """Tokens of history behind which pieces of one token are."""

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, int]]) -> Load:
        load = cls()
        for history_len, chunk_len in pieces:
            load.add(history_len, chunk_len)
        return load

    def add(self, history_len: int, chunk_len: int) -> None:
        self.tokens += chunk_len
        self.area += (2 * history_len + chunk_len) * chunk_len
        self.history += history_len
        self.behind += chunk_len if history_len else 0
        self.decoded += history_len if chunk_len == 1 else 0

    def plus(self, history_len: int, chunk_len: int) -> Load:
        more = replace(self)
        more.add(history_len, chunk_len)
        return more


@dataclass
class Batch:
    """A batch's pieces, as `BudgetSizer.next_chunk` wants to know them: all of them, and those that
    are prefills."""

    all: Load = field(default_factory=Load)
    prefills: Load = field(default_factory=Load)

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, int]]) -> Batch:
        batch = cls()
        for piece in pieces:
            batch.add(*piece)
        return batch

    def add(self, history_len: int, chunk_len: int) -> None:
        self.all.add(history_len, chunk_len)
        if chunk_len > 1:
            self.prefills.add(history_len, chunk_len)


class BudgetSizer:
    """Fills batches up to a time budget instead of a number of tokens.

    With a token budget, a batch behind a long history may take four times as long as one without
    history, and the requests that decode in the same batch wait for it. Here the budget is in ms.
    As in an engine, a batch holds parts of several requests, each behind its own history, and
    decodes.

        sizer = BudgetSizer(model, budget_ms=60.0, max_tokens=8192)
        decodes = [Piece(9_000, 1), Piece(700, 1)]
        batch = list(decodes)
        for request in waiting:                      # first come, first served
            room = sizer.next_chunk(request.done, beside=batch)
            take = min(room, request.left)
            if take == 0:
                break
            batch.append(Piece(request.done, take))

    or, in one call, `sizer.fill([(request.done, request.left) for request in waiting], decodes)`.

    Args:
        model: a fitted and usable model.
        budget_ms: predicted time of a batch on one stage that must not be exceeded, in ms.
        page_size: sizes are multiples of it, in tokens, unless they finish a request.
        min_chunk: a batch that has no prefill yet takes this many tokens even if they exceed the
            budget. Behind a long history, the attention of one token can take as long as that of
            512 (measured in SGLang, docs/pp.md), so smaller batches would only cost throughput.
            Default: the smallest chunk of the model's profile; it does not know smaller ones.
        max_tokens: most tokens of a batch, decodes included.
        tile: rows of a tile of the engine's matrix products, in tokens. A batch takes as long as
            one that fills its last tile. So if a request must wait for the next batch, this one
            ends with a whole tile, unless it has less than two (tile quantization, Sarathi,
            arXiv 2308.16369). Set 1 for a mixture of experts: its rows are spread over the experts.
        decode_ms_per_token: time in ms per cached token that a decode reads. The model was fitted
            to prefills, whose attention works on many rows at once; the attention of a decode is
            bound by reading the cache. Measure it, or leave it 0 where decodes are few.

    Raises:
        ValueError: the model is not usable (keep the engine's token budget then), or an argument
            is out of range.
    """

    def __init__(
        self,
        model: LatencyModel,
        *,
        budget_ms: float,
        page_size: int = 64,
        min_chunk: int | None = None,
        max_tokens: int = 8192,
        tile: int = TILE,
        decode_ms_per_token: float = 0.0,
    ) -> None:
        if not model.report.usable:
            raise ValueError(f"the latency model is not usable: {model.report.reason}")
        if not budget_ms > 0:
            raise ValueError(f"budget_ms={budget_ms} must be positive")
        if min_chunk is None:
            min_chunk = max(min(model.report.chunk_range[0], max_tokens), page_size)
        if min(page_size, tile) < 1 or not 0 < min_chunk <= max_tokens:
            raise ValueError(
                f"page_size={page_size} and tile={tile} must be positive, "
                f"and 0 < min_chunk={min_chunk} <= max_tokens={max_tokens}"
            )
        self.model = model
        self.budget_ms = budget_ms
        self.page_size = page_size
        self.min_chunk = -(-min_chunk // page_size) * page_size
        self.max_tokens = max_tokens
        self.tile = tile
        self.decode_ms_per_token = decode_ms_per_token

    def __repr__(self) -> str:
        return (
            f"<BudgetSizer: {self.budget_ms:g} ms, {self.min_chunk:,} to {self.max_tokens:,} "
            f"tokens, pages of {self.page_size}>"
        )

    def batch_ms(self, pieces: Sequence[tuple[int, int]]) -> float:
        """Predicted time in ms of one forward over all pieces; 0 if there are none.

        Fixed costs of a forward (launches, reading the weights) count once, matrix products count
        the sum of all tokens, and attention counts each piece behind its own history.
        """
        return self._ms(Load.of(pieces))

    def next_chunk(
        self,
        history_len: int,
        beside: Sequence[tuple[int, int]] | Batch = (),
        left: int | None = None,
    ) -> int:
        """How many tokens of a request behind `history_len` fit beside the other pieces; 0 if none.

        `left` is the number of tokens that the request still has. The result is all of them if they
        fit, else whole pages. For a batch that grows, pass a `pystage.pp.budget.Batch` and `add`
        to it: the call then takes the same time however many pieces there are.
        """
        if history_len < 0:
            raise ValueError(f"history_len={history_len} must not be negative")
        batch = beside if isinstance(beside, Batch) else Batch.of(beside)
        room = self.max_tokens - batch.all.tokens
        most = room if left is None else min(room, left)

        def fits(size: int) -> bool:
            return self._ms(batch.all.plus(history_len, size)) <= self.budget_ms

        # By the model, a short chunk behind a long history may take longer than with other tokens
        # beside it. Such a batch is full all the same.
        if most <= 0 or self._ms(batch.prefills) > self.budget_ms:
            return 0
        if left is not None and left <= room and fits(left):
            return left
        low, high = 0, most // self.page_size  # in pages; more of them hardly ever take less time
        while low < high:
            middle = (low + high + 1) // 2
            if fits(middle * self.page_size):
                low = middle
            else:
                high = middle - 1
        size = self._whole_tiles(low * self.page_size, self.max_tokens - room)
        if size < self.min_chunk and not batch.prefills.tokens:
            size = min(self.min_chunk, most)
        return size

    def fill(
        self,
        waiting: Sequence[tuple[int, int]],
        beside: Sequence[tuple[int, int]] = (),
    ) -> list[int]:
        """Tokens to take from each waiting request, given as (history_len, tokens left), in order.

        The first request that does not get all its tokens ends the batch: later ones get none.
        """
        batch = Batch.of(beside)
        takes = [0] * len(waiting)
        for i, (history_len, left) in enumerate(waiting):
            takes[i] = self.next_chunk(history_len, batch, left)
            if takes[i]:
                batch.add(history_len, takes[i])
            if takes[i] < left:
                break
        return takes

    def _whole_tiles(self, size: int, beside: int) -> int:
        """`size`, less the pages that only begin another tile behind `beside` tokens."""
        tiles = (beside + size) // self.tile
        pages = (tiles * self.tile - beside) // self.page_size
        return pages * self.page_size if tiles >= 2 and pages > 0 else size

    def _ms(self, load: Load) -> float:
        ms = self.model.form.predict_sums(load.tokens, load.area, load.history, load.behind)
        return ms + load.decoded * self.decode_ms_per_token
