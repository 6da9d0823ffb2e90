"""Exports the pools' statistics with SGLang's metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ...stats import StagingStats
from . import process
from .symbols import Function

logger = logging.getLogger("pystage.sglang")

GAUGES = {
    "capacity_bytes": "Limit of the staging pool's pinned memory.",
    "reserved_bytes": "Memory held from the device by the staging pool, waste included.",
    "in_use_bytes": "Memory in slots that are leased, in flight or quarantined.",
    "high_water_bytes": "The most in_use_bytes ever was.",
    "pageable_bytes": "Memory that should have been pinned and could not be.",
    "leased_slots": "Slots that staged ids hold.",
    "in_flight_slots": "Slots that a stream still reads.",
    "quarantined_slots": "Slots given up after a failed device call.",
}
COUNTERS = {
    "stages": ("stages", "Batches staged."),
    "tokens": ("staged_tokens", "Ids in staged batches."),
    "wire_bytes": ("wire_bytes", "Bytes transferred from slots to the device."),
    "waits": ("waits", "Stages that waited for a slot."),
    "wait_seconds": ("wait_seconds", "Time that stages waited for a slot."),
    "exhausted": ("exhausted", "Stages for which there was no slot at the limit."),
    "fallbacks": ("fallbacks", "Stages that left the pool for torch's own allocator."),
    "allocations": ("allocations", "Pieces of memory taken from the device."),
    "frees": ("frees", "Pieces of memory given back to the device."),
    "kernel_transfers": ("kernel_transfers", "Transfers by a kernel."),
    "copy_engine_transfers": ("copy_engine_transfers", "Transfers by a copy engine."),
}
OF_THE_PLUGIN = {
    "forgotten_resolves": "Batches resolved only when their forward was built.",
    "sglang_stagings": "Batches that SGLang staged itself: no slot, an error, or no pinning.",
    "sglang_mixed": "Mixed batches staged in the pool that SGLang resolved itself.",
    "sglang_small": "Batches whose small tensors SGLang sent itself, though its code is known.",
    "sglang_rows": "Batches whose rows of KV indices SGLang wrote itself, for the same reason.",
}


class Metrics:
    """The pools' statistics as Prometheus metrics, with the labels of SGLang's own.

    SGLang's processes write their metrics to files (prometheus_client's multiprocess mode). There a
    metric cannot be computed when it is read, so ``update`` runs whenever SGLang logs its own.
    """

    def __init__(self, labels: Mapping[str, Any], counter: Function, gauge: Function) -> None:
        def made(kind: Function, name: str, text: str, **kwargs: Any) -> Any:
            metric = kind(
                name=f"pystage_{name}", documentation=text, labelnames=list(labels), **kwargs
            )
            return metric.labels(**labels)

        self._gauges = {
            name: made(gauge, name, text, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        self._counters = {
            name: made(counter, as_name, text) for name, (as_name, text) in COUNTERS.items()
        }
        self._of_the_plugin = {
            name: made(counter, name, text) for name, text in OF_THE_PLUGIN.items()
        }
        self._told: dict[str, float] = {}

    def update(self, pools: list[StagingStats]) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(sum(getattr(stats, name) for stats in pools))
        for name, counter in self._counters.items():
            self._add(counter, name, sum(getattr(stats, name) for stats in pools))
        for name, count in process.counts().items():
            self._add(self._of_the_plugin[name], name, count)

    def _add(self, counter: Any, name: str, now: float) -> None:
        counter.inc(max(0, now - self._told.get(name, 0)))
        self._told[name] = now


def metrics_init(original: Function, collector: Any, *args: Any, **kwargs: Any) -> None:
    original(collector, *args, **kwargs)
    try:
        # Not earlier: prometheus_client decides at import time where metrics are stored.
        import prometheus_client

        process.state.metrics = Metrics(
            collector.labels,
            getattr(collector, "_counter_cls", None) or prometheus_client.Counter,
            getattr(collector, "_gauge_cls", None) or prometheus_client.Gauge,
        )
    except Exception as error:  # whatever it is, the server has to serve
        logger.warning("pystage: no figures for Prometheus: %r", error)


def log_stats(original: Function, collector: Any, *args: Any, **kwargs: Any) -> Any:
    if process.state.metrics is not None:
        try:
            process.state.metrics.update(process.pools.stats())
        except Exception as error:  # whatever it is, the server has to serve
            process.state.metrics = None
            logger.warning("pystage: no more figures for Prometheus: %r", error)
    return original(collector, *args, **kwargs)
