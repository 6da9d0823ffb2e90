"""Hooks that resolve a batch's staged ids to ``input_ids``, and catch ids that nobody resolved."""

from __future__ import annotations

from typing import Any

from ...batch import ensure_resolved
from ...errors import UnresolvedInputsError
from ...pool import StagedTokens, resolve_mixed
from . import process
from .small import BUILT, small_scope
from .symbols import Function


def resolve_forward_inputs(original: Function, batch: Any, future_map: Any) -> Any:
    """Resolves staged ids. A device error is raised here as it would be in SGLang, and leaves the
    batch unchanged."""
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
    # If the batch has its ids now, SGLang's code handles only the inputs of speculative decoding.
    # Otherwise it does everything, and uses StagedTokens like the tensor that they replace.
    return original(batch, future_map)


def init_new(original: Function, cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
    if batch.input_ids is None and getattr(batch, "prefill_input_ids_cpu", None) is not None:
        ensure_resolved(batch, stacklevel=3)  # skips this frame and the registry's
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
    """Whether the batch is an extend that makes and reads only the lengths in this way: no decode,
    no speculative decoding and no diffusion LLM, which also make and read positions."""
    return bool(
        batch.forward_mode.is_extend()
        and batch.spec_algorithm.is_none()
        and getattr(batch, "dllm_config", None) is None
    )


def merge_batch(original: Function, batch: Any, other: Any) -> Any:
    """Resolves both batches before SGLang merges them, so that SGLang joins their ``input_ids``.

    SGLang's merge keeps the staged ids of ``batch`` but drops those of ``other``, so the forward
    would run on too few ids.

    Raises:
        UnresolvedInputsError: a batch has ids in the relay, which only its forward can read.
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
