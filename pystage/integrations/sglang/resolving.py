"""Hooks that make a batch's ids ``input_ids``, and guard those that nobody resolved."""

from __future__ import annotations

from typing import Any

from ...batch import ensure_resolved
from ...errors import UnresolvedInputsError
from ...pool import StagedTokens, resolve_mixed
from . import process
from .small import BUILT, small_scope
from .symbols import Function


def resolve_forward_inputs(original: Function, batch: Any, future_map: Any) -> Any:
    """A device error surfaces here as it would in SGLang, and the batch is left as it was."""
    state, staged = process.state, batch.prefill_input_ids_cpu
    if type(staged) is StagedTokens:
        indices = batch.mix_running_indices
        if indices is None:
            if state.preempts:
                batch.input_ids = staged._resolve(None, None, False)
                batch.prefill_input_ids_cpu = None
        elif state.preempts and batch.spec_algorithm.is_none() and not state.checks_relay:
            batch.input_ids = resolve_mixed(staged, future_map.output_tokens_buf, indices)
            batch.prefill_input_ids_cpu = None
            batch.mix_running_indices = None
        else:
            state.left_to_sglang["mixed"] += 1
    # For a batch that has its ids now, what is left are the inputs of speculative decoding; for
    # all others it is SGLang's as ever (it takes StagedTokens for the tensor they stand for).
    return original(batch, future_map)


def init_new(original: Function, cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    if batch.input_ids is None and getattr(batch, "prefill_input_ids_cpu", None) is not None:
        ensure_resolved(batch, stacklevel=3)  # behind this frame and the registry's
    small = None
    if process.state.small_codes and _is_plain_extend(batch):
        runner = args[0] if args else kwargs["model_runner"]
        small = small_scope(process.pools.of(batch.device), runner.device, batch, BUILT)
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


def merge_batch(original: Function, batch: Any, other: Any) -> Any:
    """SGLang's merge drops what ``other`` has staged, and keeps what ``batch`` has: the forward
    would run on too few ids. So both are resolved before, and SGLang joins their ``input_ids``.

    Raises:
        UnresolvedInputsError: ``batch`` has ids in the relay, which only its forward can read.
    """
    if other.prefill_input_ids_cpu is not None and len(other.reqs):
        for side in (batch, other):
            if side.mix_running_indices is not None or (
                side.input_ids is None and not _staged(side)
            ):
                raise UnresolvedInputsError(
                    f"merge_batch of {len(batch.reqs)} and {len(other.reqs)} requests would lose "
                    "the staged ids of a prefill: run the prefill's forward before the merge, or "
                    "call resolve_forward_inputs on both batches"
                )
        for side in (batch, other):
            if _staged(side):
                side.input_ids = side.prefill_input_ids_cpu.to(side.device, non_blocking=True)
                side.prefill_input_ids_cpu = None
    return original(batch, other)


def _staged(batch: Any) -> bool:
    return batch.prefill_input_ids_cpu is not None
