"""Sizes the chunks of long prompts so that each takes the same time. The engine is simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pystage.pp import ChunkSizer, LatencyModel, SamplePlan, Timing, profile_prefill


def step(history_len: int, chunk_len: int) -> float:
    """Simulates a prefill forward of your engine; returns the milliseconds that it would take."""
    return 2.0 + chunk_len / 60 + chunk_len * (history_len + chunk_len / 2) / 3e6


def timer(run: Callable[[], Any]) -> Timing:
    """Simulates the clock. Without a timer, profile_prefill times the step on the GPU."""
    return Timing(latency_ms=run(), host_ms=0.1)


# --8<-- [start:sizes]
plan = SamplePlan.spread(base_chunk=8192, context_len=131072)
profile = profile_prefill(step, plan, timer=timer)  # on rank 0; share_profile sends it to all ranks
model = LatencyModel.fit(profile)  # t(history, chunk)
print(model.report)  # how good the fit is

sizer = ChunkSizer(model, base_chunk=8192, context_len=131072)
sizer.next_chunk(65536)  # size of the next chunk after 65,536 tokens; None: keep the static size
sizer.plan(100_000)  # all chunks of a prompt, including the last one, of equal time
sizer.fastest_plan(100_000, ranks=4)  # the chunks with the least predicted time to first token
# --8<-- [end:sizes]

sizes = sizer.plan(100_000)
assert sum(sizes) == 100_000 and sizes[0] > sizes[-1]
