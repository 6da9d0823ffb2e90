"""Evaluates the samples: quantiles with intervals, targets, a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.common import MET

VARIANTS = ("off", "bypassed", "on")
FEW = 20  # below so many samples a p99 is not told
GATED_MS = 1.0  # ids that take longer to reach the device have waited for another copy
ROUNDS = 2000  # rounds of the bootstrap


Blocks = Sequence[Sequence[float]]  # samples in blocks, in the order they were taken


def _whole(blocks: Blocks) -> Any:
    """The blocks as an array, without the last block if it ended early."""
    ended_early = len({len(block) for block in blocks}) > 1
    return np.asarray(blocks[:-1] if ended_early else blocks)


def interval(statistic: Callable[..., Any], *variants: Blocks) -> list[float]:
    """95 % interval of ``statistic`` by bootstrap over blocks. ``statistic`` takes an array for
    each variant, with a row for each round.

    The samples of a block share the speed that the machine had at that time, so blocks are drawn as
    a whole. All variants use the same draw if they have the same number of blocks.
    """
    dice = np.random.default_rng(1)
    whole = [_whole(blocks) for blocks in variants]
    shared = len({len(blocks) for blocks in whole}) == 1
    rows = [dice.integers(0, len(blocks), (ROUNDS, len(blocks))) for blocks in whole]
    drawn = [blocks[rows[0 if shared else i]].reshape(ROUNDS, -1) for i, blocks in enumerate(whole)]
    return [round(float(q), 3) for q in np.quantile(statistic(*drawn), [0.025, 0.975])]


def flat(blocks: Blocks) -> list[float]:
    return [sample for block in blocks for sample in block]


def quantiles(blocks: Blocks) -> dict[str, Any]:
    """Quantiles in milliseconds with 95 % intervals. With few samples, that of a p99 is wide."""
    ms = flat(blocks)
    told: dict[str, Any] = {"samples": len(ms), "mean": round(float(np.mean(ms)), 3)}
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        told[name] = round(float(np.quantile(ms, q)), 3)
        told[f"{name}_interval"] = interval(lambda x, q=q: np.quantile(x, q, axis=1), blocks)
    return {**told, "max": round(max(ms), 3)}


def row_of(name: str, found: dict[str, Any], same_chunks: bool = True) -> dict[str, Any]:
    """A workload's row, made from the blocks of its variants (lists of ``worker``'s answers).
    Outputs are compared if the variants cut prompts into the same chunks: other shapes round
    differently."""
    row: dict[str, Any] = {"workload": name, "traffic_gb_per_s": found.get("traffic_gb_per_s")}
    times: dict[str, list[list[float]]] = {}
    for variant in VARIANTS:
        blocks = found[variant]
        starved = [s for block in blocks for s in block if s.get("starved_s") is not None]
        blocks = [[s for s in block if s.get("starved_s") is None] for block in blocks]
        blocks = [block for block in blocks if block]
        answered = [s for block in blocks for s in block]
        times[variant] = [[round(s["ttft_ms"], 3) for s in block] for block in blocks]
        row[variant] = {
            "answered": len(answered),
            "starved": len(starved),
            "given_up_after_s": max((s["starved_s"] for s in starved), default=None),
            "ttft_ms": quantiles(times[variant]) if answered else None,
            "blocks_ms": times[variant],
        }
        between = [flat([s["itl_ms"] for s in block]) for block in blocks]
        if any(between):
            row[variant]["itl_ms"] = quantiles(between)
            row[variant]["output_tokens_per_s"] = round(
                sum(len(s["out"]) for s in answered) / sum(found["seconds"][variant]), 3
            )
        row[variant]["cached"] = float(np.mean([s["cached"] or 0 for s in answered] or [0]))
        on_device = [n for s in answered if (n := s.get("cached_on_device")) is not None]
        row[variant]["cached_on_device"] = float(np.mean(on_device)) if on_device else None
        row[variant]["staged_batches"] = found["stages"].get(variant)
    pairs = [
        [(a, b) for a, b in zip(*blocks, strict=False) if "starved_s" not in a | b]
        for blocks in zip(found["off"], found["on"], strict=False)  # one side may have ended early
    ]
    pairs = [block for block in pairs if block]
    if name.startswith("open"):  # batches vary, and other shapes round differently
        pairs = []
    compared = pairs if same_chunks else []
    row["compared"] = sum(map(len, compared))
    row["different_outputs"] = sum(a["out"] != b["out"] for block in compared for a, b in block)
    if pairs:
        gain = [[a["ttft_ms"] - b["ttft_ms"] for a, b in block] for block in pairs]
        row["sooner_than_off_ms"] = round(float(np.median(flat(gain))), 3)
        row["sooner_than_off_interval"] = interval(lambda x: np.median(x, axis=1), gain)
    if times["bypassed"] and times["on"]:
        row["sooner_than_bypassed_ms"] = round(
            float(np.median(flat(times["bypassed"])) - np.median(flat(times["on"]))), 3
        )
        row["sooner_than_bypassed_interval"] = interval(
            lambda x, y: np.median(x, axis=1) - np.median(y, axis=1),
            times["bypassed"],
            times["on"],
        )
    return row


def trace_row(batches: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Medians of the parts of traced prefills, and the number of batches whose ids waited."""
    if not batches:
        return None
    names = sorted({name for batch in batches for name in batch if name.endswith("_ms")})
    row: dict[str, Any] = {
        name: round(float(np.median([b[name] for b in batches if name in b])), 3) for name in names
    }
    ids = [b["device_ids_ms"] - b["device_resolve_ms"] for b in batches if "device_ids_ms" in b]
    forwards = [
        b["device_end_ms"] - b["device_forward_ms"]
        for b in batches
        if {"device_end_ms", "device_forward_ms"} <= b.keys()
    ]
    row["longest_forward_ms"] = round(max(forwards), 3) if forwards else None
    row["batches"] = len(batches)
    row["ids_ms"] = round(float(np.median(ids)), 4) if ids else None
    row["gated"] = sum(ms > GATED_MS for ms in ids)
    return row


def targets(rows: list[dict[str, Any]], traces: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets: never slower; as fast beside copies as without; nothing starves; nothing waits
    behind a load-back; equal outputs. ``rows`` may be of several plans, which "plan" then names.

    Each ratio is that of the workload that is most certainly above the limit. A target is missed if
    the whole 95 % interval is above the limit. If only the ratio itself is above it, the run does
    not decide: "undecided_of" counts such workloads, and "largest" is the largest ratio of all.
    """
    calm = {(row.get("plan"), row["workload"]): row for row in rows if "+" not in row["workload"]}
    told = []
    for q, name, limit in ((0.5, "p50", 1.01), (0.99, "p99", 1.03)):
        for base in ("off", "bypassed"):
            ratios = [_ratio(q, r, r["on"], r[base]) for r in rows]
            told.append(_worst(f"TTFT {name}, with / {base}", limit, ratios))
    beside = [
        _ratio(0.99, row, row["on"], calm[alone]["on"])
        for row in rows
        if row["workload"].endswith("+stream")
        and (alone := (row.get("plan"), row["workload"].partition("+")[0])) in calm
    ]
    told.append(_worst("TTFT p99 with pystage, copies / none", 1.05, beside))
    gated = [t["on"]["gated"] for t in traces.values() if t.get("on")]
    for measure, counts in (
        ("requests starved with pystage", [row["on"]["starved"] for row in rows]),
        ("traced batches whose ids waited, with pystage", gated),
        ("different outputs", [row["different_outputs"] for row in rows]),
    ):
        value = sum(counts) if counts else None
        told.append(
            {
                "measure": measure,
                "target": "0",
                "value": value,
                "unit": "",
                "ok": None if value is None else value == 0,
            }
        )
    return told


def _ratio(q: float, row: dict[str, Any], on: dict[str, Any], other: dict[str, Any]) -> Any:
    a, b = on["blocks_ms"], other["blocks_ms"]
    if not a or not b:
        return None
    value = float(np.quantile(flat(a), q) / np.quantile(flat(b), q))
    bounds = interval(lambda x, y: np.quantile(x, q, axis=1) / np.quantile(y, q, axis=1), a, b)
    return bounds[0], value, bounds, row.get("plan", ""), row["workload"]


def _worst(measure: str, limit: float, ratios: list[Any]) -> dict[str, Any]:
    """From a list of ``_ratio`` results, the one that is most certainly above the limit."""
    told: dict[str, Any] = {"measure": measure, "target": f"<= {limit} x", "unit": "x"}
    ratios = [ratio for ratio in ratios if ratio is not None]
    if not ratios:
        return {**told, "value": None, "ok": None}
    above = [ratio for ratio in ratios if ratio[1] > limit]
    low, value, bounds, plan, where = max(above or ratios)
    told |= {"value": round(value, 4), "interval": bounds, "plan": plan, "where": where}
    told |= {"undecided_of": [sum(r[0] <= limit for r in above), len(ratios)]}
    _, largest, _, *place = max(ratios, key=lambda ratio: float(ratio[1]))
    told |= {"largest": [round(largest, 4), *place]}
    return {**told, "ok": value <= limit, "undecided": value > limit >= low}


def cells(row: dict[str, Any]) -> list[str]:
    """A workload's row as text: each variant, then the gain of pystage."""
    told = []
    for variant in VARIANTS:
        ms, starved = row[variant]["ttft_ms"], row[variant]["starved"]
        parts = [f"{ms['p50']:,.1f} / {p99_of(ms)}"] if ms else []
        if starved:
            after = f"in {row[variant]['given_up_after_s']:g} s"
            parts.append(f"{starved} without an answer {after}" if ms else f"no answer {after}")
        told.append("; ".join(parts) or "not run")
    gain = ""
    if "sooner_than_off_ms" in row:
        low, high = row["sooner_than_off_interval"]
        gain = f"{row['sooner_than_off_ms']:.2f} ({low:.2f} to {high:.2f})"
    return [*told, gain]


def p99_of(ms: dict[str, Any]) -> str:
    return f"{ms['p99']:,.1f}" if ms["samples"] >= FEW else "-"


def requests(row: dict[str, Any]) -> str:
    """How many requests each variant sent: one number if it is the same for all."""
    counts = [f"{row[v]['answered'] + row[v]['starved']}" for v in VARIANTS]
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def line(row: dict[str, Any]) -> str:
    """A workload's row as padded text for a terminal."""
    padded = "  ".join(f"{cell:>26}" for cell in cells(row))
    return f"{row['workload']:20}  {padded}  {row['on']['answered']:4d}"


def verdict(target: dict[str, Any]) -> str:
    if target["ok"] is False and target.get("undecided"):
        return "not certain"
    return MET[target["ok"]]


HEADS = ("baseline", "pool off", "pystage", "sooner than baseline, ms")
HEAD = f"{'TTFT, ms, p50 / p99':20}  " + "  ".join(f"{head:>26}" for head in HEADS) + "     n"
