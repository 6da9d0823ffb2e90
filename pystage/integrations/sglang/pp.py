"""``pystage.pp`` in SGLang, in place of its own profiler and chunk sizer (PYSTAGE_SGLANG_SIZER=1).

As there (PR 37674), the first pipeline stage profiles, and every rank of every stage fits the same
samples. Unlike there, which point comes next depends on the times so far, so the stage's first rank
leads: it tells the others of its stage each point before they run it together.

``owner`` is SGLang's ``DynamicChunkSizer``, or its ``Scheduler`` before that existed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ...pp import (
    ChunkSizer,
    LatencyModel,
    Profile,
    SamplePlan,
    profile_prefill,
    random_token_ids,
    share_profile,
)

logger = logging.getLogger("pystage.sglang")

_SMALLEST_PAGE = 64  # SGLang aligns chunks to no less
_STOP = (-1, -1)


def profile_and_fit(owner: Any) -> bool:
    """Profiles, fits, and gives ``owner`` a sizer; False: SGLang keeps its static chunk size."""
    from sglang.srt.distributed import parallel_state

    stage, world = parallel_state.get_tp_group(), parallel_state.get_world_group()
    owner.pystage_sizer = None
    try:
        step = PrefillStep(owner)
        if parallel_state.get_pp_group().is_first_rank and dist.get_rank() != 0:
            _follow(step, stage.cpu_group)
        profile = share_profile(
            lambda: _lead(step, owner, stage), group=world.cpu_group, device="cpu"
        )
        model = LatencyModel.fit(profile)
        if not model.report.usable:
            return False
        owner.pystage_sizer = _sizer(model, owner)
    except Exception as error:  # as SGLang: a failed profile costs the sizer, not the server
        logger.warning("pystage: no chunk sizer, the chunk size stays static: %r", error)
        return False
    logger.info("pystage: chunks of %.1f ms each: %s", owner.pystage_sizer.target_ms, model.report)
    return True


def predict(owner: Any, history_len: int) -> int | None:
    """Tokens of the next chunk behind ``history_len``, or None for the static size."""
    sizer: ChunkSizer | None = getattr(owner, "pystage_sizer", None)
    return None if sizer is None else sizer.next_chunk(history_len)


def sample_plan(owner: Any) -> SamplePlan:
    """Where to sample: as far as a request's row, the KV cache and the model's context go."""
    context = int(owner.model_config.context_len)
    free = int(owner.token_to_kv_pool_allocator.available_size())
    row = int(owner.req_to_token_pool.req_to_token.shape[1])
    page = max(int(owner.page_size), _SMALLEST_PAGE)
    base = int(owner.chunked_prefill_size)
    return SamplePlan.spread(
        base_chunk=base,
        context_len=context,
        page_size=page,
        min_chunk=min(512, base),
        max_chunk=int(owner.max_prefill_tokens),
        # A page is left over: a request that fills its last one may take another.
        max_tokens=max(page, min(context, free - page, row - page)),
    )


def _sizer(model: LatencyModel, owner: Any) -> ChunkSizer:
    base, page = int(owner.chunked_prefill_size), max(int(owner.page_size), _SMALLEST_PAGE)
    return ChunkSizer(
        model,
        base_chunk=base,
        context_len=int(owner.model_config.context_len),
        page_size=page,
        min_chunk=min(512, base),
        max_chunk=max(min(int(owner.max_prefill_tokens), 2 * base), page),
    )


# --- the ranks of the first stage ----------------------------------------------------------------


def _lead(step: PrefillStep, owner: Any, stage: Any) -> Profile:
    together = stage.world_size > 1

    def tell_and_run(history_len: int, chunk_len: int) -> None:
        if together:
            _tell((history_len, chunk_len), stage.cpu_group)
        step(history_len, chunk_len)

    try:
        return profile_prefill(tell_and_run, sample_plan(owner), device=owner.device, progress=True)
    finally:
        if together:
            _tell(_STOP, stage.cpu_group)


def _follow(step: Callable[[int, int], object], group: Any) -> None:
    point = torch.zeros(2, dtype=torch.int64)
    while True:
        dist.broadcast(point, src=0, group=group)
        history_len, chunk_len = point.tolist()
        if (history_len, chunk_len) == _STOP:
            return
        step(history_len, chunk_len)


def _tell(point: tuple[int, int], group: Any) -> None:
    dist.broadcast(torch.tensor(point, dtype=torch.int64), src=0, group=group)


# --- one forward ---------------------------------------------------------------------------------


class PrefillStep:
    """A prefill of ``chunk_len`` new tokens behind ``history_len``, through SGLang's own request,
    batch and forward; staged and resolved by the hooks, as in service.

    The history gets its KV slots and its row, but is not computed: what a forward takes does not
    depend on what stands in the cache. Giving it its slots is timed with the chunk, about a
    millisecond of host time. All of it goes back afterwards, also after an error.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.runner = getattr(owner, "model_runner", None) or owner.tp_worker.model_runner
        self.count = 0

    def __call__(self, history_len: int, chunk_len: int) -> None:
        from sglang.srt.layers.dp_attention import set_is_extend_in_batch
        from sglang.srt.managers.overlap_utils import resolve_forward_inputs
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        self.count += 1
        tokens = history_len + chunk_len
        ids = random_token_ids(tokens, int(self.owner.model_config.vocab_size), self.count)
        request = _request(self.owner, f"pystage-profile-{self.count}", ids)
        try:
            if history_len:
                request.extend(0, history_len)
                self._batch(request.req, history_len)
            request.extend(history_len, tokens)
            batch = self._batch(request.req, chunk_len)
            resolve_forward_inputs(batch, None)  # type: ignore[arg-type]
            wanted = inspect.signature(ForwardBatch.init_new).parameters
            flags = {n: False for n in ("return_hidden_states_before_norm",) if n in wanted}
            forward_batch = ForwardBatch.init_new(batch, self.runner, **flags)
            set_is_extend_in_batch(True)
            with torch.no_grad():
                self.runner.forward(forward_batch)
        finally:
            request.release()

    def _batch(self, req: Any, tokens: int) -> Any:
        from sglang.srt.layers import dp_attention
        from sglang.srt.managers.schedule_batch import ScheduleBatch

        o = self.owner
        batch = ScheduleBatch.init_new(
            [req],
            o.req_to_token_pool,
            o.token_to_kv_pool_allocator,
            o.tree_cache,
            o.model_config,
            False,
            o.spec_algorithm,
        )
        if dp_attention.is_dp_attention_enabled():
            rank, size = _attention_dp(dp_attention)
            batch.global_num_tokens = [tokens if r == rank else 0 for r in range(size)]
            batch.global_num_tokens_for_logprob = batch.global_num_tokens
        batch.prepare_for_extend()
        return batch


def _attention_dp(dp_attention: Any) -> tuple[int, int]:
    if hasattr(dp_attention, "get_attention_dp_rank"):
        return dp_attention.get_attention_dp_rank(), dp_attention.get_attention_dp_size()
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().attn_dp_rank, get_parallel().attn_dp_size


class _Request:
    """A request of a profile: its range is ``req.extend_end``, its history ``req.prefix_len``."""

    def __init__(self, owner: Any, name: str, ids: Any) -> None:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        self.owner = owner
        self.req = Req(
            rid=name,
            origin_input_text="",
            origin_input_ids=ids,
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        )
        self.enter()

    def enter(self) -> None:
        self.req.init_next_round_input(self.owner.tree_cache)
        self.req.lock = self.owner.tree_cache.lock(self.req.last_node)

    def extend(self, start: int, end: int) -> None:
        self.req.prefix_len, self.req.extend_end = start, end

    def release(self) -> None:
        from sglang.srt.mem_cache.common import release_kv_cache

        if self.req.kv.holds_kv:
            release_kv_cache(self.req, self.owner.tree_cache, checkpoint=False)
        elif self.req.lock is not None:
            self.owner.tree_cache.unlock(self.req.lock)
            self.req.lock = None

    def _prefix(self, row: int | None, length: int) -> Any:
        if not length:
            return torch.empty(0, dtype=torch.int64)
        return self.owner.req_to_token_pool.req_to_token[row, :length].to(torch.int64)


class _RequestWithRange(_Request):
    """As it was in 0.5.20: ``set_extend_range``, and the history's slots in ``prefix_indices``."""

    def enter(self) -> None:
        self.req.init_next_round_input(self.owner.tree_cache)
        receipt = self.owner.tree_cache.inc_lock_ref(self.req.last_node)
        self.req.lock_receipt = receipt.to_dec_params()

    def extend(self, start: int, end: int) -> None:
        self.req.prefix_indices = self._prefix(self.req.kv.req_pool_idx, start)
        self.req.set_extend_range(start, end)

    def release(self) -> None:
        from sglang.srt.mem_cache.common import release_kv_cache

        if self.req.kv.holds_kv:
            release_kv_cache(self.req, self.owner.tree_cache, is_insert=False)


class _RequestWithFillLen(_Request):
    """As it was in 0.5.13: ``fill_len``, and a row that is freed by hand."""

    def enter(self) -> None:
        self.req.full_untruncated_fill_ids = self.req.origin_input_ids
        self.req.logprob_start_len = -1

    def extend(self, start: int, end: int) -> None:
        self.req.prefix_indices = self._prefix(self.req.req_pool_idx, start)
        self.req.fill_len = end
        self.req.set_extend_input_len(end - start)

    def release(self) -> None:
        pool, row = self.owner.req_to_token_pool, self.req.req_pool_idx
        if row is not None:
            held = int(self.req.kv_allocated_len)
            self.owner.token_to_kv_pool_allocator.free(pool.req_to_token[row, :held])
            pool.free(self.req)


def _request(owner: Any, name: str, ids: Any) -> _Request:
    from sglang.srt.managers.schedule_batch import Req

    if hasattr(Req, "set_extend_range"):
        return _RequestWithRange(owner, name, ids)
    if hasattr(Req, "set_extend_input_len"):
        return _RequestWithFillLen(owner, name, ids)
    return _Request(owner, name, ids)
