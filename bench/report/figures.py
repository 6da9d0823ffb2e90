"""Tables and plots of the SGLang plugin (bench/in_sglang), the pipeline (bench/pp/prefill.py) and
the long run (sustained.py). The other tables are beside what they show: bench/suite/pages.py,
bench/engine/page.py, bench/pp/pages.py."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import load, newest_on_gpu
from bench.engine import page as engine
from bench.pp import pages as pp_pages
from bench.report import svg
from bench.report.tables import source, tabulate, target_table

RESULTS = Path("bench/results")  # this and the following paths are relative to the root
PIPELINE = RESULTS / "pp_prefill-8b-2xnvidia-h200.json"
OURS_FIRST = RESULTS / "pp_prefill-8b-2xnvidia-h200-ours-first.json"
ONE_BLOCK = RESULTS / "pp_prefill-8b-2xnvidia-h200-one-block.json"
ONE_GPU = {
    "8B": RESULTS / "pp_prefill-8b-1xnvidia-h200.json",
    "1B (16 layers)": RESULTS / "pp_prefill-1b-1xnvidia-h200.json",
}
IN_TURN = [
    RESULTS / f"pp_prefill-{name}-in-turn-nvidia-h200.json" for name in ("8b-4", "8b-8", "32b-4")
]
IN_TURN_TRACES = [RESULTS / "pp_prefill-8b-4-in-turn-trace-nvidia-h200.json", IN_TURN[1]]
RANKS = RESULTS / "ranks-2xnvidia-h200.json"
TWO_GPUS = RESULTS / "two-gpus-2xnvidia-h200.json"
BUDGET = RESULTS / "engine-budget-nvidia-h200.json"
SIZED = RESULTS / "engine-pp2-sized-2xnvidia-h200.json"
PIPELINE_PLOT = Path("docs/pp-profile.svg")
SURFACES = RESULTS / "pp_surfaces.json"
QUEUES = RESULTS / "pp_queues.json"
SURFACES_PLOT = Path("docs/pp-surfaces.svg")
LOGITS_ON_CPU = RESULTS / "logits-host-device.json"
FAULTS = RESULTS / "faults-nvidia-h200.json"
SUSTAINED_PLOT = Path("docs/sustained.svg")
ENGINE_PLOT = Path("docs/engine.svg")


def sections(root: Path) -> dict[str, str]:
    """The text to put between the marks of the pages, by the name of the mark."""
    pipeline, ours_first = load(root / PIPELINE), load(root / OURS_FIRST)
    one_block = load(root / ONE_BLOCK)
    one_gpu = {name: load(root / path) for name, path in ONE_GPU.items()}
    in_turn = {path: load(root / path) for path in [*IN_TURN, IN_TURN_TRACES[0]]}
    plugin = newest_on_gpu(root / RESULTS, "sglang")
    assert plugin is not None
    engines = engine.newest_runs(root / RESULTS)
    return {
        "sglang": sglang_tables(plugin),
        "logits": logits_text(newest_on_gpu(root / RESULTS, "logits") or root / LOGITS_ON_CPU),
        "sglang-when": when_it_helps(engines.get("copies"), load(plugin)),
        "sglang-in-place": in_place_table(plugin),
        "pp-errors": pipeline_errors(pipeline["results"], ours_first["results"]),
        "pp-plans": pipeline_plans(one_block["results"]),
        "pp-budget": engine.budget_table(engine.runs_of(root / BUDGET)["budget"]),
        "pp-sized": engine.sized_table(engine.runs_of(root / SIZED)["pp2-sized"]),
        "pp-why": pipeline_why(pipeline["results"], one_block["results"]),
        "pp-one-gpu": one_gpu_table({name: run["results"] for name, run in one_gpu.items()}),
        "pp-in-turn": in_turn_table([in_turn[path] for path in IN_TURN]),
        "pp-in-turn-trace": trace_table([in_turn[path] for path in IN_TURN_TRACES]),
        "pp-in-turn-source": "\n".join(
            f"- {in_turn_name(run)}{', trace' if path in IN_TURN_TRACES[:1] else ''}: "
            f"{source(run, path.name)}"
            for path, run in in_turn.items()
        ),
        "pp-targets": pipeline_targets(
            pipeline["results"],
            ours_first["results"],
            one_block["results"],
            {name: run["results"] for name, run in one_gpu.items()},
        ),
        "pp-source": "\n".join(
            f"{at}. {source(run, path.name)}"
            for at, (run, path) in enumerate(
                [
                    (pipeline, PIPELINE),
                    (ours_first, OURS_FIRST),
                    (one_block, ONE_BLOCK),
                    *((one_gpu[name], path) for name, path in ONE_GPU.items()),
                ],
                1,
            )
        ),
        **pp_pages.sections(root / SURFACES),
        "pp-queues": pp_pages.queues_table(root / QUEUES),
        "pp-queues-measured": pp_pages.measured_sizes(root / QUEUES),
        "faults": faults_text(root / FAULTS),
        "two-gpus": two_gpus_text(root / TWO_GPUS),
        "ranks": ranks_text(root / RANKS),
        "sustained": sustained_table(newest_on_gpu(root / RESULTS, "sustained")),
        "engine": engine.table(engines),
        "engine-first": engine.first_table(engines),
    }


def draw(root: Path) -> list[Path]:
    """Draws the plots. Returns their files."""
    plots = [root / PIPELINE_PLOT]
    draw_pipeline(load(root / PIPELINE), plots[0])
    if (root / SURFACES).exists():
        plots.append(root / SURFACES_PLOT)
        pp_pages.draw(load(root / SURFACES), plots[-1])
    if run := newest_on_gpu(root / RESULTS, "sustained"):
        plots.append(root / SUSTAINED_PLOT)
        draw_sustained(load(run), plots[-1])
    if run := engine.newest_runs(root / RESULTS).get("copies"):
        plots.append(root / ENGINE_PLOT)
        engine.draw(run, plots[-1])
    return plots


def pair(cell: dict[str, float]) -> str:
    return f"{cell['p50']:,.1f} / {cell['p99']:,.1f}"


SIDES = {"without": "baseline", "with pystage": "pystage"}  # names in the results: column heads


def logits_text(path: Path) -> str:
    """The comparison of a model's logits on the same batches."""
    result = load(path)
    logits, made = result["logits"], result["init_new"]
    kinds = ", ".join(f"{count:,} have {kind}" for kind, count in logits["requests"].items())
    different = ", ".join(f"{count} {name}" for name, count in logits["different"].items())
    text = (
        f"A tiny Llama ran {logits['batches']:,} batches of the trace, each with the plugin and "
        f"without it. The results were compared bit by bit; different are {different}. Of the "
        f"requests, {kinds}. "
    )
    if made:
        before, after = (len(made[side]) for side in ("without", "with pystage"))
        text += (
            f"`ForwardBatch.init_new` puts {before} kernels and copies on the forward stream "
            f"without the plugin, and {after} with it."
        )
    else:
        text += "This was on a CPU."
    return f"{text}\n\n{source(result, path.name)}"


def sglang_tables(path: Path) -> str:
    """Tables of SGLang with and without the plugin."""
    result = load(path)
    parts = {"flatten + resolve": "staging and resolving", "prepare + resolve": "the whole batch"}
    cells = [
        (re.sub(r"(\d)(\d{3})\b", r"\1,\2", shape) + f": {words}", cell[part])
        for shape, cell in result.get("host", {}).items()
        for part, words in parts.items()
    ]
    cells += [
        ("8,192 behind 122,880 of history: staging", c["us"])
        for c in result.get("history", {}).values()
    ]
    cells += [(f"8,192 ids on the GPU, {w}", c["us"]) for w, c in result.get("latency", {}).items()]
    rows = [
        [name, *(pair(cell[side]) for side in SIDES), f"{cell['ratio']['p50']:.1f} x"]
        for name, cell in cells
    ]
    table = tabulate(["us, p50 / p99", *SIDES.values(), "baseline / pystage, p50"], rows)
    return f"{table}\n\n{target_table(result)}\n\n{source(result, path.name)}"


def when_it_helps(run: engine.Run | None, plugin: dict[str, Any]) -> str:
    """What SGLang users want to know first: when the plugin helps."""
    if run is None:
        return "Not measured yet."
    row = run.rows["prompt-4096+stream"]
    ms, patience = row["on"]["ttft_ms"]["p50"], row["off"]["given_up_after_s"]
    one, paged = (
        plugin["host"][shape]["prepare + resolve"]["saved_us"]["p50"] / 1e3
        for shape in ("1 x 8192", "64 x 128, pages of 64")
    )
    few, many = (len(plugin["launches"]["1 x 8192"][s]) for s in ("with pystage", "without"))
    bullets = (
        "**It helps** when another stream keeps the GPU's copy engine busy without a pause. In our "
        "test a loop always keeps two copies of 256 MiB queued. SGLang then does not start prompts "
        "of 4,096 ids and more. With pystage they start at once "
        f"({ms:.0f} ms to the first token, where SGLang has no answer in {patience:g} s, "
        "[below](#time-to-first-token)). A weight update or another process may make such traffic; "
        "neither has been measured.",
        f"**It saves a little** elsewhere: {one:.1f} ms of the scheduler's time for a prefill of "
        f"one request, {paged:.1f} ms for 64 requests with pages of 64 tokens. The schedule stream "
        f"runs {few} kernels in place of {many} kernels and copies. In the time to first token "
        "this does not show.",
        "**It made no difference** where LoRA adapters are loaded in bursts, weights stay on the "
        "host (`--cpu-offload-gb`), or HiCache loads KV cache back on one GPU. SGLang #38448 "
        "reports prefills that wait for HiCache at TP 8; that is not measured yet. pystage does "
        "nothing for decode, on a CPU, or where SGLang asks for memory that is not pinned.",
    )
    return "\n".join(
        textwrap.fill(f"- {text}", 100, subsequent_indent="  ", break_on_hyphens=False)
        for text in bullets
    )


def in_place_table(path: Path) -> str:
    """How the time of a batch of 8,192 ids in SGLang is spent."""
    result = load(path)
    parts = {
        "flatten_arrays_to_pinned_cpu": "flatten_arrays_to_pinned_cpu",
        "resolve_forward_inputs": "resolve_forward_inputs",
        "resolve, nothing to do": "&nbsp;&nbsp;of a batch that has its ids",
        "prepare_for_extend": "prepare_for_extend, all of it",
        "alloc_for_extend": "&nbsp;&nbsp;alloc_for_extend",
        "sampling info": "&nbsp;&nbsp;sampling info",
    }
    cell = result["host"]["1 x 8192"]
    rows = [[label, *(pair(cell[part][side]) for side in SIDES)] for part, label in parts.items()]
    table = tabulate(["8,192 ids, us, p50 / p99", *SIDES.values()], rows)
    return f"{table}\n\n{source(result, path.name)}"


# --- driver calls that fail ---------------------------------------------------------------------


def faults_text(path: Path) -> str:
    """The number of places at which a driver call was made to fail."""
    result = load(path)
    return (
        f"Last run: {result['places']} places, on an {result['device']}, driver "
        f"{result['driver']}, commit `{result['commit'][:9]}`, `bench/results/{path.name}`."
    )


def two_gpus_text(path: Path) -> str:
    """The scenarios that ran on a machine with two GPUs."""
    result = load(path)
    failed = [name for name, told in result["scenarios"].items() if not told["ok"]]
    return (
        f"Last run: {len(result['scenarios'])} scenarios, {len(failed)} failed, on "
        f"{result['devices']} x {result['device']}, driver {result['driver']}, commit "
        f"`{result['commit'][:9]}`, `bench/results/{path.name}`."
    )


def ranks_text(path: Path) -> str:
    """What pools of several ranks cost each other."""
    result = load(path)
    ranks = result["ranks"]

    def slowest(when: str) -> str:
        return pair({q: max(float(r[when]["ready_us"][q]) for r in ranks) for q in ("p50", "p99")})

    pinned = {f"{r['pinned_bytes'] / 2**20:.0f}" for r in ranks}
    devices = result["devices_of_ranks"]
    alone = len(set(devices)) == len(devices) and all(len(r["contexts_on"]) == 1 for r in ranks)
    return (
        f"{len(ranks)} ranks that start together: their pools are made in at most "
        f"{1e3 * max(r['pool_s'] for r in ranks):.0f} ms, each pins {' or '.join(sorted(pinned))} "
        f"MiB, and {'each' if alone else 'not each'} has a context on its own GPU alone. 8,192 ids "
        f"are on the GPU after {slowest('alone')} us (p50 / p99) if one rank works, and after "
        f"{slowest('together')} us if all do; for each figure the slowest rank counts.\n\n"
        f"{source(result, path.name)}"
    )


# --- sustained ------------------------------------------------------------------------------------


def sustained_table(path: Path | None) -> str:
    """The targets of a sustained run, and its first and last minutes."""
    if path is None:
        return "Not measured yet."
    result = load(path)
    rows = result["rows"]
    batches, tokens = (sum(row[name] for row in rows) for name in ("batches", "tokens"))
    text = (
        f"{result['minutes']:.0f} minutes, {batches:,} batches, {tokens:,} ids, "
        f"{result['streams']} streams, beside copies of "
        f"{result['traffic_bytes'] / 2**20:.0f} MiB kept queued."
    )
    some = sorted({0, len(rows) // 2, len(rows) - 1})
    minutes = [
        [
            f"{rows[at]['minute']:.0f}",
            f"{rows[at]['batches']:,}",
            f"{rows[at]['wrong']}",
            pair(rows[at]["host"]),
            pair(rows[at]["ready"]),
            f"{rows[at]['resident_bytes'] / 2**20:,.0f}",
            f"{rows[at]['pool_bytes'] / 2**20:,.0f}",
        ]
        for at in some
    ]
    head = ["minute", "batches", "wrong ids", "stage + resolve, us, p50 / p99"]
    head += ["ids on the GPU, us, p50 / p99", "process, MiB", "pools, MiB"]
    parts = [text, target_table(result), tabulate(head, minutes), source(result, path.name)]
    plot = f"![Times, memory and counts of every minute]({SUSTAINED_PLOT.name})"
    return "\n\n".join([*parts, plot])


# --- the pipeline ---------------------------------------------------------------------------------

PREDICTORS = {
    "ours": "profile ours",
    "sglang warm": "profile sglang warm",
    "sglang cold": "profile sglang cold",
}


def pipeline_errors(sglang_first: dict[str, Any], ours_first: dict[str, Any]) -> str:
    """The prediction errors. Shows runs in both orders, since only the first profile in a process
    runs cold."""
    rows = []
    for name, profile in PREDICTORS.items():
        row = [name.replace("sglang", "SGLang's sweep,").replace("ours", "pystage")]
        for run in (sglang_first, ours_first):
            error = run["heldout"][name]
            row.append(f"{run[profile]['forwards']}")
            row.append(f"{run[profile]['seconds']:.1f}")
            row.append(f"{error['median']:.1%} / {error['p95']:.1%}")
        rows.append(row)
    head = ["prediction"]
    for order in ("run 1, SGLang first", "run 2, pystage first"):
        head += [f"{order}: forwards", "s", "error, median / p95"]
    return tabulate(head, rows)


def plans_of(measured: dict[str, Any]) -> dict[int, dict[str, dict[str, Any]]]:
    """By the length of the prompt, what was measured of each plan."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for name, plan in measured.items():
        if name.startswith("ttft "):
            _, prompt, policy = name.split(" ", 2)
            found.setdefault(int(prompt), {})[policy] = plan
    return found


def best_fixed(plans: dict[str, dict[str, Any]]) -> str:
    fixed = (name for name in plans if name.startswith("fixed"))
    return min(fixed, key=lambda name: float(plans[name]["ttft_ms"]))


def pipeline_plans(measured: dict[str, Any]) -> str:
    rows = []
    for prompt, plans in plans_of(measured).items():
        best = plans[best_fixed(plans)]["ttft_ms"]
        for name, plan in plans.items():
            runs = plan["runs_ms"]
            rows.append(
                [
                    f"{prompt:,}",
                    sized_by(name),
                    f"{len(plan['chunks'])}",
                    f"{plan['ttft_ms']:,.0f}",
                    f"{min(runs):,.0f} to {max(runs):,.0f}",
                    f"{plan['ttft_ms'] / best - 1:+.1%}",
                    f"{plan['simulation_error']:+.1%}",
                ]
            )
    head = ["prompt", "chunks sized by", "chunks", "first token, ms", f"{len(runs)} runs"]
    return tabulate([*head, "against the best fixed size", "simulated"], rows)


def pipeline_why(measured: dict[str, Any], one_block: dict[str, Any]) -> str:
    """What chunks cost on the GPU that receives, alone and in the pipeline, with NCCL's own choice
    of blocks and with one."""
    rows = []
    plans, others = plans_of(measured), plans_of(one_block)
    prompt = min(others)
    for name, plan in others[prompt].items():
        if not name.startswith("fixed"):
            continue
        usual = plans[prompt][name]
        rows.append(
            [
                sized_by(name),
                f"{sum(usual['stage_ms'][1]):,.0f}",
                f"{sum(usual['piped_ms'][1]):,.0f}",
                f"{usual['ttft_ms']:,.0f}",
                f"{sum(plan['piped_ms'][1]):,.0f}",
                f"{plan['ttft_ms']:,.0f}",
            ]
        )
    head = [f"{prompt:,} tokens, ms", "second GPU alone", "in the pipeline", "first token"]
    return tabulate([*head, "--nccl-blocks 1: in the pipeline", "first token"], rows)


def one_gpu_table(runs: dict[str, dict[str, Any]]) -> str:
    """A whole decoder on one GPU: the errors, and what sizing does there."""
    rows = []
    for name, measured in runs.items():
        error = measured["heldout"]["ours"]
        (plans,) = plans_of(measured).values()
        shown = [plans[which]["ttft_ms"] for which in (best_fixed(plans), "choose", "choose, run")]
        rows.append(
            [
                name,
                f"{measured['profile ours']['forwards']}",
                f"{error['median']:.1%} / {error['p95']:.1%}",
                *(f"{ms:,.0f}" for ms in shown),
                f"{len(plans['choose']['chunks'])}",
            ]
        )
    head = ["one GPU", "forwards", "error, median / p95", "best of 1,024 to 8,192, ms"]
    return tabulate([*head, "choose, ms", "choose, run, ms", "choose: chunks"], rows)


def in_turn_table(runs: Sequence[dict[str, Any]]) -> str:
    """Pipelines of which one GPU ran the first stage: the best fixed size, the share of its time
    that its bubbles take, and other plans against it."""
    rows, others = [], ("choose", "sglang warm", "fixed 8192")
    for run in runs:
        for prompt, plans in plans_of(run["results"]).items():
            name = best_fixed(plans)
            best = plans[name]
            work = max(map(sum, best["piped_ms"]))  # of the slowest stage
            against = {n: f"{plans[n]['ttft_ms'] / best['ttft_ms'] - 1:+.1%}" for n in others}
            rows.append(
                [
                    in_turn_name(run),
                    f"{prompt:,}",
                    sized_by(name).removeprefix("fixed "),
                    f"{best['ttft_ms']:,.0f}",
                    f"{1 - work / best['ttft_ms']:.1%}",
                    f"{against['choose']}, {chunks_in_words(plans['choose']['chunks'])}",
                    *(against[n] for n in others[1:]),
                ]
            )
    head = ["model", "prompt", "best fixed size", "first token, ms", "bubbles"]
    return tabulate([*head, "choose", *map(sized_by, others[1:])], rows)


def chunks_in_words(chunks: Sequence[int]) -> str:
    """The size of all chunks but a shorter last one, or the range of sizes."""
    whole = chunks[:-1] or chunks
    low, high = min(whole), max(whole)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def in_turn_name(run: dict[str, Any]) -> str:
    model = run["benchmark"].split("-")[1]
    return f"{model.upper()} over {run['ranks']}"


def trace_table(runs: Sequence[dict[str, Any]]) -> str:
    """Prompts with the lengths of a trace: the first token of each, and the time of all."""
    traces = [run["results"]["trace"] for run in runs]
    names = [n for n in traces[0] if all(isinstance(trace.get(n), dict) for trace in traces)]
    head = ["chunks sized by"]
    for run in runs:
        head += [f"{in_turn_name(run)}: first token, ms, p50", "p95", "all, ms"]
    times = ("ttft_p50_ms", "ttft_p95_ms", "ms")
    rows = [
        [sized_by(name), *(f"{trace[name][k]:,.0f}" for trace in traces for k in times)]
        for name in names
    ]
    return tabulate(head, rows)


def sized_by(policy: str) -> str:
    """A policy's name in words: ``fixed 1024`` is "fixed 1,024"."""
    return re.sub(r"(\d)(\d{3})$", r"\1,\2", policy.replace("sglang", "SGLang,"))


def pipeline_targets(
    measured: dict[str, Any],
    ours_first: dict[str, Any],
    one_block: dict[str, Any],
    one_gpu: dict[str, dict[str, Any]],
) -> str:
    ours = measured["profile ours"]
    rows: list[list[Any]] = []
    models = {
        "8B over two GPUs, run 1": measured,
        "8B over two GPUs, run 2": ours_first,
        **{f"{n}, one GPU": r for n, r in one_gpu.items()},
    }
    for name, run in models.items():
        error = run["heldout"]["ours"]
        found = f"{error['median']:.1%} / {error['p95']:.1%}"
        met = error["median"] <= 0.03 and error["p95"] <= 0.10
        rows.append([f"held-out error, median / p95, {name}", "<= 3% / 10%", found, met])
    seconds = max(
        run["profile ours"]["seconds"] / run["profile sglang warm"]["seconds"]
        for run in (measured, ours_first)
    )
    rows += [
        ["forwards of a profile", "<= 48", f"{ours['forwards']}", ours["forwards"] <= 48],
        [
            "its wall time, of SGLang's sweep once all is warm, worse run",
            "< 1",
            f"{seconds:.2f} x",
            seconds < 1,
        ],
    ]
    for name, run in (("run 1", measured), ("run 3", one_block)):
        rows += plan_targets(name, run)
    return tabulate(
        ["measure", "target", "measured", "met"],
        [[m, t, v, "yes" if ok else "no"] for m, t, v, ok in rows],
    )


def plan_targets(name: str, run: dict[str, Any]) -> list[list[Any]]:
    """What plans reached in a run, each by its worst prompt."""
    rows: list[list[Any]] = []
    prompts = plans_of(run)
    for policy in ("choose", "choose, run"):
        told = {
            prompt: (plans[policy], plans[best_fixed(plans)])
            for prompt, plans in prompts.items()
            if policy in plans  # a search by runs takes minutes for long prompts
        }
        if not told:
            continue
        ratio, prompt = max(
            (mine["ttft_ms"] / best["ttft_ms"], prompt) for prompt, (mine, best) in told.items()
        )
        apart = any(min(mine["runs_ms"]) > max(best["runs_ms"]) for mine, best in told.values())
        label = f"first token, `{policy}` / the best fixed size, {name}, worst: {prompt:,} tokens"
        rows.append([label, "<= 1, or their runs overlap", f"{ratio:.3f} x", not apart])
    ratio, prompt = max(
        (plans["choose"]["ttft_ms"] / plans["fixed 8192"]["ttft_ms"], prompt)
        for prompt, plans in prompts.items()
    )
    label = f"first token, `choose` / fixed 8,192, {name}, worst: {prompt:,} tokens"
    rows.append([label, "< 1", f"{ratio:.3f} x", ratio < 1])
    errors = [abs(p["simulation_error"]) for n, p in run.items() if n.startswith("ttft ")]
    label = f"simulation against {name}, worst of the plans"
    rows.append([label, "<= 5%", f"{max(errors):.1%}", max(errors) <= 0.05])
    return rows


# --- plots ---------------------------------------------------------------------------------------


def draw_pipeline(result: dict[str, Any], path: Path) -> None:
    """Draws the profile's samples, its fit and the plan, from the figures of the run."""
    import numpy as np

    from pystage.pp import ChunkSizer, LatencyModel
    from pystage.pp.plot import plot_profile

    svg.pyplot()
    ours = result["results"]["profile ours"]
    model = LatencyModel.from_json({"version": 1, **ours})
    sizer = ChunkSizer(model, base_chunk=8192, context_len=131072, context_margin=0)
    plan, static = sizer.plan(131072), [8192] * 16
    spans = [
        float(times.max() / times.min())
        for sizes in (static, plan)
        for times in [model.predict(np.cumsum(sizes) - sizes, np.array(sizes))]
    ]
    figure, report = plot_profile(sizer, 131072), model.report
    svg.fit(figure, 7.6)
    svg.tell(
        figure,
        f"Over a prompt of 131,072 ids, chunks of 8,192 take up to {spans[0]:.1f} times as long as "
        f"the first one; planned chunks differ by {spans[1] - 1:.0%} (predicted)",
        f"{result['devices']} x {result['device']}, Llama 3.1 8B. {report.samples_used} samples "
        f"used, {len(report.rejected)} rejected. Error of samples left out of the fit: median "
        f"{report.holdout_median:.1%}, p95 {report.holdout_p95:.1%}.",
    )
    svg.save(figure, path)


def draw_sustained(result: dict[str, Any], path: Path) -> None:
    """Draws the times and the memory held in every minute."""
    plt = svg.pyplot()
    rows = result["rows"]
    minutes = [row["minute"] for row in rows]
    figure, axes = plt.subplots(3, 1, figsize=(svg.WIDTH, 7.2), layout="constrained", sharex=True)
    times, memory, counts = axes
    for part, label, color in (
        ("host", "stage + resolve", "#1f6fb4"),
        ("ready", "until the ids are on the GPU", "#c2660c"),
    ):
        for percentile, style in (("p99", "-"), ("p50", ":")):
            values = [row[part][percentile] for row in rows]
            times.plot(minutes, values, style, color=color, label=f"{label}, {percentile}")
    times.set(ylabel="us", ylim=(0, None))
    for name, label in (
        ("resident_bytes", "the process (resident)"),
        ("device_bytes", "the GPU"),
        ("pool_bytes", "the pools (pinned)"),
    ):
        if rows[0][name] is not None:
            memory.plot(minutes, [row[name] / 2**20 for row in rows], label=label)
    memory.set(ylabel="memory, MiB", ylim=(0, None))
    for name, label in (
        ("fds", "open files"),
        ("threads", "threads"),
        ("contexts", "CUDA contexts"),
        ("pool_allocations", "pinned allocations so far"),
        ("wrong", "wrong ids"),
    ):
        if rows[0][name] is not None:
            counts.plot(minutes, [row[name] for row in rows], label=label)
    counts.set(xlabel="minute", ylabel="count", ylim=(0, None))
    for axis in axes:
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.grid(axis="y", color="#dddddd")
    batches, wrong = (sum(row[name] for row in rows) for name in ("batches", "wrong"))
    finding = f"{result['minutes']:.0f} minutes, {batches / 1e6:.1f} million batches: "
    finding += f"{wrong:,} wrong ids" if wrong else "no wrong id"
    svg.tell(figure, finding, f"{result['device']}. A serving trace beside copies kept queued.")
    svg.save(figure, path)
