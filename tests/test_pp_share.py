"""Sharing a profile between ranks, in real process groups with one process per rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pystage.pp import (
    ChunkSizer,
    LatencyModel,
    Profile,
    RemoteProfileError,
    Sample,
    SamplePlan,
    share_model,
    share_profile,
)

PLAN = SamplePlan.spread(base_chunk=8192, context_len=131072)


def measured() -> Profile:
    samples = tuple(
        Sample(h, c, 4.0 + 0.0105 * c + 3.8e-7 * (2 * h + c) * c + (i % 5) / 7, 1.0 / 3)
        for i, (h, c) in enumerate(PLAN.points)
    )
    return Profile(samples, len(samples), 1.5, "enough")


def not_mine() -> Profile:
    raise AssertionError("only the source rank may profile")


def share_and_fit(rank: int, folder: str) -> None:
    profile = share_profile(measured if rank == 0 else not_mine)
    model = LatencyModel.fit(profile)
    Path(folder, f"{rank}.json").write_text(json.dumps([profile.to_json(), model.to_json()]))


def share_the_fit(rank: int, folder: str) -> None:
    model = share_model((lambda: LatencyModel.fit(measured())) if rank == 0 else no_model_of_mine)
    plans = [list(ChunkSizer(model, base_chunk=8192, context_len=131072).choose(65_536, 4).chunks)]
    Path(folder, f"{rank}.json").write_text(json.dumps([model.to_json(), plans]))


def no_model_of_mine() -> LatencyModel:
    raise AssertionError("only the source rank may fit")


def share_from_the_last(rank: int, folder: str) -> None:
    group = dist.new_group([1, 2])
    if rank == 0:
        return
    profile = share_profile(measured if rank == 2 else not_mine, group=group, src=2)
    Path(folder, f"{rank}.json").write_text(json.dumps(profile.to_json()))


def fail_on_the_first(failure: BaseException, rank: int, folder: str) -> None:
    def broken() -> Profile:
        raise failure

    try:
        share_profile(broken if rank == 0 else not_mine)
    except (LookupError, KeyboardInterrupt, RemoteProfileError) as error:
        seen = f"{type(error).__name__}: {error}"
    # The group is still in step: nobody is left in a collective of the failed call.
    total = torch.ones(1)
    dist.all_reduce(total)
    Path(folder, f"{rank}.json").write_text(json.dumps([seen, total.item()]))


def in_group(rank: int, ranks: int, folder: str, body: Callable[[int, str], None]) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    try:
        body(rank, folder)
    finally:
        dist.destroy_process_group()


def on_ranks(ranks: int, folder: Path, body: Callable[[int, str], None]) -> None:
    """Runs `body` on every rank; fails if one raises. One that hangs meets the group's timeout."""
    mp.spawn(in_group, args=(ranks, str(folder), body), nprocs=ranks, join=True)


def test_every_rank_has_the_same_samples_and_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    on_ranks(3, tmp_path, share_and_fit)
    first, *others = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(3)]
    assert first[0] == json.loads(json.dumps(measured().to_json()))
    assert first[1]["report"]["usable"]
    assert others == [first, first]


def test_every_rank_has_the_model_that_one_has_fitted(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    on_ranks(2, tmp_path, share_the_fit)
    first, second = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)]
    assert first == second and len(first[0]["committee"]) == 5


RANK = """
import json, os, sys
from tests.test_pp_share import *
rank, folder = int(sys.argv[1]), sys.argv[2]
def decide(rank, folder):
    mine = LatencyModel.fit(noisy())  # what each would have for itself
    share_the_fit(rank, folder)
    print(json.dumps(mine.to_json()["form"]))
in_group(rank, 2, folder, decide)
"""


def noisy() -> Profile:
    rng = np.random.default_rng(9)
    rows = measured().to_json()
    for row in rows["samples"]:
        row[2] *= float(np.exp(0.1 * rng.standard_normal()))
    return Profile.from_json(rows)


def test_ranks_on_unlike_cpus_use_the_same_model_and_plans(tmp_path: Path) -> None:
    """OpenBLAS picks its kernels by the CPU, and fits end differently with them."""
    pytest.importorskip("scipy")
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)],
            env=os.environ | {"OPENBLAS_CORETYPE": kind, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for rank, kind in enumerate(("Haswell", "Sandybridge"))
    ]
    done = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], done
    first, second = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)]
    assert first == second
    own = [out.strip().splitlines()[-1] for out, _ in done]
    assert own[0] != own[1]  # else the two core types are no test


def test_a_group_of_some_ranks_with_another_source(tmp_path: Path) -> None:
    on_ranks(3, tmp_path, share_from_the_last)
    expected = json.loads(json.dumps(measured().to_json()))
    assert not (tmp_path / "0.json").exists()
    assert [json.loads((tmp_path / f"{r}.json").read_text()) for r in (1, 2)] == [expected] * 2


def test_a_failure_on_the_first_rank_is_seen_on_all_and_none_hangs(tmp_path: Path) -> None:
    failure = LookupError("no state slot left after 17 forwards")
    on_ranks(3, tmp_path, partial(fail_on_the_first, failure))
    first, *others = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(3)]
    assert first == ["LookupError: no state slot left after 17 forwards", 3.0]
    for seen, total in others:
        assert seen.startswith(
            "RemoteProfileError: rank 0 could not profile: LookupError: no state"
        )
        assert total == 3.0


def test_an_interrupt_on_the_first_rank_ends_the_others_too(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, partial(fail_on_the_first, KeyboardInterrupt("stopped by hand")))
    first, second = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2)]
    assert first == ["KeyboardInterrupt: stopped by hand", 2.0]
    assert second[0].startswith("RemoteProfileError: rank 0 could not profile: KeyboardInterrupt")


def test_without_a_group_it_runs_here() -> None:
    assert not dist.is_initialized()
    profile = share_profile(measured)
    assert profile.samples == measured().samples
    with pytest.raises(ZeroDivisionError):
        share_profile(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
