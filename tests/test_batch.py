"""Batches with deferred ids: the bug of the seeds, then the correct ids on every scheduler path.

This is one file because the paths of a scheduler build on each other and share the helpers that
make a batch.
"""

from __future__ import annotations

import copy
import gc
import itertools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pystage
from pystage import _C
from pystage.batch import (
    PrefillBatch,
    _cut,
    ensure_resolved,
    filter,
    forgotten_resolves,
    merge,
    mix_with_running,
    prepare_for_extend,
    resolve_forward_inputs,
)
from pystage.testing import hold_transfers, synchronize

from .conftest import cuda_streams, on_stream, run_of

WIDE = 1 << 40  # an id that does not fit int32


@dataclass
class ForwardBatch:
    """What SGLang's does with the ids, as far as it matters here."""

    input_ids: torch.Tensor
    num_tokens: int

    @classmethod
    def init_new(cls, batch: Any) -> ForwardBatch:
        return cls(batch.input_ids, batch.input_ids.shape[0])


@pytest.fixture
def pool(device: str) -> Iterator[pystage.StagingPool]:
    with pystage.StagingPool(device, 1 << 20) as pool:
        yield pool
        gc.collect()  # tracebacks of expected errors hold batches
        synchronize(pool)
        stats = pool.stats()
        assert (stats.leased_slots, stats.in_flight_slots, stats.quarantined_slots) == (0, 0, 0)


def tensor(values: Any, device: str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def staged(pool: pystage.StagingPool, *token_ids: Any, **kwargs: Any) -> PrefillBatch:
    batch = PrefillBatch(pool.device)
    prepare_for_extend(batch, token_ids, pool=pool, **kwargs)
    return batch


def resolved_ids(batch: Any, relay: torch.Tensor | None = None) -> list[int]:
    resolve_forward_inputs(batch, relay)
    assert batch.prefill_input_ids_cpu is None and batch.mix_running_indices is None
    assert batch.input_ids.dtype == torch.int64
    assert batch.input_ids.device.type == torch.device(batch.device).type
    return batch.input_ids.tolist()


def fields(batch: Any) -> dict[str, Any]:
    return copy.copy(vars(batch))


# --- the bug, and the paths ---------------------------------------------------------------------


def test_a_path_that_does_not_resolve_fails_as_it_did(pool: pystage.StagingPool) -> None:
    """PR 26883: the profiler built its forward right after prepare_for_extend."""
    batch = staged(pool, run_of(0, 9))
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):
        ForwardBatch.init_new(batch)
    resolve_forward_inputs(batch)
    assert ForwardBatch.init_new(batch).num_tokens == 9


def test_extend(pool: pystage.StagingPool) -> None:
    batch = staged(pool, run_of(10, 5), [1, 2], [])
    assert batch.input_ids is None
    assert batch.extend_lens == [5, 2, 0]
    assert pool.stats().leased_slots == 1
    assert resolved_ids(batch) == [10, 11, 12, 13, 14, 1, 2]
    assert pool.stats().leased_slots == 0


def test_a_second_resolve_does_nothing(pool: pystage.StagingPool) -> None:
    batch = staged(pool, [1, 2])
    resolve_forward_inputs(batch)
    ids, transfers = batch.input_ids, pool.stats().kernel_transfers
    resolve_forward_inputs(batch)
    assert batch.input_ids is ids
    assert pool.stats().kernel_transfers == transfers


def test_chunks_with_history(pool: pystage.StagingPool) -> None:
    prompt = run_of(100, 1000)
    seen: list[int] = []
    for start in range(0, 1000, 300):
        stop = min(start + 300, 1000)
        batch = staged(pool, prompt, starts=[start], stops=[stop])
        assert batch.extend_lens == [stop - start]
        seen += resolved_ids(batch)
    assert seen == prompt.tolist()


@pytest.mark.parametrize(
    "dtypes", list(itertools.product([torch.int64, torch.int32], repeat=2)), ids=str
)
@pytest.mark.parametrize("variant", ["deferred", "eager", "copy_engine", "fallback"])
@pytest.mark.parametrize("count", [1, 3, 4, 1023, 300_001])
@pytest.mark.parametrize("wide", [False, True])
def test_mixed_equals_cat(
    device: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    variant: str,
    count: int,
    wide: bool,
) -> None:
    relay_dtype, index_dtype = dtypes
    options: dict[str, Any] = {
        "deferred": {},
        "eager": {"issue": "eager"},
        "copy_engine": {"transfer": "copy_engine"},
        "fallback": {"at_capacity": "fallback", "reserve_bytes": 0},
    }[variant]
    with pystage.StagingPool(device, 8 << 20, **options) as pool:
        full = [pool.stage([run_of(0, 1 << 19)]) for _ in range(4)] if variant == "fallback" else []
        relay = torch.arange(1000, 1600, dtype=relay_dtype, device=device)
        for k in (1, 5, 600):
            indices = torch.arange(600, device=device).flip(0)[:k].to(index_dtype)
            batch = staged(pool, run_of(WIDE if wide else 0, count))
            prefill = batch.prefill_input_ids_cpu.cpu()
            assert (pool.stats().fallbacks > 0) == (variant == "fallback")
            mix_with_running(batch, indices)
            resolve_forward_inputs(batch, relay)
            expected = torch.cat([prefill, relay[indices.long()].long().cpu()])
            assert torch.equal(batch.input_ids.cpu(), expected)
            # Slices start anywhere; the output may, too.
            tokens = pool.stage([run_of(WIDE if wide else 0, count)])[1:]
            memory = torch.full((count + k + 1,), -1, device=device)
            out = pystage.resolve_mixed(tokens, relay, indices, out=memory[1 : count + k])
            assert torch.equal(out.cpu(), expected[1:])
            assert memory[0].item() == -1 and memory[-1].item() == -1
        del full


def test_mixed_is_one_transfer(pool: pystage.StagingPool, device: str) -> None:
    batch = staged(pool, run_of(0, 100))
    mix_with_running(batch, tensor([2, -1], device))
    assert batch.extend_lens == [100, 1, 1]
    assert resolved_ids(batch, tensor([7, 8, 9], device)) == [*range(100), 9, 9]
    assert pool.stats().kernel_transfers == 1
    assert pool.stats().copy_engine_transfers == 0


def test_mixed_without_prefill_ids_or_without_running(
    pool: pystage.StagingPool, device: str
) -> None:
    relay = tensor([7, 8, 9], device)
    batch = staged(pool, [])
    mix_with_running(batch, tensor([1], device))
    assert resolved_ids(batch, relay) == [8]
    batch = staged(pool, [5])
    mix_with_running(batch, tensor([], device))
    assert resolved_ids(batch, relay) == [5]


def test_running_requests_join_a_resolved_prefill(pool: pystage.StagingPool, device: str) -> None:
    batch = staged(pool, [1, 2])
    resolve_forward_inputs(batch)
    mix_with_running(batch, tensor([0], device))
    assert batch.input_ids is None
    assert resolved_ids(batch, tensor([7], device)) == [1, 2, 7]
    with pytest.raises(pystage.UnresolvedInputsError, match="prepare_for_extend"):
        mix_with_running(PrefillBatch(device), tensor([0], device))
    batch = staged(pool, [1])
    mix_with_running(batch, tensor([0], device))
    before = fields(batch)
    with pytest.raises(ValueError, match="running requests already"):
        mix_with_running(batch, tensor([0], device))
    assert all(vars(batch)[name] is value for name, value in before.items())
    # Its slot waits for the relay: whoever takes the ids for resolved would read none.
    assert batch.input_ids is None and batch.prefill_input_ids_cpu is not None


def test_decode(device: str) -> None:
    relay = tensor([7, 8, 9, WIDE], device)
    by_indices = PrefillBatch(device, mix_running_indices=tensor([3, 0], device))
    assert resolved_ids(by_indices, relay) == [WIDE, 7]
    rows = tensor([2, 2, 1], device, torch.int32)
    by_rows = PrefillBatch(device, req_pool_indices=rows)
    assert resolved_ids(by_rows, relay) == [9, 9, 8]
    assert by_rows.req_pool_indices is rows


def test_idle(pool: pystage.StagingPool, device: str) -> None:
    idle = PrefillBatch(device, input_ids=torch.empty(0, dtype=torch.int64, device=device))
    assert resolved_ids(idle) == []
    assert resolved_ids(staged(pool)) == []


def test_an_encoder_decoder_stages_twice(device: str) -> None:
    with pystage.StagingPool(device, 4096, at_capacity="raise") as pool:
        batch = staged(pool, run_of(0, 1000))
        with pytest.raises(pystage.PoolExhaustedError):
            pool.stage([[1]])  # room for one
        prepare_for_extend(batch, [run_of(0, 1000)], starts=[100], pool=pool)
        assert batch.extend_lens == [900]
        assert pool.stats().leased_slots == 1
        assert resolved_ids(batch) == list(range(100, 1000))
        assert pool.stats().leased_slots == 0


def test_preparing_again_forgets_resolved_ids(pool: pystage.StagingPool) -> None:
    """Ids of the forward before would otherwise be taken for the new ones."""
    batch = staged(pool, [1, 2])
    resolve_forward_inputs(batch)
    prepare_for_extend(batch, [[3, 4, 5]], pool=pool)
    assert batch.input_ids is None and batch.extend_lens == [3]
    assert resolved_ids(batch) == [3, 4, 5]


def test_an_interrupted_restage_keeps_the_ids(pool: pystage.StagingPool) -> None:
    class Interrupt:
        def __index__(self) -> int:
            raise KeyboardInterrupt

    batch = staged(pool, [1, 2])
    with pytest.raises(KeyboardInterrupt):
        prepare_for_extend(batch, [[Interrupt()]], pool=pool)
    assert isinstance(batch.prefill_input_ids_cpu, pystage.StagedTokens)
    assert resolved_ids(batch) == [1, 2]


def test_ends_of_requests(pool: pystage.StagingPool) -> None:
    batch = staged(pool, run_of(0, 9), run_of(10, 9), starts=[2, 0], stops=[5, 9])
    assert batch.extend_lens == [3, 9]
    assert resolved_ids(batch) == [2, 3, 4, *range(10, 19)]
    with pytest.raises(pystage.TokenRangeError):
        staged(pool, [5], vocab_size=5)


def test_a_failed_restage_keeps_the_ids(device: str) -> None:
    with pystage.StagingPool(device, 4096, at_capacity="raise") as pool:
        batch = staged(pool, run_of(0, 1000))
        with pytest.raises(pystage.TokenRangeError):
            prepare_for_extend(batch, [[5, 10]], pool=pool, vocab_size=10)
        with pytest.raises(pystage.RequestTooLargeError):
            prepare_for_extend(batch, [run_of(0, 9000)], pool=pool)
        with pytest.raises(TypeError):
            prepare_for_extend(batch, [["no id"]], pool=pool)
        assert batch.extend_lens == [1000] and batch.input_ids is None
        assert pool.stats().leased_slots == 1
        pool.close()
        with pytest.raises(pystage.PoolClosedError):
            prepare_for_extend(batch, [[5]], pool=pool)
        assert pool.stats().leased_slots == 0  # no slot to be had: a CPU tensor
        assert resolved_ids(batch) == list(range(1000))


def test_a_merged_batch_is_staged_anew(device: str) -> None:
    with pystage.StagingPool(device, 8192, at_capacity="raise") as pool:  # two slots of 4 KiB
        batch, plain = staged(pool, run_of(0, 500)), torch.tensor([7])
        merge(batch, PrefillBatch(device, prefill_input_ids_cpu=plain, extend_lens=[1]))
        merge(batch, staged(pool, run_of(500, 500)))
        with pytest.raises(pystage.TokenRangeError):
            prepare_for_extend(batch, [[5, 10]], pool=pool, vocab_size=10)
        assert batch.extend_lens == [500, 1, 500] and pool.stats().leased_slots == 2
        both = [run_of(0, 500), [7], run_of(500, 500)]
        prepare_for_extend(batch, both, pool=pool)  # the slots are full until it lets go of them
        assert pool.stats().leased_slots < 3 and batch.extend_lens == [500, 1, 500]
        assert resolved_ids(batch) == [*range(500), 7, *range(500, 1000)]


def test_a_mixed_batch_is_staged_anew_as_a_prefill(pool: pystage.StagingPool, device: str) -> None:
    batch = staged(pool, [1, 2])
    mix_with_running(batch, tensor([0], device))
    with pytest.raises(pystage.TokenRangeError):
        prepare_for_extend(batch, [[9]], pool=pool, vocab_size=5)
    assert batch.extend_lens == [2, 1] and batch.mix_running_indices is not None
    prepare_for_extend(batch, [[3]], pool=pool)
    assert batch.extend_lens == [1] and resolved_ids(batch) == [3]


def test_a_failed_first_stage_changes_nothing(pool: pystage.StagingPool, device: str) -> None:
    batch = PrefillBatch(device, input_ids=torch.zeros(3, dtype=torch.int64, device=device))
    before = fields(batch)
    with pytest.raises(pystage.TokenRangeError):
        prepare_for_extend(batch, [[10]], pool=pool, vocab_size=10)
    with pytest.raises(ValueError, match="the batch is on meta"):
        prepare_for_extend(PrefillBatch("meta"), [[10]], pool=pool)
    assert all(vars(batch)[name] is value for name, value in before.items())


def test_a_plain_cpu_tensor_is_staging_too(device: str) -> None:
    batch = PrefillBatch(device, prefill_input_ids_cpu=torch.tensor([1, 2]))
    assert resolved_ids(batch) == [1, 2]
    batch = PrefillBatch(device, prefill_input_ids_cpu=torch.tensor([1, 2]))
    mix_with_running(batch, tensor([1], device))
    assert resolved_ids(batch, tensor([7, 8], device)) == [1, 2, 8]


def test_any_object_with_the_attributes_will_do(pool: pystage.StagingPool, device: str) -> None:
    class Batch:
        device = torch.device(pool.device.type)  # without an index
        input_ids = None
        prefill_input_ids_cpu = None
        mix_running_indices = None

    batch = Batch()
    prepare_for_extend(batch, [[1, 2]], pool=pool)
    assert not hasattr(batch, "extend_lens")
    merge(batch, staged(pool, [3]))
    batch.mix_running_indices = tensor([0], device)
    assert resolved_ids(batch, tensor([9], device)) == [1, 2, 3, 9]


# --- errors -------------------------------------------------------------------------------------


def test_nothing_staged_names_the_batch_and_the_call(device: str) -> None:
    batch = PrefillBatch(device, extend_lens=[4, 5])
    with pytest.raises(
        pystage.UnresolvedInputsError, match=r"PrefillBatch of 2 requests .* prepare_for_extend\("
    ):
        resolve_forward_inputs(batch)

    class Extend:
        def is_extend(self) -> bool:
            return True

    batch.req_pool_indices = tensor([0, 1], device)
    batch.forward_mode = Extend()  # type: ignore[attr-defined]
    with pytest.raises(pystage.UnresolvedInputsError):  # a prefill's ids are not in the relay
        resolve_forward_inputs(batch, tensor([1, 2], device))


def test_errors_leave_the_batch_unchanged(pool: pystage.StagingPool, device: str) -> None:
    batch = staged(pool, [1, 2, 3])
    mix_with_running(batch, tensor([1, 0], device))
    before = fields(batch)
    relay = tensor([7, 8], device)
    bad: list[tuple[Any, type[Exception]]] = [
        (None, pystage.UnresolvedInputsError),
        ([7, 8], TypeError),
        (relay.float(), TypeError),
        (relay[None], ValueError),
        (torch.stack([relay, relay], 1)[:, 0], ValueError),
        (relay.to("meta"), ValueError),
    ]
    if device == "cpu":
        bad.append((relay[:1], IndexError))
    else:
        bad.append((relay.cpu(), ValueError))
    for wrong, error in bad:
        with pytest.raises(error):
            resolve_forward_inputs(batch, wrong)
        assert all(vars(batch)[name] is value for name, value in before.items())
    assert resolved_ids(batch, relay) == [1, 2, 3, 8, 7]


def test_a_bad_index_is_named() -> None:
    with pystage.StagingPool("cpu", 1 << 16) as pool:
        tokens = pool.stage([[1]])
        with pytest.raises(IndexError, match=r"indices\[1\] is -3, outside a relay of 2 ids"):
            pystage.resolve_mixed(tokens, torch.arange(2), torch.tensor([-2, -3, 9]))
        for relay_dtype, index_dtype in itertools.product([torch.int64, torch.int32], repeat=2):
            relay = torch.arange(5, 8, dtype=relay_dtype)
            good = torch.tensor([-3, 2, 0, -1], dtype=index_dtype)
            assert pystage.resolve_mixed(tokens, relay, good).tolist() == [1, 5, 7, 5, 7]
            for bad in (3, -4):
                with pytest.raises(
                    IndexError, match=rf"indices\[1\] is {bad}, outside a relay of 3"
                ):
                    indices = torch.tensor([0, bad, 1, 9], dtype=index_dtype)
                    pystage.resolve_mixed(tokens, relay, indices)
        with hold_transfers(pool):  # nobody waits, so nobody can be told
            ids = pystage.resolve_mixed(tokens, torch.arange(5, 8), torch.tensor([3, 1, -4]))
        synchronize(pool)
        assert ids.tolist() == [1, -1, 6, -1]
        decode = PrefillBatch("cpu", mix_running_indices=torch.tensor([2]))
        with pytest.raises(IndexError, match=r"indices\[0\] is 2"):
            resolve_forward_inputs(decode, torch.arange(2))
        assert decode.mix_running_indices is not None


@pytest.mark.gpu
def test_a_bad_index_asserts_on_the_device() -> None:
    """As torch's own indexing does; it ends the process's use of the device."""
    code = """
import os, torch, pystage
pool = pystage.StagingPool("cuda:0", 1 << 16)
relay, indices = torch.arange(2, device="cuda:0"), torch.tensor([2], device="cuda:0")
torch.cuda.synchronize()
pystage.resolve_mixed(pool.stage([[1]]), relay, indices)
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    os._exit(0 if "device-side assert" in str(error) else 2)
os._exit(1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wrong_arguments_of_resolve_mixed(pool: pystage.StagingPool, device: str) -> None:
    relay, indices = tensor([7], device), tensor([0], device)
    tokens = pool.stage([[1, 2]])
    for out in (
        torch.empty(2, dtype=torch.int64, device=device),
        torch.empty(4, dtype=torch.int64, device=device),
        torch.empty(6, dtype=torch.int64, device=device)[::2],
        torch.empty(3, 1, dtype=torch.int64, device=device),
        torch.empty(3, dtype=torch.int64, device="meta"),
    ):
        with pytest.raises(ValueError, match=r"out (must|is)"):
            pystage.resolve_mixed(tokens, relay, indices, out)
    both = torch.zeros(6, dtype=torch.int64, device=device)
    for read, name in (((both[:1], indices), "relay"), ((relay, both[2:3]), "indices")):
        with pytest.raises(ValueError, match=f"out shares memory with {name}"):
            pystage.resolve_mixed(tokens, *read, both[:3])
        with pytest.raises(ValueError, match=f"out shares memory with {name}"):
            _C.gather(*read, both[2:3] if name == "indices" else both[:1])
    none, version = indices[:0], both._version  # nothing of the relay is read
    assert pystage.resolve_mixed(tokens, both[1:2], none, both[:2]).tolist() == [1, 2]
    assert _C.gather(both, none, both[:0]).tolist() == []
    assert both._version > version
    version = both._version
    for wrong in (relay.float(), relay[None]):
        with pytest.raises((TypeError, ValueError), match="relay"):
            pystage.resolve_mixed(tokens, wrong, indices, both[:3])
        with pytest.raises((TypeError, ValueError), match="relay"):
            _C.gather(wrong, indices, both[:1])
    assert both._version == version  # nothing was written
    for bad in (indices[None], indices.to("meta")):
        with pytest.raises(ValueError, match="indices"):
            pystage.resolve_mixed(tokens, relay, bad)
    for size in (0, 2):
        with pytest.raises(ValueError, match="out must have shape"):
            _C.gather(relay, indices, torch.empty(size, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match="out must be int64"):
        pystage.resolve_mixed(
            tokens, relay, indices, torch.empty(3, dtype=torch.int32, device=device)
        )
    with pytest.raises(TypeError, match="indices is int64 or int32"):
        pystage.resolve_mixed(tokens, relay, indices.bool())
    with pytest.raises(TypeError, match="StagedTokens, not list"):
        pystage.resolve_mixed([1, 2], relay, indices)  # type: ignore[arg-type]
    every_other = tensor([0, 5, 0, 5], device)[::2]
    assert pystage.resolve_mixed(tokens, relay, every_other).tolist() == [1, 2, 7, 7]


def test_strided_indices_are_not_overwritten(pool: pystage.StagingPool, device: str) -> None:
    """Their packed copy is as large as the output, and must not share its memory."""
    size = 1 << 20
    relay = torch.randperm(size).to(device)
    indices = torch.randint(size, (2 * size,)).to(device)[::2]
    for _ in range(3):
        ids = pystage.resolve_mixed(pool.stage([[1, 2]]), relay, indices)
        assert ids[:2].tolist() == [1, 2]
        assert torch.equal(ids[2:], relay[indices])


@pytest.mark.gpu
def test_not_while_a_graph_is_captured() -> None:
    with pystage.StagingPool("cuda:0", 1 << 16) as pool:
        relay, indices = tensor([7], "cuda:0"), tensor([0], "cuda:0")
        batch = staged(pool, [1])
        mix_with_running(batch, indices)
        torch.cuda.synchronize()
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(pystage.CaptureError),
        ):
            resolve_forward_inputs(batch, relay)
        assert resolved_ids(batch, relay) == [1, 7]


# --- two streams --------------------------------------------------------------------------------

SCHEDULE, FORWARD = 1, 2


def forward_waits_for_schedule(device: str) -> None:
    if device != "cpu":  # on the host torch's tensors are written at once
        cuda_streams[FORWARD].wait_stream(cuda_streams[SCHEDULE])


@pytest.mark.parametrize("options", [{}, {"issue": "eager"}, {"transfer": "copy_engine"}])
@pytest.mark.parametrize("kind", ["extend", "mixed", "decode", "merged"])
def test_the_schedule_stream_runs_ahead(device: str, options: dict[str, Any], kind: str) -> None:
    """The forward stream is stuck; batches are prepared, resolved there and dropped meanwhile."""
    ahead, count = 8, 500
    relay = torch.arange(5000, 5064, device=device)
    with pystage.StagingPool(device, 1 << 20, **options) as pool:

        def step(i: int) -> torch.Tensor:
            with on_stream(device, SCHEDULE):
                batch = PrefillBatch(device)
                if kind != "decode":
                    prepare_for_extend(batch, [run_of(i, count)], pool=pool)
                if kind == "merged":
                    merge(batch, staged(pool, run_of(-i, 3)))
                if kind in ("mixed", "decode"):
                    batch.mix_running_indices = tensor([i, 63 - i], device)
            with on_stream(device, FORWARD):
                forward_waits_for_schedule(device)
                resolve_forward_inputs(batch, relay)
            ids = batch.input_ids
            del batch
            with on_stream(device, SCHEDULE):
                # Would be the dropped indices' memory, were they not kept for the forward stream.
                tensor([63, 63], device)
            return ids

        for _ in range(2):
            step(0)  # loads torch's kernels: that would wait for a held stream
        if device != "cpu":
            torch.cuda.synchronize()
        before = pool.stats()
        with on_stream(device, FORWARD):
            synchronize(pool)
            with hold_transfers(pool):
                ids = [step(i) for i in range(ahead)]
                if kind != "decode" and "issue" not in options:
                    slots = ahead * (2 if kind == "merged" else 1)
                    assert pool.stats().in_flight_slots == slots
            synchronize(pool)
        assert pool.stats().stages > before.stages or kind == "decode"
        for i, got in enumerate(ids):
            expected = [] if kind == "decode" else list(range(i, i + count))
            if kind == "merged":
                expected += [-i, 1 - i, 2 - i]
            if kind in ("mixed", "decode"):
                expected += [5000 + i, 5063 - i]
            assert got.tolist() == expected
        with on_stream(device, FORWARD):
            synchronize(pool)
        assert pool.stats().in_flight_slots == 0 and pool.stats().leased_slots == 0


def test_relay_and_indices_may_be_dropped_at_once(device: str) -> None:
    with pystage.StagingPool(device, 1 << 16) as pool:

        def step(i: int) -> torch.Tensor:
            with on_stream(device, SCHEDULE):
                relay = torch.arange(1000 * i, 1000 * i + 128, device=device)
                indices = tensor([5] * 64, device)
                batch = staged(pool, [i])
                mix_with_running(batch, indices)
            with on_stream(device, FORWARD):
                forward_waits_for_schedule(device)
                resolve_forward_inputs(batch, relay)
            return batch.input_ids

        for _ in range(2):
            step(0)
        if device != "cpu":
            torch.cuda.synchronize()
        with on_stream(device, FORWARD):
            with hold_transfers(pool):
                ids = [step(i) for i in range(8)]
                with on_stream(device, SCHEDULE):
                    later = [tensor([-1] * n, device) for n in (128, 64) for _ in range(16)]
            synchronize(pool)
        assert [got.tolist() for got in ids] == [[i, *[1000 * i + 5] * 64] for i in range(8)]
        del later


# --- the guard ----------------------------------------------------------------------------------


def test_the_guard_resolves_counts_and_warns_once_a_line(
    pool: pystage.StagingPool, device: str
) -> None:
    relay = tensor([7], device)

    def forgetful(batch: PrefillBatch) -> int:
        ensure_resolved(batch, relay)
        return ForwardBatch.init_new(batch).num_tokens

    def another(batch: PrefillBatch) -> None:
        ensure_resolved(batch)

    count = forgotten_resolves()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(3):
            batch = staged(pool, [1] * 4)
            mix_with_running(batch, tensor([0], device))
            assert forgetful(batch) == 5
            assert forgotten_resolves() == count + i + 1
        another(staged(pool, [1]))
        done = staged(pool, [1])
        resolve_forward_inputs(done)
        another(done)
    assert forgotten_resolves() == count + 4
    # Parameters of a test share its lines: a later one finds the first one's warning given.
    mine = [w for w in caught if w.category is pystage.ForgottenResolveWarning]
    assert len(mine) == (2 if not _guard_tested else 0)
    for warning in mine:
        assert warning.filename == __file__
        assert f"{__file__}:{warning.lineno}" in str(warning.message)
    _guard_tested.append(device)


_guard_tested: list[str] = []


def test_the_guard_neither_hides_nor_counts_failures(device: str) -> None:
    count = forgotten_resolves()
    with pytest.raises(pystage.UnresolvedInputsError):
        ensure_resolved(PrefillBatch(device))
    assert forgotten_resolves() == count


# --- merge, filter, slices ----------------------------------------------------------------------


def test_merge_two_staged(pool: pystage.StagingPool) -> None:
    batch, other = staged(pool, [1, 2], [3]), staged(pool, [4], [5, 6])
    merge(batch, other)
    assert batch.extend_lens == [2, 1, 1, 2] and batch.input_ids is None
    assert resolved_ids(batch) == [1, 2, 3, 4, 5, 6]
    assert other.extend_lens == [1, 2]
    assert resolved_ids(other) == [4, 5, 6]


@pytest.mark.parametrize("which", [0, 1])
def test_merge_staged_and_resolved(pool: pystage.StagingPool, which: int) -> None:
    batches = [staged(pool, [1, 2]), staged(pool, [3])]
    resolve_forward_inputs(batches[which])
    merge(*batches)
    assert batches[0].input_ids is None
    assert resolved_ids(batches[0]) == [1, 2, 3]


def test_merge_two_resolved(pool: pystage.StagingPool) -> None:
    batch, other = staged(pool, [1, 2]), staged(pool, [3])
    resolve_forward_inputs(batch)
    resolve_forward_inputs(other)
    merge(batch, other)
    assert batch.input_ids is not None and batch.input_ids.tolist() == [1, 2, 3]
    assert batch.extend_lens == [2, 1]


def test_merge_with_an_empty_one(pool: pystage.StagingPool, device: str) -> None:
    def empties() -> list[PrefillBatch]:
        idle = PrefillBatch(device, input_ids=torch.empty(0, dtype=torch.int64, device=device))
        return [PrefillBatch(device), idle, staged(pool)]

    for empty in empties():
        batch = staged(pool, [1, 2])
        tokens = batch.prefill_input_ids_cpu
        merge(batch, empty)
        assert batch.prefill_input_ids_cpu is tokens and batch.extend_lens == [2]
        resolve_forward_inputs(batch)
        ids = batch.input_ids
        merge(batch, empty)
        assert batch.input_ids is None or batch.input_ids is ids
        assert resolved_ids(batch) == [1, 2]
        merge(empty, staged(pool, [1, 2]))
        assert empty.extend_lens == [2] and resolved_ids(empty) == [1, 2]
    for empty in empties():
        for other in empties():
            merge(empty, other)
            assert resolved_ids(empty) == []


def test_merge_with_decodes(pool: pystage.StagingPool, device: str) -> None:
    relay = tensor([7, 8, 9], device)

    def decode(*indices: int) -> PrefillBatch:
        rows = tensor(list(indices), device)
        return PrefillBatch(device, mix_running_indices=rows, extend_lens=[1] * len(indices))

    batch = staged(pool, [1, 2])
    merge(batch, decode(2))
    merge(batch, decode(0, 1))
    assert batch.extend_lens == [2, 1, 1, 1]
    before = fields(batch)
    with pytest.raises(ValueError, match="cannot follow the running requests"):
        merge(batch, staged(pool, [3]))
    assert all(vars(batch)[name] is value for name, value in before.items())
    first = staged(pool, [3])
    merge(first, batch)
    assert resolved_ids(first, relay) == [3, 1, 2, 9, 7, 8]
    assert resolved_ids(batch, relay) == [1, 2, 9, 7, 8]
    with pytest.raises(pystage.UnresolvedInputsError):
        merge(batch, PrefillBatch(device, extend_lens=[3]))


def test_running_requests_may_be_none_at_all(pool: pystage.StagingPool, device: str) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device)
    batch = staged(pool, [1, 2])
    tokens = batch.prefill_input_ids_cpu
    mix_with_running(batch, none)
    assert batch.prefill_input_ids_cpu is tokens and batch.mix_running_indices is None
    batch.mix_running_indices = none
    merge(batch, PrefillBatch(device, req_pool_indices=none))
    merge(batch, staged(pool, [3]))
    assert batch.extend_lens == [2, 1] and resolved_ids(batch) == [1, 2, 3]
    decode = PrefillBatch(device, req_pool_indices=none)
    merge(decode, staged(pool, [3]))
    assert resolved_ids(decode) == [3]
    assert resolved_ids(PrefillBatch(device, req_pool_indices=none), tensor([7], device)) == []


def test_a_request_without_ids_may_not_follow_running_ones(
    pool: pystage.StagingPool, device: str
) -> None:
    batch = staged(pool, [1, 2])
    mix_with_running(batch, tensor([0], device))
    before = fields(batch)
    with pytest.raises(ValueError, match="cannot follow the running requests"):
        merge(batch, staged(pool, []))
    assert all(vars(batch)[name] is value for name, value in before.items())
    filter(batch, [1])
    assert resolved_ids(batch, tensor([7], device)) == [7]


def test_filter_and_slices(pool: pystage.StagingPool, device: str) -> None:
    relay = tensor([7, 8, 9], device)
    requests: list[list[int]] = [[1, 2], [], [3], [4, 5, 6]]
    rows = list(range(10, 17))
    for resolve_first in (False, True):
        for keep in ([0, 1, 2, 3, 4, 5, 6], [0, 3], [2, 3], [3, 0, 6, 4], [1], [5], [], [2, 2, 4]):
            batch = staged(pool, *requests[:2])
            merge(batch, staged(pool, *requests[2:]))
            mix_with_running(batch, tensor([2, 1, 0], device))
            batch.req_pool_indices = tensor(rows, device)
            if resolve_first:
                resolve_forward_inputs(batch, relay)
            filter(batch, keep)
            ids = [*requests, [9], [8], [7]]
            assert batch.extend_lens == [len(ids[i]) for i in keep]
            assert batch.req_pool_indices.tolist() == [rows[i] for i in keep]
            assert resolved_ids(batch, relay) == [id_ for i in keep for id_ in ids[i]]
    batch = staged(pool, *requests)
    middle = batch[1:3]
    assert len(batch) == 4 and len(middle) == 2
    assert resolved_ids(middle) == [3]
    assert resolved_ids(batch) == [1, 2, 3, 4, 5, 6]


def test_a_whole_slice_has_lengths_of_its_own(pool: pystage.StagingPool) -> None:
    batch = staged(pool, [1], [2])
    batch[:].extend_lens.append(3)
    assert batch.extend_lens == [1, 1]
    kept = torch.tensor([1])
    filter(batch, kept)  # type: ignore[arg-type]
    assert batch.extend_lens == [1] and resolved_ids(batch) == [2]


def test_filter_over_the_seams_of_a_merge(pool: pystage.StagingPool) -> None:
    """Requests kept from both sides of a seam are one range, in two slots."""
    requests = [[1, 2], [3, 4], [5, 6, 7], [8], [9]]
    for seam, end in itertools.combinations(range(1, 5), 2):
        for first, last in itertools.combinations(range(6), 2):
            batch = staged(pool, *requests[:seam])
            merge(batch, staged(pool, *requests[seam:end]))
            merge(batch, staged(pool, *requests[end:]))
            part = batch[first:last]
            assert part.extend_lens == [len(ids) for ids in requests[first:last]]
            assert resolved_ids(part) == [i for ids in requests[first:last] for i in ids]


@given(data=st.data())
def test_merge_and_filter_agree_with_lists(data: st.DataObject) -> None:
    relay = torch.arange(1000, 1010)
    with pystage.StagingPool("cpu", 1 << 16) as pool:
        batch, expected = staged(pool), list[list[int]]()
        for _ in range(data.draw(st.integers(1, 4))):
            some = st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=4)
            requests = data.draw(some)
            other = staged(pool, *requests)
            if data.draw(st.booleans()):
                resolve_forward_inputs(other)
            merge(batch, other)
            expected += requests
        running = data.draw(st.lists(st.integers(0, 9), max_size=4))
        if running:
            mix_with_running(batch, torch.tensor(running))
        prefill = list(range(len(expected)))
        expected += [[1000 + i] for i in running]
        kept = st.lists(st.sampled_from(prefill), max_size=6) if prefill else st.just([])
        keep = [*data.draw(kept), *range(len(prefill) + len(running) // 2, len(expected))]
        filter(batch, keep)
        assert batch.extend_lens == [len(expected[i]) for i in keep]
        assert resolved_ids(batch, relay) == [i for k in keep for i in expected[k]]
        assert not any(len(part) == 0 for part in _parts_of(batch))


def _parts_of(batch: PrefillBatch) -> tuple[Any, ...]:
    ids = batch.prefill_input_ids_cpu
    return ids if isinstance(ids, tuple) else ()


def test_rows_follow_their_requests(pool: pystage.StagingPool, device: str) -> None:
    batch, other = staged(pool, [1, 2]), staged(pool, [3])
    batch.req_pool_indices, other.req_pool_indices = tensor([7], device), tensor([9], device)
    merge(batch, other)
    assert batch.req_pool_indices.tolist() == [7, 9]
    merge(batch, staged(pool, [4]))  # whose rows nobody knows
    assert batch.req_pool_indices is None and batch.extend_lens == [2, 1, 1]


def test_a_filter_that_keeps_all_changes_nothing(pool: pystage.StagingPool) -> None:
    batch = staged(pool, [1, 2], [3])
    before = fields(batch)
    filter(batch, [0, 1])
    assert all(vars(batch)[name] is value for name, value in before.items())
    filter(batch, [1])
    assert len(batch.prefill_input_ids_cpu) == 1  # the others' ids are not transferred
    assert isinstance(batch.prefill_input_ids_cpu, pystage.StagedTokens)


def test_what_stays_together_stays_in_one_piece(pool: pystage.StagingPool) -> None:
    batch = staged(pool, [1, 2], [3], [4], [5])
    filter(batch, [0, 1, 3])
    assert [part.tolist() for part in batch.prefill_input_ids_cpu] == [[1, 2, 3], [5]]
    filter(batch, [1, 2])
    assert [part.tolist() for part in batch.prefill_input_ids_cpu] == [[3], [5]]


def test_a_resolved_batch_stays_resolved_when_filtered(pool: pystage.StagingPool) -> None:
    batch = staged(pool, [1, 2], [3])
    resolve_forward_inputs(batch)
    filter(batch, [1])
    assert batch.input_ids is not None and batch.input_ids.tolist() == [3]
    assert batch.prefill_input_ids_cpu is None


def test_a_slot_stays_while_a_filtered_batch_needs_it(device: str) -> None:
    with pystage.StagingPool(device, 4096, at_capacity="raise") as pool:
        batch = staged(pool, run_of(0, 900), run_of(900, 100))
        part = batch[1:]
        resolve_forward_inputs(batch)
        with pytest.raises(pystage.PoolExhaustedError, match="1 slots leased"):
            pool.stage([[1]])
        assert resolved_ids(part) == list(range(900, 1000))
        synchronize(pool)
        assert pool.stats().leased_slots == 0


def test_no_empty_piece_is_kept() -> None:
    parts = (torch.arange(3), torch.arange(3, 5))
    ranges = [(0, 0), (0, 3), (3, 3), (5, 5)]
    assert [piece.tolist() for piece in _cut(parts, ranges)] == [[0, 1, 2]]
    assert [piece.tolist() for piece in _cut(parts, [(1, 2), (4, 5)])] == [[1], [4]]
    assert [piece.tolist() for piece in _cut(parts, [(3, 5)])] == [[3, 4]]
    assert _cut(parts, [(1, 1)]) == ()


def test_filter_refuses_what_is_not_there(pool: pystage.StagingPool, device: str) -> None:
    batch = staged(pool, [1, 2], [3])
    mix_with_running(batch, tensor([0], device))
    before = fields(batch)
    for keep, error in [([3], IndexError), ([-1], IndexError), ([2, 0], ValueError)]:
        with pytest.raises(error):
            filter(batch, keep)
    for mask in ([True, False, True], torch.tensor([True, False, True])):
        with pytest.raises(TypeError, match=r"keep_indices has .*True.* not a mask"):
            filter(batch, mask)
    with pytest.raises(TypeError):
        filter(batch, ["0"])  # type: ignore[list-item]
    assert all(vars(batch)[name] is value for name, value in before.items())
    for lens in ([2, 1], [2, 1, 2]):  # a request is missing; a running one has two ids
        batch.extend_lens = lens
        with pytest.raises(ValueError, match="extend_lens of PrefillBatch"):
            filter(batch, [0])
    with pytest.raises(pystage.UnresolvedInputsError):
        filter(PrefillBatch(device, extend_lens=[1]), [0])


# --- what counts as resolved, empty, or a prefill ------------------------------------------------


def test_ids_of_the_batch_before_do_not_count_as_resolved(
    pool: pystage.StagingPool, device: str
) -> None:
    """An engine that stages a batch's next ids itself may leave the old ones standing."""
    batch = staged(pool, [5, 6])
    batch.input_ids = tensor([1, 2], device)
    assert resolved_ids(batch) == [5, 6]


def test_ids_with_running_requests_behind_are_not_resolved(device: str) -> None:
    batch = PrefillBatch(
        device, input_ids=tensor([5], device), mix_running_indices=tensor([1], device)
    )
    assert resolved_ids(batch, tensor([7, 8], device)) == [5, 8]


@dataclass
class Mode:
    extend: bool

    def is_extend(self) -> bool:
        return self.extend


def test_only_an_extend_needs_ids_of_its_own(device: str) -> None:
    relay = tensor([7, 8, 9], device)
    for extend in (False, True):
        batch: Any = PrefillBatch(device, req_pool_indices=tensor([2, 0], device))
        batch.forward_mode = Mode(extend)
        if extend:
            with pytest.raises(pystage.UnresolvedInputsError, match="has neither input_ids nor"):
                resolve_forward_inputs(batch, relay)
        else:
            assert resolved_ids(batch, relay) == [9, 7]


def test_an_empty_batch_leaves_a_resolved_one_resolved(device: str) -> None:
    ids = tensor([5, 6], device)
    for left_out in (PrefillBatch(device), PrefillBatch(device, input_ids=ids[:0])):
        batch = PrefillBatch(device, input_ids=ids, extend_lens=[2])
        merge(batch, left_out)
        assert batch.input_ids is ids and batch.prefill_input_ids_cpu is None
        merge(left_out, batch)
        assert left_out.input_ids is ids and left_out.prefill_input_ids_cpu is None


def test_running_requests_leave_nothing_resolved(device: str) -> None:
    """A batch without prefill ids is not empty when it has running requests."""
    batch = PrefillBatch(device, input_ids=tensor([5], device), extend_lens=[1])
    running = PrefillBatch(device, mix_running_indices=tensor([1], device), extend_lens=[1])
    merge(batch, running)
    assert batch.input_ids is None
    assert resolved_ids(batch, tensor([7, 8], device)) == [5, 8]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3], "mix_running_indices is a list, not a tensor: make it one on the batch's device"),
        (torch.tensor(3), r"mix_running_indices is torch.int64 \[\], not int32 or int64 \[k\]"),
        (torch.tensor([3.0]), r"mix_running_indices is torch.float32 \[1\], not int32 or int64"),
    ],
)
def test_running_indices_are_a_tensor(indices: Any, message: str) -> None:
    with pystage.StagingPool("cpu", 1 << 16) as pool:
        batch = PrefillBatch("cpu")
        prepare_for_extend(batch, [[1, 2]], pool=pool)
        with pytest.raises(TypeError, match=message):
            mix_with_running(batch, indices)
        assert batch.mix_running_indices is None and batch.extend_lens == [2]
