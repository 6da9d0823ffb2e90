"""Chunk sizes while prompts wait, and the simulated queues that they are compared on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.pp import queues
from pystage.pp import QueueSizer, simulate_pipeline

from .test_pp_sizer import LAW, STAIRS, model_of, sizer_of

ROOT = Path(__file__).resolve().parents[1]
TIMES = {512: 7.0, 1024: 11.0, 2048: 18.0, 4096: 33.0, 8192: 66.0}


@given(
    chunks=st.integers(1, 64),
    ranks=st.integers(1, 8),
    factor=st.floats(0.7, 1.5),
    more=st.floats(0.0, 5.0),
)
def test_the_size_is_the_soonest_in_the_pipeline(
    chunks: int, ranks: int, factor: float, more: float
) -> None:
    tokens = 8192 * chunks
    factors, overhead = [1.0, *[factor] * (ranks - 1)], [0.0, *[more] * (ranks - 1)]
    queue = QueueSizer(TIMES, ranks, stage_factors=factors, overhead_ms=overhead)

    def done(size: int) -> float:
        row = np.full(tokens // size, TIMES[size])
        return simulate_pipeline([f * row + o for f, o in zip(factors, overhead, strict=True)])

    assert done(queue.size(tokens)) == pytest.approx(min(map(done, TIMES)))


def test_the_more_waits_the_less_a_token_takes() -> None:
    queue = QueueSizer(TIMES, 4)
    sizes = [queue.size(tokens) for tokens in range(1, 400_000, 997)]
    each = [TIMES[size] / size for size in sizes]
    assert each == sorted(each, reverse=True)
    assert sizes[0] == 512 and sizes[-1] == 4096  # 8,192 takes as long a token, and fills later
    assert {QueueSizer(TIMES, 1).size(n) for n in (9000, 10**6)} == {4096}
    assert QueueSizer({512: 7.0, 8192: 50.0}, 1).size(600) == 512  # a chunk is not part of one


def test_a_size_is_kept_while_prompts_wait() -> None:
    queue = QueueSizer(TIMES, 4)
    assert queue.size(101_000) > queue.size(10_000)
    assert queue.next_chunk(1000, 100_000) == queue.size(101_000)
    assert queue.next_chunk(5000, 5000) == queue.size(101_000)  # the queue is shorter now
    assert queue.next_chunk(5000, 4999) is None  # mostly this prompt: its own plan
    assert queue.next_chunk(100, 9900) == queue.size(101_000)
    assert queue.next_chunk(100, 500) == queue.size(101_000)  # takes all that wait
    assert queue.next_chunk(5000, 5000) == queue.size(10_000)
    assert queue.next_chunk(1000, 100_000) == queue.size(101_000)
    assert queue.next_chunk(5000, 0) is None
    assert queue.next_chunk(5000, 5000) == queue.size(10_000)
    grown = [n for n in range(1000, 50_000, 1000) if queue.size(2 * n) != queue.size(n)]
    assert grown and all(QueueSizer(TIMES, 4).next_chunk(n, n) == queue.size(2 * n) for n in grown)


def test_sizes_are_timed_behind_half_a_chunk() -> None:
    asked: list[tuple[int, int]] = []
    spoiled = iter([9.0, 1.0, 1.0] * 100)

    def time(points: Any) -> list[float]:
        asked.extend(points)
        return [size / 100 for _, size in points]

    queue = sizer_of().for_queue(4, time=time, stage_factors=[1.0, 1.0, 1.0, 2.0])
    assert {history for history, _ in asked} == {4096}
    assert len(asked) == 3 * len(queue.ms_by_size) <= 40
    assert {512, 768, 8192, 16384} <= set(queue.ms_by_size)
    assert queue.ms_by_size == {size: size / 100 for _, size in asked}
    # The median: one repeat of the three is disturbed.
    rounds: list[float] = []

    def disturbed(points: Any) -> list[float]:
        each = len(points) // 3
        rounds.extend(next(spoiled) for _ in range(3))
        return [size * rounds[i // each] for i, (_, size) in enumerate(points)]

    again = sizer_of().for_queue(4, time=disturbed, history_len=0)
    assert again.ms_by_size == {size: float(size) for size in again.ms_by_size}


def test_without_timings_the_model_predicts() -> None:
    queue = sizer_of(STAIRS).for_queue(4, history_len=1000)
    for size, ms in queue.ms_by_size.items():
        assert ms == pytest.approx(float(STAIRS.predict(1000, size)))
    static = sizer_of(model_of(LAW.form, usable=False)).for_queue(4)
    assert [*static.ms_by_size] == [8192] and static.next_chunk(10, 20) == 8192


def test_no_chunk_reaches_beyond_the_context() -> None:
    asked: list[tuple[int, int]] = []

    def time(points: Any) -> list[float]:
        asked.extend(points)
        return [1.0] * len(points)

    queue = sizer_of(context_len=12_000).for_queue(2, time=time)
    assert max(queue.ms_by_size) == 6144 and max(map(sum, asked)) <= 12_000
    assert max(sizer_of(context_len=12_288).for_queue(2, time=time).ms_by_size) == 8192


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: QueueSizer({}, 2), "positive times"),
        (lambda: QueueSizer({0: 1.0}, 2), "positive times"),
        (lambda: QueueSizer({64: 0.0}, 2), "positive times"),
        (lambda: QueueSizer({64: math.nan}, 2), "positive times"),
        (lambda: QueueSizer(TIMES, 0), "ranks=0"),
        (lambda: QueueSizer(TIMES, 2, stage_factors=[1.0]), "stage_factors"),
        (lambda: QueueSizer(TIMES, 2, overhead_ms=[0.0, -1.0]), "overhead_ms"),
        (lambda: QueueSizer(TIMES, 2).next_chunk(0, 5), "left=0"),
        (lambda: QueueSizer(TIMES, 2).next_chunk(5, -1), "waiting=-1"),
        (lambda: sizer_of().for_queue(0), "ranks=0"),
        (lambda: sizer_of().for_queue(2, repeats=0), "repeats=0"),
        (lambda: sizer_of().for_queue(2, history_len=131_072), "history_len=131072"),
        (lambda: sizer_of().for_queue(2, history_len=-1), "history_len=-1"),
        (lambda: sizer_of().for_queue(2, history_len=131_000), "no chunk fits"),
        (lambda: sizer_of().for_queue(2, time=lambda _: [1.0]), "time gave"),
        (lambda: sizer_of().for_queue(2, time=lambda p: [math.inf] * len(p)), "time gave"),
    ],
)
def test_bad_arguments(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_it_says_what_it_has() -> None:
    assert repr(QueueSizer({64: 1.0}, 2)) == "<QueueSizer: {64: 1.0}>"


# --- the simulated queues


@pytest.fixture(scope="module")
def profile() -> dict[str, Any]:
    path = ROOT / "bench/results/pp_prefill-8b-8-in-turn-nvidia-h200.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_queue_takes_what_the_pipeline_takes(profile: dict[str, Any]) -> None:
    stages = queues.Stages(profile)
    first = queues.run(stages, [3000, 1000, 4000], [0.0] * 3, lambda *_: 2000)
    pieces = [[(0, 2000)], [(2000, 1000), (0, 1000)], [(0, 2000)], [(2000, 2000)]]
    rows = np.array([stages.on_each(batch) for batch in pieces]).T
    ends = [simulate_pipeline(rows[:, : n + 1]) for n in range(4)]
    assert first == pytest.approx([ends[1], ends[1], ends[3]])
    # A prompt that comes when all are done waits for nobody, and the first stage for it.
    apart = queues.run(stages, [2000, 2000], [0.0, 1e6], lambda *_: 2000)
    assert apart[0] == pytest.approx(apart[1])


def test_what_waits_is_what_has_arrived(profile: dict[str, Any]) -> None:
    asked: list[tuple[int, int, int]] = []

    def size(*given: int) -> int:
        asked.append(given)
        return 1000

    queues.run(queues.Stages(profile), [1500, 700, 900], [0.0, 0.0, 1e6], size)
    assert asked == [(0, 1500, 700), (1000, 1500, 700), (500, 700, 0), (0, 900, 0)]


def test_the_sizer_is_as_good_as_the_best_fixed_size(
    profile: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "SEEDS", range(2))
    rows = queues.study(profile)
    assert {row["arrivals"] for row in rows} == set(queues.ARRIVALS) and len(rows) == 6
    for row in rows:
        ms = row["ttft_mean_ms"]
        best = min(v for k, v in ms.items() if k.startswith("fixed"))
        assert ms["queue"] <= 1.08 * best and ms["fixed 8192"] > 1.1 * ms["queue"]
        if row["arrivals"] == "all at once":
            assert ms["queue"] < 0.97 * ms["choose"]


def test_the_study_writes_its_result(profile: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(queues, "SEEDS", range(1))
    monkeypatch.setattr(queues, "PROMPTS", 6)
    source, out = tmp_path / "eight.json", tmp_path / "queues.json"
    source.write_text(json.dumps(profile))
    monkeypatch.setattr("sys.argv", ["queues", str(source), "--out", str(out)])
    queues.main()
    found = json.loads(out.read_text())
    assert found["profiles"] == ["eight.json"] and len(found["rows"]) == 3
    assert {row["ranks"] for row in found["rows"]} == {8}
    measured = found["by_measured_chunks"]
    assert [row["prompt"] for row in measured] == [131_072, 262_144]
    run = profile["results"]["ttft 131072 fixed 2048"]
    assert measured[0]["ms_by_size"]["2048"] == run["piped_ms"][0][2]  # behind 4,096 tokens
    assert measured[0]["sizes"]["131072"] == 2048
