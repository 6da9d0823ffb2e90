"""Chunk sizes: equal times within the engine's limits, and plans without very small chunks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pystage.pp import ChunkSizer, LatencyModel, simulate_pipeline
from pystage.pp.forms import Form
from pystage.pp.model import FitReport


def model_of(form: Form, *, usable: bool = True) -> LatencyModel:
    report = FitReport(
        form=form.name,
        coefficients=dict(zip(form.terms(), form.coefficients, strict=True)),
        floor_ms=form.floor_ms,
        tile=form.tile,
        wave=form.wave,
        holdout_median=0.01,
        holdout_p95=0.03,
        scores={},
        samples_used=40,
        rejected=(),
        usable=usable,
        reason="" if usable else "median error 40% over 15%",
    )
    return LatencyModel(form, report, ())


LAW = model_of(Form("law", (4.0, 2e-5, 0.0105, 0.0, 3.8e-7)))
STAIRS = model_of(
    Form("waves", (4.0, 0.0, 0.0, 0.0, 0.0105, 1.2e-7, 2.6e-7), floor_ms=7.0, tile=128, wave=1056)
)


def sizer_of(model: LatencyModel = LAW, **changes: object) -> ChunkSizer:
    settings_: dict[str, object] = {"base_chunk": 8192, "context_len": 131072} | changes
    return ChunkSizer(model, **settings_)  # type: ignore[arg-type]


def times_of(model: LatencyModel, chunks: list[int]) -> np.ndarray:
    sizes = np.array(chunks)
    return np.asarray(model.predict(np.cumsum(sizes) - sizes, sizes))


def test_every_chunk_takes_the_time_of_the_base_chunk() -> None:
    sizer = sizer_of()
    assert sizer.next_chunk(0) == pytest.approx(8192, rel=0.04)
    sizes = []
    for history in range(0, 122_000, 1_000):
        size = sizer.next_chunk(history)
        assert size is not None
        assert size % 64 == 0
        assert LAW.predict(history, size) <= 1.03 * sizer.target_ms
        assert LAW.predict(history, size + 64) > 1.03 * sizer.target_ms
        sizes.append(size)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1100  # a quarter of the base chunk, 2,048, would take twice as long


def test_a_late_chunk_may_be_smaller_than_a_quarter_but_not_than_the_floor() -> None:
    assert sizer_of(min_chunk=512).next_chunk(120_000) == pytest.approx(1000, rel=0.15)
    assert sizer_of(min_chunk=2048).next_chunk(120_000) == 2048
    assert sizer_of(min_chunk=2000, page_size=64).next_chunk(120_000) == 2048


def test_sizes_keep_to_pages_maximum_and_context() -> None:
    sizer = sizer_of(page_size=256, max_chunk=6000, context_margin=100)
    assert sizer.next_chunk(0) == 5888
    # 131,072 - 130,300 - 100 leaves 672 tokens: two pages of 256.
    assert sizer.next_chunk(130_300) == 512
    assert sizer.next_chunk(131_072 - 100 - 256) == 256
    assert sizer.next_chunk(131_072 - 100 - 255) == 0
    assert sizer.next_chunk(131_072) == 0
    assert sizer_of(page_size=256).next_chunk(131_072 - 256) == 256


def test_one_size_alone_may_be_allowed() -> None:
    sizer = sizer_of(min_chunk=4096, max_chunk=4096)
    assert [sizer.next_chunk(history) for history in (0, 60_000, 120_000)] == [4096] * 3


def test_smooth_moves_a_share_of_the_way_from_the_base_chunk() -> None:
    full = sizer_of().next_chunk(60_000)
    half = sizer_of(smooth=0.5).next_chunk(60_000)
    assert full is not None
    assert half == pytest.approx((8192 + full) / 2, abs=64)


@pytest.mark.parametrize("smooth", [0.05, 0.3, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize(("base_chunk", "page"), [(8192, 64), (8000, 256), (7777, 96), (500, 64)])
def test_smoothed_sizes_are_whole_pages_within_the_limits(
    smooth: float, base_chunk: int, page: int
) -> None:
    """Also where the base chunk is not: no whole page, above the largest, below the smallest."""
    sizer = sizer_of(
        smooth=smooth, base_chunk=base_chunk, page_size=page, min_chunk=1000, max_chunk=7000
    )
    plain = sizer_of(base_chunk=base_chunk, page_size=page, min_chunk=1000, max_chunk=7000)
    smallest, largest = -(-1000 // page) * page, 7000 // page * page
    for history in range(0, 120_000, 997):  # with room for the largest
        size, full = sizer.next_chunk(history), plain.next_chunk(history)
        assert size is not None and full is not None
        assert size % page == 0 and smallest <= size <= largest
        wanted = min(base_chunk + smooth * (full - base_chunk), 7000)
        assert wanted - page - 1 < size <= max(wanted, smallest)
    for prompt_len in (100_000, 54_321, 3000):
        chunks = sizer.plan(prompt_len)
        assert sum(chunks) == prompt_len
        assert all(size % page == 0 and size <= largest for size in chunks[:-1])


def test_at_a_jump_in_time_the_size_stays_below_it() -> None:
    sizer = sizer_of(STAIRS)
    history = 100_000
    size = sizer.next_chunk(history)
    assert size == 1024
    assert STAIRS.predict(history, 1088) > 1.08 * sizer.target_ms


def test_a_size_far_under_its_target_gives_way_to_one_a_little_over() -> None:
    """At a jump in time: to the longer, up to 8 % over, where the shorter is 7 % under."""
    sizer = sizer_of(STAIRS)
    over = 0
    for history in range(0, 120_000, 512):
        size = sizer.next_chunk(history)
        assert size is not None
        shorter, this, longer = (
            STAIRS.predict(history, size + pages * 64) / sizer.target_ms for pages in (-1, 0, 1)
        )
        assert this <= 1.08
        if this > 1.03:
            assert shorter < 0.93
            over += 1
        if this < 0.93:
            assert longer > 1.08
    assert over > 10


def test_an_unusable_model_keeps_the_static_size_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizer = sizer_of(model_of(LAW.form, usable=False))
    assert sizer.next_chunk(0) is None
    assert sizer.next_chunk(8192) is None
    assert sizer.plan(20_000) == [8192, 8192, 3616]
    assert sizer.plan(16_384) == [8192, 8192]
    assert sizer.fastest_plan(20_000, 4) == [8192, 8192, 3616]
    assert [r.message for r in caplog.records] == [
        "static chunks of 8192 tokens: the latency model is not usable (median error 40% over 15%)"
    ]


@pytest.mark.parametrize("prompt_len", [131_072, 131_071, 100_001, 65_536, 33_333, 20_000])
def test_a_plan_has_equal_times_first_and_last_chunk_included(prompt_len: int) -> None:
    sizer = sizer_of()
    chunks = sizer.plan(prompt_len)
    times = times_of(LAW, chunks)
    assert sum(chunks) == prompt_len
    assert all(size % 64 == 0 for size in chunks[:-1])
    assert np.ptp(times) / times.mean() <= 0.12
    assert times.max() <= 1.15 * sizer.target_ms


@pytest.mark.parametrize("prompt_len", [9_000, 24_999, 64_991, 104_983, 131_072])
def test_a_plan_has_no_more_chunks_than_a_tenth_over_the_target_needs(prompt_len: int) -> None:
    sizer = sizer_of()
    done = needed = 0
    while done < prompt_len:  # the largest chunks within a tenth, and 3 % for whole pages
        sizes = np.arange(512, 16_385, 64)
        within = LAW.predict(done, sizes) <= 1.03 * 1.10 * sizer.target_ms
        done += int(sizes[within][-1])
        needed += 1
    assert len(sizer.plan(prompt_len)) == needed


def test_no_page_moved_to_the_second_of_two_chunks_would_even_them() -> None:
    sizer = sizer_of()
    for prompt_len in range(9_166, 13_000, 111):
        first, second = sizer.plan(prompt_len)
        times, moved = times_of(LAW, [first, second]), times_of(LAW, [first - 64, second + 64])
        assert np.ptp(moved) >= np.ptp(times)


def test_the_last_chunk_is_as_long_as_the_others_whatever_the_prompt() -> None:
    sizer = sizer_of()
    for prompt_len in np.random.default_rng(0).integers(25_000, 131_072, 60):
        times = times_of(LAW, sizer.plan(int(prompt_len)))
        assert np.ptp(times) / times.mean() <= 0.06
        assert times[-1] == pytest.approx(times.mean(), rel=0.04)


def test_evening_the_last_chunk_takes_nothing_from_a_chunk_of_the_smallest_size() -> None:
    sizer = sizer_of(min_chunk=4096, base_chunk=4096)
    assert sizer.plan(6663) == [4096, 2567]
    times, moved = times_of(LAW, [4096, 2567]), times_of(LAW, [4032, 2631])
    assert np.ptp(moved) < np.ptp(times)  # evener, but below the smallest


def test_a_little_more_than_a_chunk_is_one_chunk_and_a_half_more_is_two_halves() -> None:
    sizer = sizer_of()
    assert sizer.plan(100) == [100]
    assert sizer.plan(8192 + 256) == [8448]
    first, second = sizer.plan(12_000)
    assert LAW.predict(first, second) == pytest.approx(LAW.predict(0, first), rel=0.05)


def test_a_plan_over_few_waves_takes_longer_chunks_to_stay_even() -> None:
    """Where two waves or three make the difference, a target between them evens nothing."""
    form = Form("waves", (4.0, 0, 0, 0, 0.0115, 0, 3.7e-7), floor_ms=7.0, tile=128, wave=528)
    model = model_of(form)
    chunks = sizer_of(model).plan(131_072)
    times = times_of(model, chunks)
    assert np.ptp(times) / times.mean() < 0.25  # a wave less is a third less
    assert times.max() < 1.45 * sizer_of(model).target_ms


@settings(max_examples=60, deadline=None)
@given(
    prompt_len=st.integers(1, 131_072),
    attention=st.floats(0, 1e-6),
    linear=st.floats(1e-4, 0.02),
    constant=st.floats(0, 50),
    page=st.sampled_from([1, 16, 64, 256]),
)
def test_plans_cover_any_prompt_within_the_limits(
    prompt_len: int, attention: float, linear: float, constant: float, page: int
) -> None:
    model = model_of(Form("law", (constant, 0.0, linear, 0.0, attention)))
    sizer = sizer_of(model, page_size=page)
    for chunks in (sizer.plan(prompt_len), sizer.fastest_plan(prompt_len, 4)):
        assert sum(chunks) == prompt_len
        assert all(0 < size <= 16_384 for size in chunks)
        assert all(size % page == 0 and size >= 512 for size in chunks[:-1])
    times = times_of(model, sizer.plan(prompt_len))
    if len(times) > 3 and min(sizer.plan(prompt_len)[:-1]) > 512:
        assert times[-1] >= 0.7 * times.mean()  # no sliver at the end


@pytest.mark.parametrize(
    ("prompt_len", "limits"),
    [
        (131_073, {"base_chunk": 4160, "min_chunk": 4160, "max_chunk": 4160}),
        (200_000, {"base_chunk": 1984, "min_chunk": 1984, "max_chunk": 1984}),
        (1 << 20, {"base_chunk": 576, "max_chunk": 1000}),
        (1 << 21, {"base_chunk": 1024, "max_chunk": 1984}),
        (1 << 22, {"base_chunk": 1024, "max_chunk": 1024}),
    ],
    ids=str,
)
def test_the_limits_hold_for_prompts_of_any_length(prompt_len: int, limits: dict[str, int]) -> None:
    """Plans of long prompts are made of units of many pages."""
    sizer = sizer_of(context_len=1 << 22, **limits)
    for chunks in (sizer.fastest_plan(prompt_len, 2), list(sizer.choose(prompt_len, 2).chunks)):
        assert sum(chunks) == prompt_len
        assert max(chunks) <= limits["max_chunk"]
        assert min(chunks[:-1]) >= limits.get("min_chunk", 512)
        assert not any(size % 64 for size in chunks[:-1])


def compositions(pages: int, most: int) -> Iterator[list[int]]:
    if pages == 0:
        yield []
    for first in range(1, min(pages, most) + 1):
        for rest in compositions(pages - first, most):
            yield [first, *rest]


@pytest.mark.parametrize("model", [LAW, STAIRS], ids=["law", "stairs"])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_the_fastest_plan_is_that_of_trying_them_all(model: LatencyModel, ranks: int) -> None:
    sizer = sizer_of(model, page_size=512, base_chunk=4096, min_chunk=512, max_chunk=4096)

    def first_token_ms(chunks: list[int]) -> float:
        return simulate_pipeline([times_of(model, chunks).tolist()] * ranks)

    best = min(first_token_ms([p * 512 for p in pages]) for pages in compositions(12, 8))
    # The caps on the slowest chunk are a grid: at most one step of it is lost per rank.
    found = first_token_ms(sizer.fastest_plan(12 * 512, ranks))
    assert best <= found <= best * 1.03


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_the_fastest_plan_beats_fixed_chunks_and_equal_times(ranks: int) -> None:
    sizer = sizer_of(STAIRS)

    def first_token_ms(chunks: list[int]) -> float:
        return simulate_pipeline([times_of(STAIRS, chunks).tolist()] * ranks)

    fastest = first_token_ms(sizer.fastest_plan(131_072, ranks))
    for size in (1024, 2048, 4096, 8192):
        assert fastest <= 1.001 * first_token_ms([size] * (131_072 // size))
    assert fastest <= first_token_ms(sizer.plan(131_072))


def test_the_simulation_is_what_two_stages_do_by_hand() -> None:
    # Stage 1: 0-3, 3-4. Stage 2: 3-5, 5-9; with a hop of 2: 5-7, 7-11.
    assert simulate_pipeline([[3, 1], [2, 4]]) == 9
    assert simulate_pipeline([[3, 1], [2, 4]], [2, 2]) == 11
    # A chunk that the second stage must wait for: 0-1, 1-6, then 1-2, 6-7.
    assert simulate_pipeline([[1, 5], [1, 1]]) == 7


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12), st.integers(1, 8))
def test_equal_stages_take_the_sum_and_the_slowest_chunk_again_a_stage(
    times: list[float], stages: int
) -> None:
    expected = sum(times) + (stages - 1) * max(times)
    assert simulate_pipeline([times] * stages) == pytest.approx(expected)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of page_size"):
        sizer_of(min_chunk=1000, max_chunk=1000, page_size=256)
    for smooth in (0.0, -0.5, 1.01):
        with pytest.raises(ValueError, match="smooth"):
            sizer_of(smooth=smooth)
    with pytest.raises(ValueError, match="must be positive"):
        sizer_of(page_size=0)
    for change in ({"base_chunk": 0}, {"context_len": 0}):
        with pytest.raises(ValueError, match="both must be positive"):
            sizer_of(**{"max_chunk": 16_384} | change)
    with pytest.raises(ValueError, match="ranks=0 must be positive"):
        sizer_of().fastest_plan(1000, 0)
    with pytest.raises(ValueError, match="not be negative"):
        sizer_of().next_chunk(-1)
    for prompt_len in (0, 131_073):
        with pytest.raises(ValueError, match="prompt_len"):
            sizer_of().plan(prompt_len)
        with pytest.raises(ValueError, match="prompt_len"):
            sizer_of().fastest_plan(prompt_len, 2)
    with pytest.raises(ValueError, match="stages x chunks"):
        simulate_pipeline([])


def test_the_plot_shows_samples_residuals_and_the_plan(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pystage.pp import Sample
    from pystage.pp.plot import plot_profile

    samples = [Sample(h, c, LAW.predict(h, c)) for h in (0, 50_000) for c in (512, 4096, 8192)]
    model = LatencyModel(LAW.form, LAW.report, samples)
    figure = plot_profile(sizer_of(model), 65_536, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    axes = {axis.get_title(): axis for axis in figure.axes}
    assert {"samples and fit", "residuals", "chunk plan", "predicted time"} <= set(axes)
    assert axes["residuals"].get_legend_handles_labels()[1] == ["used"]
    chunk_plan = axes["chunk plan"].get_legend_handles_labels()[1]
    assert chunk_plan == ["equal time", "static 8,192"]


def test_the_plot_tells_rejected_samples_from_used_ones() -> None:
    pytest.importorskip("matplotlib")
    from pystage.pp import Sample
    from pystage.pp.plot import plot_profile

    samples = [Sample(h, c, LAW.predict(h, c)) for h in (0, 50_000) for c in (512, 4096)]
    samples[1] = Sample(0, 4096, 2 * LAW.predict(0, 4096))
    report = dataclasses.replace(LAW.report, rejected=((samples[1], "2.00 x the fit"),))
    figure = plot_profile(sizer_of(LatencyModel(LAW.form, report, samples)), 4096)
    (residuals,) = (axis for axis in figure.axes if axis.get_title() == "residuals")
    used, rejected = residuals.collections
    assert (used.get_label(), rejected.get_label()) == ("used", "rejected")
    assert np.asarray(rejected.get_offsets()) == pytest.approx(np.array([[4096, 100.0]]))
    assert len(used.get_offsets()) == 3
    # No static chunk is as short as this prompt: the plan is drawn alone.
    (plan,) = (axis for axis in figure.axes if axis.get_title() == "chunk plan")
    assert plan.get_legend_handles_labels()[1] == ["equal time"]


def test_without_matplotlib_the_plot_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from pystage.pp.plot import plot_profile

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pystage-h2d\[plot\]"):
        plot_profile(sizer_of(), 4096)
