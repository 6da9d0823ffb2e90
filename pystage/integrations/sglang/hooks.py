"""The symbols of SGLang that the plugin hooks, and the function that hooks each."""

from __future__ import annotations

import functools
import pkgutil

from . import metrics, ray_actors, resolving, sizer, staging, validation
from .known_code import RESOLVE, WRITE_ROWS, end_of_fill_ids
from .settings import Settings
from .symbols import Hook, MissingError, is_there, look_up

BATCH = "managers.schedule_batch:ScheduleBatch"
_SIZER = "managers.scheduler_components.dynamic_chunk_sizer:DynamicChunkSizer"
_SCHEDULER = "managers.scheduler:Scheduler"
_START = f"{_SCHEDULER}.maybe_init_dynamic_chunk_sizer"
_FORWARD = "managers.tp_worker:TpModelWorker.forward_batch_generation"
_RECEIVER = "managers.scheduler_components.request_receiver:SchedulerRequestReceiver"
_ADDER = "managers.schedule_policy:PrefillAdder"
_MIXIN = "managers.scheduler_pp_mixin:SchedulerPPMixin"
_COLLECTOR = "observability.metrics_collector:SchedulerMetricsCollector"
_FILL_IDS = "managers.schedule_batch:Req.get_fill_ids"

NEEDED = (
    Hook("staging", f"{BATCH}.prepare_for_extend", ("self",), staging.prepare_for_extend),
    Hook("staging", "utils.common:flatten_arrays_to_pinned_cpu", ("parts", "pin"), staging.flatten),
    Hook("resolve", RESOLVE[0], ("batch", "future_map"), resolving.resolve_forward_inputs),
    Hook(
        "guard",
        "model_executor.forward_batch_info:ForwardBatch.init_new",
        ("cls", "batch", "model_runner"),
        resolving.init_new,
    ),
)
_FIELDS = ("input_ids", "prefill_input_ids_cpu", "mix_running_indices", "spec_algorithm")


def needed_symbols() -> list[Hook]:
    """The hooks that the pool needs. Raises MissingError if one of their symbols is missing or
    different."""
    for hook in NEEDED:
        look_up(hook.target, hook.takes)
    batch = pkgutil.resolve_name(f"sglang.srt.{BATCH}")
    for name in _FIELDS:
        if name not in getattr(batch, "__dataclass_fields__", {}):
            raise MissingError(f"no {BATCH}.{name}")
    return list(NEEDED)


def optional(settings: Settings) -> list[Hook]:
    """Hooks that are used only if their symbol exists."""
    rows = [
        Hook("rows", target, staging.ROWS, staging.write_cache_indices) for target in WRITE_ROWS
    ]
    hooks = [
        *(rows if settings.small else []),
        Hook("guard", f"{BATCH}.merge_batch", ("self", "other"), resolving.merge_batch),
        Hook("log", "utils.common:configure_logger", ("server_args",), ray_actors.configure_logger),
        Hook("metrics", f"{_COLLECTOR}.__init__", ("self", "labels"), metrics.metrics_init),
        Hook("metrics", f"{_COLLECTOR}.log_stats", ("self",), metrics.log_stats),
    ]
    part = "budget" if settings.budget_ms else "correction" if settings.correct else "sizer"
    start = Hook(
        part,
        _START,
        ("self",),
        sizer.init_dynamic_chunk_sizer,
    )
    starts = any((settings.budget_ms, settings.correct, settings.sizer)) and is_there(start)
    budget, correct = starts and settings.budget_ms > 0, starts and settings.correct
    if starts:
        hooks.append(start)
    if settings.sizer or budget:
        part = "sizer" if settings.sizer else "budget"
        hooks += [
            Hook(part, f"{_ADDER}.add_chunked_req", ("self", "req"), sizer.add_chunked_req),
            Hook(part, f"{_ADDER}.add_one_req", ("self", "req"), sizer.add_one_req),
        ]
    if correct:
        hooks += [
            Hook("correction", _FORWARD, ("self", "batch"), sizer.forward_batch_generation),
            Hook("correction", f"{_RECEIVER}._pull_raw_reqs", ("self",), sizer.pull_raw_reqs),
            Hook(
                "correction",
                f"{_SCHEDULER}.process_input_requests",
                ("self", "recv_reqs"),
                sizer.process_input_requests,
            ),
        ]
    if settings.sizer:
        hooks += [
            Hook("sizer", f"{_SIZER}.profile_and_fit", ("self",), sizer.profile_and_fit),
            Hook("sizer", f"{_SIZER}.predict", ("self", "history_len"), sizer.predict),
            Hook("sizer", f"{_MIXIN}.profile_and_init_predictor", ("self",), sizer.profile_and_fit),
            Hook(
                "sizer", f"{_MIXIN}.predict_next_chunk_size", ("self", "history_len"), sizer.predict
            ),
        ]
    else:
        profilers = (f"{_SIZER}._profile_prefill_latency", f"{_MIXIN}.profile_and_init_predictor")
        hooks += [Hook("profiler", p, ("self",), sizer.profile_prefill_latency) for p in profilers]
    if settings.validate_ids:
        handlers = ("handle_generate_request", "handle_embedding_request")
        hooks += [
            Hook(
                "validation",
                f"managers.scheduler:Scheduler.{name}",
                ("self",),
                validation.handle_request,
            )
            for name in handlers
        ]
        hooks.append(
            Hook(
                "validation",
                "managers.utils:validate_input_length",
                ("req",),
                validation.validate_input_length,
            )
        )
    return hooks


def history_hook() -> Hook:
    """The hook of ``get_fill_ids``. Raises OtherCodeError if that does not return a plain slice of
    the ids."""
    end_of = end_of_fill_ids(look_up(_FILL_IDS, ("self",)))
    return Hook("history", _FILL_IDS, ("self",), functools.partial(staging.get_fill_ids, end_of))
