"""The time a pipeline takes over the chunks of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pystage.pp.forms import Floats


def simulate_pipeline(
    stage_ms: Sequence[Sequence[float]], transfer_ms: Sequence[float] | None = None
) -> float:
    """Time in ms until the last stage has finished the last chunk.

    `stage_ms[s][i]` is the time of chunk i on stage s, `transfer_ms[i]` that of its hidden states
    between two stages. A stage starts a chunk when it is done with the one before and the hidden
    states are there; transfers overlap with compute.
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
    """ms until the last stage has the last chunk.

    Stage s takes `factors[s]` times `chunk_ms[i]` for chunk i, and `overhead_ms` on top: what the
    engine adds to every chunk on every stage (scheduling, sending, launching).
    """
    first = factors[0]
    if all(factor == first for factor in factors):  # whatever the order of the chunks
        ms = first * chunk_ms + overhead_ms
        return float(ms.sum() + (len(factors) - 1) * ms.max())
    return simulate_pipeline([(factor * chunk_ms + overhead_ms).tolist() for factor in factors])
