"""The small tensors of a prefill: lengths, indices, sampling parameters.

SGLang makes eleven of them for each batch. It makes each from a list, in newly pinned memory, and
copies each one separately. With pages of more than one token, it also fills a one-element tensor on
the device for each request without a prefix. Here, small tensors that known code makes are sent
together, as the parameters of one kernel (``csrc/small_tensors.h``), and the filled tensor is made
once and reused:

==========================  ========  ==============================================================
function                    tensors   names
==========================  ========  ==============================================================
``prepare_for_extend``      5         ``seq_lens``, ``orig_seq_lens``; in ``alloc_for_extend``
                                      ``prefix_lens``, ``extend_lens``, ``req_pool_indices``
``from_schedule_batch``     4         ``temperatures``, ``top_ps``, ``top_ks``, ``min_ps``
``init_new``                2         ``extend_seq_lens``, ``extend_prefix_lens``
==========================  ========  ==============================================================

In all releases of ``known_code.KNOWN``, these are the first tensors that a function makes, and
nothing reads one before the last of its group is made. At that moment the group is sent
("delivered"). Until then, ``torch.tensor`` and ``torch.full`` are replaced by functions that check
their caller. They handle only calls from the code whose turn it is, in this thread. So a tensor
that ``prepare_for_extend`` makes after its five is torch's: for hybrid models it makes one more and
reads it at once. A call that differs from the known ones ends this for the batch, and the tensors
made so far are delivered.
"""

from __future__ import annotations

import sys
import threading
from types import CodeType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ... import _C
from ...errors import PystageError
from ...pool import StagingPool
from . import process

PREPARED, BUILT = "prepare_for_extend", "init_new"
DELIVER_AT = {PREPARED: (5, 9), BUILT: (2,)}  # a group is delivered after so many tensors
Groups: TypeAlias = "tuple[tuple[CodeType, ...], ...]"  # the code that makes them

_tensor = torch.tensor
_full = torch.full
_one = threading.Lock()  # only one parcel at a time can replace torch.tensor


class Scope:
    """While a scope is open, the pool makes the small tensors of known code in this thread.

    A process has at most one open scope. With two, the first to close would restore torch's
    functions while the other still has undelivered tensors.
    """

    __slots__ = ("_codes", "_minus_one", "_parcel", "_thread")

    def __init__(
        self,
        pool: StagingPool,
        device: Any,
        groups: Groups,
        requests: int,
        deliver_at: tuple[int, ...],
        minus_one: Tensor,
    ) -> None:
        # 4 or 8 bytes per request and tensor, each tensor rounded up to 16 bytes.
        capacity = 8 * deliver_at[-1] * (requests + 2)
        if not _one.acquire(blocking=False):
            raise PystageError("another thread is making small tensors")
        try:
            self._parcel = _C.parcel(
                pool._handle, capacity, device, _tensor, groups, deliver_at, minus_one
            )
        except BaseException:
            _one.release()
            raise
        self._codes, self._minus_one = {code for codes in groups for code in codes}, minus_one
        self._thread = threading.get_ident()
        torch.tensor = self._parcel.tensor  # type: ignore[assignment]
        torch.full = self._filled  # type: ignore[assignment]

    def close(self) -> None:
        """Delivers the remaining tensors. A device error is raised here, as it would be in SGLang's
        copies."""
        torch.tensor, torch.full = _tensor, _full
        _one.release()
        self._parcel.end()

    def _filled(self, *args: Any, **kwargs: Any) -> Tensor:
        if (
            args == ((1,), -1)
            and kwargs.keys() == {"device"}
            and threading.get_ident() == self._thread
            and sys._getframe(1).f_code in self._codes
        ):
            return self._minus_one
        return _full(*args, **kwargs)


def codes_of(*functions: Any) -> tuple[CodeType, ...]:
    """The code objects of the functions, and of the comprehensions within them."""
    found: list[CodeType] = []
    todo = [function.__code__ for function in functions]
    while todo:
        code = todo.pop()
        found.append(code)
        todo += [const for const in code.co_consts if isinstance(const, CodeType)]
    return tuple(found)


class MinusOne:
    """The result of ``torch.full((1,), -1, device=device)``, made once for each device."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}

    def on(self, device: Any, pool: StagingPool) -> Tensor:
        try:
            return self._made[pool.device]
        except KeyError:
            tensor = _full((1,), -1, device=device)
            if tensor.is_cuda:  # other streams may read it at any time
                torch.cuda.current_stream(tensor.device).synchronize()
            self._made[pool.device] = tensor
            return tensor


_minus_one = MinusOne()


def small_scope(pool: StagingPool | None, device: Any, batch: Any, where: str) -> Scope | None:
    """Opens a scope for PREPARED or BUILT, or returns None if SGLang has to send its small tensors
    itself."""
    groups = process.state.small_codes.get(where)
    if pool is None or not groups:
        return None
    try:
        minus_one = _minus_one.on(device, pool)
        return Scope(pool, device, groups, len(batch.reqs), DELIVER_AT[where], minus_one)
    except PystageError as error:
        process.once("pystage: %s: SGLang sends the small tensors of such batches itself", error)
        process.state.left_to_sglang["small"] += 1
        return None
