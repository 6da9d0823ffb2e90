"""Regime: chunks of requests with a long history."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pystage
from bench.common import TwoCalls, two_calls_time
from bench.device import Absent
from bench.suite.cells import Bench, Cell, budget
from bench.suite.contenders import (
    DEFERRED,
    RUNNER,
    SGLANG,
    Batch,
    sglang_code,
    torch_array,
)

HISTORIES = (0, 8192, 32768, 131072, 524288, 1048576)
CUT = "torch, request sliced"


def regime(bench: Bench) -> dict[str, Cell]:
    """A chunk of 8,192 ids after a request's history. Some contenders read the history too."""
    return {f"8192 behind {n}": partial(_history_cell, bench, n) for n in HISTORIES}


def _history_cell(bench: Bench, before: int) -> dict[str, Any]:
    device, chunk = bench.device, 8192
    samples, warmup = budget(bench, chunk)
    whole, rotated = bench.inputs("array", [before + chunk], False, samples)
    pool = pystage.StagingPool(device.torch)
    plain = torch_array(device)
    calls: dict[str, TwoCalls] = {
        DEFERRED: (lambda batch: pool.stage(batch, starts=[before]), pystage.resolve),
        CUT: (lambda batch: plain.stage([batch[0][before:]]), plain.resolve),
    }
    failed: dict[str, Any] = {}
    try:
        code = sglang_code(bench.contenders.sources)
    except Absent as why:
        failed[SGLANG] = {"absent": str(why)}
    else:
        theirs = bench.contenders.make(SGLANG)
        assert theirs is not None

        def stage(batch: Batch) -> Any:
            # prepare_for_extend: r.get_fill_ids()[r.prefix_len:]
            request = SimpleNamespace(full_untruncated_fill_ids=batch[0], extend_end=before + chunk)
            return theirs.stage([code.get_fill_ids(request)[before:]])

        calls[SGLANG] = (stage, theirs.resolve)
    runner = bench.contenders.make(RUNNER)
    if runner is not None:
        # The request's ids were written to its row on arrival, so a chunk needs only the second
        # call.
        row = runner.stage([whole(0)[0].tolist()])
        calls[RUNNER] = (lambda _: row, lambda row: runner.resolve(row, before))
    try:
        rows = two_calls_time(calls, whole, samples, warmup, device.synchronize)
    finally:
        pool.close()
    return {"history": before, "rotated_bytes": rotated, "contenders": rows | failed}
