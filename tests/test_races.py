"""Slots are not reused too early, with work held pending and with threads that compete."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

import pystage
from pystage import _C
from pystage.testing import hold_transfers, synchronize

from .conftest import SCALE, on_stream, run_of


@pytest.fixture(params=["deferred", "eager", "copy_engine"])
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {
        "deferred": {},
        "eager": {"issue": "eager"},
        "copy_engine": {"transfer": "copy_engine"},
    }[request.param]


@pytest.mark.parametrize("how", ["whole", "slice", "copy_", "slice copy_", "out"])
def test_no_slot_is_rewritten_before_its_readers_are_done(
    device: str, variant: dict[str, Any], how: str
) -> None:
    count, slots = 1024, 16
    with pystage.StagingPool(device, slots * 4 * count, at_capacity="raise", **variant) as pool:
        outs = []

        def transfer(i: int) -> None:
            staged = pool.stage([run_of(i * count, count)])
            out = torch.full((count,), -1, dtype=torch.int64, device=device)
            if how == "whole":
                out = staged.to(device, non_blocking=True)
            elif how == "slice":
                out = staged[1:].to(device, non_blocking=True)
            elif how == "copy_":
                out.copy_(staged, non_blocking=True)
            elif how == "slice copy_":
                out[1:].copy_(staged[1:], non_blocking=True)
            else:
                pystage.resolve(staged, out=out)
            outs.append(out)

        transfer(0)  # loads torch's kernels: that would wait for a held stream
        outs.clear()
        synchronize(pool)
        with hold_transfers(pool):
            for i in range(slots):
                transfer(i)
            # On the host a copy into a tensor of the same device is done at once.
            in_flight = device != "cpu" or "copy_" not in how or "issue" in variant
            assert pool.stats().in_flight_slots == (slots if in_flight else 0)
            if in_flight:
                with pytest.raises(pystage.PoolExhaustedError, match="16 in flight"):
                    pool.stage([[1]])
        synchronize(pool)
        for i in range(64):  # every slot again, with other ids
            pystage.resolve(pool.stage([run_of(-i * count, count)]))
            synchronize(pool)  # others may use the GPU too
        for i, out in enumerate(outs):
            expected = torch.arange(i * count, (i + 1) * count)
            tail = expected[1:]
            assert torch.equal(out.cpu()[-len(tail) :], tail)
            if how != "slice copy_" and len(out) == count:
                assert torch.equal(out.cpu(), expected)


def test_a_stuck_stream_keeps_its_own_slots_only(device: str) -> None:
    count = 1024
    with pystage.StagingPool(device, 8 * 4 * count, at_capacity="raise") as pool:
        with on_stream(device, 1), hold_transfers(pool):
            stuck = [pystage.resolve(pool.stage([run_of(i, count)])) for i in range(4)]
            assert pool.stats().in_flight_slots == 4
            with on_stream(device, 2):
                for i in range(200):
                    ids = pystage.resolve(pool.stage([run_of(i, count)]))
                    assert ids[-1].item() == i + count - 1  # waits for this stream alone
            assert pool.stats().in_flight_slots >= 4
            with on_stream(device, 2):
                held = [pool.stage([run_of(0, count)]) for _ in range(4)]
                with pytest.raises(pystage.PoolExhaustedError):
                    pool.stage([[1]])
                del held
        with on_stream(device, 1):
            synchronize(pool)
        assert [ids[0].item() for ids in stuck] == [0, 1, 2, 3]


def test_every_stream_that_reads_a_slot_counts(device: str) -> None:
    with pystage.StagingPool(device, 4096, at_capacity="raise") as pool:
        with on_stream(device, 1), hold_transfers(pool):
            staged = pool.stage([run_of(5, 1000)])
            late = staged.to(device, non_blocking=True)
            with on_stream(device, 2):
                early = staged.to(device, non_blocking=True)
                again = staged[10:].to(device, non_blocking=True)
                assert early.tolist() == list(range(5, 1005))
            del staged
            with on_stream(device, 2), pytest.raises(pystage.PoolExhaustedError):
                pool.stage([[1]])
        with on_stream(device, 1):
            synchronize(pool)
        assert late.tolist() == list(range(5, 1005))
        assert again.tolist() == list(range(15, 1005))


def test_a_lease_outlives_its_transfers(device: str) -> None:
    with pystage.StagingPool(device, 4096, at_capacity="raise") as pool:
        staged = pool.stage([run_of(5, 1000)])
        for _ in range(3):
            assert staged.to(device)[0].item() == 5
        with pytest.raises(pystage.PoolExhaustedError, match="1 slots leased"):
            pool.stage([[1]])
        assert staged.tolist() == list(range(5, 1005))


def test_results_dropped_while_pending(device: str, variant: dict[str, Any]) -> None:
    with pystage.StagingPool(device, 1 << 20, **variant) as pool:
        pystage.resolve(pool.stage([[1]]))  # loads torch's kernels, as above
        synchronize(pool)
        with hold_transfers(pool):
            # With 100 copies pending, the driver waited for the hold to end.
            for i in range(20):
                pystage.resolve(pool.stage([run_of(i, 500)]))  # nobody keeps the result
            kept = [pystage.resolve(pool.stage([run_of(i, 500)])) for i in range(20)]
        synchronize(pool)
        assert [k[0].item() for k in kept] == list(range(20))


def test_memory_of_dropped_results_is_not_another_s(device: str, variant: dict[str, Any]) -> None:
    """While a transfer is pending its output, and what it reads, must not be handed out again."""
    count = 5000
    relay = torch.arange(1000, 1000 + count, device=device)
    with pystage.StagingPool(device, 8 << 20, **variant) as pool:

        def resolve_all(i: int) -> list[torch.Tensor]:
            indices = torch.full((count,), i, device=device)
            return [
                pystage.resolve(pool.stage([run_of(i, count)])),
                pystage.resolve_mixed(pool.stage([run_of(i, count)]), relay, indices),
                _C.gather(relay, indices, None),
            ]

        resolve_all(0)  # loads torch's kernels, as above
        synchronize(pool)
        with hold_transfers(pool):
            for i in range(8):
                resolve_all(i)
            kept = [resolve_all(i) for i in range(8)]
            sizes = [count, 2 * count] * 24
            others = [torch.full((size,), -1, device="cpu") for size in sizes]
        synchronize(pool)
        assert all(bool((other == -1).all()) for other in others)
        for i, (plain, mixed, gathered) in enumerate(kept):
            assert plain.tolist() == list(range(i, i + count))
            assert mixed.tolist() == [*range(i, i + count), *[1000 + i] * count]
            assert gathered.tolist() == [1000 + i] * count


def test_synchronize_waits_for_eager_transfers(device: str) -> None:
    with pystage.StagingPool(device, 32 << 20, issue="eager") as pool:
        big = torch.arange(1 << 20)
        for _ in range(5):
            with hold_transfers(pool):
                for _ in range(8):
                    pool.stage([big])
            synchronize(pool)
            assert pool.stats().in_flight_slots == 0


def test_eager_is_handed_out_once_and_right(device: str) -> None:
    with pystage.StagingPool(device, 1 << 20, issue="eager") as pool:
        staged = pool.stage([run_of(0, 700)])
        assert pool.stats().eager_transfers == 1
        first, second = pystage.resolve(staged), pystage.resolve(staged)
        first.zero_()
        assert second.tolist() == list(range(700))
        assert staged[3:5].to(device).tolist() == [3, 4]
        narrow = pystage.resolve(pool.stage([[7]]), dtype=torch.int32)
        assert narrow.dtype is torch.int32 and narrow.tolist() == [7]
        out = torch.empty(2, dtype=torch.int64, device=device)
        assert pystage.resolve(pool.stage([[8, 9]]), out=out) is out and out.tolist() == [8, 9]
        assert pool.stats().eager_transfers == 3
        # A part of what is not resolved yet: its own ids, and the whole is there still.
        staged = pool.stage([run_of(0, 700)])
        part = staged[3:6]
        assert part.to(device).tolist() == [3, 4, 5]
        assert pystage.resolve(part[1:]).tolist() == [4, 5]
        assert pystage.resolve(staged).tolist() == list(range(700))


def test_the_stream_waits_for_eager_ids(device: str) -> None:
    """What reads them on the current stream does so behind the pool's own stream."""
    count = 700
    with pystage.StagingPool(device, 1 << 20, issue="eager") as pool:
        relay, indices = (torch.tensor(v, device=device) for v in ([7, 8], [1]))
        pystage.resolve_mixed(pool.stage([[1]]), relay, indices)  # loads torch's kernels
        synchronize(pool)
        with on_stream(device, 1):
            hold = hold_transfers(pool)
            hold.__enter__()  # stream 1, and the pool's own
        mixed: list[list[int]] = []

        def read() -> None:  # on a free stream, which has to stop for the ids by itself
            staged = pool.stage([run_of(5, count)])
            mixed.append(pystage.resolve_mixed(staged, relay, indices).tolist())

        reader = threading.Thread(target=read)
        reader.start()
        while pool.stats().eager_transfers < 2:
            pass
        hold.__exit__(None, None, None)
        reader.join(60)
        assert mixed == [[*range(5, 5 + count), 8]]


def test_eager_goes_past_a_held_stream(device: str) -> None:
    """The transfer runs while the consumer's stream is stuck; resolve adds only a wait."""
    with pystage.StagingPool(device, 1 << 20, issue="eager") as pool:
        plain = pystage.StagingPool(device, 1 << 20)
        with hold_transfers(plain):  # this stream, and not the pool's own
            staged = [pool.stage([run_of(i, 700)]) for i in range(20)]
            ids = [pystage.resolve(s) for s in staged]
            staged.clear()
            # All slots come back while the current stream is held: their only reader was eager.
            while pool.stats().in_flight_slots:
                pass
        synchronize(plain)
        plain.close()
        assert [i[-1].item() for i in ids] == [i + 699 for i in range(20)]


def test_stress(device: str) -> None:
    """100,000 random batches over threads, streams and pools, every one verified."""
    threads, total = 4, int(100_000 * SCALE)
    pools = [
        pystage.StagingPool(device, 1 << 16, timeout_s=120),
        pystage.StagingPool(device, 1 << 16, timeout_s=120, issue="eager"),
        pystage.StagingPool(device, 1 << 16, at_capacity="fallback", reserve_bytes=0),
    ]
    source = torch.randint(0, 128_256, (1 << 14,), generator=torch.Generator().manual_seed(0))
    on_device = source.to(device)
    array_ = source.numpy()
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        checks: list[torch.Tensor] = []
        try:
            for i in range(total // threads):
                pool = pools[rng.randrange(3)]
                size = rng.choice([1, 7, 64, 500, 2000])
                start = rng.randrange(len(source) - size)
                cut = rng.randrange(size)
                with on_stream(device, 10 + 2 * seed + rng.randrange(2)):
                    staged = pool.stage(
                        [array_, array_],
                        [start, start + cut],
                        [start + cut, start + size],
                        vocab_size=128_256,
                    )
                    part = staged[cut // 2 :] if i % 3 else staged
                    ids = pystage.resolve(part)
                    del staged, part
                    checks.append((ids == on_device[start + size - len(ids) : start + size]).all())
                if len(checks) == 256:
                    if device != "cpu":
                        torch.cuda.synchronize()
                    assert all(bool(c) for c in checks)
                    checks.clear()
            if device != "cpu":
                torch.cuda.synchronize()
            assert all(bool(c) for c in checks)
        except BaseException as error:
            errors.append(error)

    if device != "cpu":
        torch.cuda.synchronize()
    workers = [threading.Thread(target=work, args=(t,)) for t in range(threads)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    if errors:
        raise errors[0]
    stats = [p.stats() for p in pools]
    assert sum(s.stages for s in stats) == total // threads * threads
    for p in pools:
        p.close()
        assert p.stats().reserved_bytes == 0
