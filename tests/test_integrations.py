"""What of the SGLang plugin needs no SGLang."""

from __future__ import annotations

import io
import json
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pystage import StagingPool, TokenRangeError
from pystage._C import ids_view
from pystage.integrations import sglang as plugin
from pystage.integrations import sglang_pp
from pystage.pp import ProfileError

ROOT = Path(__file__).resolve().parent.parent


def test_a_view_of_ids() -> None:
    ids = array("q", range(100))
    view = ids_view(ids, 0, 90)[10:]
    assert len(view) == 80 and view[0] == 10 and view[-1] == 89
    assert list(view[-3:]) == [87, 88, 89] and len(view[200:]) == 0 and len(view[5:2]) == 0
    assert list(view[::40]) == [10, 50]
    assert view[5:10].copy() == array("q", range(15, 20))
    assert len(ids_view(ids, -10, 1 << 70)) == 10 and len(ids_view(ids, 90, 10)) == 0
    with pytest.raises(IndexError):
        view[80]
    with pytest.raises(TypeError):
        ids_view(ids, 0, "90")
    ids.append(1)


def test_a_view_of_ids_is_a_buffer() -> None:
    ids = array("q", range(100))
    view = ids_view(ids, 10, 90)
    with memoryview(view) as whole, whole[5:] as part:
        assert whole.readonly and whole.format == "q" and whole.tolist() == list(range(10, 90))
        assert part[0] == 15
        with pytest.raises(BufferError):
            ids.append(1)
    ids.append(1)
    assert np.asarray(view).tolist() == list(range(10, 90))
    evens = ids_view(np.arange(10)[::2], 1, 4)
    assert memoryview(evens).tolist() == [2, 4, 6]
    with pytest.raises((BufferError, ValueError)):
        array("q").frombytes(evens)
    del ids[50:]
    with pytest.raises(BufferError, match="fewer ids than when the view was made"):
        memoryview(view)
    with pytest.raises(BufferError, match="one dimension"):
        memoryview(ids_view(np.zeros((3, 2), np.int64), 0, 2))


def test_views_of_ids_hold_their_array_and_let_go() -> None:
    ids = array("q", range(100))
    before = sys.getrefcount(ids)
    for _ in range(10):
        view = ids_view(ids, 10, 90)
        assert sys.getrefcount(ids) == before + 1
        kept = [view[5:], view[:0], view.copy(), list(view), memoryview(view)[3:]]
        with pytest.raises(IndexError):
            view[99]
        with pytest.raises(TypeError):
            view["a"]
        with pytest.raises(TypeError):
            ids_view(ids, None, 1)
        with pytest.raises(TypeError, match="read-write"):
            io.BytesIO(bytes(8)).readinto(view)
        del view, kept
    assert sys.getrefcount(ids) == before
    view = ids_view(array("q", [1, 2, 3]), 1, 3)
    assert list(view) == [2, 3]  # nobody else holds it


def test_views_of_ids_are_staged() -> None:
    ids = array("q", range(100))
    with StagingPool("cpu") as pool:
        staged = pool.stage([ids_view(ids, 90, 100), ids_view(ids, 0, 5), array("q", [7])])
        ids.append(1)
        assert staged.tolist() == [*range(90, 100), *range(5), 7]
        with pytest.raises(TokenRangeError, match=r"token_ids\[1\]\[2\] is 12"):
            pool.stage([ids[:5], ids_view(ids, 10, 20)], vocab_size=12)


def test_settings() -> None:
    read = plugin.Settings.from_environment
    assert read({}) == plugin.Settings()
    given = {
        "PYSTAGE_SGLANG": "0",
        "PYSTAGE_SGLANG_CAPACITY_MIB": "8",
        "PYSTAGE_SGLANG_AT_CAPACITY": "wait",
        "PYSTAGE_SGLANG_ISSUE": "Eager",
        "PYSTAGE_SGLANG_VALIDATE_IDS": "1",
        "PYSTAGE_SGLANG_SIZER": "1",
    }
    assert set(given) == set(plugin.ENVIRONMENT.values())
    assert read(given) == plugin.Settings(False, 8, "wait", "eager", True, True)
    for name in given:
        with pytest.raises(ValueError, match=f"{name} is '-1'; it is "):
            read({name: "-1"})


def test_settings_are_documented() -> None:
    text = (ROOT / "docs/sglang.md").read_text()
    for name in plugin.ENVIRONMENT.values():
        assert f"| `{name}` |" in text


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([0, 511], None),
        ([], None),
        ([5, 512, 9], "input_ids[1] is 512, outside the vocabulary of 512 (1 of 3 ids are)"),
        ([-1, 600], "input_ids[0] is -1, outside the vocabulary of 512 (2 of 2 ids are)"),
    ],
)
def test_bad_ids(ids: list[int], error: str | None) -> None:
    req = SimpleNamespace(
        origin_input_ids=array("q", ids), multimodal_inputs=None, input_embeds=None
    )
    assert plugin._bad_id(req, 512) == error
    req.multimodal_inputs = object()
    assert plugin._bad_id(req, 512) is None


# --- the ranks of a stage profile together ---


def owner() -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(context_len=8192),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 6000),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.empty(1, 8192, device="meta")),
        page_size=16,
        chunked_prefill_size=1024,
        max_prefill_tokens=2048,
        device="cpu",
    )


def test_the_plan_fits_the_kv_cache() -> None:
    plan = sglang_pp.sample_plan(owner())
    assert plan.base == (0, 1024) and plan.page_size == 64
    assert max(history + chunk for history, chunk in plan.points) <= 6000 - 64
    assert max(chunk for _, chunk in plan.points) <= 1280


def stage_rank(rank: int, folder: str, fails_at: int) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    seen: list[list[int]] = []

    def step(history_len: int, chunk_len: int) -> None:
        seen.append([history_len, chunk_len])
        if rank == 0 and len(seen) == fails_at:
            raise LookupError("no state slot left")

    outcome: Any = None
    if rank == 0:
        stage = SimpleNamespace(world_size=2, cpu_group=dist.group.WORLD)
        try:
            outcome = len(sglang_pp._lead(step, owner(), stage))
        except ProfileError as error:
            outcome = str(error)
    else:
        sglang_pp._follow(step, dist.group.WORLD)
    Path(folder, f"{rank}.json").write_text(json.dumps([seen, outcome]))
    dist.destroy_process_group()


@pytest.mark.parametrize("fails_at", [0, 5])
def test_every_rank_runs_the_leaders_points(tmp_path: Path, fails_at: int) -> None:
    pytest.importorskip("scipy")
    mp.spawn(stage_rank, (str(tmp_path), fails_at), nprocs=2)
    (led, outcome), (followed, _) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert led == followed
    if fails_at:
        assert len(led) == fails_at and "no state slot left" in outcome
    else:
        assert len(led) > 20 and outcome > 20
