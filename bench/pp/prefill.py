"""Chunked prefill through a real pipeline: accuracy and benefit of predicted chunk times.

    torchrun --nproc-per-node 2 -m bench.pp.prefill --model 8b
    python -m bench.pp.prefill --model tiny            # one rank, a CPU is enough

The model is a Llama with random weights, built of modules of transformers. Its layers are split
evenly over the ranks. The KV cache is preallocated. Attention is `scaled_dot_product_attention`
with a lower-right causal bias. pystage stages the ids on rank 0 and resolves them at forward entry.
Hidden states go from rank to rank with torch.distributed (NCCL between GPUs, gloo on a CPU). Writes
one JSON file to bench/results.

Parts (`--parts`, default all):
  profile   our profile and, with --sglang-wheel, SGLang's 128-length sweep, cold and warm: forwards
            and wall time. Only the first one in a process runs cold: --first chooses it.
  heldout   prediction error on random (history, chunk) points
  ttft      for prompts of a quarter, half and all of the context (--prompts): chunk times alone on
            each stage, their spread, time to first token through the pipeline (plans in a new
            random order each round), and a comparison with the simulation
  trace     prompts with the lengths of a conversation trace, all there at the start: makespan, and
            time to first token of each

With `--in-turn N` one process on one GPU measures a pipeline of N ranks: it runs the chunks on the
first stage only, and the times of the pipeline follow from the times of these chunks (`InTurn`).

On 2 x H100, `--model 8b` with all parts takes about ten minutes; `--prompts 65536 --reps 2` takes a
third of that, `--model 1b` about a quarter. PYSTAGE_COMMIT names the commit where there is no git.

This is one file because every part runs the same model, pipeline and planners.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import os
import random
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from bench.common import load, parts_of, write_result
from bench.llama import SHAPES as MODELS
from bench.pp.sglang_sizes import chunks_of, sglang_class, sweep_lengths
from pystage.pp import (
    Choice,
    ChunkSizer,
    LatencyModel,
    QueueSizer,
    SamplePlan,
    fit_stages,
    profile_prefill,
    random_token_ids,
    share_profile,
    simulate_pipeline,
    time_chunks,
)
from pystage.pp.choice import size_at
from pystage.pp.makespan import fixed_chunks, histories, pipeline_ends
from pystage.pp.profile import DeviceClock

logger = logging.getLogger("pp_prefill")

PARTS = ("profile", "heldout", "ttft", "trace")
MEASURED_TOKENS = 131072  # the stages are measured with a prompt of at most half of this
IN_FLIGHT = DeviceClock.AHEAD  # chunks enqueued ahead of the device, as where they are timed alone


@dataclass(frozen=True)
class Piece:
    """Tokens start..stop of one prompt. The prompt's KV rows begin at `row`."""

    prompt: int
    row: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


Batch = Sequence[Piece]


# --- the model: one stage of it -------------------------------------------------------------------


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    batch: Batch,
    masks: Sequence[torch.Tensor],
    kv: dict[int, tuple[torch.Tensor, torch.Tensor]],
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over a preallocated cache, one SDPA call per prompt."""
    keys, values = kv[int(module.layer_idx)]
    outputs, at = [], 0
    for piece, mask in zip(batch, masks, strict=True):
        rows = slice(at, at + piece.count)
        at += piece.count
        keys[:, :, piece.row + piece.start : piece.row + piece.stop] = key[:, :, rows]
        values[:, :, piece.row + piece.start : piece.row + piece.stop] = value[:, :, rows]
        seen = slice(piece.row, piece.row + piece.stop)
        output = scaled_dot_product_attention(
            query[:, :, rows],
            keys[:, :, seen],
            values[:, :, seen],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1).contiguous(), None


class Stage(nn.Module):
    """The layers of one rank, with the embedding on the first and the head on the last."""

    def __init__(
        self, shape: dict[str, int], rank: int, ranks: int, kv_rows: int, device: torch.device
    ) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama import modeling_llama as llama

        ALL_ATTENTION_FUNCTIONS.register("pp_prefill", attend)
        config = LlamaConfig(**shape, max_position_embeddings=kv_rows)
        config._attn_implementation = "pp_prefill"
        layers = config.num_hidden_layers
        if layers < ranks:
            raise ValueError(f"{layers} layers cannot be split over {ranks} ranks")
        mine = range(rank * layers // ranks, (rank + 1) * layers // ranks)
        self.hidden, self.vocab = config.hidden_size, config.vocab_size
        self.first, self.last = rank == 0, rank == ranks - 1
        self.layers = nn.ModuleList(llama.LlamaDecoderLayer(config, i) for i in mine)
        self.rotary = llama.LlamaRotaryEmbedding(config)
        self.embed = nn.Embedding(self.vocab, self.hidden) if self.first else None
        self.norm = llama.LlamaRMSNorm(self.hidden, eps=config.rms_norm_eps)
        self.head = nn.Linear(self.hidden, self.vocab, bias=False) if self.last else None
        rows = (1, config.num_key_value_heads, kv_rows, config.head_dim)
        self.kv = {i: (torch.zeros(rows), torch.zeros(rows)) for i in mine}
        self.device = device

    def forward(self, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Takes ids [n] on the first rank, else hidden states [1, n, hidden]. Returns hidden
        states, or on the last rank the next token of the last piece, [1]."""
        hidden = self.embed(inputs)[None] if self.embed is not None else inputs
        spans = [torch.arange(p.start, p.stop, device=self.device) for p in batch]
        positions = self.rotary(hidden, torch.cat(spans)[None])
        masks = [causal_lower_right(p.count, p.stop) for p in batch]
        for layer in self.layers:
            hidden = layer(
                hidden, position_embeddings=positions, batch=batch, masks=masks, kv=self.kv
            )
        if self.head is None:
            return hidden
        return self.head(self.norm(hidden[0, -1:])).argmax(dim=-1)


def build_stage(
    shape: dict[str, int], rank: int, ranks: int, kv_rows: int, device: torch.device
) -> Stage:
    dtype, before = (
        (torch.bfloat16 if device.type == "cuda" else torch.float32),
        torch.get_default_dtype(),
    )
    torch.manual_seed(rank)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Stage(shape, rank, ranks, kv_rows, device).eval()
    finally:
        torch.set_default_dtype(before)


# --- the pipeline ---------------------------------------------------------------------------------


class ChunkClock:
    """Times of consecutive chunks in ms, from events on a GPU (read at the end) or the host clock
    on a CPU.

    `finish` also makes the host wait, so that no more than IN_FLIGHT chunks are enqueued."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> Any:
        return self._now()

    def finish(self, begin: Any) -> None:
        self.marks.append((begin, self._now()))
        if self.cuda and len(self.marks) > IN_FLIGHT:
            self.marks[-1 - IN_FLIGHT][1].synchronize()

    def read(self) -> list[float]:
        return [self._between(begin, end) for begin, end in self._done()]

    def since(self, start: Any) -> list[float]:
        """When each chunk ended, in ms after `start`."""
        return [self._between(start, end) for _, end in self._done()]

    def _done(self) -> list[tuple[Any, Any]]:
        if self.cuda:
            torch.cuda.synchronize()
        return self.marks

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) if self.cuda else (end - begin) * 1e3)


class Pipeline:
    def __init__(self, stage: Stage, rank: int, ranks: int) -> None:
        import pystage

        self.stage, self.rank, self.ranks = stage, rank, ranks
        self.device = stage.device
        self.pool = pystage.StagingPool(device=self.device) if stage.first else None
        self._resolve = pystage.resolve
        self.piped_ms: list[float] = []
        """Times of the last run's chunks on this stage, in ms."""
        self.ended_ms: list[float] = []
        """When they ended, in ms after the run's start."""
        self.stages: dict[str, Any] = {}
        """`stage_factors` and `overhead_ms`, if they are known before a run."""
        self.dtype = next(stage.layers.parameters()).dtype

    def gather(self, ms: list[float]) -> list[list[float]]:
        """The times of chunks on each stage, [ranks, chunks], the same on all ranks. `ms` are those
        on this rank's stage."""
        stages: list[Any] = [None] * self.ranks
        dist.all_gather_object(stages, ms)
        return stages

    def ids(self, batch: Batch, prompts: Sequence[array[int]]) -> torch.Tensor:
        """The batch's ids, staged on the host and resolved on the current stream."""
        assert self.pool is not None
        staged = self.pool.stage(
            [prompts[p.prompt] for p in batch],
            starts=[p.start for p in batch],
            stops=[p.stop for p in batch],
            vocab_size=self.stage.vocab,
        )
        return self._resolve(staged)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Random hidden states. With constant ones the GPU would run at a higher clock."""
        shape = (1, sum(p.count for p in batch), self.stage.hidden)
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch], prompts: Sequence[array[int]]) -> float:
        """Time in ms from staging the first id on rank 0 until rank 0 has the last batch's
        token."""
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        clock = ChunkClock(self.device)
        start = clock.start()
        sending = []
        # The next receive is posted before this forward is enqueued, so it overlaps with it.
        coming = None if self.stage.first else self._receive(batches[0])
        output = torch.empty(0)
        for i, batch in enumerate(batches):
            if coming is None:
                inputs = self.ids(batch, prompts)
            else:
                work, inputs = coming
                if i + 1 < len(batches):
                    coming = self._receive(batches[i + 1])
                work.wait()
            begin = clock.start()
            output = self.stage(inputs, batch)
            if not self.stage.last:
                sending.append((dist.isend(output, self.rank + 1), output))
            clock.finish(begin)
        for work, _ in sending:
            work.wait()
        token = output if self.stage.last else torch.zeros(1, dtype=torch.int64, device=self.device)
        if self.ranks > 1 and self.stage.last:
            dist.send(token, 0)
        elif self.ranks > 1 and self.stage.first:
            dist.recv(token, self.ranks - 1)
        if not (self.stage.first or self.stage.last) and self.device.type == "cuda":
            torch.cuda.synchronize()
        assert int(token[0]) >= 0  # waits for the token
        took = (time.perf_counter() - began) * 1e3
        self.piped_ms, self.ended_ms = clock.read(), clock.since(start)
        return took

    def _receive(self, batch: Batch) -> tuple[Any, torch.Tensor]:
        shape = (1, sum(p.count for p in batch), self.stage.hidden)
        buffer = torch.empty(shape, dtype=self.dtype, device=self.device)
        return dist.irecv(buffer, self.rank - 1), buffer

    def transfer_ms_per_token(self, tokens: int) -> float:
        """Time of one hop of hidden states from rank 0 to rank 1, median of seven."""
        if self.ranks == 1:
            return 0.0
        piece = [Piece(0, 0, 0, tokens)]
        times = []
        for _ in range(9):
            dist.barrier()
            buffer = self.hidden(piece)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            if self.rank == 0:
                dist.send(buffer, 1)
            elif self.rank == 1:
                dist.recv(buffer, 0)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
        return float(np.median(times[2:])) / tokens


class InTurn(Pipeline):
    """A pipeline of `ranks` stages with equal numbers of layers. This GPU has the first one.

    A run takes the prompt through the first stage alone. For each chunk, stage s then takes
    `stage_factors[s]` times as long and `overhead_ms[s]` more, and a hop takes `hop_ms` per token.
    These numbers come from a run on two GPUs, whose second stage stands for all that receive.
    Without such a run all stages take as long as the first one, and a hop takes no time.
    """

    def __init__(self, stage: Stage, ranks: int, like: dict[str, Any] | None) -> None:
        super().__init__(stage, 0, ranks)
        self.hop_ms = like["transfer_ms_per_token"] if like else 0.0
        told = like["stages"] if like else {"stage_factors": [1.0, 1.0], "overhead_ms": [0.0, 0.0]}
        self.stages = {
            name: [first, *[second] * (ranks - 1)] for name, (first, second) in told.items()
        }

    def gather(self, ms: list[float]) -> list[list[float]]:
        each = zip(self.stages["stage_factors"], self.stages["overhead_ms"], strict=True)
        return [[factor * one + more for one in ms] for factor, more in each]

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch], prompts: Sequence[array[int]]) -> float:
        # The first forward of a size may load kernels. The first batch has the least history.
        for batch in {sum(p.count for p in batch): batch for batch in reversed(batches)}.values():
            self.stage(self.ids(batch, prompts), batch)
        clock = ChunkClock(self.device)
        for batch in batches:
            begin = clock.start()
            self.stage(self.ids(batch, prompts), batch)
            clock.finish(begin)
        self.piped_ms = clock.read()
        hops = [self.hop_ms * sum(p.count for p in batch) for batch in batches]
        self.ended_ms = pipeline_ends(self.gather(self.piped_ms), hops).tolist()
        return self.ended_ms[-1]

    def transfer_ms_per_token(self, _tokens: int) -> float:
        return self.hop_ms


# --- SGLang's predictor, for comparison -----------------------------------------------------------


def sglang_sweep(
    step: Callable[[int, int], object], base: int, wait: Callable[[], object]
) -> dict[str, Any]:
    """Times SGLang's sweep as SGLang does: with the host clock, and a pause after each forward.
    `wait` waits for the device."""
    lengths, times = sweep_lengths(base), []
    began = time.perf_counter()
    wait()
    for length in lengths:
        start = time.perf_counter()
        step(0, length)
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    seconds = time.perf_counter() - began
    return {"lengths": lengths, "ms": times, "forwards": len(lengths), "seconds": seconds}


class SglangSizes:
    """A fitted predictor. If its own fit refuses, static chunks, as in SGLang."""

    def __init__(self, wheel: Path, sweep: dict[str, Any], args: argparse.Namespace) -> None:
        self.args = args
        self.predictor = sglang_class(wheel)()
        self.refused = ""
        try:
            self.predictor.fit(sweep["lengths"], sweep["ms"])
            self.predictor.set_target_latency(args.base)
            self.predictor.is_ready = True
        except ValueError as error:
            self.refused = str(error)

    def next_size(self, history: int) -> int:
        size = self.predictor.predict_next_chunk_size(
            history, self.args.base, self.args.page, self.args.context, 2 * self.args.base
        )
        return size or self.args.base

    def ms(self, history: int, chunk: int) -> float:
        """The time that its sizes are based on: f(history + chunk) - f(history)."""
        p = self.predictor
        a, b = p.quadratic_coeff_a, p.linear_coeff_b
        return a * (chunk * chunk + 2 * history * chunk) + b * chunk

    def ms_with_constant(self, history: int, chunk: int) -> float:
        return self.ms(history, chunk) + self.predictor.constant_coeff_c


# --- what is measured -----------------------------------------------------------------------------


def batches_of_one(chunks: Sequence[int]) -> list[Batch]:
    starts = np.cumsum([0, *chunks])
    return [[Piece(0, 0, int(a), int(b))] for a, b in pairwise(starts)]


NextSize = Callable[[int, int, int], int]
"""The size of the next chunk, by the tokens that are done, the length of the prompt, and the tokens
that wait behind the prompt."""


def batches_of_many(lengths: Sequence[int], next_size: NextSize) -> list[Batch]:
    """Batches in order of arrival. The next prompts fill what a prompt leaves of a chunk."""
    rows = np.cumsum([0, *lengths])
    batches: list[Batch] = []
    prompt = done = 0
    while prompt < len(lengths):
        waiting = int(rows[-1] - rows[prompt + 1])
        budget, batch = next_size(done, lengths[prompt], waiting), []
        while budget > 0 and prompt < len(lengths):
            take = min(budget, lengths[prompt] - done)
            batch.append(Piece(prompt, int(rows[prompt]), done, done + take))
            budget, done = budget - take, done + take
            if done == lengths[prompt]:
                prompt, done = prompt + 1, 0
        batches.append(batch)
    return batches


def by_length(plans: Mapping[int, Sequence[int]]) -> NextSize:
    """Sizes from the plan for the least of these lengths that the prompt does not exceed."""
    return lambda history, prompt, _: size_at(plans[min(n for n in plans if n >= prompt)], history)


def while_waiting(queue: QueueSizer, alone: NextSize) -> NextSize:
    """The queue's sizes while prompts wait, else those of `alone`."""

    def size(history: int, prompt: int, waiting: int) -> int:
        found = queue.next_chunk(prompt - history, waiting)
        return alone(history, prompt, waiting) if found is None else found

    return size


def _told(choice: Choice, seconds: float) -> dict[str, Any]:
    return {**asdict(choice), "gain": choice.gain, "seconds": seconds}


def spread(times: Sequence[float]) -> float:
    """(max - min) / mean"""
    return float(np.ptp(times) / np.mean(times))


class Bench:
    def __init__(self, args: argparse.Namespace, pipeline: Pipeline) -> None:
        self.args, self.pipeline = args, pipeline
        self.rank, self.ranks = pipeline.rank, pipeline.ranks
        self.seconds: dict[str, float] = {}
        self.wait = torch.cuda.synchronize if pipeline.device.type == "cuda" else lambda: None
        self.results: dict[str, Any] = {}
        self.policies: dict[str, Callable[[int], list[int]]] = {}
        self.next_sizes: dict[str, NextSize] = {}
        for size in args.fixed:
            self.next_sizes[f"fixed {size}"] = lambda *_, size=size: size
        self.sizer: ChunkSizer | None = None
        self.sglang: dict[str, SglangSizes] = {}
        self.stages = pipeline.stages
        """What `choose` is told about the stages."""
        vocab = pipeline.stage.vocab
        self.prompt = random_token_ids(args.context, vocab, args.seed)

    @torch.inference_mode()
    def step(self, history: int, chunk: int) -> object:
        """The work that profilers time: staging and resolve on the first stage, random hidden
        states on the others, and one forward of this rank's stage."""
        batch = [Piece(0, 0, history, history + chunk)]
        first = self.pipeline.stage.first
        inputs = self.pipeline.ids(batch, [self.prompt]) if first else self.pipeline.hidden(batch)
        return self.pipeline.stage(inputs, batch)

    def alone(self, chunks: Sequence[int]) -> list[list[float]]:
        """Times of the chunks of a prompt in ms on each stage, without communication: [ranks,
        chunks], the same on all ranks."""
        points = list(zip(histories(chunks).tolist(), chunks, strict=True))
        return self.pipeline.gather(time_chunks(self.step, points, self.pipeline.device))

    def on_rank0(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs `work` on rank 0 and returns its result on every rank. Its failure is raised on
        every rank too."""
        box: list[Any] = [None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                box = [{"ok": work()}]
            except Exception as caught:
                error, box = caught, [{"failed": repr(caught)}]
        dist.broadcast_object_list(box, src=0)
        if error is not None:
            raise error
        if "failed" in box[0]:
            raise RuntimeError(f"rank 0: {box[0]['failed']}")
        return box[0]["ok"]

    def profile(self) -> None:
        args = self.args
        plan = SamplePlan.spread(
            base_chunk=args.base,
            context_len=args.context,
            page_size=args.page,
            min_chunk=args.min_chunk,
            **({"ranks": self.ranks} if self.ranks > 1 else {}),
        )
        if args.first == "ours":
            self._ours(plan)
        if args.sglang_wheel:
            for name in ("sglang cold", "sglang warm"):
                self._theirs(name)
        if args.first != "ours":
            self._ours(plan)
        sizer = self.sizer
        assert sizer is not None
        self.policies = {
            name: lambda n, next_size=next_size: chunks_of(n, lambda h: next_size(h, n, 0))
            for name, next_size in self.next_sizes.items()
        }
        self.policies["equal time"] = sizer.plan
        self.policies["equal time, base x 2"] = self._sizer(sizer.model, 2 * args.base).plan
        self.policies["fastest"] = lambda n: sizer.fastest_plan(n, self.ranks)
        self.policies["choose"] = self._choose
        self.policies["choose, run"] = self._choose_by_runs
        self.next_sizes["equal time"] = lambda history, *_: sizer.next_chunk(history) or args.base

    def _choose(self, prompt_len: int, key: str = "choice") -> list[int]:
        """Rank 0 chooses the chunks. It times the finalists on its own stage."""

        def choose() -> dict[str, Any]:
            assert self.sizer is not None
            began = time.perf_counter()
            choice = self.sizer.choose(
                prompt_len,
                self.ranks,
                time=lambda points: time_chunks(self.step, points, self.pipeline.device),
                **self.stages,
            )
            return _told(choice, time.perf_counter() - began)

        told = self.results[f"{key} {prompt_len}"] = self.on_rank0(choose)
        chunks: list[int] = told["chunks"]
        return chunks

    def _queue(self) -> QueueSizer:
        """The sizer for prompts that wait. Rank 0 times the sizes on its own stage."""
        sizer = self.sizer
        assert sizer is not None

        def timed() -> dict[str, Any]:
            began = time.perf_counter()
            queue = sizer.for_queue(
                self.ranks,
                time=lambda points: time_chunks(self.step, points, self.pipeline.device),
                **self.stages,
            )
            seconds = time.perf_counter() - began
            return {"ms_by_size": [*queue.ms_by_size.items()], "seconds": seconds}

        told = self.results["queue"] = self.on_rank0(timed)
        return QueueSizer(dict(told["ms_by_size"]), self.ranks, **self.stages)

    def _choose_by_runs(self, prompt_len: int) -> list[int]:
        """As `_choose`, but whole prompts are run through all stages. Each rank chooses, and all
        ranks use the times of rank 0, so that they run the same plans."""
        assert self.sizer is not None
        box: list[Any] = [None]

        def run(chunks: Sequence[int]) -> float:
            box[0] = self.pipeline.run(batches_of_one(chunks), [self.prompt])
            dist.broadcast_object_list(box, src=0)
            return float(box[0])

        began = time.perf_counter()
        choice = self.sizer.choose(prompt_len, self.ranks, run=run, **self.stages)
        self.results[f"choice {prompt_len} by runs"] = _told(choice, time.perf_counter() - began)
        return list(choice.chunks)

    def _sizer(self, model: LatencyModel, base: int) -> ChunkSizer:
        return ChunkSizer(
            model,
            base_chunk=base,
            context_len=self.args.context,
            page_size=self.args.page,
            min_chunk=self.args.min_chunk,
            context_margin=0,
        )

    def _ours(self, plan: SamplePlan) -> None:
        args = self.args
        profile = share_profile(
            lambda: profile_prefill(
                self.step, plan, device=self.pipeline.device, progress=args.progress
            )
        )
        began = time.perf_counter()
        model = LatencyModel.fit(profile)
        fit_seconds = time.perf_counter() - began
        self.sizer = self._sizer(model, args.base)
        self.results["profile ours"] = {
            **profile.to_json(),
            "fit_seconds": fit_seconds,
            "report": model.to_json()["report"],
            "form": model.to_json()["form"],
        }
        if self.rank == 0 and args.plot:
            from pystage.pp.plot import plot_profile

            plot_profile(self.sizer, args.context, args.plot)

    def _theirs(self, name: str) -> None:
        sweep = self.on_rank0(lambda: sglang_sweep(self.step, self.args.base, self.wait))
        sizes = SglangSizes(self.args.sglang_wheel, sweep, self.args)
        self.sglang[name] = sizes
        p = sizes.predictor
        fitted = [p.quadratic_coeff_a, p.linear_coeff_b, p.constant_coeff_c]
        self.results[f"profile {name}"] = {**sweep, "fit": fitted, "refused": sizes.refused}
        self.next_sizes[name] = lambda history, *_: sizes.next_size(history)

    def heldout(self) -> None:
        args = self.args
        rng = np.random.default_rng(args.seed + 1)
        low, high = args.base // 8, args.base * 5 // 4
        points = []
        while len(points) < args.heldout:
            chunk = int(low * (high / low) ** rng.random()) // args.page * args.page
            history = int(rng.random() * (args.context - chunk)) // args.page * args.page
            points.append((history, max(chunk, args.page)))

        def measure() -> dict[str, Any]:
            # The faster of two runs, which is closer to the time on a quiet device.
            runs = [time_chunks(self.step, points, self.pipeline.device) for _ in range(2)]
            return {"points": points, "ms": np.min(runs, axis=0).tolist()}

        result = self.on_rank0(measure)
        ms = np.array(result["ms"])
        sizer = self.sizer
        assert sizer is not None
        predictors: dict[str, Callable[[int, int], float]] = {"ours": sizer.model.predict}
        for name, sizes in self.sglang.items():
            predictors[name] = sizes.ms
            predictors[f"{name}, plus its constant"] = sizes.ms_with_constant
        for name, predict in predictors.items():
            guess = np.array([predict(h, c) for h, c in points])
            error = np.abs(guess - ms) / ms
            result[name] = {
                "ms": guess.tolist(),
                "median": float(np.median(error)),
                "p95": float(np.percentile(error, 95)),
                "worst": float(error.max()),
            }
        self.results["heldout"] = result

    def measured_stages(self) -> dict[str, Any]:
        """`stage_factors` and `overhead_ms`, from a prompt of half the context (at most 65,536
        tokens) in chunks of four sizes. The same on all ranks.

        The prompt is long, and its first chunk does not count, because after a pause a GPU runs at
        a higher clock. From prompts of 16,384 tokens, two equal stages seemed to differ by 8 %.
        """
        args = self.args
        sizes = [args.base // part for part in (8, 4, 2, 1)]
        each = min(args.context, MEASURED_TOKENS) // len(sizes) // 2
        chunks = [c for size in sizes for c in fixed_chunks(size, each)]
        alone = self.alone(chunks)[0][1:]
        runs = []
        for _ in range(4):
            self.pipeline.run(batches_of_one(chunks), [self.prompt])
            runs.append(self.pipeline.piped_ms[1:])
        piped = self.pipeline.gather(np.median(runs[1:], axis=0).tolist())
        names = ("stage_factors", "overhead_ms")
        return self.on_rank0(lambda: dict(zip(names, fit_stages(alone, piped), strict=True)))

    def ttft(self) -> None:
        args = self.args
        per_token = self.pipeline.transfer_ms_per_token(args.base)
        self.results["transfer_ms_per_token"] = per_token
        if self.ranks > 1:
            self.stages = self.stages or self.measured_stages()
            self.results["stages"] = self.stages
        order = random.Random(args.seed)  # the same on all ranks
        for prompt_len in args.prompts:
            plans = {
                name: policy(prompt_len)
                for name, policy in self.policies.items()
                if not {name, f"{name}:{prompt_len}"}.intersection(args.without)
            }
            alone: dict[str, list[list[float]]] = {}
            if not args.in_turn:  # there a run is the first stage alone
                alone = {name: self.alone(chunks) for name, chunks in plans.items()}
            runs: dict[str, list[float]] = {name: [] for name in plans}
            piped: dict[str, list[list[float]]] = {}
            for _ in range(args.reps):
                for name in order.sample([*plans], len(plans)):
                    runs[name].append(self.pipeline.run(batches_of_one(plans[name]), [self.prompt]))
                    piped[name] = self.pipeline.gather(self.pipeline.piped_ms)
                for name, chunks in plans.items():
                    told = self._told_ttft(chunks, piped[name], runs[name], per_token)
                    if name in alone:
                        told |= self._told_alone(chunks, alone[name], runs[name], per_token)
                    self.results[f"ttft {prompt_len} {name}"] = told
                self.write()  # a run of ten minutes may be cut

    def write(self) -> Path | None:
        """Writes what has been measured. Only rank 0 does."""
        if self.rank > 0:
            return None
        args, device = self.args, self.pipeline.device
        kind = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
        where = f"{self.ranks}-in-turn-" if args.in_turn else f"{self.ranks}x"
        name = f"pp_prefill-{args.model}-{where}{kind.lower().replace(' ', '-')}"
        name += "-ours-first" if args.first == "ours" else ""
        body: dict[str, Any] = {"ranks": self.ranks, "first": args.first, "seconds": self.seconds}
        if args.in_turn:
            body |= {"in_turn": True, "like": args.like and args.like.name}
        return write_result(name, {**body, "results": self.results}, args.out)

    def _told_ttft(
        self, chunks: list[int], piped: list[list[float]], runs: list[float], per_token: float
    ) -> dict[str, Any]:
        """`piped` are the times of the chunks on each stage in the last run."""
        hops = [per_token * c for c in chunks]
        return {
            "chunks": chunks,
            "piped_ms": piped,
            "spread": spread(piped[0]),
            "ttft_ms": float(np.median(runs)),
            "runs_ms": runs,
            "simulated_from_piped_ms": simulate_pipeline(piped, hops),
        }

    def _told_alone(
        self, chunks: list[int], stages: list[list[float]], runs: list[float], per_token: float
    ) -> dict[str, Any]:
        """`stages` are the times of the chunks on each stage alone."""
        hops = [per_token * c for c in chunks]
        simulated = simulate_pipeline(stages, hops)
        layers = np.mean(stages, axis=0) * self.ranks
        return {
            "stage_ms": stages,
            "spread": spread(stages[0]),
            "simulated_ms": simulated,
            "simulation_error": simulated / float(np.median(runs)) - 1,
            "simulated_ms_by_ranks": {
                n: simulate_pipeline([layers / n] * n, hops) for n in range(2, 17)
            },
        }

    def trace(self) -> None:
        args = self.args
        lengths: list[int] = []
        for length in trace_lengths(args.trace, args.seed, args.context // 4):
            if sum(lengths) + length > args.context // 2:
                break
            lengths.append(length)
        vocab = self.pipeline.stage.vocab
        prompts = [random_token_ids(n, vocab, args.seed + i) for i, n in enumerate(lengths)]
        told = self.results["trace"] = {"lengths": lengths}
        # As the SGLang plugin does: plans for a few lengths, and a size is looked up by history.
        lengths_of_plans = [args.context // 4 >> k for k in range(3)]
        chosen = by_length({n: self._choose(n, "trace choice") for n in lengths_of_plans})
        queued = while_waiting(self._queue(), chosen)
        for name, next_size in {**self.next_sizes, "choose": chosen, "queue": queued}.items():
            if name in args.without:
                continue
            batches = batches_of_many(lengths, next_size)
            # Later batches replace earlier ones: where each prompt ends, in the prompts' order.
            last = {piece.prompt: i for i, batch in enumerate(batches) for piece in batch}
            self.pipeline.run(batches, prompts)  # warm-up
            runs, first = [], []
            for _ in range(args.reps):
                runs.append(self.pipeline.run(batches, prompts))
                ended: list[Any] = [self.pipeline.ended_ms]
                dist.broadcast_object_list(ended, src=dist.get_world_size() - 1)
                first.append([ended[0][i] for i in last.values()])
            ttft = np.median(first, axis=0)
            told[name] = {
                "ms": float(np.median(runs)),
                "runs_ms": runs,
                "forwards": len(batches),
                "ttft_ms": ttft.tolist(),
                "ttft_p50_ms": float(np.median(ttft)),
                "ttft_p95_ms": float(np.percentile(ttft, 95)),
            }


def trace_lengths(path: Path | None, seed: int, longest: int) -> Iterator[int]:
    """Prompt lengths in tokens, from the column input_length or ContextTokens of a CSV. Without a
    CSV they are log-normal with the median and mean of Mooncake's FAST'25 conversation trace (6,909
    and 12,035), scaled down if the context is short."""
    if path is not None:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                yield min(int(row.get("input_length") or row["ContextTokens"]), longest)
        return
    rng = np.random.default_rng(seed)
    sigma = math.sqrt(2 * math.log(12035 / 6909))
    median = min(6909, longest // 4)
    while True:
        yield int(np.clip(rng.lognormal(math.log(median), sigma), 1, longest))


# --- the run --------------------------------------------------------------------------------------


def start_group() -> tuple[int, int, torch.device]:
    """This rank, the number of ranks, and its device. With fewer GPUs than ranks only one rank goes
    on."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        logger.warning("%d ranks but %d GPUs: one rank runs alone", ranks, gpus)
        if rank > 0:
            raise SystemExit(0)
        ranks = 1
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    where = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if ranks == 1 else {}
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=5), **where)
    return rank, ranks, device


def summary(results: dict[str, Any]) -> str:
    lines = []
    for name, r in results.items():
        if name.startswith("profile"):
            lines.append(f"{name}: {r['forwards']} forwards, {r['seconds']:.2f} s")
        elif name == "heldout":
            lines += [
                f"heldout {who}: median {e['median']:.1%}, p95 {e['p95']:.1%}, "
                f"worst {e['worst']:.1%}"
                for who, e in r.items()
                if isinstance(e, dict)
            ]
        elif name.startswith("ttft"):
            lines.append(
                f"{name}: {r['ttft_ms']:.1f} ms in {len(r['chunks'])} chunks, spread "
                f"{r['spread']:.1%}"
                + (f", simulation {r['simulation_error']:+.1%}" if "stage_ms" in r else "")
            )
        elif name == "trace":
            lines += [
                f"trace {k}: {v['ms']:.1f} ms, first token p95 {v['ttft_p95_ms']:.1f} ms"
                for k, v in r.items()
                if isinstance(v, dict)
            ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--parts", type=parts_of(PARTS), default=PARTS, help=",".join(PARTS))
    parser.add_argument("--context", type=int, help="tokens; default 131072, tiny 2048")
    parser.add_argument("--base", type=int, help="base chunk, tokens; default 8192, tiny 256")
    parser.add_argument("--page", type=int, help="tokens; default 64, tiny 8")
    parser.add_argument("--min-chunk", type=int, help="tokens; default 512, tiny 16")
    parser.add_argument(
        "--fixed",
        type=lambda text: [int(n) for n in text.split(",")],
        help="fixed sizes to compare; default: an eighth, a quarter, half and all of the base",
    )
    parser.add_argument("--heldout", type=int, default=49, help="held-out points")
    parser.add_argument("--reps", type=int, default=3, help="pipeline runs of every plan")
    parser.add_argument(
        "--prompts",
        type=lambda text: [int(n) for n in text.split(",")],
        help="their tokens; default: a quarter, half and all of the context",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="PLAN",
        help="plans that ttft leaves out, such as 'sglang cold' fastest, or 'choose, run:131072' "
        "for one prompt length only",
    )
    parser.add_argument("--sglang-wheel", type=Path, help="of 0.5.20 or later, or a folder of it")
    parser.add_argument(
        "--nccl-blocks",
        type=int,
        metavar="N",
        help="thread blocks of a transfer between GPUs (NCCL_MAX_CTAS, and one channel); default: "
        "NCCL's own choice. Blocks that wait for a chunk take multiprocessors from the forward",
    )
    parser.add_argument(
        "--in-turn",
        type=int,
        metavar="N",
        help="one process measures a pipeline of N ranks with the chunk times of its first stage",
    )
    parser.add_argument(
        "--like",
        type=Path,
        help="with --in-turn: the JSON of a run on two GPUs, whose second stage the stages behind "
        "the first are like",
    )
    parser.add_argument("--first", choices=("ours", "sglang"), default="sglang")
    parser.add_argument("--trace", type=Path, help="CSV with input_length or ContextTokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write a picture of the profile here")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file; default in bench/results")
    args = parser.parse_args()
    tiny = args.model == "tiny"
    defaults = {"context": (131072, 2048), "base": (8192, 256), "page": (64, 8)}
    for name, (usual, small) in (defaults | {"min_chunk": (512, 16)}).items():
        if getattr(args, name) is None:
            setattr(args, name, small if tiny else usual)
    args.fixed = args.fixed or [args.base // 8, args.base // 4, args.base // 2, args.base]
    args.prompts = args.prompts or [args.context // 4, args.context // 2, args.context]
    if not all(0 < n <= args.context for n in args.prompts):
        parser.error(f"--prompts {args.prompts}: between 1 and the context, {args.context}")
    if args.like and not args.in_turn:
        parser.error("--like needs --in-turn")
    if args.in_turn and (args.in_turn < 2 or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        parser.error(f"--in-turn {args.in_turn}: at least 2 ranks, measured by one process")
    return args


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    args = arguments()
    if args.nccl_blocks:  # NCCL reads these when it starts
        os.environ |= {"NCCL_MAX_CTAS": str(args.nccl_blocks), "NCCL_MAX_P2P_NCHANNELS": "1"}
    rank, ranks, device = start_group()
    try:
        stages = args.in_turn or ranks
        stage = build_stage(MODELS[args.model], rank, stages, args.context, device)
        if args.in_turn:
            like = load(args.like)["results"] if args.like else None
            bench = Bench(args, InTurn(stage, stages, like))
        else:
            bench = Bench(args, Pipeline(stage, rank, ranks))
        # The other parts need the profile, so it always runs, and runs first.
        for part in ("profile", *(p for p in args.parts if p != "profile")):
            began = time.perf_counter()
            getattr(bench, part)()
            bench.seconds[part] = time.perf_counter() - began
            if rank == 0:
                print(f"{part}: {bench.seconds[part]:.0f} s", flush=True)
        if rank == 0:
            print(summary(bench.results))
            print("written to", bench.write())
    except BaseException:
        if dist.get_backend() == "nccl" and dist.get_world_size() > 1:
            # NCCL's shutdown waits for receives that nobody will serve any more.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        raise
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
