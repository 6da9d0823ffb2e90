"""The pipeline bench: its model computes what a Llama computes, and two ranks run it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pystage.pp import random_token_ids

pytest.importorskip("transformers")
pytest.importorskip("scipy")

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("bench.pp.prefill")


@torch.inference_mode()
def hidden_of(bench: ModuleType, stages: list, batches: list, prompts: list) -> torch.Tensor:
    """Hidden states of all tokens of all batches, through all stages."""
    out = []
    for batch in batches:
        ids = [t for p in batch for t in prompts[p.prompt][p.start : p.stop]]
        hidden = torch.tensor(ids)
        for stage in stages:
            hidden = stage(hidden, batch)
        out.append(hidden[0])
    return torch.cat(out)


def stages_of(bench: ModuleType, ranks: int, rows: int = 512) -> list:
    stages = [bench.build_stage(bench.MODELS["tiny"], r, ranks, rows, CPU) for r in range(ranks)]
    stages[-1].head = None  # hidden states instead of a token
    return stages


def test_chunks_through_two_stages_compute_what_transformers_does_at_once(
    bench: ModuleType,
) -> None:
    from transformers import LlamaConfig, LlamaModel

    stages = stages_of(bench, 2)
    prompt = random_token_ids(300, 512)
    batches = bench.batches_of_one([128, 100, 7, 64, 1])
    chunked = hidden_of(bench, stages, batches, [prompt])

    reference = LlamaModel(LlamaConfig(**bench.MODELS["tiny"])).eval()
    reference.embed_tokens = stages[0].embed
    mine = [layer for stage in stages for layer in stage.layers]
    for theirs, layer in zip(reference.layers, mine, strict=True):
        theirs.load_state_dict(layer.state_dict())
    reference.norm = torch.nn.Identity()
    with torch.inference_mode():
        expected = reference(torch.tensor(list(prompt))[None]).last_hidden_state[0]
    torch.testing.assert_close(chunked, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_prompts_computes_what_each_does_alone(bench: ModuleType) -> None:
    lengths = [70, 9, 120, 33]
    prompts = [random_token_ids(n, 512, seed=n) for n in lengths]
    batches = bench.batches_of_many(lengths, lambda *_: 50)
    assert [sum(p.count for p in b) for b in batches] == [50, 50, 50, 50, 32]
    together = hidden_of(bench, stages_of(bench, 1), batches, prompts)
    alone = [
        hidden_of(bench, stages_of(bench, 1), bench.batches_of_one([len(p)]), [p]) for p in prompts
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_the_first_chunk_of_a_prompt_says_nothing_about_the_stages(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It follows a pause, so it runs at a higher clock than alone."""
    lengths: list[int] = []

    def run(batches: list, _prompts: list) -> None:
        sizes = [sum(piece.count for piece in batch) for batch in batches]
        lengths.append(sum(sizes))
        pipeline.piped_ms = [1.01 * size + 0.5 for size in sizes]
        pipeline.piped_ms[0] /= 2

    pipeline = SimpleNamespace(
        rank=0, ranks=1, device=CPU, stage=SimpleNamespace(vocab=512), stages={}, run=run
    )
    pipeline.gather = lambda ms: [ms]
    args = SimpleNamespace(fixed=[], context=1024, base=128, seed=0)
    measured = bench.Bench(args, pipeline)
    monkeypatch.setattr(measured, "alone", lambda chunks: [[float(size) for size in chunks]])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stages = measured.measured_stages()
    finally:
        dist.destroy_process_group()
    assert stages["stage_factors"] == pytest.approx((1.01,))
    assert stages["overhead_ms"] == pytest.approx((0.5,))
    assert set(lengths) == {512}


LIKE = {
    "transfer_ms_per_token": 0.01,
    "stages": {"stage_factors": [1.0, 1.5], "overhead_ms": [0.0, 2.0]},
}


@pytest.mark.parametrize("like", [LIKE, None])
def test_a_pipeline_in_turn_takes_what_its_stages_take(
    bench: ModuleType, like: dict | None
) -> None:
    stage = bench.build_stage(bench.MODELS["tiny"], 0, 4, 512, CPU)
    assert len(stage.layers) == 1 and stage.head is None
    pipeline = bench.InTurn(stage, 4, like)
    seen: list[list[int]] = []
    stage.embed.register_forward_hook(lambda _module, ids, _out: seen.append(ids[0].tolist()))
    prompt = random_token_ids(300, 512)
    took = pipeline.run(bench.batches_of_one([128, 100, 72]), [prompt])
    assert [t for ids in seen[3:] for t in ids] == list(prompt)  # three chunks warm up
    factor, more, hop = (1.5, 2.0, 0.01) if like else (1.0, 0.0, 0.0)
    # A stage starts a chunk when it is free and the chunk has arrived.
    free = [0.0] * 4
    for ms, tokens in zip(pipeline.piped_ms, [128, 100, 72], strict=True):
        arrived = 0.0
        for rank in range(4):
            takes = ms if rank == 0 else factor * ms + more
            free[rank] = max(free[rank], arrived) + takes
            arrived = free[rank] + hop * tokens
    assert took == pytest.approx(free[-1]) and pipeline.ended_ms[-1] == took
    assert pipeline.ended_ms == sorted(pipeline.ended_ms) and len(pipeline.ended_ms) == 3
    rows = pipeline.gather([10.0])
    assert rows == [[10.0], *[[factor * 10.0 + more]] * 3]


def test_one_process_reports_on_four_ranks_in_turn(tmp_path: Path) -> None:
    like, out = tmp_path / "two.json", tmp_path / "out.json"
    like.write_text(json.dumps({"results": LIKE}))
    command = [sys.executable, "-m", "bench.pp.prefill", "--model=tiny", "--in-turn=4"]
    command += [f"--like={like}", "--context=512", "--base=64", "--reps=1", "--parts=ttft,trace"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, f"--out={out}"], env=environment, check=True, timeout=300)
    report = json.loads(out.read_text())
    assert report["ranks"] == 4 and report["in_turn"] and report["like"] == "two.json"
    results = report["results"]
    assert results["stages"]["stage_factors"] == [1.0, 1.5, 1.5, 1.5]
    run = results["ttft 512 fixed 64"]
    assert len(run["piped_ms"]) == 4 and "simulation_error" not in run
    assert run["ttft_ms"] > 4 * 2.0 + sum(run["piped_ms"][0])
    assert results["trace"]["fixed 64"]["ttft_p95_ms"] <= results["trace"]["fixed 64"]["ms"]


@pytest.mark.parametrize(
    ("given", "says"),
    [(["--in-turn=1"], "at least 2 ranks"), (["--like=x.json"], "--like needs --in-turn")],
)
def test_a_pipeline_in_turn_that_cannot_be(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    says: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["prefill", *given])
    with pytest.raises(SystemExit):
        bench.arguments()
    assert says in capsys.readouterr().err


def test_trace_lengths_come_from_a_file_or_a_seed(bench: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "trace.csv"
    table.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1,374,44\n2,9999,1\n")
    assert list(bench.trace_lengths(table, 0, 1000)) == [374, 1000]
    drawn = bench.trace_lengths(None, 3, 131072)
    lengths = [next(drawn) for _ in range(4000)]
    assert sorted(lengths)[2000] == pytest.approx(6909, rel=0.1)


def test_two_ranks_prefill_a_prompt_and_report(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [
        "-m",
        "bench.pp.prefill",
        "--model=tiny",
        "--reps=1",
        "--heldout=4",
        "--context=1024",
    ]
    command += ["--base=128", f"--out={out}"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["ranks"] == 2
    started = "torchrun --nproc-per-node 2 -m bench.pp.prefill --model=tiny"
    assert report["command"] == f"{started} --reps=1 --heldout=4 --context=1024 --base=128"
    assert report["torch"] == torch.__version__
    results = report["results"]
    assert [len(results["stages"][name]) for name in ("stage_factors", "overhead_ms")] == [2, 2]
    assert results["profile ours"]["forwards"] <= 64
    assert len(results["heldout"]["ours"]["ms"]) == 4
    for prompt_len in (512, 1024):
        for policy in ("fixed 32", "fixed 64", "fixed 128", "equal time", "fastest"):
            run = results[f"ttft {prompt_len} {policy}"]
            assert sum(run["chunks"]) == prompt_len
            assert [len(stage) for stage in run["stage_ms"]] == [len(run["chunks"])] * 2
            assert run["ttft_ms"] > 0
            # The last chunk cannot be done before the first stage has done them all.
            assert run["simulated_ms"] >= sum(run["stage_ms"][0])
            assert len(run["simulated_ms_by_ranks"]) == 15
            assert [len(stage) for stage in run["piped_ms"]] == [len(run["chunks"])] * 2
            assert run["simulated_from_piped_ms"] >= sum(run["piped_ms"][0]) > 0
    for prompt_len in (512, 1024):
        choice = results[f"choice {prompt_len} by runs"]
        assert sum(choice["chunks"]) == prompt_len
        # A profile of a busy machine may give no usable model; then nothing is run.
        assert choice["runs"] == 0 if choice["kind"] == "static" else 4 <= choice["runs"] <= 24
    trace = results["trace"]
    for policy in ("fixed 128", "equal time", "choose"):
        first = trace[policy]["ttft_ms"]
        assert len(first) == len(trace["lengths"]) and first == sorted(first)
        assert first[0] <= trace[policy]["ttft_p95_ms"] <= first[-1]
    assert sum(trace["lengths"]) <= 512
    assert trace["fixed 128"]["forwards"] == -(-sum(trace["lengths"]) // 128)
