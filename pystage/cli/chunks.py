"""The second half of the demo: profiles a small decoder and sizes its prefill chunks.

The decoder has random weights and a KV cache, and gets its ids from a pool. `pystage.pp` profiles
its time per chunk and makes a plan. Then the demo runs the plan, and compares the times of its
chunks with those of chunks of one size.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from .. import StagingPool, resolve
from ..pp import (
    ChunkSizer,
    FitReport,
    LatencyModel,
    Profile,
    SamplePlan,
    profile_prefill,
    random_token_ids,
    time_chunks,
)


@dataclass(frozen=True)
class Size:
    """The sizes of the decoder, and of its context, chunks and KV pages in tokens."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    context: int
    base_chunk: int
    min_chunk: int
    page: int
    dtype: torch.dtype


SIZES = {
    "cpu": Size(4, 256, 8, 8192, 8192, 1024, 128, 32, torch.float32),
    "cuda": Size(8, 2048, 16, 32768, 65536, 4096, 512, 64, torch.bfloat16),
}


class Decoder:
    """A decoder of pre-norm blocks: causal attention over a preallocated KV cache, gated MLP."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        generator = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int) -> Tensor:
            drawn: Tensor = torch.randn(rows, columns, generator=generator) * columns**-0.5
            return drawn.to(device=device, dtype=size.dtype)

        wide = 3 * size.hidden
        self.embedding = weight(size.vocab, size.hidden)
        self.blocks = [
            (
                weight(3 * size.hidden, size.hidden),
                weight(size.hidden, size.hidden),
                weight(2 * wide, size.hidden),
                weight(size.hidden, wide),
            )
            for _ in range(size.layers)
        ]
        rows = (2, size.layers, 1, size.heads, size.context, size.hidden // size.heads)
        self.cache = torch.zeros(rows, device=device, dtype=size.dtype)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, history: int) -> Tensor:
        """Runs ids [n] that follow `history` tokens in the cache; returns the last id's logits,
        [vocab]."""
        n, shape = len(input_ids), (len(input_ids), self.size.heads, -1)
        mask = causal_lower_right(n, history + n)
        x = nn.functional.embedding(input_ids, self.embedding)
        for layer, (qkv, out, up, down) in enumerate(self.blocks):
            q, k, v = (
                part.view(shape).transpose(0, 1)[None]
                for part in (rms_norm(x, x.shape[-1:]) @ qkv.T).chunk(3, -1)
            )
            keys, values = self.cache[:, layer]
            keys[:, :, history : history + n] = k
            values[:, :, history : history + n] = v
            seen = slice(0, history + n)
            attended = scaled_dot_product_attention(
                q, keys[:, :, seen], values[:, :, seen], attn_mask=mask
            )
            x = x + attended[0].transpose(0, 1).reshape(n, -1) @ out.T
            gate, value = (rms_norm(x, x.shape[-1:]) @ up.T).chunk(2, -1)
            x = x + (silu(gate) * value) @ down.T
        return x[-1] @ self.embedding.T


@dataclass(frozen=True)
class Chunks:
    """Chunks of one prompt: their sizes in tokens, and their predicted and measured times in ms."""

    sizes: list[int]
    predicted_ms: list[float]
    measured_ms: list[float]

    @property
    def spread(self) -> float:
        """(max - min) / mean of the measured times."""
        times = self.measured_ms
        return (max(times) - min(times)) / (sum(times) / len(times))


@dataclass(frozen=True)
class ChunkReport:
    """The profile, the quality of its fit, and two ways to cut one prompt into chunks."""

    size: Size
    parameters: int
    profile: Profile
    fit: FitReport
    fixed: Chunks
    """Chunks of one size, the base chunk."""
    planned: Chunks | None
    """Chunks of equal predicted time. None if the fit is not usable, so there is no plan to run."""


def size_chunks(pool: StagingPool, on_forward: Callable[[], None] = lambda: None) -> ChunkReport:
    """Profiles a decoder on the pool's device, fits a latency model, and times the chunks of a
    whole context: chunks of one size and, if the fit is usable, chunks of equal predicted time.

    This needs SciPy, and raises ImportError without it. The ids of every forward are staged in
    `pool` and resolved within the timed region.
    """
    device = pool.device
    size = SIZES[device.type]
    decoder = Decoder(size, device)
    prompt = random_token_ids(size.context, size.vocab)

    def step(history: int, chunk: int) -> Tensor:
        on_forward()
        return _forward(decoder, pool, prompt, history, chunk)

    plan = SamplePlan.spread(
        base_chunk=size.base_chunk,
        context_len=size.context,
        page_size=size.page,
        min_chunk=size.min_chunk,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about attention backends it does not use
        profile = profile_prefill(step, plan, device=device)
        model = LatencyModel.fit(profile)
        sizer = ChunkSizer(
            model,
            base_chunk=size.base_chunk,
            context_len=size.context,
            page_size=size.page,
            min_chunk=size.min_chunk,
            context_margin=0,
        )

        def run(sizes: list[int]) -> Chunks:
            points = list(zip(accumulate(sizes, initial=0), sizes, strict=False))
            runs = [time_chunks(step, points, device) for _ in range(2)]
            took = [min(times) for times in zip(*runs, strict=True)]
            return Chunks(sizes, [float(model.predict(*point)) for point in points], took)

        fixed = [size.base_chunk] * (size.context // size.base_chunk)
        by_one_size = run(fixed)
        planned = run(sizer.plan(size.context)) if model.report.usable else None
    parameters = sum(w.numel() for block in decoder.blocks for w in block)
    parameters += decoder.embedding.numel()
    return ChunkReport(size, parameters, profile, model.report, by_one_size, planned)


def _forward(
    decoder: Decoder, pool: StagingPool, prompt: array[int], history: int, chunk: int
) -> Tensor:
    staged = pool.stage([prompt], [history], [history + chunk], decoder.size.vocab)
    return decoder.forward(resolve(staged), history)
