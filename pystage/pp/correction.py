"""Keeps a latency model accurate in service: it takes the times of real chunks, and gives every
rank the same new model."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pystage.pp.apart import apart
from pystage.pp.model import LatencyModel
from pystage.pp.samples import Sample
from pystage.pp.share import share_json


class Event(Protocol):
    """The part of `torch.cuda.Event(enable_timing=True)` that is needed."""

    def query(self) -> bool: ...

    def elapsed_time(self, end: Any, /) -> float: ...


class Correction:
    """Collects chunk times of one rank, refits in another process, and gives all ranks the model.

        begin.record(); forward(batch); end.record()      # on the stream of the forward
        correction.observe(pieces, begin, end)            # hot path: no sync, no fit
        ...
        correction.refit()                                # once a minute, on another thread
        ...
        if step % 1000 == 0:
            correction.agree(group)                       # every rank, at the same step

    Only batches of a single piece of prefill count. Beside decodes or another request, a chunk
    takes longer for reasons that the model does not contain, and would distort the fit. `agree` is
    a small broadcast (8 bytes if there is no new model), so call it at a point that all ranks reach
    anyway.

    A refit is taken if it predicts chunks that it was not fitted to better in the median and no
    worse at the 95th percentile (`LatencyModel.update`). Only `agree` changes `model` itself, so
    the sizers of all ranks change between the same two chunks.
    """

    def __init__(self, model: LatencyModel, *, pending: int = 256) -> None:
        self.model = model
        self._draft = model  # until there is a better one
        self._running: deque[tuple[int, int, Event, Event]] = deque(maxlen=pending)
        self._done: deque[Sample] = deque(maxlen=pending)
        self._recent: deque[Sample] = deque(maxlen=LatencyModel.KEPT)
        self._lock = threading.Lock()  # held during a refit; guards its model and chunks
        self._new = False

    def observe(self, pieces: Sequence[tuple[int, int]], begin: Event, end: Event) -> bool:
        """Takes a batch of (history_len, chunk_len) pieces with its recorded events.

        Returns whether the batch counts. This call never waits. If more than `pending` batches are
        still running, the oldest are dropped.
        """
        if not _counts(pieces):
            return False
        self._running.append((*pieces[0], begin, end))
        return True

    def observe_ms(self, pieces: Sequence[tuple[int, int]], ms: float) -> bool:
        """The same for a batch that has already been timed, for example on a CPU."""
        if not _counts(pieces) or not (math.isfinite(ms) and ms > 0):
            return False
        self._done.append(Sample(*pieces[0], ms))
        return True

    def collect(self) -> int:
        """Takes the times of batches that are done, and returns how many times are waiting for a
        refit. Never waits."""
        while self._running and self._running[0][3].query():
            history_len, chunk_len, begin, end = self._running.popleft()
            ms = begin.elapsed_time(end)
            if ms > 0:
                self._done.append(Sample(history_len, chunk_len, ms))
        return len(self._done)

    def refit(self) -> bool:
        """Updates a copy of the model with the collected times. Returns whether the copy has new
        coefficients.

        Does nothing until 32 chunks have been collected. Then it waits for a process that fits
        (`apart`: some seconds of one core), so call it from a thread that launches no forwards.
        """
        with self._lock:
            lot = LatencyModel.REFIT_EVERY
            new = len(self._done) // lot * lot
            self._recent.extend(self._done.popleft() for _ in range(new))
            model = apart(_updated, self._draft.to_json(), list(self._recent)) if new else None
            if model is not None:
                self._draft = LatencyModel.from_json(model)
                self._new = True
        return model is not None

    def take(self) -> dict[str, Any] | None:
        """The new model as JSON if there is one since the last call, else None.

        `agree` does this. It is for engines that send the model to their ranks themselves, for
        example in the stream of requests that all ranks handle in the same order. Every rank,
        including this one, then calls `model.adopt`. It never waits: while a refit runs, there is
        no new model.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if not self._new:
                return None
            self._new = False
            return self._draft.to_json()
        finally:
            self._lock.release()

    def agree(
        self,
        group: dist.ProcessGroup | None = None,
        src: int = 0,
        device: torch.device | str = "cpu",
    ) -> bool:
        """Gives every rank the model of global rank `src` if that has a new one. Returns whether it
        had.

        This is a collective call. It never waits for a refit.
        """
        new = self.take() if dist.get_rank() == src else None
        flag = torch.tensor([new is not None], dtype=torch.int64, device=device)
        dist.broadcast(flag, src=src, group=group)
        if not int(flag):
            return False
        self.model.adopt(
            LatencyModel.from_json(share_json(lambda: new, group=group, src=src, device=device))
        )
        return True


def _updated(model: dict[str, Any], chunks: list[Sample]) -> dict[str, Any] | None:
    """The model (as JSON) after an update with these chunks, or None if that changed nothing."""
    updated = LatencyModel.from_json(model)
    return updated.to_json() if updated.update(chunks) else None


def _counts(pieces: Sequence[tuple[int, int]]) -> bool:
    """Whether a batch is a single piece of prefill."""
    return len(pieces) == 1 and pieces[0][1] > 1
