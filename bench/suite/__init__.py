"""The regimes that `python -m bench` measures, one file for each."""

from __future__ import annotations

from collections.abc import Callable

from bench.suite import drift, history, host, latency, mixed, processes, stream, threads
from bench.suite.cells import Bench, Cell

REGIMES: dict[str, Callable[[Bench], dict[str, Cell]]] = {
    "host": host.regime,
    "stream": stream.regime,
    "latency": latency.regime,
    "drift": drift.regime,
    "threads": threads.regime,
    "processes": processes.regime,
    "history": history.regime,
    "mixed": mixed.regime,
}
