"""Known latency surfaces, noise like that of real timings, and the best possible plan.

Used by bench/pp/surfaces.py. A surface gives the time of a chunk on one stage in ms, from arrays of
history and chunk (tokens). The surfaces are rooflines of an H100-like device, and do not have the
form that pystage.pp fits. The rates were measured with a real decoder: 550 TFLOP/s in matrix
products, 345 in attention.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pystage.pp import simulate_pipeline
from pystage.pp.makespan import histories
from pystage.pp.profile import Timing

Floats = NDArray[np.float64]
Surface = Callable[[Any, Any], Floats]

PAGE = 64
LARGEST = 16_384

# Amounts per millisecond: FLOP in matrix products (bf16, fp8) and in attention, bytes from memory
# and over NVLink.
_GEMM, _GEMM_FP8, _ATTENTION, _MEMORY, _LINK = 550e9, 950e9, 345e9, 2.8e9, 0.3e9
_CHUNK_MS = 1.5  # an engine's own work around a forward: schedule, receive, send
_BUCKETS = (*range(256, 1025, 256), *range(1536, 4097, 512), *range(5120, 16385, 1024))


def _up(x: Floats, tile: float) -> Floats:
    return np.ceil(x / tile) * tile


def _pairs(history: Floats, chunk: Floats) -> Floats:
    """Number of (query, key) pairs of causal attention."""
    return history * chunk + 0.5 * chunk * chunk


def _products(chunk: Floats, weights: float, byte: float = 2.0, rate: float = _GEMM) -> Floats:
    """Matrix products of one layer: its weights are read once, rows come in tiles of 128."""
    return np.maximum(2.0 * weights / rate * _up(chunk, 128), weights * byte / _MEMORY)


def _experts(chunk: Floats, count: int, active: float, weights: float, byte: float) -> Floats:
    """Time of one layer's experts on one device. Each token uses `active` of them on average, and
    each has `weights` weights.

    Only the distinct experts that are used are read from memory. The rows of each are padded to
    tiles of 64, by half a tile on average.
    """
    touched = count * (1.0 - (1.0 - active / count) ** chunk)
    rows = chunk * active + 32.0 * touched
    rate = _GEMM if byte > 1 else _GEMM_FP8
    return np.maximum(2.0 * weights / rate * rows, weights * byte / _MEMORY * touched)


def _all_reduce(chunk: Floats, hidden: int, devices: int) -> Floats:
    """Time of the two all-reduces of one layer in bf16, each with 20 us of latency."""
    volume = 2.0 * hidden * 2.0 * (devices - 1) / devices
    return 2.0 * (0.02 + volume / _LINK * 1e-3 * chunk)


@dataclass(frozen=True)
class Family:
    """A kind of model: its layers, and the device time of one of them."""

    name: str
    layers: int
    layer: Surface
    launch_ms: float = 0.15
    """Host time to launch one layer: a forward is never faster than that."""

    def stage(self, ranks: int) -> Surface:
        """The surface of one of `ranks` equal stages."""

        def ms(history: Any, chunk: Any) -> Floats:
            past, new = np.asarray(history, np.float64), np.asarray(chunk, np.float64)
            device = self.layers / ranks * self.layer(past, new)
            return _CHUNK_MS + np.maximum(device, self.layers / ranks * self.launch_ms)

        return ms


_8B, _70B_OF_4 = 218e6, 856e6 / 4  # weights of one layer on one device


def _dense(history: Floats, chunk: Floats, rows: float = 128.0) -> Floats:
    """A dense 8B model: 32 heads of 128, 8 for keys and values. Attention works in tiles of `rows`
    queries."""
    new = _up(chunk, rows)
    attention = 4 * 4096 / _ATTENTION * (history * new + 0.5 * chunk * new)
    return _products(chunk, _8B) + attention + 4096 / _MEMORY * history


def _padded(history: Floats, chunk: Floats) -> Floats:
    edges = np.asarray(_BUCKETS, np.float64)
    at = np.minimum(np.searchsorted(edges, chunk), edges.size - 1)
    return _dense(history, np.maximum(chunk, edges[at]))


def _dense_70b(history: Floats, chunk: Floats) -> Floats:
    attention = 4 * 2048 / _ATTENTION * _pairs(history, chunk) + 1024 / _MEMORY * history
    return _products(chunk, _70B_OF_4) + attention + _all_reduce(chunk, 8192, 4)


def _fp8(history: Floats, chunk: Floats) -> Floats:
    attention = 4 * 4096 / _ATTENTION * _pairs(history, chunk) + 4096 / _MEMORY * history
    return _products(chunk, _8B, byte=1.0, rate=_GEMM_FP8) + attention


def _moe(history: Floats, chunk: Floats) -> Floats:
    """A 30B model with 128 experts, 8 per token."""
    attention = 4 * 4096 / _ATTENTION * _pairs(history, chunk) + 2048 / _MEMORY * history
    return _products(chunk, 19e6) + attention + _experts(chunk, 128, 8, 4.7e6, 2.0)


def _mla(history: Floats, chunk: Floats) -> Floats:
    """A 671B model on eight devices in fp8, with 256 experts, 8 per token. Each chunk recomputes
    the keys and values of the whole history from their latents."""
    expand = 2 * 512 * 16 * 256 / _GEMM * (history + chunk)
    attention = 2 * 16 * (192 + 128) / _ATTENTION * _pairs(history, chunk)
    mixed = _products(chunk, 12e6) + _experts(chunk, 32, 1, 44e6, 1.0)
    return expand + attention + mixed + _all_reduce(chunk, 7168, 8)


def _window(history: Floats, chunk: Floats) -> Floats:
    """A model in which five of six layers attend to a window of 1,024 tokens."""
    pairs = _pairs(history, chunk)
    seen = pairs / 6 + 5 / 6 * np.minimum(pairs, 1024 * chunk)
    return _products(chunk, _8B) + 4 * 4096 / _ATTENTION * seen


def _linear(history: Floats, chunk: Floats) -> Floats:
    """A state-space model: a scan in blocks of 256, independent of the history."""
    scan = 4 * 4096 * 256 / _ATTENTION * _up(chunk, 256)
    return _products(chunk, 120e6) + scan + 0.0 * history


def _small(history: Floats, chunk: Floats) -> Floats:
    attention = 4 * 1024 / _ATTENTION * _pairs(history, chunk) + 512 / _MEMORY * history
    return _products(chunk, 15e6) + attention


FAMILIES = {
    family.name: family
    for family in (
        Family("dense 8B", 32, _dense),
        Family("dense 70B, TP 4", 80, _dense_70b),
        Family("fp8 8B", 32, _fp8),
        Family("MoE 30B", 48, _moe, 0.25),
        Family("MLA 671B, TP 8", 64, _mla, 0.25),
        Family("sliding window", 48, _window),
        Family("linear attention", 48, _linear),
        Family("launch-bound 0.5B", 32, _small, 0.35),
        Family("padded graphs 8B", 32, _padded),
        # FlashAttention-2 on 132 multiprocessors: 528 tokens of 32 heads fill half a wave.
        Family("attention waves 8B", 32, partial(_dense, rows=528.0)),
    )
}


# --- timings --------------------------------------------------------------------------------------


def _plain(sigma: float) -> Callable[[np.random.Generator, int], float]:
    return lambda rng, _: float(np.exp(sigma * rng.standard_normal()))


def _drift(rng: np.random.Generator, index: int) -> float:
    """A drift of the times: clocks fall by 4 % while the device warms up."""
    return float(np.exp(0.02 * rng.standard_normal())) * (1.0 + 0.04 * min(index / 40, 1.0))


def _spikes(rng: np.random.Generator, _: int) -> float:
    spike = float(rng.uniform(1.5, 4.0)) if rng.random() < 0.06 else 1.0
    return spike * float(np.exp(0.03 * rng.standard_normal()))


def _slow_start(rng: np.random.Generator, index: int) -> float:
    """The start of a cold process, as observed once: 1,390 and 1,101 ms, then 207."""
    return (6.7, 5.3, 1.3)[index] if index < 3 else float(np.exp(0.03 * rng.standard_normal()))


def _bimodal(rng: np.random.Generator, _: int) -> float:
    return (1.12 if rng.random() < 0.3 else 1.0) * float(np.exp(0.02 * rng.standard_normal()))


NOISES: dict[str, Callable[[np.random.Generator, int], float]] = {
    "1 %": _plain(0.01),
    "3 %": _plain(0.03),
    "10 %": _plain(0.10),
    "drift": _drift,
    "spikes": _spikes,
    "slow start": _slow_start,
    "bimodal": _bimodal,
}
HARSH = {"20 %": _plain(0.20), "30 %": _plain(0.30)}
"""Beyond what a gate must accept: only asked whether what it does is right."""


@dataclass
class Engine:
    """A simulated engine to profile. `step` runs a forward and `timer` times it, with noise."""

    surface: Surface
    noise: str
    seed: int
    forwards: int = 0
    _ms: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._noise = (NOISES | HARSH)[self.noise]

    def step(self, history_len: int, chunk_len: int) -> None:
        ms = float(self.surface(history_len, chunk_len))
        self._ms = ms * self._noise(self._rng, self.forwards)
        self.forwards += 1

    def timer(self, run: Callable[[], object]) -> Timing:
        run()
        return Timing(self._ms, self._ms)

    def ms(self, history_len: int, chunk_len: int) -> float:
        """One noisy timing."""
        self.step(history_len, chunk_len)
        return self._ms


def seed_of(*words: object) -> int:
    """A seed that is the same for the same words in every process."""
    return zlib.crc32("/".join(map(str, words)).encode())


# --- plans under the truth ------------------------------------------------------------------------


def chunk_times(surface: Surface, chunks: Sequence[int]) -> Floats:
    return np.asarray(surface(histories(chunks), np.asarray(chunks, np.int64)))


def makespan(surface: Surface, chunks: Sequence[int], ranks: int) -> float:
    """Time to first token in ms over equal stages."""
    return simulate_pipeline([list(chunk_times(surface, chunks))] * ranks)


@cache
def _lattice(cells: int, sizes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """History and chunk by (end of chunk, size), in pages. Impossible ones have negative
    history."""
    chunk = np.arange(1, sizes + 1)[None, :]
    return np.arange(1, cells + 1)[:, None] - chunk, chunk


def optimum(
    surface: Surface, prompt_len: int, ranks: int, largest: int = LARGEST, gap: float = 0.001
) -> tuple[list[int], float]:
    """The best plan of chunks of whole pages up to `largest`, and a lower bound of all such plans.

    On equal stages a plan takes sum(t) + (ranks - 1) * max(t). With a cap on the slowest chunk, the
    cheapest cover is a shortest path over pages. No plan whose slowest chunk is between two caps
    can take less than the cost of the higher cap plus the bubbles of the lower one. So intervals
    are split until the best plan found is within `gap` of all these bounds.
    """
    if prompt_len % PAGE:
        raise ValueError(f"prompt_len={prompt_len} must be a multiple of {PAGE}")
    ms = _every_chunk(surface, prompt_len, largest)
    high = float(ms[np.isfinite(ms)].max())
    caps = np.geomspace(float(ms[0, 0]), high, 12)
    known: dict[float, float] = {0.0: np.inf}  # cap: cost of the cheapest cover
    best, found = np.inf, [0]
    low = 0.0
    for _ in range(8):
        costs, plans = _covers(ms, caps, best)
        known.update(zip(caps.tolist(), costs.tolist(), strict=True))
        for plan in plans:
            total = makespan(surface, plan, ranks)
            if total < best:
                best, found = total, plan
        edges = sorted(known)
        floors = [known[b] + (ranks - 1) * a for a, b in pairwise(edges)]
        low = min(floors)
        if low >= (1.0 - gap) * best:
            break
        open_ = [i for i, value in enumerate(floors) if value < (1.0 - gap) * best]
        each = max(1, 12 // len(open_))
        caps = np.concatenate([np.linspace(edges[i], edges[i + 1], each + 2)[1:-1] for i in open_])
    return found, min(low, best)


def least_ms_within(surface: Surface, prompt_len: int, cap_ms: float, largest: int) -> float:
    """The time in ms of the cheapest plan of whole pages with no chunk over the cap, on one
    stage."""
    ms = _every_chunk(surface, prompt_len, largest)
    return float(_covers(ms, np.array([cap_ms]), 0.0)[0][0])


def _every_chunk(surface: Surface, prompt_len: int, largest: int) -> Floats:
    """The times of all chunks of whole pages, [end of the chunk, size]."""
    history, chunk = _lattice(prompt_len // PAGE, min(largest, prompt_len) // PAGE)
    ms = surface(np.maximum(history, 0) * PAGE, chunk * PAGE)
    return np.asarray(np.where(history < 0, np.inf, ms))


def _covers(ms: Floats, caps: Floats, best: float) -> tuple[Floats, list[list[int]]]:
    """For each cap, the cost of the cheapest cover with no chunk over it; and the plans that may
    beat `best`."""
    cells, sizes = ms.shape
    cost = np.full((caps.size, sizes + cells + 1), np.inf)
    cost[:, sizes] = 0.0  # column `sizes` is the start of the prompt, so all windows are complete
    taken = np.zeros((cells + 1, caps.size), dtype=np.int64)
    limit = caps[:, None] * (1.0 + 1e-12)
    rows = np.arange(caps.size)
    for end in range(1, cells + 1):
        window = cost[:, end : end + sizes][:, ::-1]  # cost at end - 1, end - 2, ... pages
        total = np.where(ms[end - 1] <= limit, window + ms[end - 1], np.inf)
        at = total.argmin(axis=1)
        taken[end] = at + 1
        cost[:, sizes + end] = total[rows, at]
    costs = cost[:, -1]
    plans = []
    for row in np.flatnonzero(costs < best):
        chunks, end = [], cells
        while end:
            chunks.append(int(taken[end, row]) * PAGE)
            end -= int(taken[end, row])
        plans.append(chunks[::-1])
    return costs, plans
