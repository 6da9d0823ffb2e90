"""The sustained benchmark: its rows, the errors that it detects, and its page."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pystage
from bench import sustained
from bench.common import newest_on_gpu
from bench.report import figures
from bench.report.tables import target_table

SHORT = ("--device", "cpu", "--every", "0.4", "--traffic", "1")
HELD = ("resident_bytes", "pool_bytes", "fds", "threads", "device_bytes", "contexts")


def test_every_row_has_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "sustained.json"
    result = sustained.main([*SHORT, "--minutes", "0.02", "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert len(result["rows"]) == 3
    for row in result["rows"]:
        assert row["wrong"] == 0 and row["batches"] > 0 and row["tokens"] > 0
        assert row["host"]["samples"] == row["batches"]
        assert row["ready"]["samples"] == pytest.approx(row["batches"] / sustained.READY, abs=1)
        assert row["ready"]["p99"] >= row["host"]["p50"]
        assert row["copied_gb_per_s"] > 0
        assert set(HELD) <= row.keys()
    for name in ("date", "command", "commit", "torch", "device", "driver"):
        assert name in result
    assert [t for t in result["targets"] if t["measure"] in ("wrong ids", "threads: growth")] == [
        {"measure": "wrong ids", "target": "0", "value": 0, "unit": "", "ok": True},
        {"measure": "threads: growth", "target": "0", "value": 0, "unit": "", "ok": True},
    ]


def test_it_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    few = [*SHORT, "--minutes", "0.02", "--resume", "--out", str(tmp_path / "s.json")]
    first = sustained.main([*few, "--at-most", "0.008"])
    assert len(first["rows"]) == 1
    whole = sustained.main(few)
    assert whole["rows"][0] == first["rows"][0]
    assert [row["run"] for row in whole["rows"]] == [1, 2, 2]
    assert len(whole["runs"]) == 2
    minutes = [row["minute"] for row in whole["rows"]]
    assert minutes == sorted(minutes) and minutes[0] > 0
    assert sustained.main(few) == json.loads(json.dumps(whole))  # all are there


def test_one_wrong_id_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = pystage.resolve, iter(range(10**9))

    def wrong(staged: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        ids = right(staged, out=out)
        if next(calls) == 200:  # the first one after the warm-up
            ids[-1] += 1
        return ids

    monkeypatch.setattr(pystage, "resolve", wrong)
    few = [*SHORT, "--minutes", "0.014", "--out", str(tmp_path / "s.json")]
    result = sustained.main(few)
    assert sum(row["wrong"] for row in result["rows"]) == 1
    assert not result["targets"][0]["ok"]


def a_row(run: int = 1, **changes: Any) -> dict[str, Any]:
    times = {"p50": 10.0, "p99": 20.0}
    row = dict.fromkeys(HELD, 1 << 20) | {"run": run, "wrong": 0, "host": times, "ready": times}
    return row | {"minute": 1.0, "batches": 5, "tokens": 9, "pool_allocations": 2} | changes


@pytest.mark.parametrize("name", HELD)
def test_what_grows_is_noticed(name: str) -> None:
    rows = [a_row(), a_row(), a_row()]
    assert all(t["ok"] for t in sustained.targets(rows))
    rows[0][name] = 0  # the first row warms up
    assert all(t["ok"] for t in sustained.targets(rows))
    rows[2][name] += 64 << 20
    assert [t["ok"] for t in sustained.targets(rows)].count(False) == 1
    rows[2]["run"] = 2  # another process
    assert all(t["ok"] for t in sustained.targets(rows))
    rows[1][name] = None  # not to be had here
    assert all(t["ok"] for t in sustained.targets(rows))


def test_what_no_minute_has_is_not_met() -> None:
    rows = [a_row(device_bytes=None), a_row(device_bytes=None)]
    told = {t["measure"]: t for t in sustained.targets(rows)}["memory of the GPU: growth"]
    assert told["value"] is None and told["ok"] is None
    assert "not measured" in target_table({"targets": [told]})


def test_a_minute_unlike_the_others_is_noticed() -> None:
    rows = [a_row(), a_row(host={"p50": 10.0, "p99": 41.0}), a_row()]
    assert [t["measure"] for t in sustained.targets(rows) if not t["ok"]] == [
        "p99 of stage + resolve, worst minute of the median one"
    ]


def test_the_page_and_the_plot_are_those_of_the_newest_run_on_a_gpu(tmp_path: Path) -> None:
    assert newest_on_gpu(tmp_path / figures.RESULTS, "sustained") is None
    assert figures.sustained_table(None) == "Not measured yet."
    folder = tmp_path / figures.RESULTS
    folder.mkdir(parents=True)
    rows = [a_row(minute=float(m), batches=1000 + m) for m in range(1, 21)]
    made = {"devices": 1, "date": "2026-01-01T00:00:00+00:00", "device": "GPU", "cores": 2}
    made |= {"cpu": "CPU", "driver": "1", "torch": "2", "commit": "a" * 40, "command": "python x"}
    made |= {"rows": rows, "targets": sustained.targets(rows), "minutes": 20.0, "streams": 4}
    made |= {"traffic_bytes": 512 << 20}
    for name, changes in (
        ("sustained-a.json", {}),
        ("sustained-b.json", {"date": "2026-02-01T00:00:00+00:00"}),
        ("sustained-c.json", {"date": "2026-03-01T00:00:00+00:00", "devices": 0}),
    ):
        (folder / name).write_text(json.dumps(copy.deepcopy(made) | changes))
    newest = newest_on_gpu(tmp_path / figures.RESULTS, "sustained")
    assert newest is not None and newest.name == "sustained-b.json"
    text = figures.sustained_table(newest)
    assert "20 minutes, 20,210 batches, 180 ids, 4 streams, beside copies of 512 MiB" in text
    assert "| wrong ids" in text and "| 20 " in text and "sustained-b.json" in text
    pytest.importorskip("matplotlib")
    figures.draw_sustained(made, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<path") > 20
