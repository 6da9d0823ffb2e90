"""Batches whose input ids stay on the host until the forward needs them.

Names and meanings are SGLang's (PR 25945 introduced deferred staging; PR 26883 added the missing
resolve to the pipeline-parallel profiler). The functions take any object with the attributes of
:class:`DeferredBatch`, including SGLang's ``ScheduleBatch``. :class:`PrefillBatch` is a small
implementation.

Sources of a batch's ids:

=============  =========================  =======================  ============================
kind           ``prefill_input_ids_cpu``  ``mix_running_indices``  ``input_ids`` once resolved
=============  =========================  =======================  ============================
prefill        staged ids                 None                     the ids
mixed          staged ids                 int [k]                  ids, then ``relay[indices]``
decode         None                       int [k], or None         ``relay[indices]``
=============  =========================  =======================  ============================

A decode batch without ``mix_running_indices`` gathers by ``req_pool_indices``. The relay is the
device tensor to which the forward writes the ids it samples (SGLang: ``output_tokens_buf``).

Streams: ``resolve_forward_inputs`` works on the current stream and does not wait on CUDA. The
caller must order that stream after the work that writes the relay and the indices. In SGLang the
forward stream writes the relay itself; before each forward it waits for the schedule stream, which
makes the indices. Tensors from other streams are kept alive until the current stream has read them.
Batches are not thread-safe.

This is one file because its functions share one rule: who resolves a batch, and when.
"""

from __future__ import annotations

import copy
import itertools
import operator
import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from . import _C
from .errors import ForgottenResolveWarning, PystageError, UnresolvedInputsError
from .pool import StagedTokens, StagingPool, resolve, resolve_mixed

Part: TypeAlias = StagedTokens | Tensor
Staging: TypeAlias = Part | tuple[Part, ...]


class DeferredBatch(Protocol):
    """The attributes that a batch must have.

    Attributes:
        input_ids: int64 [n] on the device once the batch is resolved, else None.
        prefill_input_ids_cpu: int64 [p] staged ids, or None. It may be a plain CPU tensor. After a
            merge or a filter it may be a tuple of staged ids, CPU tensors and device tensors, whose
            ids follow one another.
        mix_running_indices: int64 or int32 [k] on the device, or None: the positions in the relay
            of the running requests' ids. These ids follow those of the prefill.
        device: the device that runs the forward.

    Optional attributes: ``extend_lens`` (the number of ids of each request, in order; 1 for a
    running request), ``req_pool_indices`` (int [b] on the device) and SGLang's ``forward_mode``.
    """

    input_ids: Any
    prefill_input_ids_cpu: Any
    mix_running_indices: Any

    @property
    def device(self) -> Any: ...


@dataclass
class PrefillBatch:
    """A small :class:`DeferredBatch`. ``batch[i:j]`` has some of its requests, and shares slots."""

    device: torch.device | str
    input_ids: Tensor | None = None
    prefill_input_ids_cpu: Staging | None = None
    mix_running_indices: Tensor | None = None
    extend_lens: list[int] = field(default_factory=list)
    req_pool_indices: Tensor | None = None

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.extend_lens)

    def __getitem__(self, key: slice) -> PrefillBatch:
        part = copy.copy(self)
        part.extend_lens = [*self.extend_lens]
        filter(part, range(len(self))[key])
        return part


# --- staging -----------------------------------------------------------------------------------


def prepare_for_extend(
    batch: DeferredBatch,
    token_ids: Sequence[Any],
    *,
    pool: StagingPool,
    starts: Sequence[int] | None = None,
    stops: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> None:
    """Stages the batch's ids. ``input_ids`` is None until the batch is resolved.

    It may be called again for the same batch, for example when an encoder-decoder model strips the
    encoder's ids and stages the rest. It then releases the first slot before it takes the second,
    so a pool with room for one slot is enough. A mixed batch becomes a prefill batch again.

    Args:
        batch: its ``prefill_input_ids_cpu`` is set, and its ``extend_lens`` if it has that
            attribute.
        token_ids, starts, stops, vocab_size: as for :meth:`StagingPool.stage`. In a chunked
            prefill, ``starts`` is the length of each request's history; ids before it are not read.
        pool: a pool for the batch's device.

    Raises:
        ValueError: the pool is for another device.
        Exception: whatever :meth:`StagingPool.stage` raises. The batch then keeps the ids it had
            (staged again if there is a slot, else as CPU tensors).
    """
    device, index = torch.device(batch.device), pool.device.index
    if device.type != pool.device.type or (index is not None and device.index not in (None, index)):
        raise ValueError(f"the batch is on {device}, the pool stages for {pool.device}")
    parts = batch.prefill_input_ids_cpu
    parts = parts if isinstance(parts, tuple) else (parts,)
    held = [isinstance(part, StagedTokens) for part in parts]
    if restage := any(held):  # no name here may keep a slot
        parts = tuple(p.cpu() if had else p for p, had in zip(parts, held, strict=True))
        batch.prefill_input_ids_cpu = None
    try:
        staged = pool.stage(token_ids, starts, stops, vocab_size)
        first = [0] * len(token_ids) if starts is None else starts
        last = [len(ids) for ids in token_ids] if stops is None else stops
        lens = [int(stop) - int(start) for start, stop in zip(first, last, strict=True)]
    except BaseException:
        if restage:
            batch.prefill_input_ids_cpu = _staged_again(parts, held, pool)
        raise
    batch.input_ids = None
    batch.prefill_input_ids_cpu = staged
    batch.mix_running_indices = None
    if hasattr(batch, "extend_lens"):
        batch.extend_lens = lens


def mix_with_running(batch: DeferredBatch, mix_running_indices: Tensor) -> None:
    """Appends running requests, one id each, to a prefill batch, which becomes a mixed batch.

    Args:
        batch: a staged or resolved batch that is not mixed yet.
        mix_running_indices: int64 or int32 [k] on the device, the positions of the running
            requests' ids in the relay.

    Raises:
        UnresolvedInputsError: the batch has no ids.
        ValueError: the batch is mixed already.
        TypeError: the indices are not such a tensor.

    If this raises, the batch is unchanged.
    """
    _check_indices(mix_running_indices)
    parts, indices = _contents(batch)
    if indices is not None:
        raise ValueError(f"{_name(batch)} has running requests already: use merge")
    if not parts:
        raise _nothing_staged(batch)
    if not len(mix_running_indices):
        return
    batch.prefill_input_ids_cpu = _staging(parts)
    batch.input_ids = None
    batch.mix_running_indices = mix_running_indices
    if hasattr(batch, "extend_lens"):
        batch.extend_lens = [*batch.extend_lens, *[1] * len(mix_running_indices)]


# --- resolving ---------------------------------------------------------------------------------


def resolve_forward_inputs(batch: DeferredBatch, relay: Tensor | None = None) -> None:
    """Sets ``input_ids`` to an int64 [n] tensor on the device, ordered on the current stream.

    This takes one kernel, also for a mixed batch. A merged or filtered batch takes one per part.
    Afterwards both staging fields are None, so the slot is free once the stream has run the kernel.
    A batch that is resolved already is left unchanged.

    Args:
        batch: a staged batch or a decode batch.
        relay: int64 or int32 [m], contiguous, on the device. Mixed and decode batches need it.

    Raises:
        UnresolvedInputsError: the batch has neither ids nor staged ids, or it needs a relay and
            there is none.
        IndexError: an index is outside ``[-m, m)``, on the host device. On CUDA, such an index
            triggers a device-side assertion, as in torch.
        Exception: as for :func:`pystage.resolve_mixed`.

    If this raises, the batch is unchanged and can be resolved again.
    """
    if _is_resolved(batch):
        return
    parts, indices = _contents(batch)
    if not parts and indices is None:
        raise _nothing_staged(batch)
    if indices is not None and relay is None:
        raise UnresolvedInputsError(
            f"{_name(batch)} has running requests, whose ids are in the relay: call "
            "resolve_forward_inputs(batch, relay)"
        )
    batch.input_ids = _materialise(parts, relay, indices, batch.device)
    batch.prefill_input_ids_cpu = None
    batch.mix_running_indices = None


_guard = threading.Lock()
_forgotten = 0
_warned: set[tuple[str, int]] = set()


def ensure_resolved(
    batch: DeferredBatch, relay: Tensor | None = None, *, stacklevel: int = 1
) -> None:
    """Resolves the batch if it is not resolved yet. Call it in the code that builds a forward.

    A code path that forgot to resolve a batch does not crash. The batch is counted
    (:func:`forgotten_resolves`), and a :class:`pystage.ForgottenResolveWarning` is issued once for
    each calling line.

    Args:
        batch, relay: as for :func:`resolve_forward_inputs`.
        stacklevel: how many frames up the stack the line to blame is. 1: the caller of this
            function.

    Raises:
        Exception: as for :func:`resolve_forward_inputs`.
    """
    if _is_resolved(batch):
        return
    resolve_forward_inputs(batch, relay)
    global _forgotten  # noqa: PLW0603
    caller = sys._getframe(stacklevel)
    site = (caller.f_code.co_filename, caller.f_lineno)
    with _guard:
        _forgotten += 1
        first = site not in _warned
        _warned.add(site)
    if first:
        warnings.warn(
            f"{_name(batch)} reached {site[0]}:{site[1]} unresolved and was resolved there: call "
            "resolve_forward_inputs(batch, relay) at forward entry",
            ForgottenResolveWarning,
            stacklevel=stacklevel + 1,
        )


def forgotten_resolves() -> int:
    """How many batches :func:`ensure_resolved` had to resolve in this process."""
    return _forgotten


# --- merging and filtering ---------------------------------------------------------------------


def merge(batch: DeferredBatch, other: DeferredBatch) -> None:
    """Appends the requests of ``other`` to ``batch``. ``other`` is left unchanged.

    Nothing staged is copied. Staged ids stay in their slots, which are free once both batches are
    done with them. Two resolved batches give a resolved one. An empty batch changes nothing. A
    prefill merged with a decode batch becomes a mixed batch.

    Raises:
        ValueError: ids of ``other`` would follow running requests, which must come last in a batch.
        UnresolvedInputsError: one of the batches has requests but no ids.
    """
    parts, indices = _contents(batch)
    more, more_indices = _contents(other)
    for side, ids, running in ((batch, parts, indices), (other, more, more_indices)):
        if not ids and running is None and getattr(side, "extend_lens", None):
            raise _nothing_staged(side)
    resolved = all(_is_resolved(side) or _is_empty(side) for side in (batch, other))
    parts, more = _not_empty(parts), _not_empty(more)
    indices, more_indices = _some(indices), _some(more_indices)
    decodes = 0 if more_indices is None else len(more_indices)
    if indices is not None and (more or len(getattr(other, "extend_lens", ())) > decodes):
        raise ValueError(
            f"{_name(other)} cannot follow the running requests of {_name(batch)}: merge the "
            "other way round, or resolve both first"
        )
    merged = {
        name: _joined(getattr(batch, name), getattr(other, name))
        for name in ("extend_lens", "req_pool_indices")
        if hasattr(batch, name) and hasattr(other, name)
    }
    if indices is None or more_indices is None:
        indices = more_indices if indices is None else indices
    else:
        indices = torch.cat([indices, more_indices])
    _assign(batch, (*parts, *more), indices, resolved)
    for name, value in merged.items():
        setattr(batch, name, value)


def filter(batch: DeferredBatch, keep_indices: Iterable[int]) -> None:
    """Keeps the given requests, in the given order, and drops the others.

    Nothing staged is copied. A slot stays in use while the ids of any request in it are needed. If
    no request is left, the batch is idle: resolved, with no ids.

    Args:
        batch: must have ``extend_lens``. Running requests come last and must stay last.
        keep_indices: indices of the requests to keep, each in ``[0, len(extend_lens))``.

    Raises:
        IndexError: there is no such request.
        TypeError: an index is not an integer, as in a mask.
        ValueError: ``extend_lens`` does not fit the ids, or ``keep_indices`` has a running request
            before one that is not running.
        UnresolvedInputsError: the batch has no ids.
    """
    parts, indices = _contents(batch)
    lens: list[int] = list(batch.extend_lens)  # type: ignore[attr-defined]
    if lens and not parts and indices is None:
        raise _nothing_staged(batch)
    prefill = len(lens) - (0 if indices is None else len(indices))
    if prefill < 0 or sum(lens[:prefill]) != sum(map(len, parts)) or set(lens[prefill:]) - {1}:
        raise ValueError(
            f"extend_lens of {_name(batch)} is {lens}, but it has {sum(map(len, parts))} ids and "
            f"{len(lens) - prefill} running requests"
        )
    keep = [_position(i) for i in keep_indices]
    for i in keep:
        if not 0 <= i < len(lens):
            raise IndexError(f"request {i} is out of range: {_name(batch)}")
    if keep == list(range(len(lens))):
        return
    if keep != sorted(keep, key=lambda i: i >= prefill):
        raise ValueError("running requests come last in a batch, so in keep_indices too")

    ends = [0, *itertools.accumulate(lens)]
    kept = _cut(parts, [(ends[i], ends[i + 1]) for i in keep if i < prefill])
    if indices is not None:
        indices = _picked(indices, [i - prefill for i in keep if i >= prefill])
    rows = getattr(batch, "req_pool_indices", None)
    if rows is not None:
        rows = _picked(rows, keep) if keep else rows[:0]
    _assign(batch, kept, indices, _is_resolved(batch))
    batch.extend_lens = [lens[i] for i in keep]  # type: ignore[attr-defined]
    if rows is not None:
        batch.req_pool_indices = rows  # type: ignore[attr-defined]


# --- what a batch is made of -------------------------------------------------------------------


def _is_resolved(batch: DeferredBatch) -> bool:
    return (
        batch.input_ids is not None
        and batch.prefill_input_ids_cpu is None
        and batch.mix_running_indices is None
    )


def _contents(batch: DeferredBatch) -> tuple[tuple[Part, ...], Tensor | None]:
    """The parts that the ids are read from, in order, and the indices of running requests."""
    staged, indices = batch.prefill_input_ids_cpu, batch.mix_running_indices
    if staged is not None:
        return (staged if isinstance(staged, tuple) else (staged,)), _some(indices)
    if batch.input_ids is not None:
        return (batch.input_ids,), _some(indices)
    if indices is None and not _extends(batch):
        indices = getattr(batch, "req_pool_indices", None)
    return (), indices


def _extends(batch: DeferredBatch) -> bool:
    """Whether the engine marks the batch as a prefill, whose ids the relay alone cannot give."""
    mode = getattr(batch, "forward_mode", None)
    return mode is not None and bool(mode.is_extend())


def _is_empty(batch: DeferredBatch) -> bool:
    parts, indices = _contents(batch)
    return not _not_empty(parts) and _some(indices) is None


def _some(indices: Tensor | None) -> Tensor | None:
    return None if indices is None or not len(indices) else indices


def _not_empty(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(part for part in parts if len(part))


def _assign(
    batch: DeferredBatch, parts: tuple[Part, ...], indices: Tensor | None, resolved: bool
) -> None:
    """Sets the batch to these parts and indices. With none of either, it becomes idle."""
    ids: Tensor | None = None
    if not parts and indices is None:
        ids = torch.empty(0, dtype=torch.int64, device=batch.device)
    elif resolved:
        ids = parts[0] if len(parts) == 1 else torch.cat(parts)  # type: ignore[arg-type, assignment]
    batch.input_ids = ids
    batch.prefill_input_ids_cpu = None if ids is not None else _staging(parts)
    batch.mix_running_indices = indices


def _staging(parts: tuple[Part, ...]) -> Staging | None:
    return (parts[0] if len(parts) == 1 else parts) if parts else None


def _cut(parts: tuple[Part, ...], ranges: list[tuple[int, int]]) -> tuple[Part, ...]:
    """Cuts ranges out of the ids that the parts form. Adjacent ranges stay in one piece."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    ends = [0, *itertools.accumulate(map(len, parts))]
    pieces = [
        part[max(start - at, 0) : stop - at]
        for start, stop in joined
        for part, at in zip(parts, ends)  # noqa: B905
        if start < at + len(part) and stop > at
    ]
    return tuple(pieces)


def _position(index: Any) -> int:
    if isinstance(index, bool) or getattr(index, "dtype", None) is torch.bool:
        raise TypeError(
            f"keep_indices has {index!r}: it takes the indices of the requests to keep, not a mask"
        )
    return operator.index(index)


def _picked(indices: Tensor, at: list[int]) -> Tensor | None:
    pieces = _cut((indices,), [(i, i + 1) for i in at])
    if len(pieces) < 2:
        return pieces[0] if pieces else None  # type: ignore[return-value]
    return torch.cat(pieces)  # type: ignore[arg-type]


def _joined(a: Any, b: Any) -> Any:
    """Concatenates both. None if either is unknown."""
    if a is None or b is None:
        return None
    return torch.cat([a, b]) if isinstance(a, Tensor) else [*a, *b]


def _staged_again(parts: Sequence[Any], held: Sequence[bool], pool: StagingPool) -> Any:
    """After a failure, stages the parts that had a slot again, as far as slots are free."""

    def again(ids: Tensor) -> Part:
        try:
            return pool.stage([ids])
        except PystageError:
            return ids

    return _staging(tuple(again(p) if had else p for p, had in zip(parts, held, strict=True)))


def _materialise(
    parts: tuple[Part, ...], relay: Tensor | None, indices: Tensor | None, device: Any
) -> Tensor:
    if len(parts) == 1 and isinstance(parts[0], StagedTokens):
        if indices is None:
            return resolve(parts[0])
        return resolve_mixed(parts[0], relay, indices)  # type: ignore[arg-type]
    if not parts:
        return _C.gather(relay, indices, None)  # type: ignore[arg-type]
    running = 0 if indices is None else len(indices)
    ids = torch.empty(
        sum(map(len, parts)) + running, dtype=torch.int64, device=_device(parts, device)
    )
    at = 0
    for part in parts:
        _write(part, ids[at : at + len(part)])
        at += len(part)
    if indices is not None:
        _C.gather(relay, indices, ids[at:])  # type: ignore[arg-type]
    return ids


def _device(parts: tuple[Part, ...], device: Any) -> Any:
    """The pool's device if there is one: it has an index, which the batch's device may lack."""
    return next((p.pool.device for p in parts if isinstance(p, StagedTokens)), device)


def _write(part: Part, out: Tensor) -> None:
    if isinstance(part, StagedTokens):
        resolve(part, out=out)
        return
    if part.device.type == "cuda":
        part.record_stream(torch.cuda.current_stream(part.device))
    out.copy_(part, non_blocking=True)


def _check_indices(indices: Tensor) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(
            f"mix_running_indices is a {type(indices).__name__}, not a tensor: make it one on the "
            "batch's device, torch.tensor(indices, device=batch.device)"
        )
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"mix_running_indices is {indices.dtype} {list(indices.shape)}, not int32 or int64 [k]"
        )


# --- errors ------------------------------------------------------------------------------------


def _name(batch: DeferredBatch) -> str:
    lens = getattr(batch, "extend_lens", None)
    requests = "" if lens is None else f" of {len(lens)} requests"
    return f"{type(batch).__name__}{requests}"


def _nothing_staged(batch: DeferredBatch) -> UnresolvedInputsError:
    return UnresolvedInputsError(
        f"{_name(batch)} has neither input_ids nor prefill_input_ids_cpu: call "
        "prepare_for_extend(batch, token_ids, pool=pool) before its forward (a decode batch takes "
        "mix_running_indices or req_pool_indices, and the relay)"
    )
