"""The command line, run as its users run it, on the host device."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pystage
from pystage import _chunks, _replay, cli, trace
from pystage.pp import random_token_ids

pytest.importorskip("rich")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps rich from folding what a test looks for."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    """90 + 30 + 60 tokens to prefill, 512 and 1,024 of history: 6 batches of 30."""
    path = tmp_path / "mooncake.csv"
    path.write_text(
        "timestamp_ms,input_length,output_length,reused_prefix_blocks\n"
        "0,90,5,0\n3000,542,5,1\n6000,1084,5,2\n"
    )
    return path


def demo(path: Path, *more: str) -> int:
    common = ["--device", "cpu", "--trace", str(path), "--chunk", "30", "--batches", "12"]
    return cli.main(["demo", "--no-profile", *common, *more])


@pytest.mark.parametrize("issue", ["deferred", "eager"])
def test_demo(
    mooncake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], issue: str
) -> None:
    out = tmp_path / "figures.json"
    assert demo(mooncake, "--issue", issue, "--json", str(out)) == 0

    shown = capsys.readouterr().out
    for text in (
        "12 (after 20 of warm-up)",
        "plain torch path",
        "after warm-up",
        "stage + resolve",
    ):
        assert text in shown
    assert "np.concatenate alone" in shown  # what host times mean

    figures = json.loads(out.read_text())
    assert figures["device"] == "cpu"
    assert figures["issue"] == issue
    assert figures["batches"] == 12
    assert figures["tokens"] == 12 * 30
    # batches 20 to 31 are of the fourth pass over the trace (from its third batch) to the sixth
    assert figures["requests"] == 7
    pool = figures["pool"]
    assert pool["wire_bytes"] == 12 * 30 * 4
    assert pool["int64_bytes"] == 12 * 30 * 8
    assert pool["allocations_after_warm_up"] == 0
    assert pool["fallbacks"] == 0
    for name in ("stage", "resolve", "both", "plain"):
        times = figures[name]
        assert 0 < times["p50_us"] <= times["p99_us"] <= times["max_us"]
    ratio = figures["plain"]["p50_us"] / figures["both"]["p50_us"]
    assert figures["plain_to_pystage"]["p50"] == pytest.approx(ratio)


def test_demo_of_the_sample_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--no-profile", "--device", "cpu", "--batches", "5"]) == 0
    assert "40,960" in capsys.readouterr().out


TINY = _chunks.Size(2, 32, 2, 128, 512, 128, 16, 8, torch.float32)


def test_demo_ends_with_a_chunk_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(_chunks.SIZES, "cpu", TINY)
    out = tmp_path / "figures.json"
    assert cli.main(["demo", "--device", "cpu", "--batches", "2", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "512 tokens, base chunk 128" in shown
    assert "equal time" in shown
    chunks = json.loads(out.read_text())["chunks"]
    assert 0 < chunks["profile_forwards"] <= 64
    for name in ("equal time", "one size"):
        assert sum(chunks[name]["sizes"]) == TINY.context
        assert len(chunks[name]["measured_ms"]) == len(chunks[name]["sizes"])
        assert min(chunks[name]["measured_ms"]) > 0


def test_without_scipy_the_demo_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert cli.main(["demo", "--device", "cpu", "--batches", "2"]) == 0
    assert "pystage-h2d[pp]" in capsys.readouterr().out


def test_the_decoder_sees_its_history(device: str) -> None:
    """The last logits of a prompt are the same however it is cut."""
    decoder = _chunks.Decoder(TINY, torch.device(device))
    prompt = random_token_ids(100, TINY.vocab, seed=3)
    with pystage.StagingPool(device) as pool:

        def last(*cuts: int) -> torch.Tensor:
            decoder.cache.zero_()
            ends = [0, *cuts, len(prompt)]
            for start, stop in pairwise(ends):
                staged = pool.stage([prompt], [start], [stop], TINY.vocab)
                logits = decoder.forward(pystage.resolve(staged), start)
            return logits

        whole = last()
        for cuts in ((50,), (1, 2, 99), (64, 96)):
            torch.testing.assert_close(last(*cuts), whole, rtol=1e-3, atol=1e-4)
        decoder.cache.fill_(1)  # what stands behind the prompt is not seen
        assert torch.equal(decoder.forward(torch.tensor(list(prompt), device=device), 0), whole)


def test_ids_that_take_int64_on_the_wire(mooncake: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert demo(mooncake, "--vocab", str(1 << 40), "--json", str(out)) == 0
    pool = json.loads(out.read_text())["pool"]
    assert pool["wire_bytes"] == pool["int64_bytes"]


@pytest.mark.parametrize("bad", [0, 19, 20, 31])
def test_a_wrong_id_in_any_batch_fails(
    mooncake: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bad: int,
) -> None:
    calls = 0

    def flip(staged: pystage.StagedTokens) -> torch.Tensor:
        nonlocal calls
        ids = pystage.resolve(staged)
        if calls == bad:
            ids[29] ^= 1
        calls += 1
        return ids

    monkeypatch.setattr(_replay, "resolve", flip)
    assert demo(mooncake) == cli.EXIT_DIFFERENT_IDS
    captured = capsys.readouterr()
    assert f"wrong ids: batch {bad}: id 29 (request " in captured.err
    assert "host time" not in captured.out


def test_a_missing_id_fails(
    mooncake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_replay, "resolve", lambda staged: pystage.resolve(staged)[1:])
    assert demo(mooncake) == cli.EXIT_DIFFERENT_IDS
    assert "29 ids came through the pool, 30 by the plain path" in capsys.readouterr().err


def test_a_difference_is_traced_to_its_request() -> None:
    batch = trace.Batch(requests=[4, 7], starts=[2, 512], stops=[5, 520])
    plain = torch.arange(11)
    ours = plain.clone()
    ours[5] = 99
    text = _replay._describe_difference(batch, ours, plain)
    assert text.startswith("id 5 (request 7, position 514) is 99 through the pool and 5 by")
    assert [_replay._request_of(batch, at) for at in (0, 2, 3, 10)] == [
        (4, 2),
        (4, 4),
        (7, 512),
        (7, 519),
    ]
    with pytest.raises(IndexError, match="past the end of the batch"):
        _replay._request_of(batch, 11)


def test_memory_that_is_not_pinned_is_shown_with_its_reason(
    mooncake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = _replay.Workload(trace.read_trace(mooncake), 2, chunk_tokens=30, warm_up_batches=1)
    with pystage.StagingPool("cpu") as pool:
        report = _replay.replay(pool, work, "deferred", lambda: None)
    cli._print(cli._pool_table(report))
    assert "not pinned" not in capsys.readouterr().out
    figures = dataclasses.replace(
        report.pool, why_pageable="[memlock] limit is 64 KiB", pageable_bytes=3 << 20
    )
    cli._print(cli._pool_table(dataclasses.replace(report, pool=figures)))
    shown = capsys.readouterr().out
    assert "not pinned" in shown and "3.0 MiB: [memlock] limit is 64 KiB" in shown


def test_paths_take_turns_and_see_the_chunks(
    mooncake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, list[int], list[int]]] = []

    def noting(name: str, path: Any) -> Any:
        def noted(self: _replay.Paths, batch: trace.Batch, ids: Any) -> torch.Tensor:
            order.append((name, batch.starts, batch.stops))
            parts = zip(ids, batch.starts, batch.stops, strict=True)
            expected = [np.array(whole)[start:stop] for whole, start, stop in parts]
            result: torch.Tensor = path(self, batch, ids)
            assert result.tolist() == np.concatenate(expected).tolist()
            return result

        return noted

    for name in ("plain", "through_pool"):
        monkeypatch.setattr(_replay.Paths, name, noting(name, getattr(_replay.Paths, name)))
    work = _replay.Workload(trace.read_trace(mooncake), 2, chunk_tokens=30, warm_up_batches=2)
    with pystage.StagingPool("cpu") as pool:
        report = _replay.replay(pool, work, "deferred", lambda: None)
    names = [name for name, _, _ in order]
    assert names == ["through_pool", "plain", "plain", "through_pool"] * 2
    assert order[0][1:] == ([0], [30])
    assert order[-1][1:] == ([512], [542])  # history is not prefilled
    assert (report.batches, report.tokens, report.requests) == (2, 60, 2)


def test_warm_up_is_in_no_figure(mooncake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[int]] = []

    def count(nanoseconds: Any) -> _replay.HostTime:
        timed.append([int(ns) for ns in nanoseconds])
        return _replay.HostTime(1.0, 1.0, 1.0)

    monkeypatch.setattr(_replay, "_host_time", count)
    work = _replay.Workload(trace.read_trace(mooncake), 7, chunk_tokens=30, warm_up_batches=4)
    with pystage.StagingPool("cpu") as pool:
        report = _replay.replay(pool, work, "deferred", lambda: None)
        assert pool.stats().stages == 11
    assert [len(times) for times in timed] == [7] * 4  # stage, resolve, both, plain
    assert timed[2] == [a + b for a, b in zip(timed[0], timed[1], strict=True)]
    assert report.tokens == 7 * 30
    assert report.pool.wire_bytes == 7 * 30 * 4


def test_host_time_is_in_microseconds() -> None:
    times = _replay._host_time([n * 1000 for n in range(1, 102)])
    assert times == _replay.HostTime(p50_us=51.0, p99_us=100.0, max_us=101.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk", "0"], "'0' is not a number from 1 to"),
        (["--batches", "x"], "'x' is not a number from 1 to"),
        (["--vocab", "9" * 30], "is not a number from 1 to"),
        (["--chunk", str((1 << 24) + 1)], "is not a number from 1 to 16777216"),
        (["--batches", "-1"], "'-1' is not a number from 1 to"),
        (["--device", "mps"], "'mps' is not cpu, cuda or cuda:N"),
        (["--device", "nothing"], "'nothing' is not cpu, cuda or cuda:N"),
        (["--issue", "later"], "invalid choice: 'later'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bad_trace_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    assert demo(path) == cli.EXIT_CANNOT_RUN
    assert "No such file" in capsys.readouterr().err
    path.write_text("a,b\n1,2\n")
    assert demo(path) == cli.EXIT_CANNOT_RUN
    assert "bad.csv: its columns are a,b; expected" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_gpu_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--device", "cuda"]) == cli.EXIT_CANNOT_RUN
    assert "no cuda here" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "info"])
def test_without_rich_the_extra_is_named(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main([command]) == cli.EXIT_CANNOT_RUN
    captured = capsys.readouterr()
    assert "pip install 'rich'" in captured.err
    assert "extra `cli`" in captured.err
    assert captured.out == ""


def test_exit_statuses_are_those_that_are_promised() -> None:
    assert (cli.EXIT_DIFFERENT_IDS, cli.EXIT_NOT_WELL, cli.EXIT_CANNOT_RUN) == (1, 1, 2)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert pystage.build_info().torch_built in shown
    assert "cuda architectures" in shown


def test_modules_need_no_rich_and_run_with_python_m() -> None:
    code = "import sys; sys.modules['rich'] = None; import pystage, pystage.trace, pystage.cli"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "-m", "pystage", "demo", "--device", "mps"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m pystage demo")
