"""The plugin in the real SGLang on a CPU, loaded by its entry point, with a real model runner.

Work without the plugin runs first. Then the plugin is loaded, and the results must be the same.
Cases that need another environment, or that break something, run in separate processes.

This is one file because all tests share one engine, whose start takes most of a minute.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
import warnings
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pystage
from pystage.batch import forgotten_resolves
from pystage.integrations import sglang as plugin
from pystage.integrations.sglang import budget as limits
from pystage.integrations.sglang import correction, pp
from pystage.integrations.sglang.settings import Settings
from pystage.pp import BudgetSizer, LatencyModel, QueueSizer
from pystage.pp.forms import Form
from pystage.pp.profile import Timing
from pystage.testing import synchronize
from tests.test_pp_sizer import model_of

if importlib.util.find_spec("sglang") is None:
    pytest.skip("needs SGLang: make sglang-test", allow_module_level=True)

from bench.in_sglang import rig as sglang_rig

pytestmark = pytest.mark.sglang
ROOT = Path(__file__).resolve().parent.parent
OLD = os.environ.get("PYSTAGE_TEST_SGLANG_OLD", "")
EVERYTHING = {
    *("staging", "resolve", "mixed", "guard", "history", "metrics", "profiler", "small", "rows")
}
os.environ["PYSTAGE_SGLANG_CPU"] = "1"  # here and in the processes below

Outcome = dict[str, Any]


# --- what a scheduler does ------------------------------------------------------------------------


def chunked_mixed_decode(rig: Any) -> Outcome:
    """Two requests and a chunk of a third; its second chunk with the two running; decode."""
    first, second, chunked = (
        rig.request(range(a, b)) for a, b in ((10, 17), (100, 103), (200, 212))
    )
    chunked.extend_end = 8
    out: Outcome = {}
    batch = rig.batch([first, second, chunked])
    batch.prepare_for_extend()
    sampled = step(rig, batch, out, "extend")
    for req, token in zip((first, second), sampled, strict=False):
        req.output_ids.append(token)
    batch.filter_batch(reqs_to_exclude=[chunked])
    rig.next_chunk(chunked)
    mixed = rig.batch([chunked])
    mixed.prepare_for_extend()
    batch.prepare_for_decode()
    mixed.mix_with_running(batch)
    sampled = step(rig, mixed, out, "mixed")
    for req, token in zip((chunked, first, second), sampled, strict=True):
        req.output_ids.append(token)
    mixed.prepare_for_decode()
    step(rig, mixed, out, "decode")
    rig.release(chunked, first, second)
    return out


def two_chunks(rig: Any) -> Outcome:
    """A long request in two chunks, the array growing in between."""
    req = rig.request([i * 7 % 512 for i in range(700)])
    req.extend_end = 512
    out: Outcome = {}
    for name in ("chunk 1", "chunk 2"):
        batch = rig.batch([req])
        batch.prepare_for_extend()
        req.full_untruncated_fill_ids.append(3)
        req.full_untruncated_fill_ids.pop()
        step(rig, batch, out, name)
        rig.next_chunk(req)
    rig.release(req)
    return out


def step(rig: Any, batch: Any, out: Outcome, name: str) -> list[int]:
    rig.resolve(batch)
    assert batch.prefill_input_ids_cpu is None and batch.mix_running_indices is None
    out[f"{name}: ids"] = batch.input_ids.clone()
    out[f"{name}: logits"], sampled = rig.forward(batch)
    return [int(token) for token in sampled]


def encoder_decoder(rig: Any) -> Outcome:
    """Flattens the ids a second time, without the encoder's."""
    pictured, plain = rig.request(range(20, 40)), rig.request(range(5))
    pictured.multimodal_inputs = SimpleNamespace(
        num_image_tokens=6,
        vision_position_ids=None,
        visible_frame_counts=None,
        release_features=None,
    )
    batch = rig.batch([pictured, plain])
    batch.model_config = SimpleNamespace(is_encoder_decoder=True, vocab_size=512)
    batch.prepare_for_extend()
    rig.resolve(batch)
    out = {"ids": batch.input_ids, "lens": batch.extend_lens}
    rig.release(pictured, plain)
    return out


def swa_replay(rig: Any) -> Outcome:
    """``encoder_swa_replay`` slices the staged ids and reads them on the CPU."""
    from sglang.srt.model_executor import encoder_swa_replay

    reqs = [rig.request(range(30, 60)), rig.request(range(9))]
    batch = rig.batch(reqs)
    batch.prepare_for_extend()
    batch.input_ids = batch.prefill_input_ids_cpu.to("cpu", non_blocking=True)
    batch.prefix_lens, batch.engram_history = [8, 0], None
    runner = SimpleNamespace(device="cpu", req_to_token_pool=rig.rows)
    folded = encoder_swa_replay._fold_batch(batch=batch, runner=runner, rows=[(0, 4, 8)]).batch
    out = {"ids": folded.input_ids, "cpu": folded.prefill_input_ids_cpu}
    rig.release(*reqs)
    return out


def dllm(rig: Any) -> Outcome:
    """A diffusion model's extend is staged as any other."""
    req = rig.request(range(60, 76))
    batch = rig.batch([req])
    batch.dllm_config = SimpleNamespace(block_size=4)
    req.dllm_incomplete_ids = []
    batch.prepare_for_extend()
    assert batch.forward_mode.name == "DLLM_EXTEND"
    rig.resolve(batch)
    out = {"ids": batch.input_ids}
    rig.release(req)
    return out


def idle_and_prebuilt(rig: Any) -> Outcome:
    """Nothing is staged for a rank without requests, or a prefill done elsewhere."""
    idle = rig.batch([])
    idle.prepare_for_idle()
    rig.resolve(idle)
    req = rig.request(range(12))
    batch = rig.batch([req])
    batch.prepare_for_extend()
    rig.resolve(batch)
    prebuilt = rig.batch([req])
    prebuilt.prepare_for_prebuilt()
    assert prebuilt.prefill_input_ids_cpu is None
    rig.future_map.output_tokens_buf[prebuilt.req_pool_indices] = 77
    rig.resolve(prebuilt)  # its next decode reads the relay
    out = {"idle": idle.input_ids, "prebuilt": prebuilt.input_ids}
    rig.release(req)
    return out


def merged(rig: Any) -> Outcome:
    """A resolved prefill joins the running requests."""
    reqs = [rig.request(range(50 + 10 * i, 57 + 10 * i)) for i in range(2)]
    batches = [rig.batch([req]) for req in reqs]
    for req, batch in zip(reqs, batches, strict=True):
        batch.prepare_for_extend()
        rig.resolve(batch)
        _, sampled = rig.forward(batch)
        req.output_ids.append(int(sampled[0]))
    running, other = batches
    running.merge_batch(other)
    running.prepare_for_decode()
    out: Outcome = {}
    step(rig, running, out, "decode")
    rig.release(*reqs)
    return out


def embedding(rig: Any) -> Outcome:
    """For an embedding model the batch is recorded before it is resolved, in overlap mode."""
    from sglang.srt.managers.scheduler import Scheduler

    recorder = SimpleNamespace(batch_record_ct=0, batch_record_buf=[None, None])
    ids = []
    for i in range(5):
        req = rig.request(range(i, i + 20))
        batch = rig.batch([req])
        batch.prepare_for_extend()
        Scheduler.record_batch_in_overlap(recorder, batch)
        rig.resolve(batch)
        ids.append(batch.input_ids)
        rig.release(req)
    return {"ids": ids}


def special_requests(rig: Any) -> Outcome:
    """What else is made of sampling parameters, beside small tensors, and read at once."""
    reqs = [rig.request(range(n, n + 9)) for n in range(10, 60, 10)]
    _plain, biased, penalized, logprobs, hot = reqs
    biased.sampling_params.logit_bias = {"5": 30.0, "7": -4.0}
    penalized.sampling_params.frequency_penalty = 0.5
    penalized.sampling_params.presence_penalty = 0.25
    penalized.sampling_params.repetition_penalty = 1.5
    logprobs.return_logprob, logprobs.logprob_start_len = True, 2
    hot.sampling_params.temperature, hot.sampling_params.top_p = 0.75, 0.5
    hot.sampling_params.top_k, hot.sampling_params.min_p = 3, 0.125
    batch = rig.batch(reqs)
    batch.prepare_for_extend()
    info = batch.sampling_info
    out: Outcome = {
        name: getattr(info, name).clone()
        for name in ("temperatures", "top_ps", "top_ks", "min_ps", "logit_bias")
    }
    out |= {name: getattr(batch, name).clone() for name in ("seq_lens", "orig_seq_lens")}
    assert out["logit_bias"][1, 5] == 30.0 and out["temperatures"][4] == 0.75
    out["logprob ids"] = batch.extend_input_logprob_token_ids
    for req, row, at in zip(reqs, batch.req_pool_indices.tolist(), range(0, 45, 9), strict=True):
        written = rig.rows.req_to_token[row, req.prefix_len : req.extend_end]
        assert torch.equal(written.long(), batch.out_cache_loc[at : at + 9])
    assert torch.equal(batch.req_pool_indices, batch.req_pool_indices_cpu)
    step(rig, batch, out, "extend")
    rig.release(*reqs)
    return out


def hybrid(rig: Any) -> Outcome:
    """A hybrid model's batch: one more small tensor is made, and read at once."""
    from sglang.srt.managers import schedule_batch

    execution = schedule_batch.get_exec()
    mamba = SimpleNamespace(enable_mamba_extra_buffer=True, enable_mamba_extra_buffer_lazy=False)
    tracked = SimpleNamespace(track_mask=True, track_position=1, track_seqlen=64)
    reqs = [rig.request(range(n)) for n in (40, 50, 60)]
    batch = rig.batch(reqs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            schedule_batch,
            "get_exec",
            lambda: SimpleNamespace(**{**vars(execution), "mamba": mamba}),
        )
        patch.setattr(
            type(batch), "_mamba_radix_cache_v2_req_prepare_for_extend", lambda *_: tracked
        )
        slots = torch.arange(2 * len(rig.rows.req_to_token)).view(-1, 2) + 1000
        name = "req_index_to_mamba_ping_pong_track_buffer_mapping"
        patch.setattr(rig.rows, name, slots, raising=False)
        batch.prepare_for_extend()
        rows = batch.req_pool_indices_cpu
        assert torch.equal(batch.mamba_track_indices, slots[rows, 1])
    out = {"mask": batch.mamba_track_mask, "lengths": batch.mamba_track_seqlens}
    out |= {"temperatures": batch.sampling_info.temperatures.clone()}
    rig.resolve(batch)
    rig.release(*reqs)
    return out | {"ids": batch.input_ids}


SCENARIOS: list[Callable[[Any], Outcome]] = [
    chunked_mixed_decode,
    two_chunks,
    encoder_decoder,
    swa_replay,
    dllm,
    idle_and_prebuilt,
    merged,
    embedding,
    special_requests,
    hybrid,
]


# --- before and after -----------------------------------------------------------------------------


class Engine:
    """A rig, and what every scenario gave before the plugin was loaded."""

    def __init__(self) -> None:
        sglang_rig.stand_in()
        self.rig = sglang_rig.Rig(model=True)
        importlib.import_module("sglang.srt.managers.scheduler")
        self.free = self.figures()
        torch.manual_seed(0)
        self.before = {scenario.__name__: scenario(self.rig) for scenario in SCENARIOS}
        assert plugin.pool_stats() == []
        from sglang.srt.plugins import load_plugins

        load_plugins()

    def figures(self) -> tuple[int, int]:
        return self.rig.kv.available_size(), self.rig.rows.available_size()


engines: list[Engine] = []


@pytest.fixture
def engine() -> Iterator[Engine]:
    """With the plugin. Nothing may be held afterwards: no KV cache, no row, no slot."""
    if not engines:
        engines.append(Engine())
    engine = engines[0]
    yield engine
    gc.collect()
    assert engine.figures() == engine.free
    for pool in [p for p in plugin.process.pools._pools.values() if p is not None]:
        synchronize(pool)
        stats = pool.stats()
        assert (stats.leased_slots, stats.in_flight_slots, stats.quarantined_slots) == (0, 0, 0)


def test_every_hook_is_in_place(engine: Engine) -> None:
    status = plugin.status()
    assert status["off"] == "" and status["broken"] == status["left"] == []
    assert set(status["active"]) == EVERYTHING


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_the_same_with_and_without(engine: Engine, scenario: Callable[[Any], Outcome]) -> None:
    before = engine.before[scenario.__name__]
    stages = sum(stats.stages for stats in plugin.pool_stats())
    after = scenario(engine.rig)
    assert before.keys() == after.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert sum(stats.stages for stats in plugin.pool_stats()) > stages


def test_ids_wait_in_the_pool(engine: Engine) -> None:
    req = engine.rig.request(range(40))
    batch = engine.rig.batch([req])
    batch.prepare_for_extend()
    staged = batch.prefill_input_ids_cpu
    assert isinstance(staged, pystage.StagedTokens) and batch.input_ids is None
    assert staged.tolist() == list(range(40))
    req.full_untruncated_fill_ids.append(1)  # no buffer of it is exported
    engine.rig.resolve(batch)
    assert type(batch.input_ids) is torch.Tensor
    engine.rig.release(req)


def test_small_tensors_are_of_one_parcel(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven tensors, in three deliveries; of decode none."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    rig = engine.rig
    reqs = [rig.request(range(n)) for n in (5, 9)]
    batch = rig.batch(reqs)
    seen = []
    alloc = rig.kv.alloc
    with monkeypatch.context() as patch:
        # Where KV memory is allocated, the lengths have to be there: pages are counted by them.
        patch.setattr(rig.kv, "alloc", lambda n: seen.append(batch.seq_lens.tolist()) or alloc(n))
        batch.prepare_for_extend()
    assert seen == [[5, 9]]
    info = batch.sampling_info
    made = [batch.seq_lens, batch.orig_seq_lens, batch.req_pool_indices]
    made += [info.temperatures, info.top_ps, info.top_ks, info.min_ps]
    assert len({t.untyped_storage().data_ptr() for t in made}) == 1
    assert batch.seq_lens.tolist() == [5, 9] and batch.orig_seq_lens.dtype == torch.int32
    # What stays on the host is a tensor like any other, in memory of its own.
    for host in (batch.seq_lens_cpu, batch.req_pool_indices_cpu):
        assert type(host) is torch.Tensor and host.__dict__ == {}
    rig.resolve(batch)
    forward = ForwardBatch.init_new(batch, rig.runner, return_hidden_states_before_norm=False)
    built = [forward.extend_seq_lens, forward.extend_prefix_lens]
    assert len({t.untyped_storage().data_ptr() for t in built}) == 1
    assert [t.tolist() for t in built] == [[5, 9], [0, 0]]
    assert torch.tensor is tensor and torch.full is full
    rig.release(*reqs)


tensor, full = torch.tensor, torch.full


def test_a_batch_that_fails_leaves_torch_as_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = engine.rig
    req = rig.request(range(8))
    batch = rig.batch([req])

    def fails(*args: Any) -> None:
        assert torch.tensor is not tensor
        raise RuntimeError("no rows")

    with monkeypatch.context() as patch:
        patch.setattr(rig.rows, "alloc", fails)
        with pytest.raises(RuntimeError, match="no rows"):
            batch.prepare_for_extend()
    assert torch.tensor is tensor and torch.full is full
    assert batch.seq_lens.tolist() == [8]  # made before, and delivered
    batch = rig.batch([req])
    batch.prepare_for_extend()
    rig.release(req)


def test_rows_that_pystage_cannot_write_are_sglangs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plugin.status()["counts"]["sglang_rows"]
    rig = engine.rig
    with monkeypatch.context() as patch:
        patch.setattr(rig.rows, "req_to_token", rig.rows.req_to_token.long())
        req = rig.request(range(8))
        batch = rig.batch([req])
        batch.prepare_for_extend()
        row = rig.rows.req_to_token[int(batch.req_pool_indices[0]), :8]
        assert torch.equal(row, batch.out_cache_loc)
    rig.release(req)
    assert plugin.status()["counts"]["sglang_rows"] == before + 1


def test_without_the_setting_small_tensors_are_sglangs() -> None:
    code = """
    load(lambda: None)
    assert run() == "StagedTokens"
    """
    done = process(
        OTHER_PLUGIN, code, "print(json.dumps(plugin.status()))", PYSTAGE_SGLANG_SMALL="0"
    )
    status = json.loads(done.stdout.splitlines()[-1])
    assert set(status["active"]) == EVERYTHING - {"small", "rows"} and status["left"] == []


def test_small_tensors_of_other_code_are_sglangs() -> None:
    code = """
    from sglang.srt.mem_cache import allocation

    changed(allocation.alloc_for_extend, allocation, "batch.maybe_evict_swa()", "pass")
    changed(allocation.write_cache_indices, allocation, "pt = 0", "pt = 0 + 0")
    schedule_batch.alloc_for_extend = allocation.alloc_for_extend
    load(lambda: None)
    assert run() == "StagedTokens"
    """
    done = process(OTHER_PLUGIN, code, "print(json.dumps(plugin.status()))")
    status = json.loads(done.stdout.splitlines()[-1])
    assert set(status["active"]) == EVERYTHING - {"small", "rows"} and status["broken"] == []
    small, rows = status["left"]
    assert "small (its alloc_for_extend is not that of a known release" in small
    assert "rows (its write_cache_indices is not that of a known release" in rows


def test_small_tensors_that_others_see_made_are_sglangs() -> None:
    code = """
    def theirs():
        around("mem_cache.allocation.alloc_for_extend", lambda f, batch: f(batch))
        around("mem_cache.allocation.write_cache_indices", lambda f, *args: f(*args))
    load(theirs)
    assert run() == "StagedTokens"
    """
    done = process(OTHER_PLUGIN, code, "print(json.dumps(plugin.status()))")
    status = json.loads(done.stdout.splitlines()[-1])
    assert set(status["active"]) == EVERYTHING - {"small", "rows"} and status["broken"] == []
    assert status["left"] == [
        "small (another plugin hooks mem_cache.allocation:alloc_for_extend)",
        "rows (another plugin hooks mem_cache.allocation:write_cache_indices)",
    ]


def test_mixed_is_one_transfer(engine: Engine) -> None:
    before = plugin.pool_stats()
    chunked_mixed_decode(engine.rig)
    (stats,) = plugin.pool_stats()
    count = before[0].kernel_transfers if before else 0
    assert stats.kernel_transfers - count == 2  # the extend and the mixed batch
    assert stats.copy_engine_transfers == stats.fallbacks == 0


def test_the_history_is_not_copied(engine: Engine) -> None:
    """A chunk behind a million tokens: SGLang copies 8 MiB, this the chunk."""
    from sglang.srt.managers import schedule_batch

    req = engine.rig.request([1])
    history = 1 << 20
    req.full_untruncated_fill_ids = array("q", range(history + 512))
    req.prefix_len, req.extend_end = history, history + 500

    def ids_of(batch: Any) -> Any:
        parts = [r.get_fill_ids()[r.prefix_len :] for r in batch.reqs]
        return schedule_batch.flatten_arrays_to_pinned_cpu(parts, False)

    batch = engine.rig.batch([req])
    plugin.staging.prepare_for_extend(ids_of, batch)  # the pool is there
    tracemalloc.start()
    staged = plugin.staging.prepare_for_extend(ids_of, batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert staged.tolist() == list(range(history, history + 500))
    assert peak < 64 << 10, peak
    assert len(req.get_fill_ids()) == history + 500  # elsewhere it is an array, as ever
    assert type(req.get_fill_ids()) is array
    engine.rig.tree.unlock(req.lock)


def test_who_forgets_to_resolve_is_told(engine: Engine) -> None:
    expected = engine.before["chunked_mixed_decode"]["extend: logits"][:1]
    req = engine.rig.request(range(10, 17))
    batch = engine.rig.batch([req])
    batch.prepare_for_extend()
    count = forgotten_resolves()
    with pytest.warns(pystage.ForgottenResolveWarning, match=r"rig\.py:\d+"):
        logits, _ = engine.rig.forward(batch)
    assert forgotten_resolves() == count + 1
    torch.testing.assert_close(logits, expected)
    engine.rig.release(req)


def test_one_batch_of_sglangs_own_benchmark(engine: Engine) -> None:
    from sglang.benchmark import one_batch

    reqs = [engine.rig.request(range(10, 17))]
    stages = sum(stats.stages for stats in plugin.pool_stats())
    with warnings.catch_warnings():
        warnings.simplefilter("error", pystage.ForgottenResolveWarning)
        _, logits, _ = one_batch.extend(reqs, engine.rig.runner)
    expected = engine.before["chunked_mixed_decode"]["extend: logits"][:1]
    torch.testing.assert_close(logits, expected)
    assert sum(stats.stages for stats in plugin.pool_stats()) == stages + 1
    engine.rig.release(*reqs)


def test_merging_two_unresolved_prefills_keeps_all_ids(engine: Engine) -> None:
    """SGLang's own merge would keep those of the first batch alone."""
    rig = engine.rig
    reqs = [rig.request(range(40)), rig.request(range(100, 125))]
    first, second = (rig.batch([req]) for req in reqs)
    for batch in (first, second):
        batch.prepare_for_extend()
    first.merge_batch(second)
    assert len(first.reqs) == 2
    rig.resolve(first)
    assert first.input_ids.tolist() == [*range(40), *range(100, 125)]
    rig.release(*reqs)


def test_merging_a_prefill_into_running_requests_is_refused(engine: Engine) -> None:
    """Before its forward: the ids of the others are in the relay, and its own would be lost."""
    rig, out = engine.rig, {}
    running, late = rig.request(range(30)), rig.request(range(200, 212))
    decode = rig.batch([running])
    decode.prepare_for_extend()
    running.output_ids.append(step(rig, decode, out, "extend")[0])
    prefill = rig.batch([late])
    prefill.prepare_for_extend()
    with pytest.raises(pystage.UnresolvedInputsError, match="would lose the staged ids"):
        decode.merge_batch(prefill)
    assert len(decode.reqs) == 1 and prefill.prefill_input_ids_cpu.tolist() == [*range(200, 212)]
    # With its forward done it is merged as SGLang does.
    late.output_ids.append(step(rig, prefill, out, "late")[0])
    decode.merge_batch(prefill)
    assert decode.reqs == [running, late]
    rig.release(running, late)


def test_running_requests_behind_a_mixed_batch_are_refused(engine: Engine) -> None:
    rig, out = engine.rig, {}
    running, chunk, late = (rig.request(range(a, a + 20)) for a in (0, 100, 200))
    decode = rig.batch([running])
    decode.prepare_for_extend()
    running.output_ids.append(step(rig, decode, out, "extend")[0])
    mixed, prefill = rig.batch([chunk]), rig.batch([late])
    for batch in (mixed, prefill):
        batch.prepare_for_extend()
    decode.prepare_for_decode()
    mixed.mix_with_running(decode)
    with pytest.raises(pystage.UnresolvedInputsError):
        mixed.merge_batch(prefill)
    assert mixed.prefill_input_ids_cpu is not None and prefill.prefill_input_ids_cpu is not None
    rig.resolve(mixed)
    assert len(mixed.input_ids) == 21
    rig.release(running, chunk, late)


def test_a_full_pool_falls_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = plugin.Settings(capacity_mib=1, at_capacity="fallback", cpu=True)
    monkeypatch.setattr(plugin.process.state, "settings", settings)
    monkeypatch.setattr(plugin.process, "pools", plugin.process.Pools())
    pool = plugin.process.pools.of("cpu")
    assert pool is not None
    held = pool.stage([array("q", [1 << 40]) * (1 << 16)])
    more = [pool.stage([array("q", [1 << 40]) * (1 << 15)])]
    two_chunks(engine.rig)
    more.append(pool.stage([array("q", [1 << 40]) * (1 << 15)]))
    result = two_chunks(engine.rig)
    assert result.keys() == engine.before["two_chunks"].keys()
    assert pool.stats().fallbacks > 0
    del held, more
    pool.close()


@pytest.mark.parametrize("policy", ["wait", "raise"])
def test_at_the_cap(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, policy: Any
) -> None:
    monkeypatch.setattr(plugin.process, "_warned", set())
    monkeypatch.setattr(plugin.process.state, "settings", plugin.Settings(at_capacity=policy))
    monkeypatch.setattr(plugin.process, "pools", plugin.process.Pools())
    pool = pystage.StagingPool("cpu", 4096, at_capacity=policy, timeout_s=0.01)
    plugin.process.pools._pools["cpu", -1] = pool
    held = pool.stage([array("q", [1 << 40]) * 400])
    req = engine.rig.request(range(400))
    batch = engine.rig.batch([req])
    if policy == "raise":
        with pytest.raises(pystage.PoolExhaustedError):
            batch.prepare_for_extend()
        engine.rig.tree.unlock(req.lock)
    else:
        batch.prepare_for_extend()
        assert type(batch.prefill_input_ids_cpu) is torch.Tensor
        engine.rig.resolve(batch)
        assert batch.input_ids.tolist() == list(range(400))
        assert "SGLang's own staging" in caplog.text
        engine.rig.release(req)
    del held
    pool.close()


def test_a_closed_pool_ends_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin.process, "pools", plugin.process.Pools())
    pool = plugin.process.pools.of("cpu")
    assert pool is not None
    pool.close()
    count = plugin.status()["counts"]["sglang_stagings"]
    after = two_chunks(engine.rig)
    torch.testing.assert_close(after, engine.before["two_chunks"])
    assert plugin.status()["counts"]["sglang_stagings"] == count + 2


def test_eager(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched when the batch is prepared; the ids are the same."""
    monkeypatch.setattr(plugin.process.state, "settings", plugin.Settings(issue="eager", cpu=True))
    monkeypatch.setattr(plugin.process, "pools", plugin.process.Pools())
    for scenario in (chunked_mixed_decode, two_chunks):
        after = scenario(engine.rig)
        torch.testing.assert_close(after, engine.before[scenario.__name__], rtol=0, atol=0)
    (stats,) = plugin.pool_stats()
    assert stats.eager_transfers == 4
    plugin.process.pools.close()


def test_no_pool_no_change(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin.process, "pools", plugin.process.Pools())
    assert plugin.process.pools.of("npu:0") is None
    assert "no pool for npu:0" in caplog.text
    plugin.process.pools._pools["cpu", -1] = None
    after = two_chunks(engine.rig)
    torch.testing.assert_close(after, engine.before["two_chunks"])
    assert plugin.pool_stats() == []


# --- profiler and sizer ---------------------------------------------------------------------------


def sizer_of(engine: Engine) -> Any:
    from sglang.srt.managers.scheduler_components.dynamic_chunk_sizer import DynamicChunkSizer

    rig = engine.rig
    return DynamicChunkSizer(
        model_runner=rig.runner,
        model_config=rig.model_config,
        tree_cache=rig.tree,
        req_to_token_pool=rig.rows,
        token_to_kv_pool_allocator=rig.kv,
        spec_algorithm=rig.no_spec,
        chunked_prefill_size=512,
        max_prefill_tokens=1024,
        page_size=1,
        device="cpu",
    )


@pytest.fixture
def forwards(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The ids of every forward."""
    seen: list[torch.Tensor] = []
    forward = engine.rig.runner.forward

    def recorded(forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(forward_batch.input_ids)
        return forward(forward_batch, *args, **kwargs)

    monkeypatch.setattr(engine.rig.runner, "forward", recorded)
    return seen


def test_sglangs_profiler(engine: Engine, forwards: list[torch.Tensor]) -> None:
    from sglang.srt.managers import schedule_batch
    from sglang.srt.managers.scheduler_components import dynamic_chunk_sizer

    stages = sum(stats.stages for stats in plugin.pool_stats())
    lens, latencies = sizer_of(engine)._profile_prefill_latency()
    assert len(lens) == len(latencies) == len(forwards) == 128
    assert [len(ids) for ids in forwards] == lens
    assert max(int(ids.max()) for ids in forwards) < 512
    assert sum(stats.stages for stats in plugin.pool_stats()) == stages + 128
    assert dynamic_chunk_sizer.Req is schedule_batch.Req


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forwards of a profile run, and their times are those of LAW: no noise of this machine."""
    at = (0, 1)

    def step(self: pp.PrefillStep, history_len: int, chunk_len: int) -> None:
        nonlocal at
        at = history_len, chunk_len
        run(self, history_len, chunk_len)

    def timer(call: Any) -> Timing:
        call()
        ms = float(LAW.predict(*at))
        return Timing(ms, ms)

    run = pp.PrefillStep.__call__
    monkeypatch.setattr(pp.PrefillStep, "__call__", step)
    monkeypatch.setattr("pystage.pp.profile.host_timer", timer)


def test_pystages_profiler_and_sizer(
    engine: Engine, forwards: list[torch.Tensor], steady: None
) -> None:
    pytest.importorskip("scipy")
    assert pp.profile_and_fit(sizer_of(engine))
    assert len(forwards) > 24
    assert max(int(ids.max()) for ids in forwards) < 512
    sizes = [pp.predict(history) for history in (0, 1024, 4090)]
    assert sizes[0] in range(64, 1025, 64) and sizes[2] is None
    model = pp.serving.model
    assert model is not None and float(model.predict(1000, 500)) == pytest.approx(
        float(LAW.predict(1000, 500)), rel=0.02
    )


PLAN = [640, 512, 384, 256, 256]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> pp.Plans:
    plans = pp.Plans({1024: [512, 512], 2048: PLAN}, 4096, page_size=64, largest=1024, base=512)
    monkeypatch.setattr(pp.serving, "plans", plans)
    monkeypatch.setattr(pp.serving, "align", 1)
    return plans


def adder_of(engine: Engine, tokens: int, decodes: int = 0) -> Any:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.schedule_policy import PrefillAdder

    rig = engine.rig
    running = ScheduleBatch(reqs=[])
    return PrefillAdder(1, rig.tree, rig.kv, running, 0.5, 4096, tokens, decodes)


@pytest.mark.parametrize(
    ("tokens", "chunks"),
    [(2000, [640, 512, 384, 256, 208]), (1800, [640, 512, 384, 264]), (1000, [512, 488])],
)
def test_a_prompts_chunks_are_those_of_its_plan(
    engine: Engine, planned: pp.Plans, tokens: int, chunks: list[int]
) -> None:
    """SGLang's own adder cuts it, the first chunk included; the budget it is given is SGLang's."""
    req = engine.rig.request(range(tokens))
    sizes, more = [], True
    while more:
        history = sum(sizes)
        req.init_next_round_input(engine.rig.tree if not sizes else None)
        req.prefix_len = history
        adder = adder_of(engine, planned.next_chunk(history) if sizes else 512)
        hooked = plugin.sizer.add_chunked_req if sizes else plugin.sizer.add_one_req
        own = type(adder).add_chunked_req if sizes else type(adder).add_one_req
        extra = () if sizes else (False, None)
        hooked(own, adder, req, *extra)
        assert adder.can_run_list == [req]
        sizes.append(req.extend_end - history)
        more = req.extend_end < tokens
    assert sizes == chunks


def test_a_batch_that_has_begun_or_that_decodes_share(engine: Engine, planned: pp.Plans) -> None:
    request = engine.rig.request(range(2000))
    request.init_next_round_input(engine.rig.tree)
    begun = adder_of(engine, 512)
    begun.can_run_list.append(object())
    pp.fit_batch_to(begun, request, continued=False)
    assert begun.rem_chunk_tokens == 512
    request.prefix_len = 640
    shared = adder_of(engine, planned.next_chunk(640), decodes=100)
    pp.fit_batch_to(shared, request, continued=True)
    assert shared.rem_chunk_tokens == 512 - 100
    request.prefix_len = 0
    first = adder_of(engine, 512, decodes=100)
    pp.fit_batch_to(first, request, continued=False)
    assert first.rem_chunk_tokens == 640 - 100
    short = engine.rig.request(range(400))
    short.init_next_round_input(engine.rig.tree)
    whole = adder_of(engine, 512)
    pp.fit_batch_to(whole, short, continued=False)
    assert whole.rem_chunk_tokens == 512


def queue_of(monkeypatch: pytest.MonkeyPatch, engine: Engine, *lengths: int) -> list[Any]:
    """Requests in the queue of SGLang's scheduler, and plans with a sizer for the queue."""
    queue = QueueSizer({128: 2.0, 256: 3.0, 512: 5.5, 2048: 20.0}, 4)
    monkeypatch.setattr(pp.serving, "plans", dataclasses.replace(pp.serving.plans, queue=queue))
    requests = [engine.rig.request(range(n)) for n in lengths]
    scheduler = SimpleNamespace(waiting_queue=requests)
    monkeypatch.setattr(pp.serving, "scheduler", scheduler)
    monkeypatch.setattr(pp.serving, "tokens", 0.0)
    monkeypatch.setattr(pp.serving, "uncached", 0.0)
    return requests


def test_a_queue_passes_in_chunks_of_one_size(
    engine: Engine, planned: pp.Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts through SGLang's own adder, as its scheduler does: batches of 256 tokens, and
    a shorter one and a short tail of the last prompt, behind which nobody waits."""
    waiting = queue_of(monkeypatch, engine, 400, 300, 350)
    assert pp.serving.plans.queue.size(1050) == 256 and pp.serving.plans.queue.size(350) == 128
    batches: list[list[int]] = []
    done = dict.fromkeys(map(id, waiting), 0)
    chunked = None
    while (waiting or chunked is not None) and len(batches) < 9:
        adder = adder_of(engine, 512)
        if chunked is not None:
            chunked.init_next_round_input()
            chunked.prefix_len = done[id(chunked)]
            plugin.sizer.add_chunked_req(type(adder).add_chunked_req, adder, chunked)
        for req in waiting:
            if adder.rem_chunk_tokens <= 0 or adder.new_chunked_req is not None:
                break
            req.init_next_round_input(engine.rig.tree)
            plugin.sizer.add_one_req(type(adder).add_one_req, adder, req, False, None)
        taken = list(adder.can_run_list)
        batches.append([r.extend_end - done[id(r)] for r in taken])
        done |= {id(r): r.extend_end for r in taken}
        waiting[:] = [r for r in waiting if r not in taken]
        chunked = next((r for r in taken if r.extend_end < len(r.origin_input_ids)), None)
    assert batches == [[256], [144, 112], [188, 68], [128], [154]]


def test_a_prompt_that_sglang_would_not_split_has_the_queues_size(
    engine: Engine, planned: pp.Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short,) = queue_of(monkeypatch, engine, 500)
    short.init_next_round_input(engine.rig.tree)
    adder = adder_of(engine, 512)
    pp.fit_batch_to(adder, short, continued=False)
    assert adder.rem_chunk_tokens == pp.serving.plans.queue.size(500) == 128
    long, _ = queue_of(monkeypatch, engine, 2000, 300)
    long.init_next_round_input(engine.rig.tree)
    adder = adder_of(engine, 512)
    pp.fit_batch_to(adder, long, continued=False)
    assert adder.rem_chunk_tokens == 640  # less waits than this one is long: its own plan
    _, *many = queue_of(monkeypatch, engine, 2000, *[300] * 100)
    assert pp.waiting_behind(many[0]) == 2000 + 62 * 300  # no more than 64 are looked at
    queue_of(monkeypatch, engine, 2000, *[2000] * 9)
    long.prefix_len = 640
    adder = adder_of(engine, planned.next_chunk(640), decodes=100)
    pp.fit_batch_to(adder, long, continued=True)
    assert adder.rem_chunk_tokens == pp.serving.plans.queue.size(2000 - 640 + 20_000) - 100
    monkeypatch.setattr(pp.serving, "scheduler", object())  # of another release, without a queue
    assert pp.waiting_behind(long) == 0


@pytest.mark.parametrize("how", ["plans", "budget"])
def test_chunks_are_as_sglang_aligns_them(
    engine: Engine, planned: pp.Plans, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """SGLang rounds a chunk down to a multiple. Of less than one, it would never make a batch."""
    if how == "budget":
        monkeypatch.setattr(pp.serving, "plans", None)
        sizer = BudgetSizer(LAW, budget_ms=8.0, page_size=64, min_chunk=64, max_tokens=1024, tile=1)
        monkeypatch.setattr(limits.serving, "sizer", sizer)
    for align in (1024, 256):
        req, sizes = engine.rig.request(range(2000)), []
        for continued in (False, True):
            adder = adder_of(engine, 1024)
            req.init_next_round_input(None if continued else engine.rig.tree)
            req.prefix_len = sum(sizes)
            if continued:
                plugin.sizer.add_chunked_req(type(adder).add_chunked_req, adder, req)
            else:
                plugin.sizer.add_one_req(type(adder).add_one_req, adder, req, False, align)
            assert adder.can_run_list == [req]
            sizes.append(req.extend_end - sum(sizes))
        assert sizes[0] % align == 0 and (sizes[1] % align == 0 or sum(sizes) == 2000)
        assert sizes[0] == max(512, align)


# --- a time budget and the correction of the model ------------------------------------------------

# 1 ms, 0.01 ms a token, and attention: 512 tokens take 6.4 ms without history, 22.8 behind 4,000.
LAW = model_of(Form("law", (1.0, 0.0, 0.01, 0.0, 4e-6)))


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> BudgetSizer:
    sizer = BudgetSizer(LAW, budget_ms=8.0, page_size=64, min_chunk=64, max_tokens=1024, tile=1)
    monkeypatch.setattr(limits.serving, "sizer", sizer)
    return sizer


def admit(adder: Any, req: Any, history: int, continued: bool = False) -> int:
    """The tokens that SGLang's own adder takes of a request under the hook."""
    req.init_next_round_input(None)
    req.prefix_len = history
    before = len(adder.can_run_list)
    if continued:
        plugin.sizer.add_chunked_req(type(adder).add_chunked_req, adder, req)
    else:
        plugin.sizer.add_one_req(type(adder).add_one_req, adder, req, False, None)
    return req.extend_end - history if len(adder.can_run_list) > before else 0


def test_a_batch_keeps_to_its_time(engine: Engine, budget: BudgetSizer) -> None:
    """The longer the history, the fewer tokens; a chunk that was begun always gets on."""
    taken = {}
    for history in (0, 1000, 3900):
        adder = adder_of(engine, 1024)
        taken[history] = admit(adder, engine.rig.request(range(4000)), history, continued=True)
        assert taken[history] == min(budget.next_chunk(history), 4000 - history)
        assert budget.batch_ms([(history, taken[history])]) <= 8.0
    assert 1024 > taken[0] > taken[1000] > taken[3900] > 0
    budget.budget_ms = 0.5  # less than a forward without tokens
    assert admit(adder_of(engine, 1024), engine.rig.request(range(4000)), 0, continued=True) == 64


def test_who_joins_a_batch_gets_what_its_time_has_left(engine: Engine, budget: BudgetSizer) -> None:
    adder, pieces = adder_of(engine, 1024), []
    for length in (200, 100, 3000, 50):
        took = admit(adder, engine.rig.request(range(length)), 0)
        if took:
            pieces.append((0, took))
    assert [took for _, took in pieces[:2]] == [200, 100]
    assert len(pieces) == 3 and 0 < pieces[2][1] < 1024 - 300
    assert budget.batch_ms(pieces) <= 8.0 < budget.batch_ms([*pieces, (0, 64)])


def test_what_is_kept_for_short_requests_stays_theirs(engine: Engine, budget: BudgetSizer) -> None:
    """SGLang's shortest-prefill-first limits the request that goes on, before the budget does."""
    from sglang.srt.managers.schedule_policy import PrefillAdder

    long, short = engine.rig.request(range(4000)), engine.rig.request(range(100))
    for req in (long, short):
        req.init_next_round_input(engine.rig.tree)
    long.prefix_len = 1000
    adder = adder_of(engine, 1024)
    adder.chunked_req_limit = 1024 - 100
    plugin.sizer.add_chunked_req(PrefillAdder.add_chunked_req, adder, long)
    room = budget.next_chunk(1000, (), 3000)
    assert long.extend_end - 1000 == room - 100 and adder.rem_chunk_tokens >= 100


def test_what_the_host_has_of_a_prompt_is_its_history(
    engine: Engine, budget: BudgetSizer, planned: pp.Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang loads it back when it has sized the chunk."""
    req = engine.rig.request(range(4000))
    req.init_next_round_input(engine.rig.tree)
    req.prefix_len, req.host_hit_length = 0, 3000
    adder = adder_of(engine, 512)
    pp.fit_batch_to(adder, req, continued=False)
    assert adder.rem_chunk_tokens == planned.next_chunk(3000, 4000)
    monkeypatch.setattr(pp.serving, "plans", None)
    adder = adder_of(engine, 1024)
    limits.limit(adder, req, continued=False)
    assert adder.rem_chunk_tokens == budget.next_chunk(3000, (), 1000) < budget.next_chunk(0)
    adder = adder_of(engine, 1024)
    limits.limit(adder, req, continued=True)  # it has been loaded back, and is in prefix_len
    assert adder.rem_chunk_tokens == budget.next_chunk(0)


def test_decodes_of_a_mixed_batch_count(
    engine: Engine, budget: BudgetSizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = [engine.rig.request(range(3000)) for _ in range(40)]

    def taken() -> int:
        adder = adder_of(engine, 1024)
        adder.running_batch = SimpleNamespace(reqs=running)
        return admit(adder, engine.rig.request(range(4000)), 0, continued=True)

    alone = taken()
    schedule = SimpleNamespace(enable_mixed_chunk=True)
    monkeypatch.setattr("sglang.srt.runtime_context.get_schedule", lambda: schedule)
    decodes = [(3000, 1)] * 40
    assert taken() == budget.next_chunk(0, decodes) < alone == budget.next_chunk(0)


def test_the_budget_starts_with_a_profile(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, steady: None
) -> None:
    pytest.importorskip("scipy")
    monkeypatch.setattr(pp.serving, "model", None)
    monkeypatch.setattr(pp.serving, "plans", None)
    monkeypatch.setattr(limits.serving, "sizer", None)
    monkeypatch.setattr(plugin.process.state, "settings", Settings(budget_ms=70, cpu=True))
    limits.start(sizer_of(engine))
    model = pp.serving.model
    assert model is not None and pp.serving.plans is None
    assert model.report.usable
    assert limits.serving.sizer is not None and limits.serving.sizer.budget_ms == 70.0
    assert limits.serving.sizer.tile == 128
    monkeypatch.setattr(pp.serving, "model", model_of(LAW.form, usable=False))
    limits.start(sizer_of(engine))
    assert limits.serving.sizer is None
    assert "no time budget: median error 40% over 15%" in caplog.text
    limits.start(SimpleNamespace(chunked_prefill_size=None))
    assert "it needs chunked prefill" in caplog.text


def test_a_mixture_of_experts_is_told_by_its_configuration() -> None:
    from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig

    for config in (MixtralConfig(), DeepseekV3Config(), Qwen3MoeConfig()):
        assert limits.has_experts(config)
    assert not limits.has_experts(LlamaConfig())


def test_prefills_of_one_request_are_timed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that nothing else slows: no other request, no decode, no KV that is loaded back, no
    check of drafts, no logprobs, no tokens of other ranks."""
    rig, times = engine.rig, []
    leader = correction.Leader(sizer_of(engine), LAW)
    monkeypatch.setattr(correction.serving, "leader", leader)
    monkeypatch.setattr(
        leader.correction, "observe_ms", lambda pieces, ms: times.append((pieces, ms > 0))
    )

    def run(*reqs: Any, load_back: int = -1) -> Any:
        batch = rig.batch(list(reqs))
        batch.prepare_for_extend()
        batch.hicache_consumer_index = load_back
        rig.resolve(batch)
        for req, token in zip(reqs, timed(batch), strict=True):
            req.output_ids.append(int(token))
        return batch

    def timed(batch: Any) -> Any:
        return plugin.sizer.forward_batch_generation(
            lambda worker, batch: rig.forward(batch)[1], None, batch
        )

    one, two, three = (rig.request(range(n, n + 300)) for n in (0, 20, 40))
    one.extend_end = 200
    run(one)
    rig.next_chunk(one)
    batch = run(one)
    assert times == [([(0, 200)], True), ([(200, 100)], True)]
    run(two, three)
    run(four := rig.request(range(60, 90)), load_back=3)
    batch.prepare_for_decode()
    rig.resolve(batch)
    timed(batch)
    plugin.sizer.forward_batch_generation(lambda worker, batch: None, None, None)
    assert len(times) == 2

    def seen(**changes: Any) -> int:
        """How often a prefill is timed whose batch differs in this."""
        given = {"forward_mode": ForwardMode.EXTEND, "global_num_tokens": None}
        given |= {"return_logprob": False, "hicache_consumer_index": -1}
        lens = {"reqs": [one], "prefix_lens": [0], "extend_lens": [300]}
        before = len(times)
        batch = SimpleNamespace(**given | lens | changes)
        plugin.sizer.forward_batch_generation(lambda worker, batch: None, None, batch)
        return len(times) - before

    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    assert seen() == seen(global_num_tokens=[300, 0]) == 1
    assert seen(forward_mode=ForwardMode.TARGET_VERIFY) == 0
    assert seen(return_logprob=True) == seen(global_num_tokens=[300, 8192]) == 0
    rig.release(one, two, three, four)


def test_a_correction_brings_its_plans(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rank 0 puts into SGLang's stream of requests: the model and the plans change, and SGLang
    gets the requests alone."""
    model = LatencyModel.from_json(LAW.to_json())
    for name, value in (("model", model), ("plans", None)):
        monkeypatch.setattr(pp.serving, name, value)
    for name, value in (("owner", sizer_of(engine)), ("corrections", 0)):
        monkeypatch.setattr(correction.serving, name, value)
    leader = correction.Leader(sizer_of(engine), LAW)
    monkeypatch.setattr(correction.serving, "leader", leader)
    slower = model_of(Form("law", (1.0, 0.0, 0.02, 0.0, 4e-6)))
    plans = {"4096": [1024] * 4}
    leader._messages.append({correction._KEY: {"model": slower.to_json(), "plans": plans}})
    requests = correction.received(["a", "b"])
    assert requests is not None and len(requests) == 3
    assert correction.received(["c"]) == ["c"] and correction.received(None) is None
    assert correction.without_messages(requests) == ["a", "b"]
    assert model.predict(0, 512) == slower.predict(0, 512) != LAW.predict(0, 512)
    assert pp.serving.plans is not None and pp.serving.plans.by_prompt == {4096: [1024] * 4}
    assert correction.serving.corrections == 1


def test_stages_count_by_their_layers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.distributed import parallel_state

    owner = SimpleNamespace(model_config=SimpleNamespace(num_hidden_layers=10))
    assert pp.stages_of(owner) == [1.0]
    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: SimpleNamespace(world_size=4))
    uneven = pp.stages_of(owner)
    assert uneven == [1.0, 1.0, 1.5, 1.5]
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "4,2,2,2")
    assert pp.stages_of(owner) == [1.0, 0.5, 0.5, 0.5]

    sizes = {"base_chunk": 2048, "context_len": 16_384}
    (told,), (equal,) = (
        pp.choose(LAW, sizes, stages, [16_384]).values() for stages in (uneven, [1.0] * 4)
    )
    assert told.fixed_ms > 1.3 * equal.fixed_ms


def test_a_failed_profile_keeps_the_static_size(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner = sizer_of(engine)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(engine.rig.runner, "forward", broken)
    assert not pp.profile_and_fit(owner)
    assert pp.predict(0) is None
    assert "no such kernel" in caplog.text and "static" in caplog.text


def test_a_step_has_the_history_it_says(engine: Engine, forwards: list[torch.Tensor]) -> None:
    step = pp.PrefillStep(sizer_of(engine))
    step(256, 64)
    step(0, 64)
    assert [len(ids) for ids in forwards] == [64, 64]


# --- processes of their own -----------------------------------------------------------------------


PRELUDE = """
    import json, logging, os, sys
    sys.path.insert(0, {root!r})
    from bench.in_sglang import rig as sglang_rig
    sglang_rig.stand_in()
    from pystage.integrations import sglang as plugin
"""


PATH = os.environ.get("PYTHONPATH", "")

# Importing SGLang takes most of such a process. So it is done once, in a process that forks before
# anything is hooked or a setting is read.
FORKS = """
    import json, os, signal, sys
    sys.path.insert(0, {root!r})
    from bench.in_sglang import rig as sglang_rig
    sglang_rig.stand_in()
    import sglang.srt.managers.schedule_batch
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in the forks"
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            signal.alarm(300)
            for fd, name in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), fd)
            os.environ.clear()
            os.environ.update(asked["environment"])
            exec(compile(asked["code"], "<string>", "exec"), {{"__name__": "__main__"}})
            break
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""


def script(*parts: str) -> str:
    code = [textwrap.dedent(part).strip() for part in parts]
    code[0] = code[0].format(root=str(ROOT))
    return "\n".join(code)


@functools.cache
def forks() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-c", script(FORKS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), PATH]),
            "OPENBLAS_NUM_THREADS": "1",
        },
    )
    atexit.register(server.communicate)
    return server


def process(*parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a process that has imported SGLang."""
    server = forks()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "code": script(PRELUDE, *parts),
            "environment": {**os.environ, **environment},
            "out": os.path.join(folder, "out"),
            "err": os.path.join(folder, "err"),
        }
        print(json.dumps(asked), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        out, err = (Path(asked[name]).read_text() for name in ("out", "err"))
    assert status == 0, err[-4000:]
    return subprocess.CompletedProcess(parts, status, out, err)


def fresh_process(*parts: str, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a process that has imported nothing, with ``path`` in front of others."""
    done = subprocess.run(
        [sys.executable, "-c", script(PRELUDE, *parts)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, str(ROOT), PATH]), **environment},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def status_of(*parts: str, **environment: str) -> dict[str, Any]:
    done = process(*parts, "plugin.main()", **environment)
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}


def test_off_by_sglangs_own_list() -> None:
    status = status_of(SGLANG_PLUGINS="another")
    assert status["active"] == [] and status["off"] == "SGLANG_PLUGINS is 'another'"
    assert set(status_of(SGLANG_PLUGINS="another,pystage")["active"]) == EVERYTHING


def test_off_by_its_own_setting() -> None:
    status = status_of(PYSTAGE_SGLANG="0")
    assert status["active"] == [] and status["off"] == "PYSTAGE_SGLANG=0"


def test_a_wrong_setting_is_named_and_nothing_hooked() -> None:
    status = status_of(PYSTAGE_SGLANG_ISSUE="soon")
    assert status["active"] == []
    assert "PYSTAGE_SGLANG_ISSUE is 'soon', but must be one of deferred, eager" in status["log"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("del overlap_utils.resolve_forward_inputs", "overlap_utils:resolve_forward_inputs"),
        ("overlap_utils.resolve_forward_inputs = lambda batch: None", "takes (batch), not (batch,"),
        (
            "del schedule_batch.ScheduleBatch.__dataclass_fields__['prefill_input_ids_cpu']",
            "ScheduleBatch.prefill_input_ids_cpu",
        ),
    ],
)
def test_another_sglang_is_left_alone(change: str, named: str) -> None:
    imports = """
    from sglang.srt.managers import overlap_utils, schedule_batch
    from sglang.srt.plugins.hook_registry import HookRegistry
    """
    load = """
    plugin.plugin()
    assert not HookRegistry._hooks, HookRegistry._hooks
    """
    status = status_of(imports, change, load, SGLANG_PLUGINS="another")
    assert status["active"] == [] and named in status["off"]
    assert status["log"].count("this SGLang is not as expected") == 1
    assert "Traceback" not in status["log"]


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (
            # SGLang logs what goes wrong here, and goes on.
            """
    from sglang.srt.plugins.hook_registry import HookRegistry
    apply_target = HookRegistry._apply_target.__func__
    def broken(cls, target, hooks):
        if target.endswith("resolve_forward_inputs"):
            raise RuntimeError("broken")
        apply_target(cls, target, hooks)
    HookRegistry._apply_target = classmethod(broken)
    """,
            "resolve (managers.overlap_utils:resolve_forward_inputs is not hooked)",
        ),
        (
            # The scheduler keeps calling what it imported.
            """
    from sglang.srt.plugins import hook_registry
    import sglang.srt.managers.scheduler
    hook_registry._propagate_patch = lambda *args: 0
    """,
            "still has the original of managers.overlap_utils:resolve_forward_inputs",
        ),
    ],
)
def test_a_broken_hook_is_noticed(damage: str, part: str) -> None:
    status = status_of(damage)
    assert any(part in line for line in status["broken"]), status["broken"]
    assert "resolve" not in status["active"] and "guard" in status["active"]
    assert status["log"].count("NOT active: ") == 1


# To load another plugin beside ours, and to run a prefill and a mixed batch.
OTHER_PLUGIN = """
    import inspect, linecache, pickle, __future__
    from array import array
    import torch
    from sglang.srt.managers import overlap_utils, schedule_batch, scheduler
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def around(target, hook):
        HookRegistry.register(f"sglang.srt.{target}", hook, HookType.AROUND)

    def changed(function, module, old, new):
        text = inspect.getsource(function)
        assert old in text
        text = text.replace(old, new)
        linecache.cache["<changed>"] = len(text), None, text.splitlines(True), "<changed>"
        exec(compile(text, "<changed>", "exec", __future__.annotations.compiler_flag), vars(module))

    def load(theirs):
        ours = plugin.plugin
        plugin.plugin = lambda: ours() or theirs()
        load_plugins()
        return plugin.status()

    def run():
        rig = sglang_rig.Rig()
        relay = rig.future_map.output_tokens_buf
        relay[:] = torch.arange(len(relay))
        for running in ([], [3, 4]):
            batch = rig.batch([rig.request(range(40)), rig.request(range(100, 103))])
            batch.prepare_for_extend()
            staged = type(batch.prefill_input_ids_cpu)
            if running:
                batch.mix_running_indices = torch.tensor(running)
            rig.resolve(batch)
            assert batch.input_ids.tolist() == [*range(40), *range(100, 103), *running]
        return staged.__name__
"""


def test_where_others_hook_nothing_meets_a_view() -> None:
    """Also theirs that are registered after ours."""
    code = """
    def theirs():
        around("managers.schedule_batch.Req.get_fill_ids", lambda f, req: f(req) + array("q"))
        around("utils.common.flatten_arrays_to_pinned_cpu",
               lambda f, parts, pin: f([pickle.loads(pickle.dumps(p)) for p in parts], pin))
        around("managers.overlap_utils.resolve_forward_inputs",
               lambda f, *args: print("theirs") or f(*args))
    load(theirs)
    assert run() == "StagedTokens"
    """
    done = process(OTHER_PLUGIN, code, "print(json.dumps(plugin.status()))")
    status = json.loads(done.stdout.splitlines()[-1])
    assert "theirs" in done.stdout and status["broken"] == []
    assert set(status["active"]) == EVERYTHING - {"history", "mixed"}
    assert status["left"] == [
        "history (another plugin hooks utils.common:flatten_arrays_to_pinned_cpu)",
        "mixed (another plugin hooks managers.overlap_utils:resolve_forward_inputs)",
    ]
    assert status["counts"]["sglang_mixed"] == 1
    assert done.stderr.count("left to SGLang: history (another plugin hooks") == 1


def test_code_that_is_not_known_is_left_alone() -> None:
    code = """
    changed(
        overlap_utils.resolve_forward_inputs, overlap_utils,
        "torch.cat([prefill_gpu, decode_gpu", "torch.cat([prefill_gpu, +decode_gpu",
    )
    scheduler.resolve_forward_inputs = overlap_utils.resolve_forward_inputs
    Req = schedule_batch.Req
    Req.get_fill_ids = lambda self: self.full_untruncated_fill_ids[: self.extend_end] + self.tail
    Req.tail = array("q")
    load(lambda: None)
    assert run() == "StagedTokens"
    """
    done = process(OTHER_PLUGIN, code, "print(json.dumps(plugin.status()))")
    status = json.loads(done.stdout.splitlines()[-1])
    assert set(status["active"]) == EVERYTHING - {"history", "mixed"} and status["broken"] == []
    history, mixed = status["left"]
    assert "history (get_fill_ids is not self.full_untruncated_fill_ids[:self.ext" in history
    assert "mixed (its resolve_forward_inputs is not that of a known release" in mixed
    assert status["counts"]["sglang_mixed"] == 1


def test_batches_on_the_cpu_are_sglangs() -> None:
    code = """
    load(lambda: None)
    assert run() == "Tensor" and plugin.pool_stats() == []
    """
    done = process(OTHER_PLUGIN, code, PYSTAGE_SGLANG_CPU="0")
    assert "Traceback" not in done.stderr


def test_schedulers_of_ray_load_plugins(tmp_path: Path) -> None:
    """The real actor in a real Ray; its scheduler is not made."""
    pytest.importorskip("ray")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'default_worker.py' in ' '.join(sys.orig_argv):\n"
        f"    sys.path.insert(0, {str(ROOT)!r})\n"
        "    from bench.in_sglang import rig as sglang_rig\n"
        "    sglang_rig.stand_in()\n"
    )
    code = """
    import ray
    from ray.util.placement_group import placement_group
    from types import SimpleNamespace
    from sglang.srt.plugins import load_plugins
    load_plugins()
    from sglang.srt.ray import engine
    from sglang.srt.utils import common

    class Arguments:  # the first use of them ends the actor
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            ours = sys.modules.get("pystage.integrations.sglang")
            raise LookupError(f"found: {ours and ours.status()['active']}")

    def found():
        actor = engine._create_scheduler_actor(
            group, 0, 0, Arguments(), None, 0, 0, 0, None, "127.0.0.1")
        try:
            ray.get(actor.get_info.remote())
        except ray.exceptions.RayError as error:
            return [line for line in str(error).splitlines() if "found: " in line][-1]

    ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    group = placement_group([{"CPU": 1, "GPU": 1}])
    ray.get(group.ready())
    assert "found: None" in found()  # by itself it does not
    common.configure_logger(SimpleNamespace(log_level="info"))
    print(found())
    """
    done = fresh_process(code, path=str(tmp_path))
    assert "found: ['staging', 'resolve', 'mixed', 'guard'" in done.stdout


def test_one_line_once_the_log_is_set_up() -> None:
    code = """
    from types import SimpleNamespace
    from sglang.srt.plugins import load_plugins
    from sglang.srt.utils import common
    load_plugins()
    assert "prometheus_client" not in sys.modules  # decides at its import where figures go
    assert not plugin.process.state.said
    for _ in range(2):
        common.configure_logger(SimpleNamespace(log_level="info"), prefix=" TP0")
    """
    log = process(code).stderr
    lines = [line for line in log.splitlines() if "pystage" in line and "is active" in line]
    assert len(lines) == 1 and " TP0]" in lines[0], log
    parts = "staging, resolve, mixed, guard, history, small, rows, metrics, profiler"
    assert f"{parts} (pool of 64 MiB" in lines[0]


def test_validation_refuses_when_the_request_arrives() -> None:
    code = """
    from array import array
    from sglang.srt.plugins import load_plugins
    load_plugins()
    rig = sglang_rig.Rig()
    from sglang.srt.managers import scheduler
    from sglang.srt.managers.scheduler import Scheduler
    assert "validation" in plugin.status()["active"], plugin.status()

    class Received:  # what the tokenizer's process sends; all else is None
        mm_inputs = None
        sampling_params = rig.request([1]).sampling_params
        def __init__(self, ids):
            self.rid, self.input_text, self.input_ids = "1", "", array("q", ids)
        def __getattr__(self, name):
            return None

    class Server:  # of the scheduler, what its handler of embedding requests uses
        model_config, max_req_input_len = rig.model_config, 1000
        tokenizer = pad_input_ids_func = None
        _handle_embedding_request = Scheduler._handle_embedding_request
        def _maybe_namespace_elastic_radix_cache(self, req): pass
        def _record_kv_event_lora_name(self, req, name): pass
        def _add_request_to_queue(self, req): queued.append(req)

    queued = []
    for ids in (range(20), [1, 2, 200000, -4]):
        Scheduler.handle_embedding_request(Server(), Received(ids))
    good, bad = queued
    assert good.to_finish is None and len(good.origin_input_ids) == 20
    error = "input_ids[2] is 200000, outside the vocabulary of 512 (2 of 4 ids are)"
    assert bad.to_finish.message == error and bad.to_finish.status_code == 400
    assert list(bad.origin_input_ids) == [0]  # what the GPU gets of it

    # A request to generate is refused by its handler, for the error that this returns.
    def arrives(req):
        check = lambda server: scheduler.validate_input_length(req, 1000, False)
        return plugin.validation.handle_request(check, Server())
    assert arrives(rig.request([1, 2, 200000, -4])) == error
    assert arrives(rig.request(range(20))) is None
    assert "maximum allowed length" in arrives(rig.request(range(1001)))
    picture = rig.request([1, 1000007])
    picture.multimodal_inputs = object()
    assert arrives(picture) is None
    """
    process(code, PYSTAGE_SGLANG_VALIDATE_IDS="1")


def test_sizer_by_setting() -> None:
    code = """
    from sglang.srt.managers.scheduler_components.dynamic_chunk_sizer import DynamicChunkSizer
    from pystage.integrations.sglang import pp
    from sglang.srt.plugins import load_plugins
    load_plugins()
    pp.profile_and_fit = lambda owner: owner == "owner"
    pp.predict = lambda history_len: history_len + 1
    assert DynamicChunkSizer.profile_and_fit("owner") is True
    assert DynamicChunkSizer.predict("owner", 41) == 42
    assert "sizer" in plugin.status()["active"]
    assert "profiler" not in plugin.status()["active"]
    """
    process(code, PYSTAGE_SGLANG_SIZER="1")


def test_budget_and_correction_by_setting() -> None:
    code = """
    from sglang.srt.managers.scheduler import Scheduler
    from pystage.integrations.sglang import budget, correction
    from sglang.srt.plugins import load_plugins
    load_plugins()
    started = []
    budget.start = lambda scheduler: started.append("budget")
    correction.start = lambda scheduler: started.append("correction")
    active = plugin.status()["active"]
    assert {"budget", "correction", "profiler"} <= set(active) and "sizer" not in active
    assert plugin.status()["broken"] == [], plugin.status()
    class Server:  # without pipeline stages SGLang makes no sizer
        maybe_init_dynamic_chunk_sizer = Scheduler.maybe_init_dynamic_chunk_sizer
    rig = sglang_rig.Rig()
    Server().maybe_init_dynamic_chunk_sizer()
    assert started == ["budget", "correction"]
    """
    process(code, PYSTAGE_SGLANG_BUDGET_MS="60", PYSTAGE_SGLANG_CORRECT="1")


def test_figures_reach_prometheus(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    code = """
    from sglang.srt.plugins import load_plugins
    load_plugins()
    rig = sglang_rig.Rig()
    from sglang.srt.observability.metrics_collector import (
        SchedulerMetricsCollector, SchedulerStats)
    labels = {"model_name": "tiny", "tp_rank": 0, "moe_ep_rank": 0}
    collector = SchedulerMetricsCollector(labels=labels, server_args=rig.server)
    collector.log_stats(SchedulerStats())  # no pool yet
    for length in (100, 50):
        batch = rig.batch([rig.request(range(length))])
        batch.prepare_for_extend()
        rig.resolve(batch)
        collector.log_stats(SchedulerStats())
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # as SGLang's endpoint
    print(generate_latest(registry).decode())
    """
    text = process(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)).stdout
    figures = {
        line.partition("{")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("pystage_")
    }
    labelled = [line for line in text.splitlines() if line.startswith("pystage_stages_total")]
    assert 'model_name="tiny"' in labelled[0] and 'tp_rank="0"' in labelled[0]
    assert figures["pystage_stages_total"] == 2
    assert figures["pystage_staged_tokens_total"] == 150
    assert figures["pystage_wire_bytes_total"] == 600
    assert figures["pystage_capacity_bytes"] == 64 << 20
    assert figures["pystage_kernel_transfers_total"] == 2
    assert figures["pystage_fallbacks_total"] == figures["pystage_wait_seconds_total"] == 0
    for name in plugin.metrics.OF_THE_PLUGIN:
        assert figures[f"pystage_{name}_total"] == 0
    kinds = (plugin.metrics.GAUGES, plugin.metrics.COUNTERS, plugin.metrics.OF_THE_PLUGIN)
    assert len(figures) == sum(map(len, kinds))


def test_the_doctor_asks_sglang() -> None:
    """Without the stand-ins SGLang cannot be imported on this machine, or can: it says which."""
    done = subprocess.run(
        [sys.executable, "-m", "pystage", "doctor", "--json", "-", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "SGLANG_PLUGINS": "another"},
    )
    check = json.loads(done.stdout)["checks"]["SGLang"]
    assert "SGLANG_PLUGINS is 'another'" in check["found"] and check["ok"], done.stderr
    assert done.returncode == 0


# --- other releases -------------------------------------------------------------------------------

RELEASES = ("0.5.13.post1", "0.5.20")


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, set()),
        ({"PYSTAGE_SGLANG_SIZER": "1"}, {"sizer"}),
        ({"PYSTAGE_SGLANG_BUDGET_MS": "60"}, {"budget"}),
    ],
    ids=["default", "sizer", "budget"],
)
@pytest.mark.parametrize("release", RELEASES)
def test_other_releases(release: str, settings: dict[str, str], more: set[str]) -> None:
    """Their modules are imported and hooked; their own Req, get_fill_ids, flatten and resolve
    run under the hooks. No model: these releases want another transformers."""
    folder = Path(OLD) / release
    if not OLD or not folder.is_dir():
        pytest.skip(f"needs SGLang {release} in $PYSTAGE_TEST_SGLANG_OLD: make sglang-test")
    code = """
    sglang_rig.stand_in(("llguidance", "outlines", "xgrammar"))
    sglang_rig.let_configs_be_replaced()
    from array import array
    from sglang.srt.plugins import load_plugins
    load_plugins()
    import sglang
    from types import SimpleNamespace
    import pystage, torch
    from sglang.srt.managers import schedule_batch, scheduler
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    req = schedule_batch.Req(rid="1", origin_input_text="", sampling_params=SamplingParams(),
                             origin_input_ids=array("q", range(1000)))
    req.full_untruncated_fill_ids = req.origin_input_ids
    if hasattr(req, "set_extend_range"):
        req.set_extend_range(600, 900)
    else:
        req.fill_len = 900
    req.prefix_indices = torch.arange(600)
    batch = SimpleNamespace(reqs=[req], device="cpu", input_ids=None, mix_running_indices=None,
        enable_overlap=True, spec_algorithm=SpeculativeAlgorithm.NONE, is_spec_v2=False)
    def prepare(batch):
        parts = [r.get_fill_ids()[len(r.prefix_indices):] for r in batch.reqs]
        batch.prefill_input_ids_cpu = schedule_batch.flatten_arrays_to_pinned_cpu(parts, False)
    relay = SimpleNamespace(output_tokens_buf=torch.arange(5000, 5010))
    for mixed in (None, torch.tensor([3, 4])):
        plugin.staging.prepare_for_extend(prepare, batch)
        assert isinstance(batch.prefill_input_ids_cpu, pystage.StagedTokens)
        batch.mix_running_indices = mixed
        scheduler.resolve_forward_inputs(batch, relay)
        running = [] if mixed is None else [5003, 5004]
        assert batch.input_ids.tolist() == [*range(600, 900), *running]
        assert batch.prefill_input_ids_cpu is None and batch.mix_running_indices is None
    assert plugin.pool_stats()[0].kernel_transfers == 2
    from pystage.integrations.sglang import pp
    req.host_hit_length = 50
    assert pp.lengths_of(req, continued=False) == (1000, 650)
    assert pp.lengths_of(req, continued=True) == (1000, 600)
    if not hasattr(req, "set_extend_range"):
        req.set_extend_input_len(300)
    assert pp.piece_of(req) == (600, 300)
    print(json.dumps(plugin.status()))
    """
    path = os.pathsep.join([str(folder), str(Path(OLD) / "extra")])
    done = fresh_process(code, path=path, **settings)
    status = json.loads(done.stdout.splitlines()[-1])
    assert status["sglang"] == release
    expected = EVERYTHING - ({"profiler"} if "sizer" in more else set()) | more
    broken = []
    if (release, more) == ("0.5.13.post1", {"budget"}):
        broken, expected = ["budget (this SGLang has no such symbols)"], EVERYTHING
    assert status["broken"] == broken and set(status["active"]) == expected
    assert "Traceback" not in done.stderr
