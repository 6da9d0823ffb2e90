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
    return float(pipeline_ends(stage_ms, transfer_ms)[-1])


def pipeline_ends(
    stage_ms: Sequence[Sequence[float]], transfer_ms: Sequence[float] | None = None
) -> Floats:
    """When the last stage has finished each chunk, in ms, [chunks]. Arguments as above."""
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
    return arrived


def stages_of(
    ranks: int, stage_factors: Sequence[float] | None, overhead_ms: float | Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Factor and overhead in ms of each stage, [ranks] each, from arguments as of
    `ChunkSizer.choose`."""
    factors = tuple(stage_factors) if stage_factors is not None else (1.0,) * ranks
    if len(factors) != ranks or not all(f > 0 for f in factors):
        raise ValueError(f"stage_factors={stage_factors}: {ranks} positive numbers are needed")
    given = np.asarray(overhead_ms, np.float64)
    more = tuple(given.tolist()) if given.ndim else (float(given),) * ranks
    if len(more) != ranks or not all(ms >= 0 for ms in more):
        raise ValueError(f"overhead_ms={overhead_ms}: one number or {ranks}, none negative")
    return factors, more


def makespan(
    chunk_ms: Floats, factors: Sequence[float], overhead_ms: float | Sequence[float] = 0.0
) -> float:
    """Time in ms until the last stage has finished the last chunk.

    Stage s takes `factors[s] * chunk_ms[i] + overhead_ms[s]` for chunk i. The overhead is the time
    that the engine adds to every chunk on that stage (scheduling, sending, launching); one number
    holds for all stages.
    """
    more = np.broadcast_to(np.asarray(overhead_ms, np.float64), len(factors))
    rows = [factor * chunk_ms + ms for factor, ms in zip(factors, more.tolist(), strict=True)]
    if len(set(factors)) == len(set(more.tolist())) == 1:
        # Then the order of the chunks does not matter.
        return float(rows[0].sum() + (len(factors) - 1) * rows[0].max())
    return simulate_pipeline([row.tolist() for row in rows])


def fit_stages(
    alone_ms: Sequence[float], piped_ms: Sequence[Sequence[float]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Stage factors and overheads in ms, [ranks] each, for `ChunkSizer.choose`.

    They say what the stages of a pipeline make of the times on the first stage alone: stages
    differ, and in the pipeline a transfer takes multiprocessors from the forward beside it.

    Args:
        alone_ms: times of chunks alone on the first stage, [chunks], as `time_chunks` measures
            them. There should be small and large chunks among them. Take them from a long prompt,
            without its first chunk: after a pause a GPU runs at a higher clock for a while.
        piped_ms: times of the same chunks on each stage while they went through the pipeline,
            [ranks, chunks].

    Let one rank fit and send the result to the others: BLAS libraries differ in the last digits.

    Raises ValueError if the shapes do not match or a time is not positive and finite.
    """
    alone, piped = np.asarray(alone_ms, np.float64), np.asarray(piped_ms, np.float64)
    if alone.ndim != 1 or alone.size < 2 or piped.ndim != 2 or piped.shape[1] != alone.size:
        raise ValueError(
            "alone_ms must be [chunks], at least two, and piped_ms [ranks, chunks]; got "
            f"{alone.shape} and {piped.shape}"
        )
    times = np.vstack([alone, piped])
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise ValueError("all times must be positive and finite")
    spread = alone.max() > 1.1 * alone.min()  # else the slope is noise
    fitted = []
    for ms in piped:
        # The weights make the errors relative, so that a small chunk counts as much as a large one.
        factor, more = np.polyfit(alone, ms, 1, w=1.0 / alone).tolist() if spread else (0.0, 0.0)
        if more < 0 or factor <= 0:  # noise: a larger chunk takes longer, and not less per token
            factor, more = float(np.mean(ms / alone)), 0.0
        fitted.append((factor, more))
    factors, overheads = zip(*fitted, strict=True)
    return factors, overheads
