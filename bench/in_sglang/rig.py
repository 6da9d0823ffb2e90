"""The parts of the real SGLang around prefill batches, without its kernels: requests, batches,
pools, radix cache, relay, and if wanted a model with random weights. Used by tests/test_sglang.py
and bench/in_sglang/plugin.py.

stand_ins.py provides stubs for packages that are not installed (on most machines, kernels).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.in_sglang.stand_ins import CUDA_KERNELS, KERNELS, STOOD_IN, stand_in
from bench.llama import SHAPES, TINY_LLAMA, draw_weights, write_config

__all__ = [
    "CUDA_KERNELS",
    "KERNELS",
    "STOOD_IN",
    "Rig",
    "let_configs_be_replaced",
    "model_folder",
    "stand_in",
]


def let_configs_be_replaced() -> None:
    """Lets older releases register configurations that newer transformers already has."""
    from transformers.models.auto.auto_factory import _LazyAutoMapping
    from transformers.models.auto.configuration_auto import _LazyConfigMapping

    for mapping in (_LazyAutoMapping, _LazyConfigMapping):
        register = mapping.register

        def replace(
            self: Any, key: Any, value: Any, exist_ok: bool = False, register: Any = register
        ) -> None:
            register(self, key, value, exist_ok=True)

        mapping.register = replace


def without_cute() -> None:
    """Switches SGLang's dual GEMM off if CuTe's package, in which it is written, is not installed.
    The layers then use plain matrix products."""
    if importlib.util.find_spec("cutlass") is not None:
        return
    try:
        from sglang.srt.layers.dual_gemm import DualGemm
    except ImportError:  # older releases have none
        return
    DualGemm._select_mode = lambda *_: None
    STOOD_IN.append("cutlass (no dual GEMM)")


# --- a model's configuration ---------------------------------------------------------------------


# Two layers as wide as those of an 8B model: SGLang's kernels for a GPU need such widths.
WIDE = {
    **SHAPES["8b"],
    "num_hidden_layers": 2,
    "vocab_size": TINY_LLAMA["vocab_size"],
    "torch_dtype": "bfloat16",
}


def model_folder(**changes: Any) -> str:
    """A folder with the configuration of a tiny Llama. Loading it generates random weights."""
    return write_config(Path(tempfile.mkdtemp(prefix="tiny-llama-")), {**TINY_LLAMA, **changes})


# --- the scheduler's parts -----------------------------------------------------------------------


class Rig:
    """Makes real requests and batches on a device. Without a model, the pools have ``kv_tokens``
    and ``row_tokens``. With one, they are those of the model runner. Its layers are tiny on a CPU
    and ``WIDE`` on a GPU."""

    def __init__(
        self,
        device: str = "cpu",
        *,
        model: bool = False,
        kv_tokens: int = 1 << 18,
        row_tokens: int = 1 << 17,
        rows: int = 64,
        overlap: bool = False,
        **arguments: Any,
    ) -> None:
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import PortArgs, ServerArgs
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        self.device, self.overlap = device, overlap
        self.no_spec = SpeculativeAlgorithm.NONE
        context = 4096 if model else row_tokens
        shape = WIDE if model and device != "cpu" else TINY_LLAMA
        server = ServerArgs(
            **{
                "model_path": model_folder(**{**shape, "max_position_embeddings": context}),
                "device": device.partition(":")[0],
                "load_format": "dummy",
                "attention_backend": "torch_native" if device == "cpu" else "triton",
                "sampling_backend": "pytorch",
                "grammar_backend": "none",
                "skip_tokenizer_init": True,
                "dtype": shape["torch_dtype"],
                "disable_cuda_graph": True,
                "chunked_prefill_size": 512 if model else 8192,
                "mem_fraction_static": 0.1,
                **({"max_total_tokens": 8192, "max_running_requests": 16} if model else {}),
                **arguments,
            }
        )
        publish(server, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
        self.server = server
        self.model_config = ModelConfig.from_server_args(server)
        self.runner: Any = None
        if model:
            self._load(PortArgs.init_new(server))
        else:
            self._pools(kv_tokens, row_tokens, rows)
        self.tree = self._tree(1)
        from sglang.srt.managers.overlap_utils import FutureMap

        self.future_map = FutureMap(device, self.no_spec, self.rows)
        self._count = 0

    def _load(self, ports: Any) -> None:
        without_cute()
        from sglang.srt.distributed import bootstrap
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.runtime_context import get_device

        bootstrap.init_parallel_runtime(
            server_args=self.server, device=get_device().device, dist_port=ports.nccl_port
        )
        bootstrap.init_layer_runtime(model_config=self.model_config)
        self.runner = ModelRunner(
            model_config=self.model_config,
            mem_fraction_static=0.1,
            gpu_id=0,
            nccl_port=ports.nccl_port,
            server_args=self.server,
        )
        draw_weights(self.runner.model)
        self.runner.alloc_memory_pool()
        self.runner.init_attention_backends()
        self.runner.init_cuda_graphs()
        self.rows = self.runner.req_to_token_pool
        self.kv = self.runner.token_to_kv_pool_allocator

    def _pools(self, kv_tokens: int, row_tokens: int, rows: int) -> None:
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

        self.rows = ReqToTokenPool(rows, row_tokens, self.device, False)
        self.kv = TokenToKVPoolAllocator(kv_tokens, torch.float16, self.device, None, False)

    def _tree(self, page_size: int) -> Any:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return RadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.rows,
                token_to_kv_pool_allocator=self.kv,
                page_size=page_size,
            )
        )

    def paged(self, page_size: int) -> Rig:
        """A rig like this one with separate KV memory in pages of ``page_size`` tokens, without a
        model."""
        from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

        rig = copy.copy(self)
        tokens = self.kv.available_size() // page_size * page_size
        rig.kv = PagedTokenToKVPoolAllocator(
            tokens, page_size, torch.float16, self.device, None, False
        )
        rig.tree = rig._tree(page_size)
        return rig

    def request(self, ids: Iterable[int], max_new_tokens: int = 4, **sampling: Any) -> Any:
        """Makes a request as the scheduler does, matched and locked in the radix cache."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        params = SamplingParams(**{"temperature": 0, "max_new_tokens": max_new_tokens, **sampling})
        params.normalize(None)
        self._count += 1
        req = Req(
            rid=str(self._count),
            origin_input_text="",
            origin_input_ids=ids if isinstance(ids, array) else array("q", ids),
            sampling_params=params,
            vocab_size=self.model_config.vocab_size,
        )
        req.init_next_round_input(self.tree)
        req.lock = self.tree.lock(req.last_node)
        req.extend_end = len(req.full_untruncated_fill_ids)
        return req

    def batch(self, reqs: list[Any]) -> Any:
        """A batch of these requests, not prepared yet."""
        from sglang.srt.managers.schedule_batch import ScheduleBatch

        return ScheduleBatch.init_new(
            reqs, self.rows, self.kv, self.tree, self.model_config, self.overlap, self.no_spec
        )

    def next_chunk(self, req: Any, end: int | None = None) -> None:
        """Moves the request to its next chunk, which starts where the last one ended."""
        req.prefix_len = req.extend_end
        req.extend_end = len(req.full_untruncated_fill_ids) if end is None else end

    def resolve(self, batch: Any) -> None:
        """Resolves with the function that the scheduler would call, hooked or not."""
        self._resolver.resolve_forward_inputs(batch, self.future_map)

    @functools.cached_property
    def _resolver(self) -> Any:
        """The scheduler's module. If it cannot be imported without its kernels, the module that it
        would import the function from."""
        from sglang.srt.managers import overlap_utils

        return sys.modules.get("sglang.srt.managers.scheduler", overlap_utils)

    def forward_batch(self, batch: Any) -> Any:
        """SGLang's ``ForwardBatch`` of a resolved batch."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        return ForwardBatch.init_new(batch, self.runner, return_hidden_states_before_norm=False)

    def run(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs the model on a resolved batch. Returns its logits, the logits used for sampling and
        the sampled ids."""
        with torch.no_grad():
            forward = self.forward_batch(batch)
            output = self.runner.forward(forward).logits_output
            logits = output.next_token_logits.clone()
            sampled = self.runner.sample(output, forward)
            return logits, output.next_token_logits.clone(), sampled

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and sampled ids. Stores the ids in the relay as the scheduler does."""
        from sglang.srt.managers.overlap_utils import RelayPayload

        logits, _, sampled = self.run(batch)
        self.future_map.stash(batch.req_pool_indices, RelayPayload(bonus_tokens=sampled))
        batch.input_ids = None
        return logits, sampled

    def release(self, *reqs: Any) -> None:
        """Releases the KV cache and rows of the requests. Leaves nothing in the radix cache."""
        from sglang.srt.mem_cache.common import release_kv_cache

        for req in reqs:
            release_kv_cache(req, self.tree, checkpoint=False)
