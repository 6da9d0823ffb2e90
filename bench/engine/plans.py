"""Engines and workloads."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from bench.llama import LLAMA_8B, TINY_LLAMA


@dataclass(frozen=True)
class Traffic:
    """Host-to-device copies beside the engine: ``depth`` copies of ``mib`` MiB at a time, then a
    pause of ``pause_ms`` (0: they are queued without a pause)."""

    mib: int
    depth: int
    pause_ms: float = 0.0


NONE = None
STREAM = Traffic(256, 2)  # streamed weights, an RL weight update, another tenant's offload
BURSTS = Traffic(64, 8, 100.0)  # a LoRA adapter every 0.1 s


@dataclass(frozen=True)
class Workload:
    """Requests of one kind.

    ``prompt``    ``new`` random ids, nothing cached
    ``chat``      ``new`` ids after a conversation that is in the prefix cache
    ``loadback``  ``new`` ids after a conversation that HiCache loads back from the host
    ``beside``    a load-back and, 2 ms later, a fresh prompt of ``fresh`` ids, which is timed
    ``open``      ``rate`` requests per second (Poisson) with a trace's lengths and ``tokens``
                  outputs

    In a closed loop (all but ``open``) one request runs at a time and asks for one token, so its
    latency is its time to the first token. Each variant gets ``blocks`` rounds of ``count``
    requests, and two variants get ``traced`` more that are traced. A request that takes longer than
    ``patience_s`` counts as starved.

    Blocks are short because the host's speed changes every few seconds, by more than the
    differences that are measured.
    """

    kind: str
    new: int = 0
    blocks: int = 16
    count: int = 3
    traffic: Traffic | None = None
    fresh: int = 2048
    rate: float = 0.0
    tokens: int = 1
    traced: int = 0
    patience_s: float = 10.0

    @property
    def name(self) -> str:
        size = f"{self.rate:g}/s" if self.kind == "open" else f"{self.new}"
        beside = {NONE: "", STREAM: "+stream", BURSTS: "+bursts"}.get(self.traffic, "+copies")
        return f"{self.kind}-{size}{beside}"


@dataclass(frozen=True)
class Plan:
    """One pair of engines and their workloads. There are ``conversations`` conversations of
    ``history`` ids each.

    Workloads whose requests may starve come last.
    """

    about: str
    model: dict[str, Any]
    engine: dict[str, Any]
    workloads: tuple[Workload, ...]
    history: int = 0
    conversations: int = 8
    gap_s: float = 0.035
    environment: dict[str, str] = field(default_factory=dict)
    same_chunks: bool = True
    """Whether all variants cut prompts into the same chunks."""

    @property
    def gpus(self) -> int:
        """Number of GPUs that one engine of the plan uses."""
        return int(self.engine.get("tp_size", 1) * self.engine.get("pp_size", 1))


GPU: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "page_size": 64,
    "max_running_requests": 16,
    "chunked_prefill_size": 8192,
    "context_length": 81920,
    "max_total_tokens": 98304,
    # A fraction of the memory that is free when an engine starts. Two engines start at once, so the
    # number of tokens limits what each takes.
    "mem_fraction_static": 0.8,
}
HICACHE = {  # the device holds fewer tokens than the conversations have, so they go to the host
    **GPU,
    "context_length": 16384,
    "max_total_tokens": 36864,
    "enable_hierarchical_cache": True,
    "hicache_write_policy": "write_through",
    "hicache_size": 16,  # GB of the host for each rank
}


def loadback(backend: str, how: str, **sizes: Any) -> Plan:
    """A plan over HiCache. Over several GPUs 100 rounds are traced, each a load-back and a prompt
    beside it, as in SGLang #38448."""
    return Plan(
        f"HiCache that loads KV back by {how} (--hicache-io-backend {backend})",
        LLAMA_8B,
        {**HICACHE, "hicache_io_backend": backend, **sizes},
        (
            Workload("loadback", 256, 20, 3, traced=8),
            Workload("loadback", 2048, traced=8),
            Workload("beside", 256, 24, 3, traced=100 if sizes else 8),
        ),
        history=6144,
        # The engines see a conversation's turns in other orders: the baseline takes part in a
        # third of the rounds. With fewer, some conversations would still be on the device.
        conversations=12,
    )


def ranks(about: str, long: int, **sizes: int) -> Plan:
    """A plan over several GPUs: alone, then with copies to the first GPU.

    Tensor parallelism uses NCCL: SGLang's own all-reduce may use NVLink multicast, which a machine
    that is shared with others may not allow."""
    return Plan(
        f"{about}: an 8B model, nothing else on the GPUs, then copies to the first of them",
        LLAMA_8B,
        {**GPU, "disable_custom_all_reduce": True, **sizes},
        (
            Workload("prompt", 2048, 12, 3),
            Workload("prompt", 8192, 10, 3, traced=4),
            Workload("prompt", long, 3, 1),
            Workload("prompt", 2048, 12, 3, STREAM),
            Workload("prompt", 8192, 10, 3, STREAM, traced=4),
        ),
    )


def sized(stages: int) -> Plan:
    """A plan that compares the chunk sizes of SGLang's dynamic chunking with pystage's. The second
    engine uses pystage's sizes also while its pool is taken away."""
    return Plan(
        f"{stages} GPUs, --pp-size {stages} --enable-dynamic-chunking: an 8B model, whose chunk "
        "sizes are SGLang's in the baseline and pystage's in the other two (PYSTAGE_SGLANG_SIZER)",
        LLAMA_8B,
        {**GPU, "pp_size": stages, "enable_dynamic_chunking": True},
        (Workload("prompt", 32768, 4, 1), Workload("prompt", 65536, 3, 1)),
        environment={"PYSTAGE_SGLANG_SIZER": "1"},
        same_chunks=False,
    )


def budget(how: str, *workloads: Workload, **environment: str) -> Plan:
    """A plan whose second engine keeps its batches to a time budget."""
    return Plan(
        f"an 8B model; with the plugin also a time budget of 80 ms (PYSTAGE_SGLANG_BUDGET_MS){how}",
        LLAMA_8B,
        GPU,
        workloads,
        environment={"PYSTAGE_SGLANG_BUDGET_MS": "80", **environment},
        same_chunks=False,
    )


PLANS = {
    "copies": Plan(
        "an 8B model, nothing else on the GPU, then copies on another stream beside it",
        LLAMA_8B,
        GPU,
        (
            Workload("prompt", 2048, 16, 3, traced=6),
            Workload("prompt", 4096, 14, 3, traced=6),
            Workload("prompt", 8192, 10, 3),
            Workload("chat", 200, 20, 3),
            *(Workload("prompt", n, 8, 3, BURSTS) for n in (2048, 8192)),
            Workload("chat", 200, 20, 3, STREAM),
            Workload("prompt", 2048, 16, 3, STREAM, traced=6),
            Workload("prompt", 4096, 14, 3, STREAM, traced=6),
            Workload("prompt", 8192, 8, 3, STREAM),
        ),
        history=4096,
    ),
    "lengths": Plan(
        "an 8B model, nothing else on the GPU: short and long prompts, arrivals of a trace",
        LLAMA_8B,
        GPU,
        (
            *(Workload("prompt", n, 24, 3) for n in (256, 1024)),
            Workload("open", rate=3, blocks=5, count=12, tokens=32),
            Workload("prompt", 16384, 4, 2),
        ),
    ),
    "long": Plan(
        "an 8B model, nothing else on the GPU: prompts of eight chunks",
        LLAMA_8B,
        GPU,
        (Workload("prompt", 65536, 3, 1),),
    ),
    "direct": loadback("direct", "copies"),
    "kernel": loadback("kernel", "kernels, as is the default"),
    "offload": Plan(
        "weights of 4 GiB that stay on the host (--cpu-offload-gb 4)",
        LLAMA_8B,
        {**GPU, "context_length": 16384, "max_total_tokens": 36864, "cpu_offload_gb": 4},
        (Workload("prompt", 2048, 10, 3, traced=4), Workload("prompt", 8192, 6, 3)),
    ),
    "budget": budget(
        "",
        Workload("open", rate=3, blocks=5, count=12, tokens=32),
        Workload("prompt", 8192, 10, 3),
        Workload("prompt", 32768, 3, 1, traced=2),
    ),
    "corrected": budget(  # a correction takes 60 s at least
        " that follows the server (PYSTAGE_SGLANG_CORRECT)",
        Workload("prompt", 8192, 16, 3),
        Workload("prompt", 32768, 12, 1, traced=2),
        PYSTAGE_SGLANG_CORRECT="1",
    ),
    "tp2": ranks("2 GPUs, --tp-size 2", 32768, tp_size=2),
    "pp2": ranks("2 GPUs, --pp-size 2", 32768, pp_size=2),
    "pp4": ranks("4 GPUs, --pp-size 4", 65536, pp_size=4),
    "pp2-sized": sized(2),
    "pp4-sized": sized(4),
    "tp8": ranks("8 GPUs, --tp-size 8", 65536, tp_size=8),
    "tp8-direct": loadback(
        "direct",
        "copies, on 8 GPUs at once, --tp-size 8",
        tp_size=8,
        hicache_size=2,  # a rank has an eighth of the KV heads
        disable_custom_all_reduce=True,
    ),
    "pp8": ranks("8 GPUs, --pp-size 8", 65536, pp_size=8),
    "tp2-pp4": ranks("8 GPUs, --tp-size 2 --pp-size 4", 65536, tp_size=2, pp_size=4),
    "tiny": Plan(
        "a tiny model on the CPU: a rehearsal, whose times say nothing about a GPU",
        TINY_LLAMA,
        {
            "device": "cpu",
            "dtype": "float32",
            "attention_backend": "torch_native",
            "page_size": 16,
            "max_running_requests": 16,
            "chunked_prefill_size": 512,
            "context_length": 4096,
            "max_total_tokens": 8192,
            "mem_fraction_static": 0.1,
        },
        (
            Workload("prompt", 300, 2, 3, traced=2),
            Workload("prompt", 1200, 2, 2),
            Workload("chat", 40, 2, 3),
            Workload("open", rate=8, blocks=1, count=4, tokens=3),
            Workload("prompt", 300, 2, 2, Traffic(16, 2)),
        ),
        history=256,
        conversations=2,
        gap_s=0.005,
        environment={"PYSTAGE_SGLANG_CPU": "1"},
    ),
}


def poisson(rate: float, count: int, dice: random.Random) -> list[float]:
    """Arrival times of the requests, in seconds after the start."""
    at, times = 0.0, []
    for _ in range(count):
        times.append(at)
        at += dice.expovariate(rate)
    return times
