"""Chooses the chunks of long prompts, and fills batches up to a time. The engine is simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pystage.pp import (
    BudgetSizer,
    ChunkSizer,
    LatencyModel,
    SamplePlan,
    Timing,
    profile_prefill,
    share_model,
)


def step(history_len: int, chunk_len: int) -> float:
    """Takes the place of a prefill forward of your engine; returns its milliseconds."""
    return 2.0 + chunk_len / 60 + chunk_len * (history_len + chunk_len / 2) / 3e6


def timer(run: Callable[[], Any]) -> Timing:
    """Takes the place of the clock; without it, profile_prefill times the step on the GPU."""
    return Timing(latency_ms=run(), host_ms=0.1)


def time_chunks(chunks: Sequence[tuple[int, int]]) -> list[float]:
    """Runs chunks, each (history_len, chunk_len), and returns the milliseconds of each."""
    return [step(history, chunk) for history, chunk in chunks]


# --8<-- [start:sizes]
plan = SamplePlan.spread(base_chunk=8192, context_len=131072)
# Rank 0 profiles and fits; all ranks get its model. Without torch.distributed there is one rank.
model = share_model(lambda: LatencyModel.fit(profile_prefill(step, plan, timer=timer)))
print(model.report)  # how good the fit is

sizer = ChunkSizer(model, base_chunk=8192, context_len=131072)
# The plan for the least time to first token, and why. With `time` its finalists are timed.
choice = sizer.choose(100_000, ranks=8, time=time_chunks)
print(choice)

queue = sizer.for_queue(ranks=8, time=time_chunks)
# The size for the next chunk of a prompt that has 6,000 tokens left, while 90,000 wait behind it.
queue.next_chunk(6_000, waiting=90_000)

budget = BudgetSizer(model, budget_ms=200, max_tokens=8192)
# The longest chunk behind 65,536 tokens that keeps a batch within 200 ms, beside two decodes.
budget.next_chunk(65_536, beside=[(9_000, 1), (40_000, 1)])
# --8<-- [end:sizes]

assert sum(choice.chunks) == 100_000
assert choice.predicted_ms <= choice.fixed_ms
assert queue.next_chunk(6_000, waiting=5_000) is None  # then its own plan
