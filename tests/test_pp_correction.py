"""Correction while serving: which times count, that it never waits, and when the ranks change."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import pystage
from pystage.pp import Correction, LatencyModel
from pystage.pp.apart import apart
from pystage.testing import hold_transfers
from tests.test_pp_model import PLAN, chunks_run, law, samples_of
from tests.test_pp_share import on_ranks

pytest.importorskip("scipy")


def slower(history: int, chunk: int) -> float:
    """Attention takes 1.3 times what it took when profiled."""
    return law(history, chunk) + 0.3 * 3.8e-7 * (2 * history + chunk) * chunk


def model() -> LatencyModel:
    return LatencyModel.fit(samples_of(law, points=PLAN.points), forms=["law"])


class Mark:
    """An event of a device that is done when the test says so. Cannot be waited for."""

    def __init__(self, ms: float, done: bool = True) -> None:
        self.ms, self.done = ms, done

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, end: Mark) -> float:
        assert self.done and end.done
        return end.ms - self.ms


def test_events_are_read_when_they_are_done_and_in_order() -> None:
    correction = Correction(model())
    ends = [Mark(5.0 + i, done=False) for i in range(3)]
    for i, end in enumerate(ends):
        assert correction.observe([(1024 * i, 512)], Mark(1.0), end)
    assert correction.collect() == 0
    ends[1].done = True
    assert correction.collect() == 0  # the first is still running
    ends[0].done = True
    assert correction.collect() == 2
    assert [(s.history_len, s.chunk_len, s.latency_ms) for s in correction._done] == [
        (0, 512, 4.0),
        (1024, 512, 5.0),
    ]


def test_batches_of_several_requests_or_decodes_do_not_count() -> None:
    correction = Correction(model())
    for pieces in ([], [(0, 1)], [(0, 512), (9, 1)], [(0, 512), (0, 512)]):
        assert not correction.observe(pieces, Mark(0.0), Mark(1.0))
        assert not correction.observe_ms(pieces, 1.0)
    assert correction.collect() == 0
    assert correction.observe_ms([(0, 512)], 1.0) and correction.collect() == 1


def test_no_more_than_so_many_are_kept() -> None:
    correction = Correction(model(), pending=8)
    ends = [Mark(1.0, done=False) for _ in range(20)]
    for i, end in enumerate(ends):
        correction.observe([(64 * i, 512)], Mark(0.0), end)
        correction.observe_ms([(64 * i, 512)], 1.0)
    assert [batch[0] for batch in correction._running] == [64 * i for i in range(12, 20)]
    for end in ends:
        end.done = True
    assert correction.collect() == 8
    assert not correction._running


def serve(rank: int, folder: str) -> None:
    """Rank 0 sees a device that became slower; all change at the agreement, none before."""
    correction = Correction(model())
    seen = [correction.model.predict(60_000, 2048)]
    changed = [correction.agree()]
    if rank == 0:
        for sample in chunks_run(slower, 128, seed=5):
            correction.observe_ms([(sample.history_len, sample.chunk_len)], sample.latency_ms)
        assert correction.refit()
    seen.append(correction.model.predict(60_000, 2048))
    with correction._lock:  # a refit is under way
        changed.append(correction.agree())
    changed += [correction.agree(), correction.agree()]
    seen.append(correction.model.predict(60_000, 2048))
    body = [seen, changed, correction.model.to_json()["committee"]]
    Path(folder, f"{rank}.json").write_text(json.dumps(body))
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 3.0


def test_all_ranks_change_their_model_at_the_agreement(tmp_path: Path) -> None:
    on_ranks(3, tmp_path, serve)
    first, *others = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(3)]
    (before, still, after), changed, committee = first
    assert before == still == pytest.approx(law(60_000, 2048), rel=0.01)
    assert after == pytest.approx(slower(60_000, 2048), rel=0.05)
    assert changed == [False, False, True, False]
    assert others == [first, first] and len(committee) == 5


def test_a_refit_leaves_the_interpreter_to_the_forwards(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs in another process, with the chunks of earlier refits, in lots of 32."""

    def not_here(*_args: object) -> None:
        raise AssertionError("a fit in the process that serves")

    correction = Correction(model())
    monkeypatch.setattr("pystage.pp.model.fit_form", not_here)
    sent = []
    monkeypatch.setattr(
        "pystage.pp.correction.apart", lambda f, *args: sent.append(args[1]) or apart(f, *args)
    )
    chunks, refitted = chunks_run(slower, 110, seed=5), []
    with caplog.at_level(logging.INFO, logger="pystage.pp.apart"):
        for new in (chunks[:20], chunks[20:70], chunks[70:90], chunks[90:]):
            for chunk in new:
                correction.observe_ms([(chunk.history_len, chunk.chunk_len)], chunk.latency_ms)
            refitted.append(correction.refit())
    assert refitted[:3] == [False, True, False]
    assert sent == [chunks[:64], chunks[:96]]
    assert "latency model refitted on" in caplog.text


def test_what_fails_in_the_other_process_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"sqrt failed in its process .*\n[\s\S]*math domain"):
        apart(math.sqrt, -1.0)


def test_the_other_process_may_print_and_has_one_core_and_no_gpu() -> None:
    assert apart(print, "not a result") is None
    assert apart(os.getenv, "OMP_NUM_THREADS") == "1"
    assert apart(os.getenv, "CUDA_VISIBLE_DEVICES") == ""
    assert apart(os.nice, 0) == min(os.nice(0) + 10, 19)
    assert apart(os.getpid) != os.getpid()


def test_what_the_other_process_prints_while_it_starts_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noisy.py").write_text("print('hello')\ndef f():\n    return 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    noisy = importlib.import_module("noisy")
    assert apart(noisy.f) == 7


def test_a_slower_attention_is_learned_to_a_fraction_of_the_error() -> None:
    correction = Correction(model())
    for sample in chunks_run(slower, 256, seed=2, noise=0.03):
        correction.observe_ms([(sample.history_len, sample.chunk_len)], sample.latency_ms)
    assert correction.refit()
    points = [(h, c) for h in range(20_000, 120_000, 9_999) for c in (1024, 4096)]
    old, new = (
        np.median([abs(m.predict(h, c) / slower(h, c) - 1) for h, c in points])
        for m in (correction.model, correction._draft)
    )
    assert old > 0.10 and new < 0.025
    correction.model.adopt(correction._draft)
    assert correction.model.predict(0, 8192) == correction._draft.predict(0, 8192)


def test_times_that_are_none_do_not_count() -> None:
    correction = Correction(model())
    for ms in (0.0, -1.0, math.nan, math.inf):
        assert not correction.observe_ms([(0, 512)], ms)
    assert correction.collect() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_events_are_not_waited_for() -> None:
    pool = pystage.StagingPool(device="cuda")
    correction = Correction(model())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a = torch.ones(512, 512, device="cuda") @ torch.ones(512, 512, device="cuda")
    begin.record()  # what torch and CUDA load or make first would wait for the held stream
    end.record()
    end.synchronize()
    with hold_transfers(pool):
        begin.record()
        a = a @ a
        end.record()
        assert correction.observe([(0, 512)], begin, end)
        assert correction.collect() == 0
    end.synchronize()
    assert correction.collect() == 1
