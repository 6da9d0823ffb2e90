"""Sampling: which points, how often, within which budget, and the state after a failure."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pystage.pp import (
    FitReport,
    LatencyModel,
    Profile,
    ProfileError,
    Sample,
    SamplePlan,
    Timing,
    profile_prefill,
)
from pystage.pp.forms import Form
from pystage.pp.profile import (
    DeviceClock,
    _at_once,
    _Run,
    host_timer,
    random_token_ids,
    time_chunks,
)
from pystage.pp.samples import Point


def law(history: int, chunk: int) -> float:
    return 4.0 + 2e-5 * history + 0.0105 * chunk + 3.8e-7 * (2 * history + chunk) * chunk


class Device:
    """A step and a timer that together behave like a device of the given latency."""

    def __init__(
        self, latency: Callable[[int, int], float], noise: float = 0.0, seed: int = 0
    ) -> None:
        self.latency, self.noise = latency, noise
        self.rng = np.random.default_rng(seed)
        self.calls: list[Point] = []

    def step(self, history_len: int, chunk_len: int) -> None:
        self.calls.append((history_len, chunk_len))

    def timer(self, run: Callable[[], object]) -> Timing:
        run()
        ms = self.latency(*self.calls[-1]) * (1 + self.noise * self.rng.standard_normal())
        return Timing(ms, ms)


def plan_for(**changes: object) -> SamplePlan:
    settings: dict[str, object] = {"base_chunk": 8192, "context_len": 131072} | changes
    return SamplePlan.spread(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [1, 64, 256])
def test_every_forward_keeps_to_pages_and_memory(page: int) -> None:
    device = Device(law, noise=0.1)
    plan = plan_for(page_size=page, max_tokens=100_000, min_chunk=512)
    profile = profile_prefill(device.step, plan, timer=device.timer)
    assert profile.forwards == len(device.calls) <= 64
    for history, chunk in device.calls:
        assert history % page == 0
        assert chunk % page == 0
        assert chunk >= 512
        assert history + chunk <= 100_000


def test_history_and_chunk_both_vary() -> None:
    points = plan_for().points
    assert len(set(points)) == len(points)
    assert len({h for h, _ in points}) > 20
    assert len({c for _, c in points}) >= 20
    assert max(h for h, _ in points) > 120_000
    assert min(c for _, c in points) == 512
    assert max(c for _, c in points) == 10240


def test_a_context_shorter_than_the_base_chunk_is_sampled_within_it() -> None:
    plan = plan_for(context_len=3000, page_size=64)
    assert all(h + c <= 3000 for h, c in (*plan.points, plan.base))


def test_warm_up_runs_until_steady_and_slow_first_forwards_are_no_samples() -> None:
    device = Device(law)
    slow = iter([9.0, 5.0, 1.0, 1.0])

    def latency(history: int, chunk: int) -> float:
        return law(history, chunk) * next(slow, 1.0)

    device.latency = latency
    profile = profile_prefill(device.step, plan_for(), timer=device.timer)
    base = law(0, 8192)
    assert profile.warmup_ms == pytest.approx([9 * base, 5 * base, base, base])
    assert max(s.latency_ms for s in profile) < 9 * base
    assert [s.latency_ms for s in profile.samples[:2]] == pytest.approx([base, base])


def test_an_unsteady_warm_up_ends_at_its_limit_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = Device(law)
    device.latency = lambda h, c: law(h, c) * 1.5 ** len(device.calls)
    plan = plan_for(max_forwards=8, max_warmup=5)
    profile = profile_prefill(device.step, plan, timer=device.timer)
    assert len(profile.warmup_ms) == 5
    assert "did not get steady" in caplog.text


def test_the_budget_of_forwards_counts_warm_up_and_repeats() -> None:
    device = Device(law, noise=0.1)
    slow = iter([9.0, 5.0, 2.0])  # forwards, but no samples
    device.latency = lambda h, c: law(h, c) * next(slow, 1.0)
    profile = profile_prefill(device.step, plan_for(max_forwards=20), timer=device.timer)
    assert profile.forwards == len(device.calls) == 20
    assert len(profile) <= 17
    assert len(profile) - (20 - len(profile.warmup_ms)) in (1, 2)  # of the warm-up
    assert profile.stop_reason == "all 20 forwards used"


def test_the_budget_of_seconds_stops_before_the_next_forward() -> None:
    device = Device(law)
    profile = profile_prefill(device.step, plan_for(max_seconds=0.0), timer=device.timer)
    assert device.calls == []
    assert len(profile) == 0
    assert profile.stop_reason == "all 0 s used"


def test_it_stops_early_when_the_law_is_found_and_not_when_noise_hides_it() -> None:
    clean, noisy = Device(law), Device(law, noise=0.1)
    early = profile_prefill(clean.step, plan_for(), timer=clean.timer)
    full = profile_prefill(noisy.step, plan_for(), timer=noisy.timer)
    assert early.stop_reason.startswith("hold-out error")
    assert early.forwards < full.forwards <= 48


def test_it_stops_when_the_decision_stands_though_the_error_does_not_fall() -> None:
    pytest.importorskip("scipy")
    noisy = [Device(law, noise=0.05, seed=3) for _ in range(2)]
    some, all_ = (
        profile_prefill(d.step, plan_for(decided=limit), timer=d.timer)
        for d, limit in zip(noisy, (0.05, 0.0), strict=True)
    )
    assert some.stop_reason == "the chosen plan no longer changes"
    assert some.forwards < all_.forwards == 48
    same = [s.latency_ms for s in some][:26]  # up to the second check at the earliest
    assert same == [s.latency_ms for s in all_][:26]


@pytest.mark.parametrize(("least", "planned"), [(26, 24), (27, 32)])
def test_it_stops_no_earlier_than_with_the_least_number_of_samples(
    least: int, planned: int
) -> None:
    """Two samples of the warm-up and 24 planned points are 26; it looks every eight points."""
    device = Device(law)
    plan = plan_for(min_samples=least, on_policy=0, repeats=0)
    profile = profile_prefill(device.step, plan, timer=device.timer)
    assert [(s.history_len, s.chunk_len) for s in profile][2:] == list(plan.points[:planned])


def run_with(samples: int, **report: Any) -> _Run:
    """A profile under way, whose fit so far is known: median error 1 %, p95 4 %, waves of 1,056."""
    form = Form("waves", (4.0, 0, 0, 0, 0.0105, 1.2e-7, 2.6e-7), floor_ms=7.0, tile=128, wave=1056)
    plan = plan_for(min_samples=20, target_error=0.01)
    run = _Run(lambda history, chunk: None, plan, _at_once(host_timer), lambda: None)
    run.samples = [Sample(h, c, law(h, c)) for h, c in plan.points[:samples]]
    found = {
        "holdout_median": 0.01,
        "holdout_p95": 0.04,
        "rejected": (),
        "samples_used": samples,
        "scores": {},
        "usable": True,
        "reason": "",
    }
    fit_report = FitReport("waves", {}, 7.0, 128, 1056, **(found | report))
    run.fitted = LatencyModel(form, fit_report, run.samples)
    return run


@pytest.mark.parametrize(
    ("samples", "report", "settled"),
    [
        (20, {}, True),
        (19, {}, False),
        (20, {"holdout_median": 0.0101}, False),
        (20, {"holdout_p95": 0.0401}, False),
        (20, {"rejected": ((Sample(0, 64, 9.0), "slow"),)}, True),  # one in twenty
        (20, {"rejected": ((Sample(0, 64, 9.0), "slow"),) * 2}, False),
    ],
)
def test_it_is_settled_when_all_limits_are_met(
    samples: int, report: dict[str, Any], settled: bool
) -> None:
    run = run_with(samples, **report)
    assert run.settled() == ("hold-out error 1.0%" if settled else "")


def test_a_decision_stands_if_the_one_before_is_still_as_good() -> None:
    run = run_with(20, holdout_median=0.05)
    assert not run.decided()  # there is none before
    chosen = run.chosen
    assert run.decided() and run.chosen == chosen and run.settled()
    run.chosen = (512,) * 256  # many more launches
    assert not run.decided() and run.chosen == chosen
    assert not run_with(20, usable=False).decided()


def test_it_fits_again_when_there_are_more_samples_and_not_before() -> None:
    pytest.importorskip("scipy")
    run = run_with(20)
    known = run.fit()
    assert run.fit() is known
    run.samples.append(Sample(64, 512, law(64, 512)))
    assert run.fit() is not known and len(run.fit().samples) == 21


def test_it_measures_both_sides_of_three_edges_of_the_waves() -> None:
    run = run_with(20)
    *_, a, b, c, d, e, f = run.on_policy_points()
    assert [chunk for _, chunk in (a, b, c, d, e, f)] == [1024, 1088, 2112, 2176, 3136, 3200]
    assert {history for history, _ in (a, b, c, d, e, f)} == {65_280}  # half of the deepest


class SlowAtFirst(Device):
    """The first forwards at these points take 70 ms more, as where a GPU loads kernels."""

    def __init__(self, *slow: Point) -> None:
        super().__init__(law, noise=0.01)
        self.slow = set(slow)

    def timer(self, run: Callable[[], object]) -> Timing:
        timing = super().timer(run)
        more = 70.0 if self.calls[-1] in self.slow else 0.0
        self.slow.discard(self.calls[-1])
        return Timing(timing.latency_ms + more, timing.host_ms)


def test_sizes_whose_first_forward_was_slow_are_measured_again() -> None:
    pytest.importorskip("scipy")
    sizes = (512, 2048, 4096, 10_240)
    device = SlowAtFirst(*((0, size) for size in sizes))
    profile = profile_prefill(device.step, plan_for(on_policy=0, repeats=0), timer=device.timer)
    for size in sizes[:3]:
        times = [s.latency_ms for s in profile if (s.history_len, s.chunk_len) == (0, size)]
        assert len(times) == 2 and times[0] > 1.5 * times[1]
        assert times[1] == pytest.approx(law(0, size), rel=0.05)
    assert LatencyModel.fit(profile).predict(0, 512) == pytest.approx(law(0, 512), rel=0.05)


def test_a_slow_forward_behind_a_history_is_an_outlier_and_stays_one() -> None:
    pytest.importorskip("scipy")
    plan = plan_for(on_policy=0, repeats=0)
    point = next(p for p in plan.points[8:] if 0 < p[0] < 20_000)
    device = SlowAtFirst(point)
    profile_prefill(device.step, plan, timer=device.timer)
    assert device.calls.count(point) == 1


def test_a_few_samples_do_not_tell_which_one_was_slow() -> None:
    pytest.importorskip("scipy")
    plan = plan_for(on_policy=0, repeats=0)
    few = dataclasses.replace(plan, points=plan.points[:16])
    device = SlowAtFirst((0, 512))
    profile = profile_prefill(device.step, few, timer=device.timer)
    assert device.calls.count((0, 512)) == 1
    assert len(profile) == profile.forwards - len(profile.warmup_ms) + 2


def test_no_size_is_asked_of_a_fit_that_is_not_usable() -> None:
    assert list(run_with(20, usable=False).on_policy_points()) == []


def test_it_measures_where_a_sizer_would_go() -> None:
    device = Device(law)
    profile_prefill(device.step, plan_for(), timer=device.timer)
    off_plan = [p for p in device.calls if p not in plan_for().points and p != plan_for().base]
    long = [chunk for history, chunk in off_plan if history > 100_000]
    assert long
    assert all(law(120_000, chunk) == pytest.approx(law(0, 8192), rel=0.25) for chunk in long)


class Engine(Device):
    """A step that owns something for the whole profile."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(law)
        self.error, self.entered, self.left = error, 0, 0

    def __enter__(self) -> Callable[[int, int], None]:
        self.entered += 1
        return self.step

    def __exit__(self, *_: object) -> None:
        self.left += 1

    def step(self, history_len: int, chunk_len: int) -> None:
        super().step(history_len, chunk_len)
        if len(self.calls) == 5:
            raise self.error


def test_a_failing_step_is_named_and_its_context_left() -> None:
    engine = Engine(ValueError("no free slot"))
    with pytest.raises(
        ProfileError, match=r"after 5 forwards and 4 samples.*no free slot"
    ) as caught:
        profile_prefill(engine, plan_for(), timer=engine.timer)
    assert caught.value.__cause__ is engine.error
    assert (engine.entered, engine.left) == (1, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there_is_a_profile_error_and_the_context_left() -> None:
    """The error that says so, not the one of waiting for it."""
    engine = Engine(ValueError("not reached"))
    with pytest.raises(ProfileError, match="after 1 forwards and 0 samples") as caught:
        profile_prefill(engine, plan_for(), device="cuda")
    cause = caught.value.__cause__
    assert isinstance(cause, (RuntimeError, AssertionError)) and str(cause) in str(caught.value)
    assert (engine.entered, engine.left, engine.calls) == (1, 1, [])


def test_an_interrupt_passes_through_and_leaves_the_context() -> None:
    engine = Engine(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        profile_prefill(engine, plan_for(), timer=engine.timer)
    assert engine.left == 1


def test_points_beyond_device_memory_are_left_out_and_not_tried_again() -> None:
    device = Device(law)
    failed: list[Point] = []

    def step(history: int, chunk: int) -> None:
        device.step(history, chunk)
        if chunk > 8192 or history + chunk > 100_000:
            failed.append((history, chunk))
            raise torch.OutOfMemoryError("CUDA out of memory")

    profile = profile_prefill(step, plan_for(), timer=device.timer)
    assert len(profile) > 20
    assert all(s.chunk_len <= 8192 and s.history_len + s.chunk_len <= 100_000 for s in profile)
    assert set(failed) < set(profile.skipped)
    for i, (history, chunk) in enumerate(failed):
        assert not any(history >= h and chunk >= c for h, c in failed[:i])


def test_a_timer_that_gives_no_time_is_an_error() -> None:
    def broken(run: Callable[[], object]) -> Timing:
        run()
        return Timing(0.0, 0.0)

    with pytest.raises(ProfileError, match=r"0\.0 ms"):
        profile_prefill(Device(law).step, plan_for(), timer=broken)


def test_random_ids_stay_in_the_vocabulary_and_reach_its_ends() -> None:
    ids = random_token_ids(4000, 50, seed=3)
    assert ids.typecode == "q"
    assert set(ids) == set(range(50))
    assert ids == random_token_ids(4000, 50, seed=3)


def test_a_profile_survives_json() -> None:
    samples = (Sample(0, 64, 1.5, 2.0), Sample(64, 128, 2.5))
    profile = Profile(samples, 4, 1.25, "enough", (3.0, 1.5), ((0, 4096),))
    again = Profile.from_json(profile.to_json())
    assert again.to_json() == profile.to_json()
    assert again.samples[0] == samples[0]
    assert np.isnan(again.samples[1].host_ms)


def test_lengths_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="impossible lengths"):
        Sample(-1, 64, 1.0)
    with pytest.raises(ValueError, match="impossible lengths"):
        Sample(0, 0, 1.0)
    with pytest.raises(ValueError, match="at least one point"):
        SamplePlan(points=(), base=(0, 64))
    with pytest.raises(ValueError, match="max_forwards=2: at least 3"):
        SamplePlan(points=((0, 64),), base=(0, 64), max_forwards=2)
    assert SamplePlan(points=((0, 64),), base=(0, 64), max_forwards=3).max_forwards == 3


def test_the_host_timer_runs_once() -> None:
    runs: list[int] = []
    timing = host_timer(lambda: runs.append(1))
    assert runs == [1]
    assert timing.latency_ms == timing.host_ms > 0


def test_chunks_are_timed_in_their_order() -> None:
    device = Device(law)
    points = [(0, 512), (4096, 1024), (0, 512)]
    times = time_chunks(device.step, points, "cpu")
    assert device.calls == points and all(ms > 0 for ms in times)
    assert time_chunks(device.step, [], "cpu") == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_forward_starts_while_the_one_before_still_runs() -> None:
    """The clock does not wait for the forwards, and gives each its own time."""
    clock, cycles = DeviceClock(), 20_000_000
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    ran = torch.cuda.Event()
    ready = []
    for n in (1, 3):
        ready.append(clock(lambda n=n: [torch.cuda._sleep(cycles) for _ in range(n)]))
        ran.record()
        assert not ran.query()
    one, three = (r().latency_ms for r in ready)
    assert 2.5 * one < three < 3.5 * one
    ready = [clock(lambda: torch.cuda._sleep(cycles)) for _ in range(clock.AHEAD + 2)]
    assert len(clock._ends) == clock.AHEAD
    assert all(r().latency_ms == pytest.approx(one, rel=0.2) for r in ready)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_size_runs_once_before_it_is_timed_on_a_device() -> None:
    device = Device(law)
    assert len(time_chunks(device.step, [(64, 512), (0, 1024), (0, 512)], "cuda")) == 3
    assert device.calls == [(0, 512), (0, 1024), (64, 512), (0, 1024), (0, 512)]


@pytest.mark.parametrize("rich_there", [True, False])
def test_progress_works_with_and_without_rich(
    rich_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rich_there:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    device = Device(law)
    plan = plan_for(max_forwards=6)
    assert profile_prefill(device.step, plan, timer=device.timer, progress=True).forwards == 6


def test_importing_needs_only_torch_and_numpy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import pystage.pp;"
        "extra = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(extra & {'scipy', 'matplotlib', 'rich', 'transformers'}),"
        "torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
