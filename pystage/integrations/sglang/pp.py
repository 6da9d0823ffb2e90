"""``pystage.pp`` instead of SGLang's own profiler and chunk sizer (PYSTAGE_SGLANG_SIZER=1).

As in SGLang (PR 37674), the first pipeline stage profiles. Unlike in SGLang, the next point depends
on the times measured so far. So the stage's first rank leads: it sends each point to the other
ranks of its stage before they run it together. It also fits the model and chooses plans for a few
prompt lengths (``ChunkSizer.choose``, with timed finalists). It then sends the model and the plans
to all ranks of all stages, because ranks that fitted the same samples themselves might disagree.

Note [Which size a batch gets]
SGLang asks its sizer only for the next chunk of a request that it has already begun to split, and
gives it only the history. But the plan also depends on the length of the prompt, and the first
chunk needs a size too. So the plugin also hooks ``PrefillAdder``, where the request is known, and
sets the batch's token budget to the plan's size. This covers the first chunk, and chunks behind a
cached prefix. If the rest of the prompt is only a little longer than the plan's size, the budget is
the whole rest (SGLang #23621). A request that does not begin its batch takes what the batch has
left.

A request gets the size for a queue (``QueueSizer``) while at least as many tokens of other requests
wait in SGLang's queue, or are in the pipeline, as are left of it. A request no longer than SGLang's
own chunk always gets one: SGLang would not split it, and its batch would pass the stages one by
one. The ranks agree on the size, because they have the same queue and the same batches in flight
when they make a batch. What of a waiting request is cached is not known before SGLang takes it. The
share of tokens that were not cached, of the requests that lately were to begin a batch, stands for
it.

Sizes are whole pages and multiples of the tensor and context parallel sizes. Only the first stage
is timed. The others count by their number of layers, which SGLang makes larger on the last stages
if it does not come out even. What transfers and the model's head add there is not known.

``owner`` is SGLang's ``DynamicChunkSizer``, or its ``Scheduler``: in releases without that class,
and for a time budget, which needs the model alone (``budget``).
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...pp import (
    Choice,
    ChunkSizer,
    LatencyModel,
    Piece,
    Profile,
    QueueSizer,
    SamplePlan,
    Step,
    profile_prefill,
    random_token_ids,
    share_json,
    time_chunks,
)
from ...pp.choice import TimeChunks, size_at
from ...pp.samples import Point

logger = logging.getLogger("pystage.sglang")

_SMALLEST_PAGE = 64  # SGLang aligns chunks to at least this
_STOP = (-1, -1)
CONTEXT_MARGIN = 100
"""Number of context tokens that SGLang's own sizer leaves free."""
_PROMPTS = 4  # number of plans: for prompts of the whole context, half of it, and so on
_TIMED, _BUDGET = 3, 32  # plans whose finalists are timed, and forwards for each
# The smallest chunk of a queue. The timings lack the time that SGLang takes for a batch, which
# counts most where chunks are short.
_SMALLEST = 1024
_LEAST_SHARE = 8  # beside decodes a chunk keeps this part of the static size at least
_LOOK_AHEAD = 64  # requests of the queue that count
_FORGET = 0.95  # weight of the requests before, for the share of tokens that are not cached

T = TypeVar("T")


@dataclass(frozen=True)
class Plans:
    """The plans of this server. All sizes are in tokens."""

    by_prompt: dict[int, list[int]]
    """Prompt length to the chunks for prompts up to that length."""
    context_len: int
    page_size: int
    largest: int
    base: int
    """The static chunk size."""
    queue: QueueSizer | None = None

    def in_queue(self, prompt_len: int, left: int, waiting: int, in_flight: int) -> int | None:
        """The size of the next chunk of a request that has ``left`` of its tokens to prefill, with
        ``waiting`` tokens behind it, and ``in_flight`` in the pipeline. None if its plan gives the
        size."""
        if self.queue is None:
            return None
        size = self.queue.next_chunk(left, waiting + in_flight)
        if size is None and prompt_len <= self.base:  # the plans are for longer ones
            size = self.queue.size(prompt_len)
        if size is None:
            return None
        size = min(size, self.largest)
        return size if waiting else self._with_tail(size, left) or size

    def _with_tail(self, size: int, left: int) -> int | None:
        """All that is left, in whole pages, if it is only a little more than ``size``."""
        if left <= min(size + max(size // 4, self.page_size), self.largest):
            return -(-left // self.page_size) * self.page_size
        return None

    def next_chunk(self, history_len: int, prompt_len: int | None = None) -> int | None:
        """The size of the next chunk behind ``history_len`` tokens, or None if less than a page of
        the context is left."""
        room = self.context_len - history_len - CONTEXT_MARGIN
        if room < self.page_size:
            return None
        lengths = sorted(self.by_prompt)
        known = [n for n in lengths if prompt_len is not None and n >= prompt_len]
        size = size_at(self.by_prompt[known[0] if known else lengths[-1]], history_len)
        most = min(self.largest, room)
        rest = 0 if prompt_len is None else prompt_len - history_len
        if rest > 0 and (whole := self._with_tail(size, rest)):
            return whole
        return max(min(size, most) // self.page_size, 1) * self.page_size


class Serving:
    """What this process sizes its batches by. ``PrefillAdder`` has no reference to the sizer."""

    model: LatencyModel | None = None
    plans: Plans | None = None
    scheduler: Any = None
    """SGLang's ``Scheduler``, which has the queue."""
    tokens: float = 0.0
    uncached: float = 0.0
    """Of the requests that lately were to begin a batch: all tokens, and those not cached."""
    align: int = 1
    """SGLang's ``truncation_align_size``: a chunk that leaves a rest is a multiple of it."""


serving = Serving()


def profile_and_fit(owner: Any, with_plans: bool = True) -> bool:
    """Profiles, fits, and chooses plans unless told not to. All ranks then have the same model and
    plans. Returns False if SGLang keeps its static chunk size."""
    from sglang.srt.distributed import parallel_state

    stage, world = parallel_state.get_tp_group(), parallel_state.get_world_group()
    stages = int(parallel_state.get_pp_group().world_size)
    serving.model = serving.plans = None
    if serving.scheduler is None:  # in releases without DynamicChunkSizer
        serving.scheduler = owner
    try:
        step = PrefillStep(owner)
        if parallel_state.get_pp_group().is_first_rank and dist.get_rank() != 0:
            _follow(step, stage.cpu_group)
        decision = share_json(
            lambda: _lead(
                step,
                sample_plan(owner, stages, dynamic=with_plans),
                owner,
                stage,
                lambda *found: _decide(owner, with_plans, *found),
            ),
            group=world.cpu_group,
            device="cpu",
        )
        for line in decision["why"]:
            logger.info("pystage: %s", line)
        model = LatencyModel.from_json(decision["model"])
        plans = plans_of(owner, decision["plans"], queue_of(decision))
    except Exception as error:  # as SGLang does: the server runs on without a sizer
        logger.warning("pystage: no chunk sizer, the chunk size stays static: %r", error)
        return False
    serving.model, serving.plans = model, plans
    return plans is not None


def queue_of(decision: dict[str, Any]) -> QueueSizer | None:
    """The sizer for a queue from its JSON form, or None if there is none."""
    times = {int(n): float(ms) for n, ms in decision["queue"]}
    stages = decision["stages"]
    return QueueSizer(times, len(stages), stage_factors=stages) if times else None


def plans_of(
    owner: Any, by_prompt: dict[str, list[int]], queue: QueueSizer | None = None
) -> Plans | None:
    """The plans from their JSON form, or None if there are none."""
    if not by_prompt:
        return None
    return Plans(
        by_prompt={int(n): [int(c) for c in plan] for n, plan in by_prompt.items()},
        context_len=int(owner.model_config.context_len),
        page_size=page_of(owner),
        largest=largest_of(owner),
        base=int(owner.chunked_prefill_size),
        queue=queue,
    )


def predict(history_len: int) -> int | None:
    """The size of the next chunk behind ``history_len`` tokens, or None for the static size."""
    return None if serving.plans is None else serving.plans.next_chunk(history_len)


def fit_batch_to(adder: Any, req: Any, continued: bool) -> None:
    """Sets the token budget of a batch that begins with ``req`` to the size from its plan.

    See Note [Which size a batch gets]. ``continued`` means that SGLang has already sized the batch
    for this request, from its history.
    """
    plans, budget = serving.plans, adder.rem_chunk_tokens
    if plans is None or budget is None or adder.can_run_list or adder.dllm_config is not None:
        return
    prompt_len, history_len = lengths_of(req, continued)
    left = prompt_len - history_len
    if not continued:
        serving.tokens = serving.tokens * _FORGET + prompt_len
        serving.uncached = serving.uncached * _FORGET + max(left, 0)
    size = None
    if left > 0:
        size = plans.in_queue(prompt_len, left, waiting_behind(req), in_flight_beside(req))
    if size is None:
        if not continued and left <= budget:
            return  # it fits whole, and others may share its batch
        size = plans.next_chunk(history_len, prompt_len)
    base = plans.next_chunk(history_len) if continued else plans.base
    if size is None or base is None:
        return
    if size < left:
        size = max(size // serving.align, 1) * serving.align
    # SGLang has already subtracted the decodes that share the batch.
    decodes = max(base - budget, 0)
    least = min(size, plans.base // _LEAST_SHARE)
    set_budget(adder, max(size - decodes, least, plans.page_size, serving.align), plans.page_size)


def set_budget(adder: Any, tokens: int, page_size: int) -> None:
    """Sets the token budget of the batch. What SGLang keeps free of it for shorter requests
    (shortest-prefill-first) stays free, but for a page."""
    most = getattr(adder, "chunked_req_limit", None)
    if most is not None and tokens:
        kept = adder.rem_chunk_tokens - most
        limit = (tokens - kept) // adder.page_size * adder.page_size
        adder.chunked_req_limit = max(limit, min(tokens, page_size))
    adder.rem_chunk_tokens = tokens


def waiting_behind(req: Any) -> int:
    """Tokens that the requests in SGLang's queue will prefill, without this one: an estimate, from
    the share of tokens that were not cached."""
    queue = getattr(serving.scheduler, "waiting_queue", ())
    first = itertools.islice(queue, _LOOK_AHEAD)
    tokens = sum(len(other.origin_input_ids) for other in first if other is not req)
    return round(tokens * serving.uncached / serving.tokens) if serving.tokens else tokens


def in_flight_beside(req: Any) -> int:
    """Tokens of the prefill batches in the pipeline, without those that have a chunk of this
    request. SGLang's loop has a place for each batch; that of the batch that is made now still
    holds the one before, which is done."""
    scheduler = serving.scheduler
    done = getattr(scheduler, "last_batch", None)
    return sum(
        batch.extend_num_tokens or 0
        for batch in getattr(scheduler, "mbs", None) or ()
        if batch is not None
        and batch is not done
        and batch.forward_mode.is_extend()
        and not any(other is req for other in batch.reqs)
    )


def lengths_of(req: Any, continued: bool) -> tuple[int, int]:
    """The request's number of tokens to prefill in all, and how many of them are in the cache: on
    the device, and for a request that begins also on the host, from where SGLang loads them."""
    if hasattr(req, "prefix_len"):
        ids, history_len = req.full_untruncated_fill_ids, int(req.prefix_len)
    else:
        ids = getattr(req, "full_untruncated_fill_ids", None)
        ids = req.origin_input_ids if ids is None else ids
        history_len = len(req.prefix_indices)
    return len(ids), history_len + (0 if continued else int(req.host_hit_length))


def piece_of(req: Any) -> Piece:
    """What a request that SGLang has admitted to a batch prefills there."""
    if hasattr(req, "prefix_len"):
        return Piece(req.prefix_len, req.extend_end - req.prefix_len)
    span = getattr(req, "extend_range", None)  # 0.5.13 has none
    return Piece(len(req.prefix_indices), req.extend_input_len if span is None else span.length)


def _decide(owner: Any, with_plans: bool, profile: Profile, run: Step) -> dict[str, Any]:
    """The model, the plans by prompt length and the reasons, as JSON types."""
    model = LatencyModel.fit(profile)
    limit, base = sample_plan(owner).max_tokens, int(owner.chunked_prefill_size)
    lengths = [limit >> k for k in range(_PROMPTS) if (limit >> k) > base] or [limit]
    choices, queue, stages = {}, {}, []
    if with_plans:
        sizes, stages = sizes_of(owner, lengths[0]), stages_of(owner)

        def time(points: Sequence[Point]) -> Sequence[float]:
            return time_chunks(run, points, owner.device)

        choices = choose(model, sizes, stages, lengths, time)
        if queues_agree(serving.scheduler):
            queue = times_for_queue(model, sizes, stages, limit, time)
    why = [str(model.report), *(f"{n:,} tokens: {c}" for n, c in choices.items())]
    if queue:
        shown = ", ".join(f"{n:,}: {ms:.1f} ms" for n, ms in queue.items())
        why.append(f"while requests wait, chunks of {shown}")
    return {
        "model": model.to_json(),
        "plans": better_plans(owner, choices, queue),
        "queue": [*queue.items()],
        "stages": stages,
        "why": why,
    }


def queues_agree(scheduler: Any) -> bool:
    """Whether all ranks have the same queue. In 0.5.13 each drops requests by its own clock."""
    return hasattr(scheduler, "_poll_timeout_aborts")


def times_for_queue(
    model: LatencyModel,
    sizes: dict[str, int],
    stages: Sequence[float],
    limit: int,
    time: TimeChunks,
) -> dict[int, float]:
    """The times in ms of the chunks that a queue may get, by size. A timed forward has ``limit``
    tokens at most, with its history. Empty with one stage, where no stage waits for another, and
    where the model is not usable: SGLang keeps its static size then."""
    largest = min(sizes["max_chunk"], limit) // sizes["page_size"] * sizes["page_size"]
    base = min(sizes["base_chunk"], largest)
    if len(stages) == 1 or not model.report.usable or not base:
        return {}
    smallest = min(max(sizes["min_chunk"], _SMALLEST), base)
    some = {"base_chunk": base, "context_len": limit, "min_chunk": smallest, "max_chunk": largest}
    sizer = ChunkSizer(model, **{**sizes, **some})
    history = min(base // 2, limit - largest)
    queue = sizer.for_queue(len(stages), time=time, history_len=history, stage_factors=stages)
    return queue.ms_by_size


def sizes_of(owner: Any, context_len: int) -> dict[str, int]:
    """The sizes that a ``ChunkSizer`` may use in this server, in tokens."""
    base = int(owner.chunked_prefill_size)
    return {
        "base_chunk": base,
        "context_len": context_len,
        "page_size": page_of(owner),
        "min_chunk": min(512, base),
        "max_chunk": largest_of(owner),
    }


def stages_of(owner: Any) -> list[float]:
    """The number of layers of each stage, as a multiple of the first stage's."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.distributed.utils import get_pp_indices

    stages = int(parallel_state.get_pp_group().world_size)
    layers = int(owner.model_config.num_hidden_layers)
    spans = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    counts = [end - begin for begin, end in spans]
    return [count / counts[0] for count in counts]


def choose(
    model: LatencyModel,
    sizes: dict[str, int],
    stages: Sequence[float],
    lengths: Sequence[int],
    time: TimeChunks | None = None,
) -> dict[int, Choice]:
    """The choice for each prompt length, the longest first. ``stages`` as from ``stages_of``;
    ``time`` runs chunks on the engine."""
    sizer = ChunkSizer(model, **sizes)
    return {
        n: sizer.choose(
            n,
            len(stages),
            time=time if k < _TIMED else None,
            budget=_BUDGET,
            stage_factors=stages,
        )
        for k, n in enumerate(lengths)
    }


def better_plans(
    owner: Any, choices: dict[int, Choice], queue: dict[int, float]
) -> dict[str, list[int]]:
    """The chosen plans as JSON types, or none if the static size is as good, for one request and
    for a queue."""
    base = int(owner.chunked_prefill_size)
    as_good = all(c.chunks[0] == base and len(set(c.chunks[:-1])) <= 1 for c in choices.values())
    as_good = as_good and not set(queue) - {base}
    return {} if as_good else {str(n): list(c.chunks) for n, c in choices.items()}


def sample_plan(owner: Any, stages: int = 1, dynamic: bool = True) -> SamplePlan:
    """The sample plan, limited by a request's row, the KV cache and the model's context. It may
    stop early once the plan for so many pipeline stages no longer changes. Without dynamic chunks,
    SGLang's buffers may have no room for more than the static size."""
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
        max_chunk=int(owner.max_prefill_tokens) if dynamic else base,
        # One page stays free: a request that fills its last page may take another.
        max_tokens=max(page, min(context, free - page, row - page)),
        **({"ranks": stages} if stages > 1 else {}),
    )


def page_of(owner: Any) -> int:
    """The unit of chunk sizes: a multiple of SGLang's page and of the numbers of ranks that split a
    chunk."""
    from sglang.srt.distributed import parallel_state

    page = math.lcm(
        max(int(owner.page_size), _SMALLEST_PAGE), int(parallel_state.get_tp_group().world_size)
    )
    ranks = getattr(parallel_state, "get_attn_context_model_parallel_world_size", None)
    # Each context parallel rank takes a block from the front and one from the back.
    return page if ranks is None or ranks() == 1 else math.lcm(page, 2 * int(ranks()))


def largest_of(owner: Any) -> int:
    base = int(owner.chunked_prefill_size)
    return max(min(int(owner.max_prefill_tokens), 2 * base), page_of(owner))


# --- the ranks of the first stage ----------------------------------------------------------------


def _lead(
    step: Step, plan: SamplePlan, owner: Any, stage: Any, then: Callable[[Profile, Step], T]
) -> T:
    """Profiles with the other ranks of the stage, and returns the result of ``then``, which may run
    more forwards."""
    together = stage.world_size > 1

    def tell_and_run(history_len: int, chunk_len: int) -> None:
        if together:
            _tell((history_len, chunk_len), stage.cpu_group)
        step(history_len, chunk_len)

    try:
        profile = profile_prefill(tell_and_run, plan, device=owner.device, progress=True)
        return then(profile, tell_and_run)
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
    """A prefill of ``chunk_len`` new tokens behind ``history_len`` tokens.

    It uses SGLang's own request, batch and forward, and the hooks stage and resolve the ids as in
    service. The history gets KV slots and a row but is not computed, because the time of a forward
    does not depend on the contents of the cache. Allocating these slots is timed with the chunk and
    takes about a millisecond of host time. Everything is freed afterwards, also after an error.
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
    """A request of a profile. ``req.prefix_len`` and ``req.extend_end`` are the limits of its
    chunk."""

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
    """The request of 0.5.15 to 0.5.22: it has ``set_extend_range``, and ``prefix_indices`` holds
    the slots of the history. From 0.5.19 on, its row is in ``req.kv``."""

    def enter(self) -> None:
        self.req.init_next_round_input(self.owner.tree_cache)
        receipt = self.owner.tree_cache.inc_lock_ref(self.req.last_node)
        self.req.lock_receipt = receipt.to_dec_params()

    def extend(self, start: int, end: int) -> None:
        self.req.prefix_indices = self._prefix(self._row(), start)
        self.req.set_extend_range(start, end)

    def release(self) -> None:
        from sglang.srt.mem_cache.common import release_kv_cache

        if self._row() is not None:
            release_kv_cache(self.req, self.owner.tree_cache, is_insert=False)

    def _row(self) -> int | None:
        kv: Any = getattr(self.req, "kv", None)
        row: int | None = (kv if hasattr(kv, "req_pool_idx") else self.req).req_pool_idx
        return row


class _RequestWithFillLen(_Request):
    """The request of 0.5.13: it has ``fill_len``, and its row must be freed explicitly."""

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
