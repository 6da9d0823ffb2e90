"""Corrects the latency model while the server runs (PYSTAGE_SGLANG_CORRECT=1).

Note [Where the ranks agree]
All ranks must cut a prompt into the same chunks, so they must all change the model between the same
two batches. SGLang's loops have no collective call for that. But all ranks handle the same stream
of requests in the same order: global rank 0 receives them and sends them to the other ranks of its
stage, and each stage sends them to the next before it makes its batch. So rank 0 puts the new model
and its plans into that stream, and each rank takes them out before SGLang handles the requests.

Rank 0 times the batches that hold one request's prefill alone (``pystage.pp.Correction``). The
times come from events that are done, so no batch waits for its time. At most once in ``_LEAST_S``
seconds they are refitted. If the refit predicts unseen chunks better, new plans are chosen. Both
take seconds of Python, so they run in processes of their own, for which a thread waits.

The stream contains a plain dict, since SGLang may only unpickle types that it knows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...pp import Correction, LatencyModel
from ...pp.apart import apart
from . import pp

logger = logging.getLogger("pystage.sglang")

T = TypeVar("T")

_KEY = "pystage.correction"
_LEAST_S = 60.0


class Leader:
    """Rank 0's part: times batches, refits, and has the message for all ranks."""

    def __init__(self, owner: Any, model: LatencyModel) -> None:
        self.owner = owner
        plans = pp.serving.plans
        self.lengths = sorted(plans.by_prompt, reverse=True) if plans else []
        self.correction = Correction(model)
        self.cuda = torch.device(owner.device).type == "cuda"
        self._thread: threading.Thread | None = None
        self._after = time.monotonic() + _LEAST_S
        self._messages: deque[dict[str, Any]] = deque()  # of the thread, for the scheduler's

    def timed(self, pieces: list[tuple[int, int]], run: Callable[[], T]) -> T:
        """Runs a forward on the current stream and takes its time."""
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = run()
            end.record()
            self.correction.observe(pieces, begin, end)
        else:
            began = time.perf_counter()
            result = run()
            self.correction.observe_ms(pieces, 1e3 * (time.perf_counter() - began))
        self.refit()
        return result

    def refit(self) -> None:
        """Starts a refit if enough batches were timed and the last refit is long enough ago."""
        enough = self.correction.collect() >= LatencyModel.REFIT_EVERY
        if not enough or time.monotonic() < self._after:
            return
        if self._thread is not None and self._thread.is_alive():
            return
        self._after = time.monotonic() + _LEAST_S
        self._thread = threading.Thread(target=self._refit, name="pystage-refit", daemon=True)
        self._thread.start()

    def _refit(self) -> None:
        try:
            self.correction.refit()
            if (model := self.correction.take()) is None:
                return
            plans = {}
            if self.lengths:
                sizes, stages = pp.sizes_of(self.owner, self.lengths[0]), pp.stages_of(self.owner)
                plans = apart(_plans, model, sizes, stages, self.lengths)
            self._messages.append({_KEY: {"model": model, "plans": plans}})
        except Exception as error:  # the server goes on with the model that it has
            logger.warning("pystage: no correction of the latency model: %r", error)

    def message(self) -> list[dict[str, Any]]:
        """What the stream of requests gets: mostly nothing."""
        return [self._messages.popleft()] if self._messages else []


def _plans(
    model: dict[str, Any], sizes: dict[str, int], stages: list[float], lengths: list[int]
) -> dict[str, list[int]]:
    """The plan for each prompt length, chosen by predictions alone, as JSON types."""
    choices = pp.choose(LatencyModel.from_json(model), sizes, stages, lengths)
    return {str(n): list(choice.chunks) for n, choice in choices.items()}


class Serving:
    """This process's part: every rank has the owner of the sizes, rank 0 is also the leader."""

    owner: Any = None
    leader: Leader | None = None
    corrections: int = 0


serving = Serving()


def start(owner: Any) -> None:
    """Begins to correct, if there is a usable model that sizes batches."""
    serving.owner = serving.leader = None
    model = pp.serving.model
    if model is None or not model.report.usable:
        return
    serving.owner = owner
    if dist.get_rank() == 0:
        serving.leader = Leader(owner, model)


def forward(batch: Any, run: Callable[[], T]) -> T:
    """Runs a forward on the forward stream. On rank 0 it is timed if it is one request's prefill
    and nothing more: no step that verifies drafts, no logprobs of the prompt, no tokens of other
    data-parallel ranks, no KV that is loaded back from the host."""
    leader = serving.leader
    if (
        leader is None
        or batch is None
        or len(batch.reqs) != 1
        or batch.forward_mode.name != "EXTEND"
        or batch.hicache_consumer_index >= 0
        or batch.return_logprob
        or sum(map(bool, batch.global_num_tokens or ())) > 1
    ):
        return run()
    pieces = list(zip(batch.prefix_lens, batch.extend_lens, strict=True))
    return leader.timed(pieces, run)


def received(requests: list[Any] | None) -> list[Any] | None:
    """The requests that a rank received, on rank 0 with the message."""
    if serving.leader is None or requests is None:
        return requests
    return [*requests, *serving.leader.message()]


def without_messages(requests: list[Any]) -> list[Any]:
    """The requests without messages, which are applied."""
    found = [r[_KEY] for r in requests if _is_message(r)]
    if not found:
        return requests
    _apply(found[-1])
    return [r for r in requests if not _is_message(r)]


def _is_message(request: Any) -> bool:
    return isinstance(request, dict) and _KEY in request


def _apply(message: dict[str, Any]) -> None:
    if pp.serving.model is None or serving.owner is None:
        return
    pp.serving.model.adopt(LatencyModel.from_json(message["model"]))
    if message["plans"]:
        queue = None if pp.serving.plans is None else pp.serving.plans.queue
        pp.serving.plans = pp.plans_of(serving.owner, message["plans"], queue)
    serving.corrections += 1
    logger.info("pystage: the latency model is corrected, correction %d", serving.corrections)
