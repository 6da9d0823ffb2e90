"""The command line on the host device, run in the same way as by a user.

This is one file because the commands of one program share the helpers that run them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pystage
from pystage import cli, trace
from pystage.cli import chunks as chunks_module
from pystage.cli import demo as demo_module
from pystage.cli import doctor as doctor_module
from pystage.cli import output
from pystage.cli import replay as replay_module
from pystage.pp import random_token_ids

typer = pytest.importorskip("typer", minversion="0.19")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps rich from folding what a test looks for, and from colours."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):  # each makes typer colour its help
        monkeypatch.delenv(name, raising=False)


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

    captured = capsys.readouterr()
    assert captured.err == ""  # no bar but on a terminal
    shown = captured.out
    for text in ("12 (after 20 of warm-up)", "after warm-up", "stage + resolve"):
        assert text in shown
    assert "these times say nothing about a GPU" in shown
    assert "plain / pystage" not in shown and " x" not in shown  # of a stand-in: no ratio

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
    assert figures["plain_to_pystage"] is None and "chunks" not in figures


def report(path: Path) -> replay_module.Report:
    work = replay_module.Workload(trace.read_trace(path), 2, chunk_tokens=30, warm_up_batches=1)
    with pystage.StagingPool("cpu") as pool:
        return replay_module.replay(pool, work, "deferred", lambda: None)


def test_of_a_gpu_the_ratio_is_shown(mooncake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, both = replay_module.HostTime(60, 90, 1e6), replay_module.HostTime(20, 60, 70)
    of_gpu = dataclasses.replace(report(mooncake), device="cuda:0", plain=plain, both=both)
    output.show(demo_module.time_table(of_gpu))
    shown = capsys.readouterr().out
    assert "plain torch path" in shown and "3.00 x" in shown and "1.50 x" in shown
    options = demo_module.Options(None, None, 2, 30, "deferred", 100, False, None)
    figures = demo_module._figures(of_gpu, None, options)
    assert figures["plain_to_pystage"] == {"p50": 3, "p99": 1.5}


def test_demo_of_the_sample_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--no-profile", "--device", "cpu", "--batches", "5"]) == 0
    assert "40,960" in capsys.readouterr().out


TINY = chunks_module.Size(2, 32, 2, 128, 512, 128, 16, 8, torch.float32)


def fix_the_gate(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Decides whether fits are usable, whatever the machine does meanwhile."""
    from pystage.pp import model

    monkeypatch.setattr(model, "_gate_reason", lambda report, gate: reason)


@pytest.mark.parametrize("reason", ["", "median error 82% over 15%"])
def test_demo_ends_with_what_came_of_the_profile(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    reason: str,
) -> None:
    monkeypatch.setitem(chunks_module.SIZES, "cpu", TINY)
    fix_the_gate(monkeypatch, reason)
    out = tmp_path / "figures.json"
    assert cli.main(["demo", "--device", "cpu", "--batches", "2", "--json", str(out)]) == 0
    captured = capsys.readouterr()
    assert "512 tokens, base chunk 128" in captured.out and "one size" in captured.out
    assert captured.err == "" and not caplog.records  # said once, after the bar
    chunks = json.loads(out.read_text())["chunks"]
    assert 0 < chunks["profile_forwards"] <= 64
    assert ("equal time" in captured.out) == (not reason)
    if reason:
        assert "The fit is not usable: median error 82% over 15%. No plan was made" in captured.out
        assert chunks["equal time"] is None
    else:
        assert "The fit is usable" in captured.out
    for name in ("one size",) if reason else ("equal time", "one size"):
        assert sum(chunks[name]["sizes"]) == TINY.context
        assert len(chunks[name]["measured_ms"]) == len(chunks[name]["sizes"])
        assert min(chunks[name]["measured_ms"]) > 0


@pytest.mark.parametrize(
    ("spread", "says"),
    [
        (0.1, "the plan was run: the times of its chunks spread by 10%, those of one size by 40%."),
        (0.4, "it did not help here: the times of its chunks spread by 40%, those of one size by"),
        (None, "The fit is not usable: too few. No plan was made, and a server would keep its"),
    ],
)
def test_the_verdict_is_about_what_was_measured(spread: float | None, says: str) -> None:
    def chunks(spread: float) -> chunks_module.Chunks:
        return chunks_module.Chunks([1, 1], [9.0, 9.0], [1 - spread / 2, 1 + spread / 2])

    found: Any = dataclasses.make_dataclass("Found", ("size", "fit", "fixed", "planned"))(
        TINY,
        dataclasses.make_dataclass("Fit", ("reason",))("too few"),
        chunks(0.4),
        None if spread is None else chunks(spread),
    )
    assert says in demo_module.verdict(found)


def test_without_scipy_the_demo_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert cli.main(["demo", "--device", "cpu", "--batches", "2"]) == 0
    assert "pystage-h2d[pp]" in capsys.readouterr().out


def test_the_decoder_sees_its_history(device: str) -> None:
    """The last logits of a prompt are the same however it is cut."""
    decoder = chunks_module.Decoder(TINY, torch.device(device))
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

    monkeypatch.setattr(replay_module, "resolve", flip)
    assert demo(mooncake) == cli.EXIT_FAILED
    captured = capsys.readouterr()
    assert f"wrong ids: batch {bad}: id 29 (request " in captured.err
    assert "host time" not in captured.out


def test_a_missing_id_fails(
    mooncake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replay_module, "resolve", lambda staged: pystage.resolve(staged)[1:])
    assert demo(mooncake) == cli.EXIT_FAILED
    assert "29 ids came through the pool, 30 by the plain path" in capsys.readouterr().err


def test_a_difference_is_traced_to_its_request() -> None:
    batch = trace.Batch(requests=[4, 7], starts=[2, 512], stops=[5, 520])
    plain = torch.arange(11)
    ours = plain.clone()
    ours[5] = 99
    text = replay_module._describe_difference(batch, ours, plain)
    assert text.startswith("id 5 (request 7, position 514) is 99 through the pool and 5 by")
    assert [replay_module._request_of(batch, at) for at in (0, 2, 3, 10)] == [
        (4, 2),
        (4, 4),
        (7, 512),
        (7, 519),
    ]
    with pytest.raises(IndexError, match="past the end of the batch"):
        replay_module._request_of(batch, 11)


def test_memory_that_is_not_pinned_is_shown_with_its_reason(
    mooncake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(mooncake)
    output.show(demo_module.pool_table(found))
    assert "not pinned" not in capsys.readouterr().out
    figures = dataclasses.replace(
        found.pool, why_pageable="[memlock] limit is 64 KiB", pageable_bytes=3 << 20
    )
    output.show(demo_module.pool_table(dataclasses.replace(found, pool=figures)))
    shown = capsys.readouterr().out
    assert "not pinned" in shown and "3.0 MiB: [memlock] limit is 64 KiB" in shown


def test_paths_take_turns_and_see_the_chunks(
    mooncake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, list[int], list[int]]] = []

    def noting(name: str, path: Any) -> Any:
        def noted(self: replay_module.Paths, batch: trace.Batch, ids: Any) -> torch.Tensor:
            order.append((name, batch.starts, batch.stops))
            parts = zip(ids, batch.starts, batch.stops, strict=True)
            expected = [np.array(whole)[start:stop] for whole, start, stop in parts]
            result: torch.Tensor = path(self, batch, ids)
            assert result.tolist() == np.concatenate(expected).tolist()
            return result

        return noted

    for name in ("plain", "through_pool"):
        monkeypatch.setattr(
            replay_module.Paths, name, noting(name, getattr(replay_module.Paths, name))
        )
    work = replay_module.Workload(trace.read_trace(mooncake), 2, chunk_tokens=30, warm_up_batches=2)
    with pystage.StagingPool("cpu") as pool:
        report = replay_module.replay(pool, work, "deferred", lambda: None)
    names = [name for name, _, _ in order]
    assert names == ["through_pool", "plain", "plain", "through_pool"] * 2
    assert order[0][1:] == ([0], [30])
    assert order[-1][1:] == ([512], [542])  # history is not prefilled
    assert (report.batches, report.tokens, report.requests) == (2, 60, 2)


def test_warm_up_is_in_no_figure(mooncake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[int]] = []

    def count(nanoseconds: Any) -> replay_module.HostTime:
        timed.append([int(ns) for ns in nanoseconds])
        return replay_module.HostTime(1.0, 1.0, 1.0)

    monkeypatch.setattr(replay_module, "_host_time", count)
    work = replay_module.Workload(trace.read_trace(mooncake), 7, chunk_tokens=30, warm_up_batches=4)
    with pystage.StagingPool("cpu") as pool:
        report = replay_module.replay(pool, work, "deferred", lambda: None)
        assert pool.stats().stages == 11
    assert [len(times) for times in timed] == [7] * 4  # stage, resolve, both, plain
    assert timed[2] == [a + b for a, b in zip(timed[0], timed[1], strict=True)]
    assert report.tokens == 7 * 30
    assert report.pool.wire_bytes == 7 * 30 * 4


def test_host_time_is_in_microseconds() -> None:
    times = replay_module._host_time([n * 1000 for n in range(1, 102)])
    assert times == replay_module.HostTime(p50_us=51.0, p99_us=100.0, max_us=101.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk", "0"], "Invalid value for '--chunk'"),
        (["--batches", "x"], "Invalid value for '--batches'"),
        (["--vocab", "9" * 30], "Invalid value for '--vocab'"),
        (["--chunk", str((1 << 24) + 1)], "Invalid value for '--chunk'"),
        (["--batches", "-1"], "Invalid value for '--batches'"),
        (["--device", "mps"], "--device: 'mps' is not cpu, cuda or cuda:N"),
        (["--device", "nothing"], "--device: 'nothing' is not cpu, cuda or cuda:N"),
        (["--issue", "later"], "'later' is not one of 'deferred', 'eager'"),
        (["--trace", "/none/of.csv"], "--trace: cannot read /none/of.csv: No such file"),
        (["--trace", "/"], "--trace: cannot read /: Is a directory"),
        (["--sizes", "1"], "No such option"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_a_gpu_that_is_not_among_those_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert output.find_device("cuda") == torch.device("cuda")
    assert output.find_device("cuda:1") == torch.device("cuda:1")
    assert cli.main(["demo", "--device", "cuda:2"]) == 2
    assert "no cuda:2 here: torch sees 2 CUDA device(s)" in capsys.readouterr().err


def test_help_without_a_command_and_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    whole = capsys.readouterr().out
    for command in ("demo", "info", "doctor"):
        assert command in whole
        assert cli.main([command, "-h"]) == 0
        assert "Exit status: 0 done; 1 demo: ids differ" in " ".join(
            capsys.readouterr().out.split()
        )
    assert "Exit status: 0 done; 1 demo: ids differ" in " ".join(whole.split())
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pystage {pystage.__version__}\n"


# --- --json


@pytest.mark.parametrize("command", ["demo", "info", "doctor"])
@pytest.mark.parametrize("path", ["{}", "{}/none/figures.json"])
def test_a_path_that_cannot_be_written_is_noticed_before_the_work(
    command: str,
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_work(*arguments: Any) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(demo_module, "replay", no_work)
    monkeypatch.setattr(doctor_module, "examine", no_work)
    path = path.format(tmp_path)
    assert cli.main([command, "--json", path]) == 2
    captured = capsys.readouterr()
    assert f"pystage: --json: cannot write {path}: " in captured.err and captured.out == ""


def test_json_to_standard_output_is_alone_there(
    mooncake: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(mooncake, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["batches"] == 12
    assert cli.main(["info", "--json", "-"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["version"] == pystage.__version__ and info["torch"] == torch.__version__


def test_a_file_is_kept_until_there_is_something_to_write(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("what was there, longer than what comes")
    for path in (old, new):
        with pytest.raises(ZeroDivisionError), output.json_output(str(path)):
            raise ZeroDivisionError
    assert old.read_text() == "what was there, longer than what comes" and not new.exists()
    for path in (old, new):
        with output.json_output(str(path)) as write:
            write({"a": 1})
        assert json.loads(path.read_text()) == {"a": 1}
    with output.json_output("/dev/null") as write:
        write({"a": 1})


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    figures: Mapping[str, Any] = {"a": nan, "b": [1.5, (inf, 2)], "c": {"d": -inf, "e": "x"}}
    with output.json_output(str(tmp_path / "out")) as write:
        write(figures)
    found = json.loads((tmp_path / "out").read_text())
    assert found == {"a": None, "b": [1.5, [None, 2]], "c": {"d": None, "e": "x"}}


def test_a_bad_trace_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("a,b\n1,2\n")
    assert demo(path) == cli.EXIT_CANNOT_RUN
    assert "bad.csv: its columns are a,b; expected" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_gpu_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--device", "cuda"]) == cli.EXIT_CANNOT_RUN
    captured = capsys.readouterr()
    assert "no cuda here" in captured.err and "sees no CUDA device (pystage doctor" in captured.err


def test_exit_statuses_are_those_that_are_promised() -> None:
    statuses = (cli.EXIT_FAILED, cli.EXIT_CANNOT_RUN, cli.EXIT_INTERRUPTED)
    assert statuses == (1, 2, 130)
    for status in statuses:
        assert f"; {status} " in output.EXIT_STATUS


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert pystage.build_info().torch_built in shown
    assert "cuda architectures" in shown


# --- without typer


@pytest.fixture
def commands_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pystage.cli.commands", raising=False)
    monkeypatch.delattr(cli, "commands", raising=False)


@pytest.fixture(params=["typer", "rich"])
def no_typer(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, commands_anew: None
) -> None:
    """Neither of them, or a typer without the rich that belongs to it."""
    for name in (request.param, "rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("commands_anew")
def test_a_typer_that_is_too_old_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(typer, "__version__", "0.18.3")
    assert cli.main(["demo", "--sizes", "1"]) == 2
    assert "unrecognized arguments: --sizes" in capsys.readouterr().err  # argparse says so


@pytest.mark.usefixtures("no_typer")
def test_without_typer_there_is_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch built         {pystage.build_info().torch_built}" in lines
    assert cli.main(["info", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == pystage.__version__


@pytest.mark.usefixtures("no_typer")
def test_without_typer_there_is_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["demo", "--device", "cpu", "--batches", "20", "--no-profile", "--issue", "eager"]
    assert cli.main(few) == 0
    assert "20" in capsys.readouterr().out
    assert cli.main([*few, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.dumps(report).count("eager") >= 1


@pytest.mark.usefixtures("no_typer")
def test_without_typer_there_is_the_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_module, "SELF_TEST_SECONDS", 0.05)
    status = cli.main(["doctor", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "state", "found", "what", "to", "do"]
    (device,) = (line for line in lines if line.startswith("device "))
    assert device.split()[1] == "ok"
    assert status == (0 if "All 8 checks passed." in lines else 1)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["demo", "--chunk", "0"], 2, "--chunk: 0 is not between 1 and 16777216"),
        (["demo", "--trace", "/nowhere"], 2, "--trace: cannot read /nowhere: No such file"),
        (["other"], 2, "invalid choice: 'other'"),
        (["info", "--json", "/"], 2, "--json: cannot write /: Is a directory"),
        (["doctor", "--device", "mps"], 2, "--device: 'mps' is not cpu, cuda or cuda:N"),
        ([], 0, "usage: pystage [-h]"),
        (["doctor", "-h"], 0, "Exit status: 0 done;"),
        (["--version"], 0, f"pystage {pystage.__version__}"),
    ],
)
@pytest.mark.usefixtures("no_typer")
def test_without_typer_messages_are_the_same(
    arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    assert says in " ".join((captured.err if status else captured.out).split())


def test_without_typer_python_m_runs_too() -> None:
    code = (
        "import runpy, sys; sys.modules['typer'] = sys.modules['rich'] = None; "
        "sys.argv = ['pystage', 'info']; runpy.run_module('pystage', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert pystage.__version__ in done.stdout


def test_plain_tables_stay_within_the_terminal() -> None:
    table = output.Table("title", ("name", "found"))
    table.add("a", "some words that are longer than the width that there is")
    table.add("bb", "")
    assert output.as_text(table, 30).splitlines() == [
        "title",
        "name  found",
        "a     some words that are",
        "      longer than the width",
        "      that there is",
        "bb",
    ]
    numbers = output.Table("", ("", "p50"), numbers=True)
    numbers.add("stage", "1.5")
    assert output.as_text(numbers, 80).splitlines() == ["       p50", "stage  1.5"]


# --- processes


def test_it_runs_with_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pystage", "demo", "--device", "mps"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "pystage: --device: 'mps' is not cpu, cuda or cuda:N\n"


@pytest.mark.parametrize("missing", [(), ("typer", "rich")])
def test_a_reader_that_leaves_is_no_traceback(missing: tuple[str, ...]) -> None:
    code = f"""
import sys
for name in {missing!r}:
    sys.modules[name] = None
from pystage import cli
sys.stdin.read()
sys.exit(cli.main(["info"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert errors == b"" and process.returncode == 2


@pytest.mark.parametrize("command", ["info", "demo --device cpu --batches 9 --no-profile"])
def test_a_closed_standard_output_is_no_traceback(command: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m pystage {command} >&-"],
        stderr=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("command", "missing"), [("demo", ""), ("doctor", ""), ("doctor", "typer")]
)
def test_control_c_is_quiet(command: str, missing: str) -> None:
    """The signal comes in the middle of the work."""
    code = f"""
import os, signal, sys
if {missing!r}:
    sys.modules[{missing!r}] = None
from pystage import StagingPool, cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for jobs behind &
stage = StagingPool.stage
def interrupted(*arguments, **more):
    os.kill(os.getpid(), signal.SIGINT)
    return stage(*arguments, **more)
StagingPool.stage = interrupted
sys.exit(cli.main([{command!r}, "--device", "cpu"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_on_a_terminal_bars_leave_and_messages_keep_their_lines(mooncake: Path) -> None:
    """What is logged or warned of while a bar is there is on lines of its own."""
    code = f"""
import logging, sys, warnings
from pystage import StagingPool, cli
stage = StagingPool.stage
def loud(pool, *arguments, **more):
    logging.getLogger("pystage").warning("logged in the middle")
    return stage(pool, *arguments, **more)
StagingPool.stage = loud
sys.exit(cli.main(["demo", "--no-profile", "--device", "cpu", "--trace", {str(mooncake)!r},
                   "--batches", "3", "--chunk", "30"]))
"""
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            block = os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        seen += block
    os.close(master)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and b"host time" in out
    lines = [line.rpartition("\x1b[2K")[2] for line in seen.decode().replace("\r", "").split("\n")]
    assert lines.count("logged in the middle") == 23
    assert "batches" in seen.decode()  # there was a bar
    assert "batches" not in lines[-1]  # and it is gone
