"""Batches that are filled up to a time limit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pystage.pp import BudgetSizer, ChunkSizer, LatencyModel, Piece, SamplePlan
from pystage.pp.budget import Batch
from pystage.pp.forms import Form
from tests.test_pp_sizer import LAW, STAIRS, model_of

C, G, B, A = 4.0, 2e-5, 0.0105, 3.8e-7  # of LAW
FLOOR = model_of(Form("law", (1.0, 0.0, 0.002, 0.0, 1e-8), floor_ms=20.0))


BATCHES = (
    st.integers(0, 130_000),  # history of the next request
    st.lists(st.tuples(st.integers(0, 60_000), st.integers(1, 900)), max_size=4),  # pieces beside
    st.sampled_from([16, 64, 256]),  # page size
)


def sizer_of(model: LatencyModel = LAW, **changes: float) -> BudgetSizer:
    arguments = {"budget_ms": 60.0, "tile": 1} | changes  # the law has no tiles
    return BudgetSizer(model, **arguments)  # type: ignore[arg-type]


def by_hand(pieces: list[tuple[int, int]]) -> float:
    return C + sum(G * h + B * x + A * (2 * h + x) * x for h, x in pieces)


@pytest.mark.parametrize("model", [LAW, STAIRS, FLOOR], ids=["law", "stairs", "floor"])
@pytest.mark.parametrize("piece", [(0, 64), (0, 8192), (50_000, 1000), (120_000, 1)])
def test_a_batch_of_one_piece_takes_what_the_chunk_takes(
    model: LatencyModel, piece: tuple[int, int]
) -> None:
    assert sizer_of(model).batch_ms([piece]) == pytest.approx(model.predict(*piece))


@given(st.lists(st.tuples(st.integers(0, 130_000), st.integers(1, 8192)), min_size=1, max_size=20))
def test_a_batch_costs_its_constant_once_and_attention_by_piece(
    pieces: list[tuple[int, int]],
) -> None:
    assert sizer_of().batch_ms(pieces) == pytest.approx(by_hand(pieces))


def test_no_batch_takes_no_time_and_short_forwards_the_floor() -> None:
    assert sizer_of().batch_ms([]) == 0.0
    assert sizer_of(FLOOR).batch_ms([Piece(0, 64), Piece(100, 1)]) == pytest.approx(20.0, rel=0.01)


def test_a_decode_also_reads_its_history() -> None:
    decodes = [Piece(9_000, 1), Piece(700, 1)]
    plain, reads = sizer_of(), sizer_of(decode_ms_per_token=1e-4)
    assert reads.batch_ms(decodes) - plain.batch_ms(decodes) == pytest.approx(0.97)
    assert reads.batch_ms([(9_000, 2)]) == plain.batch_ms([(9_000, 2)])
    assert reads.next_chunk(0, decodes) < plain.next_chunk(0, decodes)


@settings(max_examples=40, deadline=None)
@given(*BATCHES)
def test_the_chunk_is_the_largest_that_fits(
    history: int, beside: list[tuple[int, int]], page: int
) -> None:
    sizer = sizer_of(page_size=page, min_chunk=page, max_tokens=6000)
    size = sizer.next_chunk(history, beside)
    room = 6000 - sum(chunk for _, chunk in beside)
    assert size % page == 0 and size <= max(room, 0)
    if size > page:
        assert sizer.batch_ms([*beside, (history, size)]) <= 60.0
    if size and size + page <= room:
        assert sizer.batch_ms([*beside, (history, size + page)]) > 60.0


@settings(max_examples=40, deadline=None)
@given(*BATCHES)
def test_a_batch_ends_with_a_whole_tile(
    history: int, beside: list[tuple[int, int]], page: int
) -> None:
    tiles_of, any_of = (
        sizer_of(page_size=page, min_chunk=page, max_tokens=6000, tile=tile) for tile in (128, 1)
    )
    size, largest = (sizer.next_chunk(history, beside) for sizer in (tiles_of, any_of))
    others = sum(chunk for _, chunk in beside)
    tiles = (others + largest) // 128
    if tiles < 2 or tiles * 128 - others < page:  # another tile has to begin
        assert size == largest
    else:
        assert size % page == 0 and size <= largest
        assert others + size <= tiles * 128 < others + size + page


def test_what_is_left_is_taken_whole_and_decodes_count_in_the_tiles() -> None:
    sizer = sizer_of(max_tokens=1024 + 64, tile=128)
    assert sizer.next_chunk(0) == 1024
    assert sizer.next_chunk(0, left=1085) == 1085  # a last chunk leaves nothing for later
    assert sizer.next_chunk(0, [Piece(50, 1)] * 3) == 960  # 1,024 would begin a ninth tile


def test_a_batch_of_less_than_two_tiles_or_without_one_of_its_own_is_not_cut() -> None:
    assert sizer_of(max_tokens=192, tile=128).next_chunk(0) == 192
    assert sizer_of(max_tokens=320, tile=128).next_chunk(0) == 256
    others = [Piece(0, 250)]  # a page more begins a third tile, but less would be nothing
    assert sizer_of(max_tokens=314, tile=128).next_chunk(0, others) == 64


def test_a_prompt_gets_on_where_nothing_fits_and_only_if_nobody_else_does() -> None:
    sizer = sizer_of(budget_ms=5.0, min_chunk=256)
    assert sizer.next_chunk(100_000) == 256
    assert sizer.next_chunk(100_000, [Piece(50, 1)] * 3) == 256
    assert sizer.next_chunk(100_000, left=100) == 100
    assert sizer.next_chunk(100_000, [Piece(0, 300)]) == 0


def test_a_batch_that_is_over_the_budget_gets_no_more() -> None:
    """By its waves, a short chunk behind a long history may take longer than with more tokens."""
    sizer = sizer_of(STAIRS, tile=128)
    full = [Piece(81_900, 426)]
    assert sizer.batch_ms(full) > 60.0 > sizer.batch_ms([*full, (0, 448)])
    assert sizer.next_chunk(0, full, 2000) == 0
    assert sizer.next_chunk(0, [Piece(81_900, 1)], 2000) > 0


@given(st.tuples(*BATCHES), st.lists(st.tuples(st.integers(0, 900), st.just(1)), max_size=3))
def test_a_batch_that_grows_is_the_list_of_its_pieces(
    case: tuple[int, list[tuple[int, int]], int], decodes: list[tuple[int, int]]
) -> None:
    history, pieces, page = case
    sizer = sizer_of(STAIRS, page_size=page, decode_ms_per_token=1e-4)
    batch = Batch.of(decodes)
    for piece in pieces:
        batch.add(*piece)
    listed = [*decodes, *pieces]
    assert sizer.next_chunk(history, batch, 5000) == sizer.next_chunk(history, listed, 5000)
    chunks = np.array([chunk for _, chunk in listed], dtype=float)
    histories = np.array([h for h, _ in listed], dtype=float)
    read = sum(h for h, chunk in listed if chunk == 1)
    expected = STAIRS.form.predict_batch(histories, chunks) + 1e-4 * read
    assert sizer.batch_ms(listed) == pytest.approx(expected)


def test_a_batch_has_no_more_tokens_than_it_may() -> None:
    sizer = sizer_of(budget_ms=1e6, max_tokens=4096)
    assert sizer.next_chunk(0) == 4096
    assert sizer.next_chunk(0, [Piece(0, 4000)]) == 64  # the one page of 96 tokens
    assert sizer.next_chunk(0, [Piece(0, 4000)], left=96) == 96
    assert sizer.next_chunk(0, [Piece(0, 4000), Piece(900, 1)] * 2) == 0


def test_the_smallest_chunk_is_the_smallest_that_was_profiled() -> None:
    """Of a smaller one the model knows nothing, and it may take as long."""
    report = dataclasses.replace(LAW.report, chunk_range=(512, 10_240))
    profiled = LatencyModel(LAW.form, report, ())
    sizer = sizer_of(profiled, budget_ms=60.0)
    history = next(h for h in range(0, 10**7, 10_000) if sizer.batch_ms([(h, 512)]) > 60.0)
    assert sizer.next_chunk(history) == 512
    assert sizer_of(profiled, min_chunk=64).next_chunk(history) < 512
    assert sizer.next_chunk(history, [Piece(0, 300)]) < 512  # somebody else gets on
    assert sizer_of(profiled, max_tokens=256).min_chunk == 256


def test_what_a_request_has_left_is_taken_whole_if_it_fits() -> None:
    sizer = sizer_of()
    assert sizer.next_chunk(0, left=777) == 777
    largest = sizer.next_chunk(0)
    assert sizer.next_chunk(0, left=largest + 64) == largest
    assert sizer.next_chunk(0, [(0, 8192)]) == sizer.next_chunk(0, [(0, 8192)], left=5) == 0


def test_requests_fill_a_batch_in_their_order() -> None:
    sizer = sizer_of(max_tokens=4096)
    takes = sizer.fill([(20_000, 500), (0, 700), (90_000, 4000), (0, 10)], [Piece(500, 1)])
    assert takes[:2] == [500, 700] and 0 < takes[2] < 4000 and takes[3] == 0
    batch = [Piece(500, 1), Piece(20_000, 500), Piece(0, 700), Piece(90_000, takes[2])]
    assert sizer.batch_ms(batch) <= 60.0
    longer = [*batch[:3], Piece(90_000, takes[2] + 64)]
    assert sizer.batch_ms(longer) > 60.0 or sum(n for _, n in longer) > 4096
    assert sizer.fill([]) == []


def test_a_cap_on_chunks_keeps_late_ones_within_it_where_one_size_does_not() -> None:
    """Over a prompt of 131,072 with 80 ms a chunk: more tokens a second than the best size that
    keeps to the cap throughout."""

    def ms(history: int, size: int) -> float:
        return float(LAW.predict(history, size))

    def total(sizes: list[int]) -> float:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        assert max(map(ms, starts, sizes)) <= 80.0
        return sum(map(ms, starts, sizes))

    within = max(s for s in range(64, 8193, 64) if ms(131_072 - s, s) <= 80.0)
    whole, rest = divmod(131_072, within)
    sizer, done, sizes = sizer_of(budget_ms=80.0), 0, []
    while done < 131_072:
        sizes.append(sizer.next_chunk(done, left=131_072 - done))
        done += sizes[-1]
    assert total(sizes) < 0.95 * total([within] * whole + [rest] * bool(rest))


def test_what_cannot_be_is_refused() -> None:
    changes = (
        {"budget_ms": 0.0},
        {"page_size": 0},
        {"tile": 0},
        {"min_chunk": 0},
        {"max_tokens": 63},
    )
    for change in changes:
        with pytest.raises(ValueError, match="must be positive"):
            sizer_of(**change)
    with pytest.raises(ValueError, match="history_len=-1"):
        sizer_of().next_chunk(-1)
    report = dataclasses.replace(LAW.report, usable=False, reason="too few")
    with pytest.raises(ValueError, match="not usable: too few"):
        sizer_of(LatencyModel(LAW.form, report, ()))


def test_what_is_wrong_is_said_and_shown() -> None:
    samples = [
        (history, chunk, 3 + 0.02 * chunk + 2e-7 * (2 * history + chunk) * chunk)
        for history in (0, 8192, 40_000, 100_000)
        for chunk in (512, 2048, 4096, 8192, 10_240)
    ]
    model = LatencyModel.fit(samples)
    for history, chunk in ((-1, 100), (0, 0), (0, [100, 0]), ([5, -5], 100)):
        with pytest.raises(ValueError, match=r"tokens, at least 0 and 1"):
            model.predict(history, chunk)
    for name in ("base_chunk", "context_len", "page_size", "min_chunk"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1 token"):
            SamplePlan.spread(**{"base_chunk": 8192, "context_len": 131072, name: 0})
    assert repr(model).startswith("<LatencyModel: law form, hold-out error median 0.0%")
    sizer = ChunkSizer(model, base_chunk=8192, context_len=131072)
    assert "base 8,192 of a context of 131,072, chunks of 512 to 16,384 tokens" in repr(sizer)
    assert repr(BudgetSizer(model, budget_ms=60)).startswith("<BudgetSizer: 60 ms, 512 to 8,192 t")
