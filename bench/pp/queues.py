"""Chunk sizes while prompts wait: simulated queues over the measured latency of a real stage.

    python -m bench.pp.queues PROFILE.json ...

Each PROFILE is a result of `bench.pp.prefill --in-turn`. Its profile of the first of N stages is
fitted, and the fit gives the time of every batch on every stage (`BudgetSizer.batch_ms`); the other
stages differ as the result says. Prompts with random lengths (log-normal, with the median and mean
of a conversation trace) arrive all at once, or at random at a share of what the pipeline can do.
Whenever the first stage is free, the next batch takes a chunk of the prompt that is first in the
queue, and what is left of the chunk goes to the next ones.

Sizes: each fixed one; `choose`, which plans for a prompt that runs alone; and `queue`, which is
`QueueSizer` while prompts wait and `choose` else. All of them predict with the same fit that also
gives the times, so this compares rules, not predictions. The result also has the sizes that
`QueueSizer` takes with the chunk times that PROFILE measured. Writes bench/results/pp_queues.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import load, write_result
from bench.pp.prefill import NextSize, by_length, trace_lengths, while_waiting
from pystage.pp import BudgetSizer, ChunkSizer, LatencyModel, Profile, QueueSizer
from pystage.pp.makespan import histories

FIXED = (512, 1024, 2048, 4096, 8192, 16384)
BASE, LONGEST = 8192, 65536
SEEDS, PROMPTS = range(5), 40
WAITING = (16384, 65536, 131072, 524288)
ARRIVALS = {"all at once": None, "half load": 0.5, "80 % load": 0.8}
"""Share of the pipeline's throughput with the best fixed size at which prompts arrive."""

MakeRule = Callable[[], NextSize]
"""A fresh rule for each queue: rules may remember."""


class Stages:
    """The stages of a pipeline, with times from a fit of the first one's profile."""

    def __init__(self, result: dict[str, Any]) -> None:
        found = result["results"]
        self.ranks = int(result["ranks"])
        self.told = found.get("stages") or {}
        self.factors = np.array(self.told.get("stage_factors", [1.0] * self.ranks))
        self.more = np.array(self.told.get("overhead_ms", [0.0] * self.ranks))
        self.model = LatencyModel.fit(Profile.from_json(found["profile ours"]))
        self._batches = BudgetSizer(self.model, budget_ms=1.0)
        self.sizer = ChunkSizer(
            self.model, base_chunk=BASE, context_len=2 * LONGEST, min_chunk=min(FIXED)
        )

    def on_each(self, pieces: Sequence[tuple[int, int]]) -> np.ndarray:
        return self.factors * self._batches.batch_ms(pieces) + self.more


def run(
    stages: Stages, lengths: Sequence[int], arrivals: Sequence[float], next_size: NextSize
) -> np.ndarray:
    """Time to first token of each prompt in ms. Prompts are served in the order of arrival."""
    free = np.zeros(stages.ranks)
    first = np.zeros(len(lengths))
    ends = [0, *accumulate(lengths)]
    prompt = done = 0
    while prompt < len(lengths):
        now = max(free[0], arrivals[prompt])
        there = int(np.searchsorted(arrivals, now, side="right"))
        waiting = ends[there] - ends[prompt + 1]
        left, pieces, ended = next_size(done, lengths[prompt], waiting), [], []
        while left > 0 and prompt < there:
            take = min(left, lengths[prompt] - done)
            pieces.append((done, take))
            left, done = left - take, done + take
            if done == lengths[prompt]:
                ended.append(prompt)
                prompt, done = prompt + 1, 0
        at = now
        for stage, ms in enumerate(stages.on_each(pieces)):
            at = free[stage] = max(free[stage], at) + ms
        first[ended] = at
    return first - np.asarray(arrivals)


def rules(stages: Stages) -> dict[str, MakeRule]:
    plans = {
        n: stages.sizer.choose(n, stages.ranks, **stages.told).chunks
        for n in (LONGEST >> k for k in range(5))
    }
    alone = by_length(plans)

    def queued() -> NextSize:
        return while_waiting(stages.sizer.for_queue(stages.ranks, **stages.told), alone)

    def fixed(size: int) -> MakeRule:
        return lambda: lambda *_: size

    return {f"fixed {n}": fixed(n) for n in FIXED} | {"choose": lambda: alone, "queue": queued}


def study(result: dict[str, Any]) -> list[dict[str, Any]]:
    stages = Stages(result)
    by_name = rules(stages)
    rows = []
    for seed in SEEDS:
        lengths = list(islice(trace_lengths(None, seed, LONGEST), PROMPTS))
        at_once = {
            name: float(run(stages, lengths, [0.0] * PROMPTS, make()).max())
            for name, make in by_name.items()
            if name.startswith("fixed")
        }
        apart = min(at_once.values()) / PROMPTS  # mean time per prompt at full load
        gaps = np.random.default_rng(seed).exponential(apart, PROMPTS)
        for name, share in ARRIVALS.items():
            arrivals = np.zeros(PROMPTS) if share is None else np.cumsum(gaps) / share
            found = {rule: run(stages, lengths, arrivals, make()) for rule, make in by_name.items()}
            rows.append(
                {
                    "ranks": stages.ranks,
                    "arrivals": name,
                    "seed": seed,
                    "tokens": sum(lengths),
                    "ttft_mean_ms": {rule: float(ms.mean()) for rule, ms in found.items()},
                    "ttft_p95_ms": {r: float(np.percentile(ms, 95)) for r, ms in found.items()},
                }
            )
    return rows


def by_measured_chunks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """For each prompt that was run in fixed sizes: the sizes for queues of WAITING tokens, from the
    measured times of its chunks behind half a base chunk (between the nearest two)."""
    found: dict[int, dict[int, float]] = {}
    for name, run in result["results"].items():
        words = name.split()
        if words[0] == "ttft" and words[2] == "fixed":
            behind = histories(run["chunks"])
            ms = float(np.interp(BASE // 2, behind, run["piped_ms"][0]))
            found.setdefault(int(words[1]), {})[int(words[3])] = ms
    ranks, told = int(result["ranks"]), result["results"]["stages"]
    rows = []
    for prompt, times in found.items():
        queue = QueueSizer(times, ranks, **told)
        sizes = {str(n): queue.size(n) for n in WAITING}
        rows.append({"ranks": ranks, "prompt": prompt, "ms_by_size": times, "sizes": sizes})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profiles", type=Path, nargs="+", help="results of prefill --in-turn")
    parser.add_argument("--out", type=Path, help="JSON file; default in bench/results")
    args = parser.parse_args()
    results = [load(path) for path in args.profiles]
    body = {
        "profiles": [path.name for path in args.profiles],
        "rows": [row for result in results for row in study(result)],
        "by_measured_chunks": [row for result in results for row in by_measured_chunks(result)],
    }
    print("written to", write_result("pp_queues", body, args.out))


if __name__ == "__main__":
    main()
