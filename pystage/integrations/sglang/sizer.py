"""Hooks for the profiler, the chunk sizer, the time budget and the correction of the model."""

from __future__ import annotations

import inspect
import sys
from array import array
from typing import Any

import numpy as np

from . import process
from .symbols import Function


def profile_prefill_latency(original: Function, owner: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's profiler draws ids below 10,000. With a smaller vocabulary, this hook reduces them
    modulo its size."""
    module = sys.modules[inspect.unwrap(original).__module__]
    request, vocab_size = module.Req, int(owner.model_config.vocab_size)

    def within_vocabulary(*args: Any, **kwargs: Any) -> Any:
        ids = np.array(kwargs["origin_input_ids"], dtype=np.int64)
        if ids.size and ids.max() >= vocab_size:
            kwargs["origin_input_ids"] = array("q", (ids % vocab_size).tobytes())
        return request(*args, **kwargs)

    module.Req = within_vocabulary  # type: ignore[attr-defined]
    try:
        return original(owner, *args, **kwargs)
    finally:
        module.Req = request  # type: ignore[attr-defined]


def state() -> dict[str, Any]:
    """What this process sizes its batches by at the moment, if it does."""
    settings = process.state.settings
    if not (settings.sizer or settings.budget_ms):
        return {}
    from . import budget, correction, pp

    plans, limit = pp.serving.plans, budget.serving.sizer
    return {
        "plans": {} if plans is None else {str(n): plan for n, plan in plans.by_prompt.items()},
        "queue": {} if plans is None or plans.queue is None else plans.queue.ms_by_size,
        "budget_ms": None if limit is None else limit.budget_ms,
        "coefficients": [] if pp.serving.model is None else pp.serving.model.form.coefficients,
        "corrections": correction.serving.corrections,
    }


def profile_and_fit(original: Function, owner: Any, *args: Any, **kwargs: Any) -> bool:
    from . import pp

    return pp.profile_and_fit(owner)


def predict(original: Function, owner: Any, history_len: int) -> int | None:
    from . import pp

    return pp.predict(history_len)


def init_dynamic_chunk_sizer(original: Function, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """The last step of a scheduler's start before it serves. SGLang makes its sizer here."""
    from . import budget, correction, pp

    pp.serving.scheduler = scheduler
    result = original(scheduler, *args, **kwargs)
    if process.state.settings.budget_ms:
        budget.start(scheduler)
    if process.state.settings.correct:
        correction.start(scheduler)
    return result


def add_chunked_req(original: Function, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    _fit_batch_to(adder, req, continued=True)
    return original(adder, req, *args, **kwargs)


def add_one_req(original: Function, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    from . import pp

    # add_one_req(req, has_chunked_req, truncation_align_size)
    align = args[1] if len(args) > 1 else kwargs.get("truncation_align_size")
    pp.serving.align = align or 1
    has_chunked_req = args[0] if args else kwargs.get("has_chunked_req")
    _fit_batch_to(adder, req, continued=False, begins=not has_chunked_req)
    return original(adder, req, *args, **kwargs)


def _fit_batch_to(adder: Any, req: Any, continued: bool, begins: bool = True) -> None:
    """``begins`` is False beside a request that has begun before, also where SGLang leaves that one
    out of this batch: then no other may be split."""
    from . import budget, pp

    if begins:
        pp.fit_batch_to(adder, req, continued)
    budget.limit(adder, req, continued)


def forward_batch_generation(
    original: Function, worker: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    from . import correction

    return correction.forward(batch, lambda: original(worker, batch, *args, **kwargs))


def pull_raw_reqs(original: Function, receiver: Any, *args: Any, **kwargs: Any) -> Any:
    from . import correction

    return correction.received(original(receiver, *args, **kwargs))


def process_input_requests(
    original: Function, scheduler: Any, recv_reqs: Any, *args: Any, **kwargs: Any
) -> Any:
    from . import correction

    return original(scheduler, correction.without_messages(recv_reqs), *args, **kwargs)
