"""The chunks of a prompt, and the time that a pipeline takes for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pystage.pp.forms import Floats


def fixed_chunks(size: int, prompt_len: int) -> list[int]:
    """Chunks of one size that cover a prompt. The last one is the remainder, if there is one."""
    whole, rest = divmod(prompt_len, size)
    return [size] * whole + [rest] * bool(rest)


def histories(chunks: Sequence[int]) -> NDArray[np.int64]:
    """The number of tokens in front of each chunk of a prompt."""
    sizes = np.asarray(chunks, dtype=np.int64)
    return np.cumsum(sizes) - sizes


def simulate_pipeline(
    stage_ms: Sequence[Sequence[float]], transfer_ms: Sequence[float] | None = None
) -> float:
    """Time in ms until the last stage has finished the last chunk.

    `stage_ms[s][i]` is the time of chunk i on stage s. `transfer_ms[i]` is the time to send its
    hidden states from one stage to the next. A stage starts a chunk when it has finished the
    previous one and the hidden states have arrived. Transfers overlap with compute.
    """
    times = np.asarray(stage_ms, dtype=np.float64)
    if times.ndim != 2 or times.size == 0:
        raise ValueError(f"stage_ms must be stages x chunks, got shape {times.shape}")
    hops = np.zeros(times.shape[1]) if transfer_ms is None else np.asarray(transfer_ms, np.float64)
    arrived = np.zeros(times.shape[1])
    for stage, row in enumerate(times):
        if stage:
            arrived = arrived + hops
        # Chunk i ends at max over j <= i of arrived[j] + row[j] + ... + row[i].
        ends = np.cumsum(row)
        arrived = ends + np.maximum.accumulate(arrived - (ends - row))
    return float(arrived[-1])


def makespan(chunk_ms: Floats, factors: Sequence[float], overhead_ms: float = 0.0) -> float:
    """Time in ms until the last stage has finished the last chunk.

    Stage s takes `factors[s] * chunk_ms[i] + overhead_ms` for chunk i. `overhead_ms` is the time
    that the engine adds to every chunk on every stage (scheduling, sending, launching).
    """
    first = factors[0]
    if all(factor == first for factor in factors):  # then the order of the chunks does not matter
        ms = first * chunk_ms + overhead_ms
        return float(ms.sum() + (len(factors) - 1) * ms.max())
    return simulate_pipeline([(factor * chunk_ms + overhead_ms).tolist() for factor in factors])
