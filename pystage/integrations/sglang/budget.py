"""A limit on the predicted time of each batch that holds prefills (PYSTAGE_SGLANG_BUDGET_MS).

SGLang limits a batch's prefill in tokens. Behind a long history, a batch of that many tokens takes
several times as long, and requests that decode wait for it, or run in it. With a limit in ms, the
plugin profiles the engine when the scheduler starts, with any number of pipeline stages. It then
limits what SGLang's ``PrefillAdder`` takes of each request, as ``pystage.pp.BudgetSizer`` does: the
pieces that the batch already has count, and so do the decodes of a mixed batch.

The limit only lowers SGLang's own. A batch may exceed it where the model predicts too little, and
where even the smallest profiled chunk (512 tokens) does not fit behind a long history: the request
then gets that many. The decodes of a mixed batch count as prefills of one token, which is less than
they take behind long histories. The plugin does not size batches of diffusion models.
"""

from __future__ import annotations

import logging
from typing import Any

from ...pp import BudgetSizer, Piece
from ...pp.budget import TILE, Batch
from . import pp, process

logger = logging.getLogger("pystage.sglang")


class Serving:
    """The limit of this process, or None."""

    sizer: BudgetSizer | None = None


serving = Serving()


def start(scheduler: Any) -> None:
    """Makes the sizer, the same on all ranks. Profiles if the process has no latency model yet."""
    serving.sizer = None
    if scheduler.chunked_prefill_size is None:
        logger.warning("pystage: no time budget: it needs chunked prefill")
        return
    if pp.serving.model is None:
        pp.profile_and_fit(scheduler, with_plans=False)
    model = pp.serving.model
    if model is None or not model.report.usable:
        reason = "the profile failed" if model is None else model.report.reason
        logger.warning("pystage: no time budget: %s", reason)
        return
    page = pp.page_of(scheduler)
    serving.sizer = BudgetSizer(
        model,
        # The model is of the first stage, and the budget is for each.
        budget_ms=float(process.state.settings.budget_ms) / max(pp.stages_of(scheduler)),
        page_size=page,
        max_tokens=max(int(scheduler.max_prefill_tokens), page),
        tile=1 if has_experts(scheduler.model_config.hf_text_config) else TILE,
    )
    logger.info("pystage: %s", serving.sizer)


def has_experts(config: Any) -> bool:
    """Whether a model is a mixture of experts, by its configuration of transformers."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def limit(adder: Any, req: Any, continued: bool) -> None:
    """Lowers the batch's token budget if the rest of ``req`` would exceed the time budget."""
    sizer, tokens = serving.sizer, adder.rem_chunk_tokens
    if sizer is None or tokens is None or adder.dllm_config is not None:
        return
    prompt_len, history_len = pp.lengths_of(req, continued)
    left = prompt_len - history_len
    room = sizer.next_chunk(history_len, _so_far(adder), left)
    if room < left:
        align = pp.serving.align
        # With less than that for its first request, SGLang would make no batch, ever.
        room = max(room // align, 1 if room and not adder.can_run_list else 0) * align
    if room >= min(left, tokens):
        return
    pp.set_budget(adder, room, sizer.page_size)


def _so_far(adder: Any) -> Batch:
    """The batch that the adder makes: the running requests, if they share it, and those that it has
    taken."""
    known: tuple[Batch, int] | None = getattr(adder, "pystage_batch", None)
    batch, taken = known or (Batch.of(_decodes(adder)), 0)
    for other in adder.can_run_list[taken:]:
        batch.add(*pp.piece_of(other))
    adder.pystage_batch = batch, len(adder.can_run_list)  # one adder makes one batch
    return batch


def _decodes(adder: Any) -> list[Piece]:
    from sglang.srt.runtime_context import get_schedule

    if not get_schedule().enable_mixed_chunk or adder.running_batch is None:
        return []
    return [Piece(req.seqlen, 1) for req in adder.running_batch.reqs]
