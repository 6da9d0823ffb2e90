"""Keeps a latency model right while it serves: times of real chunks in, the same new model out on
every rank."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from pystage.pp.model import LatencyModel
from pystage.pp.samples import Sample
from pystage.pp.share import share_json


class Event(Protocol):
    """What is needed of a `torch.cuda.Event(enable_timing=True)`."""

    def query(self) -> bool: ...

    def elapsed_time(self, end: Event, /) -> float: ...


class Correction:
    """Collects chunk times of one rank, refits off the hot path, hands the model to all ranks.

        begin.record(); forward(batch); end.record()      # on the stream of the forward
        correction.observe(pieces, begin, end)            # hot path: no sync, no fit
        ...
        correction.refit()                                # any thread, now and then
        ...
        if step % 1000 == 0:
            correction.agree(group)                       # every rank, at the same step

    Only batches of a single piece of prefill count: beside decodes, or another request, a chunk
    takes longer for reasons that the model does not know, and would bend it. `agree` is a small
    broadcast (8 bytes where nothing is new), so it belongs to a point that all ranks reach anyway.

    A refit is taken if chunks that it has not seen are predicted better by it, in the median and at
    the 95th percentile (`LatencyModel.update`). `model` itself changes in `agree` alone, so that
    sizers of all ranks change theirs between the same two chunks.
    """

    def __init__(self, model: LatencyModel, *, pending: int = 256) -> None:
        self.model = model
        self._draft = LatencyModel.from_json(model.to_json())
        self._running: deque[tuple[int, int, Event, Event]] = deque(maxlen=pending)
        self._done: deque[Sample] = deque(maxlen=pending)
        self._lock = threading.Lock()  # of a refit and the model it has made
        self._new = False

    def observe(self, pieces: Sequence[tuple[int, int]], begin: Event, end: Event) -> bool:
        """Notes a batch of (history_len, chunk_len) whose events are recorded; whether it counts.

        Never waits. The oldest of more than `pending` batches still running are forgotten.
        """
        if len(pieces) != 1 or pieces[0][1] <= 1:
            return False
        self._running.append((*pieces[0], begin, end))
        return True

    def observe_ms(self, pieces: Sequence[tuple[int, int]], ms: float) -> bool:
        """The same for a batch that was timed already, as on a CPU."""
        if len(pieces) != 1 or pieces[0][1] <= 1:
            return False
        self._done.append(Sample(*pieces[0], ms))
        return True

    def collect(self) -> int:
        """Takes the times of the batches that are done; how many wait for a refit. Never waits."""
        while self._running and self._running[0][3].query():
            history_len, chunk_len, begin, end = self._running.popleft()
            ms = begin.elapsed_time(end)
            if ms > 0:
                self._done.append(Sample(history_len, chunk_len, ms))
        return len(self._done)

    def refit(self) -> bool:
        """Feeds what was collected to a copy of the model; whether that has new coefficients.

        Every 32nd chunk costs a fit (tens of ms, with SciPy): call it from a thread of its own.
        """
        with self._lock:
            samples = [self._done.popleft() for _ in range(len(self._done))]
            changed = self._draft.update(samples)
            self._new |= changed
        return changed

    def agree(
        self,
        group: dist.ProcessGroup | None = None,
        src: int = 0,
        device: torch.device | str = "cpu",
    ) -> bool:
        """Gives every rank the model of global rank `src` if it has a new one; whether it had.

        A collective call. While a refit is under way there `src` has nothing new: it never waits.
        """
        new = None
        if dist.get_rank() == src and self._lock.acquire(blocking=False):
            try:
                if self._new:
                    new, self._new = self._draft.to_json(), False
            finally:
                self._lock.release()
        flag = torch.tensor([new is not None], dtype=torch.int64, device=device)
        dist.broadcast(flag, src=src, group=group)
        if not int(flag):
            return False
        self.model.adopt(
            LatencyModel.from_json(share_json(lambda: new, group=group, src=src, device=device))
        )
        return True
