"""The SGLang plugin (entry point group ``sglang.srt.plugins``): prefills go through a pool.

Installed beside SGLang, it is found by ``load_plugins()`` in each of its processes and hooks, with
SGLang's own ``HookRegistry``:

==================================  ==============================================================
``ScheduleBatch.prepare_for_extend``  opens the pool of the batch's device on first use
``Req.get_fill_ids``                within it: a view, in place of a copy of the whole history
``flatten_arrays_to_pinned_cpu``    within it: one gather from the requests' arrays into a slot
``resolve_forward_inputs``          one kernel on the forward stream, mixed batches included
``ForwardBatch.init_new``           resolves an extend batch that its caller forgot to resolve
==================================  ==============================================================

and, if they exist, the profiler of pipeline-parallel prefill, the check of request lengths (for
ids), and the scheduler's metrics. What is hooked is decided by looking for these symbols, what they
take and what they do (``sglang_code.py``), never by a version number:

- If one of the five but ``get_fill_ids`` is missing or takes other arguments, nothing is hooked.
- Views of the history are given only if ``get_fill_ids`` does what a view does, and no other
  plugin's hook could meet one.
- Only a known ``resolve_forward_inputs`` is preempted. With any other, SGLang's code takes the
  :class:`pystage.StagedTokens` for the tensor they stand for, and resolves mixed batches itself.

Everything else stays SGLang's: decode, idle and prebuilt batches, mixed batches under speculative
decoding, devices other than CUDA, and staged tensors outside ``prepare_for_extend``. A batch that
the pool cannot stage is staged by SGLang's code, and counted. Whatever reads the staged ids in
between (``encoder_swa_replay``, ``merge_batch``, ``record_batch_in_overlap``) finds a
:class:`pystage.StagedTokens`, which reads as the CPU tensor it replaces.

SGLang logs failures of hooks and goes on, so :func:`plugin` looks afterwards whether each hook is
reached, and logs the result in one line. ``docs/sglang.md`` has the settings.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import operator
import os
import pkgutil
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from types import CodeType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from .._build import __version__
from .._C import IdsView, current_cuda_device, ids_view, write_rows
from ..batch import ensure_resolved, forgotten_resolves
from ..errors import PoolExhaustedError, PystageError
from ..pool import AtCapacity, Issue, StagedTokens, StagingPool, StagingStats, resolve_mixed
from .sglang_code import (
    ALLOCATE,
    BUILD,
    PREPARE,
    RESOLVE,
    SAMPLING,
    WRITE_ROWS,
    OtherCodeError,
    end_of_fill_ids,
    release_of,
)
from .sglang_small import BUILT, PREPARED, MinusOne, Scope, codes_of

logger = logging.getLogger("pystage.sglang")

Function: TypeAlias = Callable[..., Any]

# --- settings ------------------------------------------------------------------------------------

ENVIRONMENT = {
    "enabled": "PYSTAGE_SGLANG",
    "capacity_mib": "PYSTAGE_SGLANG_CAPACITY_MIB",
    "at_capacity": "PYSTAGE_SGLANG_AT_CAPACITY",
    "issue": "PYSTAGE_SGLANG_ISSUE",
    "validate_ids": "PYSTAGE_SGLANG_VALIDATE_IDS",
    "sizer": "PYSTAGE_SGLANG_SIZER",
    "small": "PYSTAGE_SGLANG_SMALL",
    "cpu": "PYSTAGE_SGLANG_CPU",
}


@dataclass(frozen=True)
class Settings:
    """The plugin's settings, one environment variable each (``ENVIRONMENT``).

    Attributes:
        enabled: False: nothing is hooked.
        capacity_mib: cap on the pinned memory of each process, in MiB.
        at_capacity: what happens when no slot is free at the cap. ``"fallback"``: memory of torch's
            own, counted. ``"wait"``: a second for a slot, then SGLang's own way. ``"raise"``: the
            scheduler stops with :class:`pystage.PoolExhaustedError`.
        issue: ``"deferred"``: the transfer is a kernel on the forward stream. ``"eager"``: it is
            launched at once on a stream of the pool's own, and the forward stream waits for it.
        validate_ids: a text request with an id outside the vocabulary is refused when it arrives.
        sizer: pystage's profiler and chunk sizer in place of SGLang's (``pystage.pp``).
        small: a batch's lengths, indices and sampling parameters go to the device together, as the
            parameters of a kernel; the rows of its KV indices are written by one more.
        cpu: batches of ``--device cpu`` are staged as well. For tests: SGLang alone is faster.
    """

    enabled: bool = True
    capacity_mib: int = 64
    at_capacity: AtCapacity = "fallback"
    issue: Issue = "deferred"
    validate_ids: bool = False
    sizer: bool = False
    small: bool = True
    cpu: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Raises ValueError with the variable, what it is and what it may be."""
        given: dict[str, Any] = {}
        for setting in fields(cls):
            variable = ENVIRONMENT[setting.name]
            text = environment.get(variable, "").strip().lower()
            if text:
                given[setting.name] = _parse(variable, text, setting.default)
        return cls(**given)


_CHOICES = {
    "PYSTAGE_SGLANG_AT_CAPACITY": ("fallback", "wait", "raise"),
    "PYSTAGE_SGLANG_ISSUE": ("deferred", "eager"),
}


def _parse(variable: str, text: str, default: object) -> bool | int | str:
    if isinstance(default, bool):
        if text in ("0", "1"):
            return text == "1"
        raise ValueError(f"{variable} is {text!r}; it is 0 or 1")
    if isinstance(default, int):
        if text.isascii() and text.isdigit() and 1 <= int(text) <= 1 << 20:
            return int(text)
        raise ValueError(f"{variable} is {text!r}; it is MiB, a number from 1 to {1 << 20}")
    if text not in _CHOICES[variable]:
        raise ValueError(f"{variable} is {text!r}; it is one of {', '.join(_CHOICES[variable])}")
    return text


# --- pools ---------------------------------------------------------------------------------------


class _Pools:
    """The process's pools: one a device, made on first use, since loading must not start CUDA."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, int], StagingPool | None] = {}
        self._lock = threading.Lock()

    def of(self, device: Any) -> StagingPool | None:
        """The pool that stages for a batch's device; None if there can be none."""
        name = device if isinstance(device, str) else str(device)
        key = (name, current_cuda_device() if name == "cuda" else -1)
        try:
            return self._pools[key]
        except KeyError:
            with self._lock:
                if key not in self._pools:
                    self._pools[key] = self._open(*key)
                return self._pools[key]

    def _open(self, name: str, index: int) -> StagingPool | None:
        settings = _state.settings
        kind = name.partition(":")[0]
        if kind == "cpu" and not settings.cpu:
            logger.info("pystage: nothing to gain on the CPU: SGLang stages as without it")
            return None
        if kind not in ("cuda", "cpu"):
            logger.warning("pystage: no pool for %s devices: SGLang stages as without it", name)
            return None
        try:
            pool = StagingPool(
                f"cuda:{index}" if index >= 0 else name,
                settings.capacity_mib << 20,
                at_capacity=settings.at_capacity,
                issue=settings.issue,
            )
        except (PystageError, ValueError) as error:
            logger.warning("pystage: no pool for %s (%s): SGLang stages as without it", name, error)
            return None
        _state.say()
        return pool

    def stats(self) -> list[StagingStats]:
        return [pool.stats() for pool in list(self._pools.values()) if pool is not None]

    def close(self) -> None:
        """Closes all; the next batch opens new ones."""
        for pool in self._pools.values():
            if pool is not None:
                pool.close()
        self._pools.clear()


class _Here(threading.local):
    """What this thread is in the middle of."""

    pool: StagingPool | None = None  # prepare_for_extend, staging there
    views: bool = False  # ... and nothing is staged yet
    vocab_size: int | None = None  # handling a request of a model with that vocabulary


_pools = _Pools()
_minus_one = MinusOne()
_here = _Here()


def pool_stats() -> list[StagingStats]:
    """The figures of this process's pools."""
    return _pools.stats()


# --- hooks: staging ------------------------------------------------------------------------------


def _prepare_for_extend(original: Function, batch: Any, *args: Any, **kwargs: Any) -> Any:
    here = _here
    here.pool = pool = _pools.of(batch.device)
    here.views = pool is not None and _state.gives_views
    small = _small(pool, batch.device, batch, PREPARED)
    try:
        return original(batch, *args, **kwargs)
    finally:
        here.pool = None
        here.views = False
        if small is not None:
            small.close()


def _get_fill_ids(end_of: Callable[[Any], Any], original: Function, req: Any) -> Any:
    """What ``prepare_for_extend`` slices, measures and hands on, without a copy."""
    if _here.views:
        ids, end = req.full_untruncated_fill_ids, end_of(req)
        if type(ids) is array and type(end) is int:
            return ids_view(ids, 0, end)
    return original(req)


def _flatten(original: Function, parts: list[Any], pin: bool) -> StagedTokens | Tensor:
    pool = _here.pool
    if pool is not None:
        # Later calls of get_fill_ids are somebody else's, who may need an array.
        _here.views = False
        staged = _stage(pool, parts, pin)
        if staged is not None:
            return staged
        _state.left_to_sglang["stagings"] += 1
    arrays = [part.copy() if type(part) is IdsView else part for part in parts]
    result: Tensor = original(arrays, pin)
    return result


def _stage(pool: StagingPool, parts: list[Any], pin: bool) -> StagedTokens | None:
    """None: SGLang has to stage these itself."""
    if not pin and pool.device.type == "cuda":
        _once("pystage: SGLang asks for memory that is not pinned, and stages by itself")
        return None
    try:
        return pool.stage(parts)
    except PystageError as error:
        if isinstance(error, PoolExhaustedError) and _state.settings.at_capacity == "raise":
            raise
        kind = type(error).__name__
        _once(f"pystage: {kind}: %s; SGLang's own staging is used for such batches", error)
        return None


# --- hooks: small tensors ------------------------------------------------------------------------


def _small(
    pool: StagingPool | None, device: Any, batch: Any, deliver_at: tuple[int, ...]
) -> Scope | None:
    """None: SGLang sends its small tensors itself."""
    codes = _state.small_codes
    if pool is None or not codes:
        return None
    try:
        minus_one = _minus_one.on(device, pool)
        return Scope(pool, device, codes, len(batch.reqs), deliver_at, minus_one)
    except PystageError as error:
        _once("pystage: %s: SGLang sends the small tensors of such batches itself", error)
        _state.left_to_sglang["small"] += 1
        return None


def _write_cache_indices(original: Function, *args: Any, **kwargs: Any) -> Any:
    pool = _here.pool
    if pool is not None and _state.writes_rows and len(args) == len(_ROWS) and not kwargs:
        rows = dict(zip(_ROWS, args, strict=True))
        written = write_rows(
            pool._handle,
            rows["req_to_token_pool"].req_to_token,
            rows["out_cache_loc"],
            rows["prefix_tensors"],
            rows["req_pool_indices_cpu"],
            rows["prefix_lens_cpu"],
            rows["extend_lens_cpu"],
        )
        if written:
            return None
        _state.left_to_sglang["rows"] += 1
    return original(*args, **kwargs)


# --- hooks: resolving ----------------------------------------------------------------------------


def _resolve_forward_inputs(original: Function, batch: Any, future_map: Any) -> Any:
    """A device error surfaces here as it would in SGLang, and the batch is left as it was."""
    staged = batch.prefill_input_ids_cpu
    if type(staged) is StagedTokens:
        indices = batch.mix_running_indices
        if indices is None:
            if _state.preempts:
                batch.input_ids = staged._resolve(None, None, False)
                batch.prefill_input_ids_cpu = None
        elif _state.preempts and batch.spec_algorithm.is_none() and not _state.checks_relay:
            batch.input_ids = resolve_mixed(staged, future_map.output_tokens_buf, indices)
            batch.prefill_input_ids_cpu = None
            batch.mix_running_indices = None
        else:
            _state.left_to_sglang["mixed"] += 1
    # For a batch that has its ids now, what is left are the inputs of speculative decoding; for
    # all others it is SGLang's as ever (it takes StagedTokens for the tensor they stand for).
    return original(batch, future_map)


def _init_new(original: Function, cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    if batch.input_ids is None and getattr(batch, "prefill_input_ids_cpu", None) is not None:
        ensure_resolved(batch, stacklevel=3)  # behind this frame and the registry's
    small = None
    if _state.small_codes and _is_plain_extend(batch):
        runner = args[0] if args else kwargs["model_runner"]
        small = _small(_pools.of(batch.device), runner.device, batch, BUILT)
    if small is None:
        return original(cls, batch, *args, **kwargs)
    try:
        return original(cls, batch, *args, **kwargs)
    finally:
        small.close()


def _is_plain_extend(batch: Any) -> bool:
    """Not a decode, and no extend whose positions are made, and read, as the lengths are."""
    return bool(
        batch.forward_mode.is_extend()
        and batch.spec_algorithm.is_none()
        and getattr(batch, "dllm_config", None) is None
    )


# --- hooks: profiler and sizer -------------------------------------------------------------------


def _profile_prefill_latency(original: Function, owner: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang's profiler draws ids below 10,000: they are folded into smaller vocabularies."""
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


def _profile_and_fit(original: Function, owner: Any, *args: Any, **kwargs: Any) -> bool:
    from .sglang_pp import profile_and_fit

    return profile_and_fit(owner)


def _predict(original: Function, owner: Any, history_len: int) -> int | None:
    from .sglang_pp import predict

    return predict(owner, history_len)


def _add_chunked_req(original: Function, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    from .sglang_pp import fit_batch_to

    fit_batch_to(adder, req, continued=True)
    return original(adder, req, *args, **kwargs)


def _add_one_req(original: Function, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    from .sglang_pp import fit_batch_to

    fit_batch_to(adder, req, continued=False)
    return original(adder, req, *args, **kwargs)


# --- hooks: ids of requests ----------------------------------------------------------------------


def _handle_request(original: Function, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    _here.vocab_size = int(scheduler.model_config.vocab_size)
    try:
        return original(scheduler, *args, **kwargs)
    finally:
        _here.vocab_size = None


def _validate_input_length(original: Function, req: Any, *args: Any, **kwargs: Any) -> str | None:
    error: str | None = original(req, *args, **kwargs)
    if error is None and _here.vocab_size is not None:
        error = _bad_id(req, _here.vocab_size)
        if error is not None:
            # An embedding request is queued with the error told to nobody, unless it ends here.
            req.set_finish_with_abort(error)
    return error


def _bad_id(req: Any, vocab_size: int) -> str | None:
    """Pad values of multimodal inputs exceed the vocabulary on purpose; embeddings replace ids."""
    if req.multimodal_inputs is not None or req.input_embeds is not None:
        return None
    ids = np.array(req.origin_input_ids, dtype=np.int64)
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if not bad.size:
        return None
    at = int(bad[0])
    return (
        f"input_ids[{at}] is {int(ids[at])}, outside the vocabulary of {vocab_size} "
        f"({bad.size} of {ids.size} ids are)"
    )


# --- hooks: metrics ------------------------------------------------------------------------------

_GAUGES = {
    "capacity_bytes": "Cap on the pinned memory of the staging pool.",
    "reserved_bytes": "Memory held from the device by the staging pool, waste included.",
    "in_use_bytes": "Memory in slots that are leased, in flight or quarantined.",
    "high_water_bytes": "The most in_use_bytes ever was.",
    "pageable_bytes": "Memory that should have been pinned and could not be.",
    "leased_slots": "Slots that staged ids hold.",
    "in_flight_slots": "Slots that a stream still reads.",
    "quarantined_slots": "Slots given up after a failed device call.",
}
_COUNTERS = {
    "stages": ("stages", "Batches staged."),
    "tokens": ("staged_tokens", "Ids in staged batches."),
    "wire_bytes": ("wire_bytes", "Bytes transferred from slots to the device."),
    "waits": ("waits", "Stages that waited for a slot."),
    "wait_seconds": ("wait_seconds", "Time that stages waited for a slot."),
    "exhausted": ("exhausted", "Stages for which there was no slot at the cap."),
    "fallbacks": ("fallbacks", "Stages that left the pool for torch's own allocator."),
    "allocations": ("allocations", "Pieces of memory taken from the device."),
    "frees": ("frees", "Pieces of memory given back to the device."),
    "kernel_transfers": ("kernel_transfers", "Transfers by a kernel."),
    "copy_engine_transfers": ("copy_engine_transfers", "Transfers by a copy engine."),
}
_OF_THE_PLUGIN = {
    "forgotten_resolves": "Batches resolved only when their forward was built.",
    "sglang_stagings": "Batches that SGLang staged itself: no slot, an error, or no pinning.",
    "sglang_mixed": "Mixed batches staged in the pool that SGLang resolved itself.",
    "sglang_small": "Batches whose small tensors SGLang sent itself, though its code is known.",
    "sglang_rows": "Batches whose rows of KV indices SGLang wrote itself, for the same reason.",
}


class _Metrics:
    """The pools' figures among SGLang's metrics, under its labels. Its processes write theirs to
    files (prometheus_client's multiprocess mode), where figures cannot be asked for when they are
    read: they are brought up to date whenever SGLang logs its own."""

    def __init__(self, labels: Mapping[str, Any], counter: Function, gauge: Function) -> None:
        def made(kind: Function, name: str, text: str, **kwargs: Any) -> Any:
            metric = kind(
                name=f"pystage_{name}", documentation=text, labelnames=list(labels), **kwargs
            )
            return metric.labels(**labels)

        self._gauges = {
            name: made(gauge, name, text, multiprocess_mode="mostrecent")
            for name, text in _GAUGES.items()
        }
        self._counters = {
            name: made(counter, as_name, text) for name, (as_name, text) in _COUNTERS.items()
        }
        self._of_the_plugin = {
            name: made(counter, name, text) for name, text in _OF_THE_PLUGIN.items()
        }
        self._told: dict[str, float] = {}

    def update(self, pools: list[StagingStats]) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(sum(getattr(stats, name) for stats in pools))
        for name, counter in self._counters.items():
            self._add(counter, name, sum(getattr(stats, name) for stats in pools))
        for name, count in _counts().items():
            self._add(self._of_the_plugin[name], name, count)

    def _add(self, counter: Any, name: str, now: float) -> None:
        counter.inc(max(0, now - self._told.get(name, 0)))
        self._told[name] = now


def _counts() -> dict[str, int]:
    """What the plugin counts, beside what its pools count."""
    return {
        "forgotten_resolves": forgotten_resolves(),
        **{f"sglang_{name}": count for name, count in _state.left_to_sglang.items()},
    }


def _metrics_init(original: Function, collector: Any, *args: Any, **kwargs: Any) -> None:
    original(collector, *args, **kwargs)
    try:
        # Not before: prometheus_client decides at its import where figures go.
        import prometheus_client

        _state.metrics = _Metrics(
            collector.labels,
            getattr(collector, "_counter_cls", None) or prometheus_client.Counter,
            getattr(collector, "_gauge_cls", None) or prometheus_client.Gauge,
        )
    except Exception as error:  # whatever it is, the server has to serve
        logger.warning("pystage: no figures for Prometheus: %r", error)


def _log_stats(original: Function, collector: Any, *args: Any, **kwargs: Any) -> Any:
    if _state.metrics is not None:
        try:
            _state.metrics.update(_pools.stats())
        except Exception as error:  # whatever it is, the server has to serve
            _state.metrics = None
            logger.warning("pystage: no more figures for Prometheus: %r", error)
    return original(collector, *args, **kwargs)


def _configure_logger(original: Function, *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    _state.say()
    if "sglang.srt.ray.engine" in sys.modules:
        _load_in_ray_actors()
    return result


# --- hooks: schedulers in Ray actors -------------------------------------------------------------

_ACTOR = "ray.engine:_create_scheduler_actor"


class _PluginsFirst:
    """Unpickled, it is its value; SGLang's plugins are loaded there before.

    Nothing of pystage is pickled, so that an actor starts where it is not installed.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Function, tuple[Any, ...]]:
        return operator.getitem, ([_Load(), self.value], 1)


class _Load:
    def __reduce__(self) -> tuple[Function, tuple[Any, ...]]:
        from sglang.srt.plugins import load_plugins

        return load_plugins, ()


def _create_scheduler_actor(original: Function, *args: Any, **kwargs: Any) -> Any:
    """Ray's scheduler actors do not load plugins, but they unpickle the server's arguments."""
    call = inspect.signature(original).bind(*args, **kwargs)
    call.arguments["server_args"] = _PluginsFirst(call.arguments["server_args"])
    return original(*call.args, **call.kwargs)


def _load_in_ray_actors() -> None:
    """In the process that makes the actors, once SGLang's code for Ray has been imported there."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = f"sglang.srt.{_ACTOR.replace(':', '.')}"
    if target in HookRegistry._patched:
        return
    if why := _cannot_load_in_ray_actors():
        _once(
            "pystage is off in Ray's schedulers: %s; let all processes of Ray load SGLang's "
            "plugins: ray.init(runtime_env={'worker_process_setup_hook': "
            "'sglang.srt.plugins.load_plugins'})",
            why,
        )
        return
    HookRegistry.register(target, _create_scheduler_actor, HookType.AROUND)
    HookRegistry.apply_hooks()


def _cannot_load_in_ray_actors() -> str:
    """Why; empty if they can."""
    try:
        function = _look_up(_ACTOR, ())
    except _MissingError as error:
        return str(error)
    takes = inspect.signature(function).parameters
    return "" if "server_args" in takes else f"{_ACTOR} takes no server_args"


# --- what is hooked ------------------------------------------------------------------------------


class Hook(NamedTuple):
    """One symbol and what goes around it.

    Attributes:
        part: what of the plugin it serves.
        target: ``module:symbol``, the module below ``sglang.srt``.
        takes: names of its first parameters, as they have to be.
        function: called as ``function(original, *args, **kwargs)``.
    """

    part: str
    target: str
    takes: tuple[str, ...]
    function: Function


_BATCH = "managers.schedule_batch:ScheduleBatch"
_SIZER = "managers.scheduler_components.dynamic_chunk_sizer:DynamicChunkSizer"
_ADDER = "managers.schedule_policy:PrefillAdder"
_MIXIN = "managers.scheduler_pp_mixin:SchedulerPPMixin"
_COLLECTOR = "observability.metrics_collector:SchedulerMetricsCollector"

_RESOLVE = Hook(
    "resolve",
    RESOLVE[0],
    ("batch", "future_map"),
    _resolve_forward_inputs,
)
NEEDED = (
    Hook("staging", f"{_BATCH}.prepare_for_extend", ("self",), _prepare_for_extend),
    Hook("staging", "utils.common:flatten_arrays_to_pinned_cpu", ("parts", "pin"), _flatten),
    _RESOLVE,
    Hook(
        "guard",
        "model_executor.forward_batch_info:ForwardBatch.init_new",
        ("cls", "batch", "model_runner"),
        _init_new,
    ),
)
_ROWS = (
    "out_cache_loc",
    "req_pool_indices_tensor",
    "req_pool_indices_cpu",
    "prefix_lens_tensor",
    "prefix_lens_cpu",
    "seq_lens_tensor",
    "seq_lens_cpu",
    "extend_lens_tensor",
    "extend_lens_cpu",
    "prefix_tensors",
    "req_to_token_pool",
)
_FIELDS = ("input_ids", "prefill_input_ids_cpu", "mix_running_indices", "spec_algorithm")


def _optional(settings: Settings) -> list[Hook]:
    rows = [Hook("rows", target, _ROWS, _write_cache_indices) for target in WRITE_ROWS]
    hooks = [
        *(rows if settings.small else []),
        Hook("log", "utils.common:configure_logger", ("server_args",), _configure_logger),
        Hook("metrics", f"{_COLLECTOR}.__init__", ("self", "labels"), _metrics_init),
        Hook("metrics", f"{_COLLECTOR}.log_stats", ("self",), _log_stats),
    ]
    if settings.sizer:
        hooks += [
            Hook("sizer", f"{_SIZER}.profile_and_fit", ("self",), _profile_and_fit),
            Hook("sizer", f"{_SIZER}.predict", ("self", "history_len"), _predict),
            Hook("sizer", f"{_MIXIN}.profile_and_init_predictor", ("self",), _profile_and_fit),
            Hook("sizer", f"{_MIXIN}.predict_next_chunk_size", ("self", "history_len"), _predict),
            Hook("sizer", f"{_ADDER}.add_chunked_req", ("self", "req"), _add_chunked_req),
            Hook("sizer", f"{_ADDER}.add_one_req", ("self", "req"), _add_one_req),
        ]
    else:
        profilers = (f"{_SIZER}._profile_prefill_latency", f"{_MIXIN}.profile_and_init_predictor")
        hooks += [Hook("profiler", p, ("self",), _profile_prefill_latency) for p in profilers]
    if settings.validate_ids:
        handlers = ("handle_generate_request", "handle_embedding_request")
        hooks += [
            Hook("validation", f"managers.scheduler:Scheduler.{name}", ("self",), _handle_request)
            for name in handlers
        ]
        hooks.append(
            Hook(
                "validation",
                "managers.utils:validate_input_length",
                ("req",),
                _validate_input_length,
            )
        )
    return hooks


_FILL_IDS = "managers.schedule_batch:Req.get_fill_ids"


def _history_hook() -> Hook:
    """Raises OtherCodeError if ``get_fill_ids`` does something else than a view of the ids."""
    end_of = end_of_fill_ids(_look_up(_FILL_IDS, ("self",)))
    return Hook("history", _FILL_IDS, ("self",), functools.partial(_get_fill_ids, end_of))


class _MissingError(LookupError):
    """A symbol is not there, or is another than the hook was made for."""


def _look_up(target: str, takes: tuple[str, ...]) -> Any:
    """The symbol's function as it is now."""
    try:
        function = inspect.getattr_static(*_owner_and_name(target))
    except AttributeError as error:
        raise _MissingError(f"no {target} ({error})") from error
    except Exception as error:  # importing SGLang's modules runs anything
        raise _MissingError(f"no {target} ({type(error).__name__}: {error})") from error
    function = getattr(function, "__func__", function)
    found = tuple(inspect.signature(function).parameters)[: len(takes)]
    if found != takes:
        raise _MissingError(f"{target} takes ({', '.join(found)}), not ({', '.join(takes)})")
    return function


def _owner_and_name(target: str) -> tuple[Any, str]:
    module, _, symbol = target.partition(":")
    owner, _, name = symbol.rpartition(".")
    return pkgutil.resolve_name(f"sglang.srt.{module}:{owner}"), name


def _needed_symbols() -> list[Hook]:
    """Raises _MissingError unless all that the pool needs is there."""
    for hook in NEEDED:
        _look_up(hook.target, hook.takes)
    batch = pkgutil.resolve_name(f"sglang.srt.{_BATCH}")
    for name in _FIELDS:
        if name not in getattr(batch, "__dataclass_fields__", {}):
            raise _MissingError(f"no {_BATCH}.{name}")
    return list(NEEDED)


def _there(hook: Hook) -> bool:
    try:
        _look_up(hook.target, hook.takes)
    except _MissingError as error:
        logger.debug("pystage: not hooked: %s", error)
        return False
    return True


def _current(target: str) -> Any:
    """What runs when the symbol is called."""
    function = inspect.getattr_static(*_owner_and_name(target))
    return getattr(function, "__func__", function)


def _chain(function: Any) -> list[Any]:
    """The function, what it wraps, what that wraps, and so on."""
    chain = [function]
    while hasattr(chain[-1], "__wrapped__"):
        chain.append(chain[-1].__wrapped__)
    return chain


def _is_reached(hook: Hook) -> str:
    """Why calls of the symbol do not reach the hook; empty if they do."""
    chain = _chain(_current(hook.target))
    if not any(value is hook.function for f in chain for value in _closed_over(f)):
        return f"{hook.target} is not hooked"
    for name, module in _modules_of_sglang():
        if any(value is old for value in list(vars(module).values()) for old in chain[1:]):
            return f"{name} still has the original of {hook.target}"
    return ""


def _is_shared(hook: Hook) -> str:
    """Why something else than the hook around SGLang's own code runs when the symbol is called;
    empty if nothing does. It would get the hook's results, or be left out by the hook."""
    outer, *inner = _chain(_current(hook.target))
    if not any(value is hook.function for value in _closed_over(outer)):
        return f"another plugin hooks {hook.target}"
    for function in inner:
        where = getattr(function, "__globals__", {}).get("__name__", "")
        if not where.startswith("sglang.") or where == "sglang.srt.plugins.hook_registry":
            return f"another plugin hooks {hook.target}"
    owner, name = _owner_and_name(hook.target)
    if not isinstance(owner, type):
        for where, module in _modules_of_sglang():
            if vars(module).get(name, outer) is not outer:
                return f"{where} has another {name}"
    return ""


def _modules_of_sglang() -> list[tuple[str, Any]]:
    return [(n, m) for n, m in list(sys.modules.items()) if n.startswith("sglang.") and m]


def _closed_over(function: Any) -> list[Any]:
    """What a wrapper of SGLang's registry was made of: the hook is among it."""
    return (
        list(inspect.getclosurevars(function).nonlocals.values())
        if hasattr(function, "__closure__")
        else []
    )


@dataclass
class _State:
    """What the plugin is in this process.

    Attributes:
        active: parts that work.
        broken: parts that should work, and why they do not.
        left: parts that are left to SGLang's own code, and why.
        gives_views: ``get_fill_ids`` gives views within ``prepare_for_extend``.
        preempts: batches are resolved before SGLang's ``resolve_forward_inputs`` sees them.
        small_codes: the code whose small tensors are taken; none: it is left alone.
        writes_rows: rows of KV indices are written in place of ``write_cache_indices``.
        left_to_sglang: how many batches had a pool, and what SGLang did with them itself.
    """

    settings: Settings = field(default_factory=Settings)
    hooks: list[Hook] = field(default_factory=list)
    active: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    no_history: str = ""
    gives_views: bool = False
    preempts: bool = False
    small_codes: tuple[CodeType, ...] = ()
    writes_rows: bool = False
    left_to_sglang: dict[str, int] = field(
        default_factory=lambda: {"stagings": 0, "mixed": 0, "small": 0, "rows": 0}
    )
    loaded: bool = False
    off: str = "not loaded"
    checks_relay: bool = False  # SGLang checks and marks the relay on reading (its own CI does)
    metrics: _Metrics | None = None
    said: bool = False

    def say(self) -> None:
        """The one line: when the log is set up, at the latest with the first batch."""
        if self.said or not logger.isEnabledFor(logging.INFO):
            return
        self.said = True
        logger.info("%s", self)

    def __str__(self) -> str:
        s = self.settings
        if self.off:
            return f"pystage {__version__} is off: {self.off}"
        parts = ", ".join(self.active) or "nothing"
        text = f"pystage {__version__} is active: {parts}"
        if self.broken:
            text += f"; NOT active: {'; '.join(self.broken)}"
        if self.left:
            text += f"; left to SGLang: {'; '.join(self.left)}"
        ids = "validated" if "validation" in self.active else "not validated"
        return (
            f"{text} (pool of {s.capacity_mib} MiB, at capacity {s.at_capacity}, {s.issue}; "
            f"ids {ids})"
        )


_state = _State()
_warned: set[str] = set()


def _once(message: str, *args: object) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message, *args)


def plugin() -> None:
    """The entry point: registers the hooks. They are verified once SGLang has applied them."""
    _state.loaded = True
    try:
        _state.settings = Settings.from_environment()
    except ValueError as error:
        return _stay_off(str(error), logging.ERROR)
    if not _state.settings.enabled:
        return _stay_off(f"{ENVIRONMENT['enabled']}=0", logging.INFO)
    try:
        hooks = _needed_symbols()
        try:
            hooks.append(_history_hook())
        except OtherCodeError as error:
            _state.no_history = str(error)
    except _MissingError as error:
        return _stay_off(
            f"this SGLang is not as expected: {error}; the server runs as without pystage"
        )
    hooks += [hook for hook in _optional(_state.settings) if _there(hook)]

    from sglang.srt.managers import overlap_utils
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _state.checks_relay = bool(getattr(overlap_utils, "_DEBUG_ASSERT", False))
    for hook in hooks:
        target = f"sglang.srt.{hook.target.replace(':', '.')}"
        HookRegistry.register(target, hook.function, HookType.AROUND)
    _state.hooks, _state.off = hooks, ""

    # Hooks are applied after all plugins have registered theirs. Applying them here would shut out
    # later plugins that hook the same symbols.
    as_it_was = vars(HookRegistry)["apply_hooks"]

    def apply_hooks(registry: type) -> None:
        HookRegistry.apply_hooks = as_it_was
        HookRegistry.apply_hooks()
        verify()

    HookRegistry.apply_hooks = classmethod(apply_hooks)
    return None


def _stay_off(reason: str, level: int = logging.WARNING) -> None:
    _state.off = reason
    if level > logging.INFO:
        _state.said = True
        logger.log(level, "%s", _state)
    else:
        _state.say()


def verify() -> None:
    """Looks whether each hook is reached, decides what is left to SGLang, and logs the result."""
    found = {hook.part: why for hook in _state.hooks if (why := _is_reached(hook))}
    parts = dict.fromkeys(hook.part for hook in _state.hooks if hook.part != "log")
    _state.broken = [f"{part} ({why})" for part, why in found.items()]
    for part, wanted in (
        ("sizer", _state.settings.sizer),
        ("validation", _state.settings.validate_ids),
    ):
        if wanted and part not in parts:
            _state.broken.append(f"{part} (this SGLang has no such symbols)")

    inactive = {part: f"{part} is not active" for part in found}
    left = {
        "history": _state.no_history or inactive.get("staging") or _shared("staging", "history"),
        "mixed": inactive.get("resolve") or _unknown(),
    }
    _state.small_codes, _state.writes_rows = (), False
    if _state.settings.small:
        left["small"] = inactive.get("staging") or inactive.get("guard") or _no_small()
        left["rows"] = inactive.get("rows") or _no_rows()
    left = {part: why for part, why in left.items() if why and part not in found}
    _state.left = [f"{part} ({why})" for part, why in left.items()]
    _state.active = [part for part in parts if part not in found and part not in left]
    _state.gives_views = "history" in _state.active
    _state.preempts = "mixed" not in left
    if _state.preempts:
        _state.active.insert(_state.active.index("resolve") + 1, "mixed")
    if _state.small_codes:
        at = next((i for i, part in enumerate(_state.active) if part in ("rows", "metrics")), None)
        _state.active.insert(len(_state.active) if at is None else at, "small")
    if _state.broken or _state.left:
        _state.said = True
        logger.warning("%s", _state)
    else:
        _state.say()


def _shared(*names: str) -> str:
    """Why the plugin is not alone with these symbols, or those of these parts; empty if it is."""
    reasons = (
        _is_shared(hook) for hook in _state.hooks if hook.part in names or hook.target in names
    )
    return next(filter(None, reasons), "")


def _no_small() -> str:
    """Why the small tensors of a batch are left to SGLang; empty if they are not."""
    if why := _shared(*PREPARE, *BUILD):
        return why
    functions = []
    try:
        for targets in (PREPARE, ALLOCATE, SAMPLING, BUILD):
            target = _first_there(targets)
            function = _chain(_current(target))[-1]
            if targets in (ALLOCATE, SAMPLING) and function is not _current(target):
                return f"another plugin hooks {target}"
            release_of(targets, function)
            functions.append(function)
    except LookupError as error:
        return str(error)
    _state.small_codes = codes_of(*functions)
    return ""


def _no_rows() -> str:
    """Why the rows of KV indices are left to SGLang; empty if they are not."""
    if why := _shared("rows"):
        return why
    try:
        release_of(WRITE_ROWS, _chain(_current(_first_there(WRITE_ROWS)))[-1])
    except LookupError as error:
        return str(error)
    _state.writes_rows = True
    return ""


def _first_there(targets: tuple[str, ...]) -> str:
    """Raises _MissingError if there is none."""
    for target in targets[:-1]:
        try:
            _look_up(target, ())
        except _MissingError:
            continue
        return target
    _look_up(targets[-1], ())
    return targets[-1]


def _unknown() -> str:
    """Why SGLang's resolve_forward_inputs cannot be preempted; empty if it can."""
    if why := _shared("resolve"):
        return why
    try:
        release_of(RESOLVE, _chain(_current(_RESOLVE.target))[-1])
    except OtherCodeError as error:
        return str(error)
    return ""


def status() -> dict[str, Any]:
    """What the plugin is in this process, for ``python -m pystage doctor``."""
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        version = None
    return {
        "sglang": version,
        "off": _state.off,
        "active": _state.active,
        "broken": _state.broken,
        "left": _state.left,
        "counts": _counts(),
        "settings": asdict(_state.settings),
        "line": str(_state),
    }


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Imports may print: standard output is for the one JSON object."""
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = out


def main() -> None:
    """Loads SGLang's plugins as a server's process does, and prints the status as JSON."""
    with _nothing_on_stdout():
        from sglang.srt.plugins import load_plugins

        load_plugins()
    if not _state.loaded:
        allowed = os.environ.get("SGLANG_PLUGINS")
        _state.off = f"SGLANG_PLUGINS is {allowed!r}" if allowed else "SGLang did not load it"
    with _nothing_on_stdout():
        ray = _cannot_load_in_ray_actors() if importlib.util.find_spec("ray") else ""
    print(json.dumps({**status(), "ray": ray}))


__all__ = ["ENVIRONMENT", "Settings", "main", "plugin", "pool_stats", "status"]
