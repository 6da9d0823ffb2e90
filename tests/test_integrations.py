"""The SGLang plugin without SGLang: the parts that do not need it, and the hooks with
``small_sglang``, which has the symbols that they replace. ``test_sglang.py`` uses the real SGLang.

This is one file because nearly all tests share the helpers that edit, load and run
``small_sglang``.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import json
import linecache
import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pystage
from pystage import StagedTokens, StagingPool, TokenRangeError
from pystage._C import ids_view
from pystage.batch import PrefillBatch, forgotten_resolves, prepare_for_extend
from pystage.cli import doctor
from pystage.integrations import sglang as plugin
from pystage.integrations.sglang import known_code, pp
from pystage.pp import ProfileError, QueueSizer

from .test_pp_sizer import LAW, model_of

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
        "PYSTAGE_SGLANG_BUDGET_MS": "60",
        "PYSTAGE_SGLANG_CORRECT": "1",
        "PYSTAGE_SGLANG_SMALL": "0",
        "PYSTAGE_SGLANG_CPU": "1",
    }
    assert set(given) == set(plugin.ENVIRONMENT.values())
    assert read(given) == plugin.Settings(
        False, 8, "wait", "eager", True, True, 60, True, False, True
    )
    for name in given:
        with pytest.raises(ValueError, match=f"{name} is '-1', but must be "):
            read({name: "-1"})


@pytest.mark.parametrize(
    ("text", "mib"), [("1", 1), ("1048576", 1 << 20), ("0", 0), ("1048577", 0), ("²", 0)]
)
def test_capacity_from_1_to_2_to_the_20_mib(text: str, mib: int) -> None:
    variable = "PYSTAGE_SGLANG_CAPACITY_MIB"
    if mib:
        assert plugin.Settings.from_environment({variable: text}).capacity_mib == mib
    else:
        with pytest.raises(
            ValueError, match=f"{variable} is '{text}', but must be a number of MiB"
        ):
            plugin.Settings.from_environment({variable: text})


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
    assert plugin.validation.bad_id(req, 512) == error
    req.multimodal_inputs = object()
    assert plugin.validation.bad_id(req, 512) is None


# --- what SGLang's code does ---------------------------------------------------------------------


class Forms:
    """``get_fill_ids`` as it is in releases, and as a view cannot be."""

    def get_0_5_13(self: Any) -> Any:
        return self.full_untruncated_fill_ids[: self.fill_len]

    def get_0_5_20(self: Any) -> Any:
        """A docstring."""
        return self.full_untruncated_fill_ids[: self.extend_range.end]

    def get_0_5_23(self: Any) -> Any:
        return self.full_untruncated_fill_ids[: self.extend_end]

    def from_a_start(self: Any) -> Any:
        return self.full_untruncated_fill_ids[self.prefix_len : self.extend_end]

    def behind_the_prefix(self: Any) -> Any:
        return self.full_untruncated_fill_ids[self.prefix_len :]

    def to_a_cap(self: Any) -> Any:
        return self.full_untruncated_fill_ids[: min(self.extend_end, self.cap)]

    def with_a_tail(self: Any) -> Any:
        return self.full_untruncated_fill_ids[: self.extend_end] + self.tail

    def without_the_last(self: Any) -> Any:
        return self.full_untruncated_fill_ids[: -self.extend_end]

    def one_more(self: Any) -> Any:
        return self.full_untruncated_fill_ids[: self.extend_end + 1]

    def to_a_number(self: Any) -> Any:
        return self.full_untruncated_fill_ids[: self.extend_end & 0xFFFF]

    def every_other(self: Any) -> Any:
        return self.full_untruncated_fill_ids[: self.extend_end : 2]

    def as_a_list(self: Any) -> Any:
        return [*self.full_untruncated_fill_ids[: self.extend_end]]

    def as_a_tuple_of_one(self: Any) -> Any:
        return (self.full_untruncated_fill_ids[: self.extend_end],)

    def the_array_itself(self: Any) -> Any:
        ids = self.full_untruncated_fill_ids
        return ids[: self.extend_end] if ids[self.extend_end :] else ids

    def all_of_them(self: Any) -> Any:
        return self.full_untruncated_fill_ids

    def up_to_a_method(self: Any) -> Any:
        return self.full_untruncated_fill_ids[: self.extend_end()]

    def with_an_argument(self: Any, more: int = 0) -> Any:
        return self.full_untruncated_fill_ids[: self.extend_end]


REAL = [name for name in vars(Forms) if name.startswith("get_0")]
OTHER = [name for name in vars(Forms) if not name.startswith(("get_0", "__"))]


@pytest.mark.parametrize("name", REAL)
def test_get_fill_ids_of_releases_is_known(name: str) -> None:
    end_of = known_code.end_of_fill_ids(getattr(Forms, name))
    req = SimpleNamespace(fill_len=5, extend_range=SimpleNamespace(end=5), extend_end=5)
    assert end_of(req) == 5


@pytest.mark.parametrize("name", OTHER)
def test_other_forms_of_get_fill_ids_are_not(name: str) -> None:
    with pytest.raises(known_code.OtherCodeError, match="get_fill_ids "):
        known_code.end_of_fill_ids(getattr(Forms, name))


def test_what_another_form_gives_is_told() -> None:
    with pytest.raises(known_code.OtherCodeError, match=r"with extend_end = 0, it gives .* of 1,"):
        known_code.end_of_fill_ids(Forms.one_more)
    theirs = array  # may do anything later
    with pytest.raises(known_code.OtherCodeError):
        known_code.end_of_fill_ids(
            lambda self: theirs("q", self.full_untruncated_fill_ids[: self.extend_end])
        )
    with pytest.raises(known_code.OtherCodeError):
        known_code.end_of_fill_ids(len)


def function(text: str) -> Callable[..., Any]:
    """Of this text: it has a source, as a function of a module."""
    name = f"<{hash(text)}>"
    scope: dict[str, Any] = {}
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec"), scope)
    found: Callable[..., Any] = scope["f"]
    return found


def test_a_fingerprint_is_of_what_the_code_says() -> None:
    plain = function("def f(a, b=None):\n    if a is not None:\n        return a + 1\n")
    same = function(
        "def f(a: int, b: 'x' = None) -> int:\n"
        "    'What it does.'\n    # why\n"
        "    if (a is not\n            None):\n        return (a + 1)  # how\n"
    )
    assert known_code.fingerprint(plain) == known_code.fingerprint(same)
    for text in (
        "def f(a, b=None):\n    if a is not None:\n        return a + 2\n",
        "def f(a, b=None):\n    if a is not None:\n        return a - 1\n",
        "def f(a, b=None):\n    if a is None:\n        return a + 1\n",
        "def f(a, b=1):\n    if a is not None:\n        return a + 1\n",
        "def f(a, b=None):\n    if a is not None:\n        a.b\n        return a + 1\n",
        "@callable\ndef f(a, b=None):\n    if a is not None:\n        return a + 1\n",
    ):
        other = function(text.replace("@callable", "@(lambda f: f)"))
        assert known_code.fingerprint(plain) != known_code.fingerprint(other)
    assert known_code.fingerprint(len) == ""
    with pytest.raises(known_code.OtherCodeError, match="it has no source"):
        known_code.release_of(known_code.RESOLVE, len)


# --- the hooks -----------------------------------------------------------------------------------

small = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is not None, reason="the real SGLang is here"
)


class Small:
    """The small SGLang, freshly imported, and a plugin that is not loaded yet."""

    IDS = (*range(600, 900), *range(5))

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.relay = torch.arange(5000, 5010)

    def edit(self, module: str, old: str, new: str) -> None:
        """Another release, before it is imported."""
        path = self.folder / "sglang/srt" / f"{module.replace('.', '/')}.py"
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def module(self, name: str) -> Any:
        return importlib.import_module(f"sglang.srt.{name}")

    @property
    def schedule_batch(self) -> Any:
        return self.module("managers.schedule_batch")

    @property
    def common(self) -> Any:
        return self.module("utils.common")

    def load(self, *plugins: Callable[[], object]) -> dict[str, Any]:
        """As SGLang does it: all plugins, then their hooks."""
        self.module("managers.scheduler")
        self.module("plugins").PLUGINS[:] = plugins or (plugin.plugin,)
        self.module("plugins").load_plugins()
        return plugin.status()

    def hook(self, target: str, function: Any, kind: str = "AROUND") -> None:
        """What another plugin does."""
        registry = self.module("plugins.hook_registry")
        target = f"sglang.srt.{target}"
        registry.HookRegistry.register(target, function, registry.HookType[kind])

    def batch(self, device: str = "cpu") -> Any:
        """Two requests: 300 ids behind 600, and all 5 of another."""
        reqs = [self.schedule_batch.Req(range(1000), 600), self.schedule_batch.Req(range(5))]
        reqs[0].extend_end = 900
        return self.schedule_batch.ScheduleBatch(reqs, device)

    def resolve(self, batch: Any) -> list[int]:
        scheduler = self.module("managers.scheduler").Scheduler()
        relay = self.relay.to(batch.device)
        future_map = self.module("managers.overlap_utils").FutureMap(relay, batch.spec_algorithm)
        ids: list[int] = scheduler.forward(batch, future_map).tolist()
        assert batch.prefill_input_ids_cpu is None and batch.mix_running_indices is None
        self.extras, self.relay = future_map.extras, relay
        return ids

    def run(self, batch: Any = None) -> Any:
        """A batch prepared and resolved: the ids have to be right. Returns what was staged."""
        batch = self.batch() if batch is None else batch
        batch.prepare_for_extend()
        staged = batch.prefill_input_ids_cpu
        assert self.resolve(batch) == [*self.IDS]
        assert all(type(ids) is array for ids in batch.fill_ids)
        return staged

    def run_mixed(self, spec: bool = False, device: str = "cpu") -> None:
        batch = self.batch(device)
        batch.prepare_for_extend()
        batch.mix_running_indices = torch.tensor([3, 4], device=device)
        batch.spec_algorithm = self.schedule_batch.SpecAlgorithm(not spec)
        assert self.resolve(batch) == [*self.IDS, 5003, 5004]


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Small]:
    shutil.copytree(ROOT / "tests/small_sglang", tmp_path / "small")
    monkeypatch.syspath_prepend(str(tmp_path / "small"))
    for name in plugin.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYSTAGE_SGLANG_CPU", "1")
    monkeypatch.setenv("PYSTAGE_SGLANG_SMALL", "0")  # the small SGLang makes no small tensors
    monkeypatch.setattr(plugin.process, "state", plugin.process.State())
    monkeypatch.setattr(plugin.process, "pools", plugin.process.Pools())
    monkeypatch.setattr(plugin.process, "_warned", set())
    # A change of its prepare_for_extend changes this. The messages name the new fingerprint.
    monkeypatch.setitem(known_code.KNOWN[known_code.PREPARE], "f65eb41c4c6b9e96", "small")
    yield Small(tmp_path / "small")
    assert plugin.process.here.pool is None and not plugin.process.here.views
    plugin.process.pools.close()
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        del sys.modules[name]


PARTS = ["staging", "resolve", "mixed", "guard", "history", "metrics", "profiler"]


@small
def test_small_tensors_of_a_release_that_is_not_known_are_left(
    sglang: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYSTAGE_SGLANG_SMALL")
    status = sglang.load()
    assert status["active"] == PARTS and status["broken"] == []
    small, rows = status["left"]
    assert "small (no mem_cache.common:alloc_for_extend" in small
    assert "rows (no mem_cache.common:write_cache_indices" in rows
    assert sglang.run() is not None


@small
def test_no_views_for_code_that_is_not_known(sglang: Small) -> None:
    """A view lacks some of an array's methods, so this code would fail with one."""
    sglang.edit(
        "managers.schedule_batch",
        "flatten_arrays_to_pinned_cpu(input_ids",
        "flatten_arrays_to_pinned_cpu([array('q', ids.tolist()) for ids in input_ids]",
    )
    status = sglang.load()
    assert "history" not in status["active"]
    (history,) = status["left"]
    assert "history (its prepare_for_extend is not that of a known release" in history
    assert sglang.run() is not None


@small
def test_loaded(sglang: Small, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pystage.sglang")
    status = sglang.load()
    assert status["active"] == PARTS
    assert status["broken"] == status["left"] == [] and status["off"] == ""
    assert caplog.text.count("is active: staging, resolve, mixed, guard, history, metrics") == 1
    assert "(pool of 64 MiB, at capacity fallback, deferred; ids not validated)" in status["line"]
    sglang.common.configure_logger(None)
    assert caplog.text.count("is active") == 1


@small
@pytest.mark.parametrize("issue", ["deferred", "eager"])
def test_batches_go_through_the_pool(
    sglang: Small, monkeypatch: pytest.MonkeyPatch, device: str, issue: str
) -> None:
    monkeypatch.setenv("PYSTAGE_SGLANG_ISSUE", issue)
    assert type(sglang.run(sglang.batch(device))) is torch.Tensor and plugin.pool_stats() == []
    sglang.load()
    assert type(sglang.run(sglang.batch(device))) is StagedTokens
    sglang.run_mixed(device=device)
    (stats,) = plugin.pool_stats()
    assert stats.stages == stats.kernel_transfers == 2 and stats.tokens == 2 * len(Small.IDS)
    assert stats.eager_transfers == (2 if issue == "eager" else 0)
    assert plugin.status()["counts"]["sglang_stagings"] == 0


@small
def test_decode_and_speculative_batches_stay_sglangs(sglang: Small) -> None:
    sglang.load()
    batch = sglang.batch()
    batch.req_pool_indices = torch.tensor([7, 8])
    assert sglang.resolve(batch) == [5007, 5008]
    sglang.run_mixed(spec=True)
    assert sglang.extras == 2 and plugin.status()["counts"]["sglang_mixed"] == 1
    sglang.run_mixed()
    assert sglang.extras == 0 and plugin.status()["counts"]["sglang_mixed"] == 1


@small
def test_a_relay_that_is_checked_is_read_by_sglang(sglang: Small) -> None:
    """Its own CI marks what was read."""
    sglang.edit("managers.overlap_utils", "_DEBUG_ASSERT = False", "_DEBUG_ASSERT = True")
    sglang.load()
    sglang.run_mixed()
    assert sglang.relay[3:5].tolist() == [-1, -1]


@small
@pytest.mark.parametrize("name", sorted({*OTHER} - {"as_a_list", "as_a_tuple_of_one"}))
def test_another_get_fill_ids_is_left_alone(
    sglang: Small, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Whatever it gives, the ids are those without the plugin."""

    def ids() -> Any:
        batch = sglang.batch()
        for req in batch.reqs:
            req.cap, req.tail = 700, array("q", [77])
        try:
            batch.prepare_for_extend()
        except Exception as error:
            return type(error)
        return sglang.resolve(batch)

    sglang.schedule_batch.Req.get_fill_ids = getattr(Forms, name)
    expected = ids()
    status = sglang.load()
    assert ids() == expected
    assert "history" not in status["active"] and "staging" in status["active"]
    assert [line for line in status["left"] if line.startswith("history (get_fill_ids ")]
    assert "left to SGLang: history (get_fill_ids " in caplog.text


@small
def test_ids_of_another_type_get_no_view(sglang: Small) -> None:
    """A view is of an array up to an int: None, for one, is no end that it could have."""
    sglang.load()
    batch = sglang.batch()
    batch.reqs[0].full_untruncated_fill_ids = np.arange(1000)
    batch.reqs[1].extend_end = None
    seen: list[Any] = []
    plugin.staging.prepare_for_extend(
        lambda b: seen.extend(r.get_fill_ids() for r in b.reqs), batch
    )
    assert [type(ids) for ids in seen] == [np.ndarray, array]
    assert [len(ids) for ids in seen] == [900, 5]


@small
def test_another_resolve_is_left_alone(sglang: Small, caplog: pytest.LogCaptureFixture) -> None:
    """The extend part too: SGLang's code takes staged ids for the tensor they stand for."""
    sglang.edit(
        "managers.overlap_utils",
        "torch.cat([prefill_gpu, decode_gpu])",
        "torch.cat([prefill_gpu, decode_gpu + 1])",
    )
    status = sglang.load()
    assert type(sglang.run()) is StagedTokens
    sglang.relay -= 1
    sglang.run_mixed()
    assert plugin.pool_stats()[0].kernel_transfers == 2
    assert plugin.status()["counts"]["sglang_mixed"] == 1
    assert "mixed" not in status["active"] and "resolve" in status["active"]
    assert "left to SGLang: mixed (its resolve_forward_inputs is not that of a kn" in caplog.text


@small
def test_a_resolve_that_does_more_for_an_extend_does_it(sglang: Small) -> None:
    sglang.edit(
        "managers.overlap_utils",
        "            batch.input_ids = prefill_gpu\n",
        "            batch.input_ids = prefill_gpu\n            future_map.extras += 1\n",
    )
    sglang.load()
    sglang.run()
    assert sglang.extras == 1


FILL_IDS = "managers.schedule_batch.Req.get_fill_ids"
FLATTEN = "utils.common.flatten_arrays_to_pinned_cpu"
PREPARE = "managers.schedule_batch.ScheduleBatch.prepare_for_extend"


def needs_arrays(parts: list[Any]) -> None:
    """What others do with ids, and a view cannot."""
    for part in parts:
        assert part + array("q") == part and len(part.tobytes()) == 8 * len(part)
        assert pickle.loads(pickle.dumps(part)) == part


def around_get_fill_ids(original: Any, req: Any) -> Any:
    needs_arrays([original(req)])
    return original(req)


def around_flatten(original: Any, parts: Any, pin: Any) -> Any:
    needs_arrays(parts)
    return original(parts, pin)


def around_prepare(original: Any, batch: Any) -> Any:
    needs_arrays([req.get_fill_ids() for req in batch.reqs])
    return original(batch)


def other_get_fill_ids(req: Any) -> Any:
    return array("q", req.full_untruncated_fill_ids[: req.extend_end])


OTHERS = {
    "around get_fill_ids": (FILL_IDS, around_get_fill_ids, "AROUND"),
    "after get_fill_ids": (FILL_IDS, lambda ids, req: needs_arrays([ids]), "AFTER"),
    "replace get_fill_ids": (FILL_IDS, other_get_fill_ids, "REPLACE"),
    "around flatten": (FLATTEN, around_flatten, "AROUND"),
    "before flatten": (FLATTEN, lambda parts, pin: needs_arrays(parts), "BEFORE"),
    "around prepare": (PREPARE, around_prepare, "AROUND"),
}


@small
@pytest.mark.parametrize("first", [False, True], ids=["registers last", "registers first"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_where_others_hook_nothing_meets_a_view(
    sglang: Small, caplog: pytest.LogCaptureFixture, other: tuple[str, Any, str], first: bool
) -> None:
    def theirs() -> None:
        sglang.hook(*other)

    plugins = (theirs, plugin.plugin) if first else (plugin.plugin, theirs)
    status = sglang.load(*plugins)
    assert type(sglang.run()) is StagedTokens
    sglang.run_mixed()
    assert "history" not in status["active"] and "staging" in status["active"]
    assert "history (another plugin hooks " in status["left"][0]
    assert "left to SGLang: history (another plugin hooks " in caplog.text


@small
def test_a_function_that_others_replace_meets_no_view(sglang: Small) -> None:
    """By assignment, without SGLang's registry; also where only its caller has theirs."""

    def theirs() -> None:
        original = sglang.schedule_batch.flatten_arrays_to_pinned_cpu
        sglang.schedule_batch.flatten_arrays_to_pinned_cpu = lambda parts, pin: (
            needs_arrays(parts) or original(parts, pin)
        )

    status = sglang.load(theirs, plugin.plugin)
    sglang.run()
    assert "managers.schedule_batch has another flatten_arrays_to_pinned_cpu" in status["left"][0]
    assert "history" not in status["active"]


@small
def test_a_method_that_others_replace_meets_no_view(sglang: Small) -> None:
    def theirs() -> None:
        original = sglang.schedule_batch.Req.get_fill_ids
        sglang.schedule_batch.Req.get_fill_ids = lambda req: (
            needs_arrays([original(req)]) or original(req)
        )

    assert "history" not in sglang.load(plugin.plugin, theirs)["active"]
    sglang.run()


@small
def test_where_others_hook_resolve_it_is_not_preempted(sglang: Small) -> None:
    seen: list[Any] = []

    def theirs(original: Any, batch: Any, future_map: Any) -> Any:
        seen.append(batch.prefill_input_ids_cpu)
        return original(batch, future_map)

    target = "managers.overlap_utils.resolve_forward_inputs"
    status = sglang.load(lambda: sglang.hook(target, theirs), plugin.plugin)
    assert status["left"] == [
        "mixed (another plugin hooks managers.overlap_utils:resolve_forward_inputs)"
    ]
    sglang.run()
    sglang.run_mixed()
    assert [type(staged) for staged in seen] == [StagedTokens, StagedTokens]


# --- what the pool cannot stage -------------------------------------------------------------------


def left_to_sglang() -> int:
    count: int = plugin.status()["counts"]["sglang_stagings"]
    return count


@small
def test_a_closed_pool_ends_nothing(sglang: Small, caplog: pytest.LogCaptureFixture) -> None:
    sglang.load()
    sglang.run()
    (pool,) = plugin.process.pools._pools.values()
    assert pool is not None
    pool.close()
    for count in (1, 2):
        assert type(sglang.run()) is torch.Tensor
        assert left_to_sglang() == count
    assert caplog.text.count("PoolClosedError: ") == 1
    assert "SGLang's own staging is used for such batches" in caplog.text


@small
def test_a_failed_device_call_ends_nothing(sglang: Small) -> None:
    """There is no more memory for the pool. What SGLang asks for then, it gets."""
    code = """
    import resource, sys, types
    from array import array
    import torch
    from pystage.integrations import sglang as plugin
    plugin.process.state.settings = plugin.Settings(capacity_mib=1 << 14, cpu=True)
    ids = array("q", [1 << 40]) * (256 << 17)  # 256 MiB
    def own(parts, pin):
        resource.setrlimit(resource.RLIMIT_AS, limits)
        assert type(parts[0]) is array and len(parts[0]) == len(ids) and pin is False
        return "SGLang's"
    def prepare(batch):
        limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (limit + (64 << 20), limits[1]))
        return plugin.staging.flatten(own, [ids], False)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    batch = types.SimpleNamespace(device="cpu")
    plugin.process.pools.of("cpu").stage([ids[:10]])
    try:
        plugin.process.pools.of("cpu")._pool
        assert plugin.staging.prepare_for_extend(prepare, batch) == "SGLang's"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    print(plugin.status()["counts"]["sglang_stagings"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"] and "pystage: DeviceError: " in done.stderr


@small
@pytest.mark.parametrize("policy", ["fallback", "wait", "raise"])
def test_no_slot(sglang: Small, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    monkeypatch.setenv("PYSTAGE_SGLANG_AT_CAPACITY", policy)
    sglang.load()
    pool = StagingPool("cpu", 4096, at_capacity=policy, timeout_s=0.01)  # type: ignore[arg-type]
    plugin.process.pools._pools["cpu", -1] = pool
    held = pool.stage([array("q", [1 << 40]) * 500], [0])
    if policy == "raise":
        with pytest.raises(pystage.PoolExhaustedError):
            sglang.run()
        assert plugin.process.here.pool is None and not plugin.process.here.views
        # A batch that another error stops is not what was asked to be told of.
        pool.close()
        sglang.run()
        assert left_to_sglang() == 1
    else:
        staged = sglang.run()
        assert type(staged) is (StagedTokens if policy == "fallback" else torch.Tensor)
        assert left_to_sglang() == (policy == "wait")
    del held


@small
@pytest.mark.parametrize("staged", [True, False])
def test_merging_two_unresolved_prefills(sglang: Small, staged: bool) -> None:
    """Whoever staged them: without the guard the ids of the second are gone."""
    sglang.load()
    first, second = sglang.batch(), sglang.batch()
    for batch in (first, second):
        batch.prepare_for_extend()
        if not staged:
            batch.prefill_input_ids_cpu = batch.prefill_input_ids_cpu.cpu()
    first.merge_batch(second)
    assert sglang.resolve(first) == [*sglang.IDS, *sglang.IDS]


@small
@pytest.mark.parametrize("which", ["running", "mixed", "into mixed"])
def test_merging_ids_that_only_the_relay_has(sglang: Small, which: str) -> None:
    sglang.load()
    first, second = sglang.batch(), sglang.batch()
    second.prepare_for_extend()
    if which != "running":
        first.prepare_for_extend()
        mixed = second if which == "mixed" else first
        mixed.mix_running_indices = torch.tensor([3, 4])
    with pytest.raises(pystage.UnresolvedInputsError, match="would lose the staged ids of a pre"):
        first.merge_batch(second)
    assert len(first.reqs) == 2 and second.input_ids is None
    assert second.prefill_input_ids_cpu.tolist() == [*sglang.IDS]


@small
@pytest.mark.gpu
@pytest.mark.parametrize("pin", [True, False])
def test_memory_that_is_not_to_be_pinned(sglang: Small, pin: bool) -> None:
    """SGLang asks for pageable memory under Confidential Computing, or when told it is."""
    if not pin:
        sglang.edit("managers.schedule_batch", '.type == "cuda"', '.type == "never"')
    sglang.load()
    staged = sglang.run(sglang.batch("cuda:0"))
    assert type(staged) is (StagedTokens if pin else torch.Tensor)
    assert pin or not staged.is_pinned()
    assert left_to_sglang() == (not pin)


def test_memory_that_is_not_to_be_pinned_is_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where no GPU is: a CUDA pool is not even asked."""
    monkeypatch.setattr(plugin.process, "state", plugin.process.State())
    ids = array("q", range(10))
    pool = SimpleNamespace(device=torch.device("cuda:0"))
    monkeypatch.setattr(plugin.process.here, "pool", pool)
    seen = plugin.staging.flatten(
        lambda parts, pin: (parts, pin), [ids_view(ids, 2, 5), ids], False
    )
    assert seen == ([ids[2:5], ids], False) and left_to_sglang() == 1


@small
@pytest.mark.parametrize("switch", [None, "0"])
def test_batches_on_the_cpu_are_sglangs(
    sglang: Small, monkeypatch: pytest.MonkeyPatch, switch: str | None
) -> None:
    monkeypatch.delenv("PYSTAGE_SGLANG_CPU")
    if switch:
        monkeypatch.setenv("PYSTAGE_SGLANG_CPU", switch)
    sglang.load()
    assert type(sglang.run()) is torch.Tensor
    sglang.run_mixed()
    assert plugin.pool_stats() == [] and left_to_sglang() == 0
    assert plugin.process.pools.of("npu:0") is None


@small
def test_no_pool_where_one_cannot_be_made(
    sglang: Small, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin.process, "StagingPool", lambda *a, **k: StagingPool("cpu", 5))
    sglang.load()
    assert type(sglang.run()) is torch.Tensor and plugin.pool_stats() == []
    assert "no pool for cpu (capacity_bytes is 5, but" in caplog.text


# --- what stays behind after a batch --------------------------------------------------------------


@small
def test_views_are_given_until_ids_are_staged(sglang: Small) -> None:
    sglang.load()
    seen: list[Any] = []

    def prepare(batch: Any) -> None:
        (req, _) = batch.reqs
        seen.append(req.get_fill_ids())
        sglang.common.flatten_arrays_to_pinned_cpu([seen[0][600:]], False)
        seen.append(req.get_fill_ids())
        raise LookupError("later")

    batch = sglang.batch()
    with pytest.raises(LookupError, match="later"):
        plugin.staging.prepare_for_extend(prepare, batch)
    seen.append(batch.reqs[0].get_fill_ids())
    assert [type(ids) is array for ids in seen] == [False, True, True]
    assert [len(ids) for ids in seen] == [900] * 3


@small
@pytest.mark.parametrize("error", [None, LookupError])
def test_outside_prepare_nothing_is_staged(sglang: Small, error: Any) -> None:
    sglang.load()

    def prepare(batch: Any) -> None:
        if error:
            raise error

    try:
        plugin.staging.prepare_for_extend(prepare, sglang.batch())
    except LookupError:
        assert error
    elsewhere = sglang.common.flatten_arrays_to_pinned_cpu([array("q", [1, 2])], False)
    assert type(elsewhere) is torch.Tensor and elsewhere.tolist() == [1, 2]


def test_a_batch_prepared_again_has_no_ids_of_before() -> None:
    with StagingPool("cpu") as pool:
        batch = PrefillBatch("cpu")
        prepare_for_extend(batch, [array("q", [1, 2])], pool=pool)
        pystage.batch.resolve_forward_inputs(batch)
        assert batch.input_ids is not None
        prepare_for_extend(batch, [array("q", [3])], pool=pool)
        assert batch.input_ids is None
        pystage.batch.resolve_forward_inputs(batch)
        assert batch.input_ids.tolist() == [3]


@small
def test_a_batch_that_nobody_resolved_is(sglang: Small) -> None:
    sglang.load()
    info = sglang.module("model_executor.forward_batch_info")
    batch, count = sglang.batch(), forgotten_resolves()
    batch.prepare_for_extend()
    with pytest.warns(pystage.ForgottenResolveWarning, match=r"test_integrations\.py"):
        forward = info.ForwardBatch.init_new(batch, None)
    assert forward.input_ids.tolist() == [*Small.IDS]
    assert forgotten_resolves() == count + 1
    info.ForwardBatch.init_new(batch, None)
    assert forgotten_resolves() == count + 1


@small
def test_a_failed_resolve_surfaces_and_leaves_the_batch(sglang: Small) -> None:
    sglang.load()
    batch = sglang.batch()
    batch.prepare_for_extend()
    staged = batch.prefill_input_ids_cpu
    batch.mix_running_indices = torch.tensor([3, 99])
    with pytest.raises(IndexError):
        sglang.resolve(batch)
    assert batch.prefill_input_ids_cpu is staged and batch.input_ids is None
    batch.mix_running_indices[1] = 4
    assert sglang.resolve(batch) == [*Small.IDS, 5003, 5004]


# --- what else is hooked --------------------------------------------------------------------------


@small
def test_hooks_that_are_not_reached_are_named(
    sglang: Small, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = sglang.module("plugins.hook_registry")
    apply_target = registry.HookRegistry._apply_target

    def broken(target: str, hooks: Any) -> None:
        if target.endswith("flatten_arrays_to_pinned_cpu"):
            raise RuntimeError("broken")
        apply_target(target, hooks)

    monkeypatch.setattr(registry.HookRegistry, "_apply_target", broken)
    monkeypatch.setenv("PYSTAGE_SGLANG_SIZER", "1")
    shutil.rmtree(sglang.folder / "sglang/srt/managers/scheduler_components")
    status = sglang.load()
    assert status["broken"] == [
        "staging (utils.common:flatten_arrays_to_pinned_cpu is not hooked)",
        "sizer (this SGLang has no such symbols)",
    ]
    assert status["left"] == ["history (staging is not active)"]
    assert "NOT active: staging (utils" in caplog.text and "guard" in status["active"]
    assert type(sglang.run()) is torch.Tensor


@small
def test_an_importer_that_keeps_the_original_is_named(
    sglang: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = sglang.module("plugins.hook_registry")
    monkeypatch.setattr(registry, "_propagate_patch", lambda *args: None)
    (first, *_) = sglang.load()["broken"]
    assert "sglang.srt.managers.schedule_batch still has the original of utils.common:fla" in first


@small
@pytest.mark.parametrize(
    ("module", "old", "new", "why"),
    [
        ("managers.overlap_utils", "def resolve_forward", "def resolve", "no managers.overlap"),
        ("managers.overlap_utils", "(batch, future_map):", "(batch):", "takes (batch), not (b"),
        ("managers.schedule_batch", "    mix_running_indices", "    mixed", "ScheduleBatch.mix_ru"),
        ("managers.schedule_batch", "def get_fill_ids", "def fill_ids", "no managers.schedule_ba"),
        ("utils.common", "import torch\n", "import no_such_module\n", "no_such_module"),
    ],
)
def test_another_sglang_is_left_alone(
    sglang: Small, caplog: pytest.LogCaptureFixture, module: str, old: str, new: str, why: str
) -> None:
    sglang.edit(module, old, new)
    plugin.plugin()
    assert not sglang.module("plugins.hook_registry").HookRegistry._hooks
    assert caplog.text.count("this SGLang is not as expected: ") == 1
    assert why in plugin.status()["off"] and "is off: this SGLang" in plugin.status()["line"]


@small
@pytest.mark.parametrize(
    ("variable", "text", "why"),
    [
        ("PYSTAGE_SGLANG", "0", "PYSTAGE_SGLANG=0"),
        (
            "PYSTAGE_SGLANG_ISSUE",
            "soon",
            "PYSTAGE_SGLANG_ISSUE is 'soon', but must be one of deferred, ",
        ),
    ],
)
def test_off(
    sglang: Small, monkeypatch: pytest.MonkeyPatch, variable: str, text: str, why: str
) -> None:
    monkeypatch.setenv(variable, text)
    assert why in sglang.load()["off"]
    assert type(sglang.run()) is torch.Tensor


@small
def test_validation(sglang: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSTAGE_SGLANG_VALIDATE_IDS", "1")
    status = sglang.load()
    assert "validation" in status["active"] and "; ids validated)" in status["line"]
    scheduler = sglang.module("managers.scheduler").Scheduler()
    good, bad = sglang.schedule_batch.Req([1, 511]), sglang.schedule_batch.Req([1, 512])
    for handle in (scheduler.handle_generate_request, scheduler.handle_embedding_request):
        assert handle(good) is None and good.to_finish is None
        assert (
            handle(bad)
            == bad.to_finish
            == ("input_ids[1] is 512, outside the vocabulary of 512 (1 of 2 ids are)")
        )
        assert handle(sglang.schedule_batch.Req([512] * 1001)) == "too long"
    assert sglang.module("managers.utils").validate_input_length(bad, 1000) is None


@small
def test_profiler_and_sizer(sglang: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    sizers = sglang.module("managers.scheduler_components.dynamic_chunk_sizer")
    sglang.load()
    folded, first, same = sizers.DynamicChunkSizer()._profile_prefill_latency()
    assert folded.origin_input_ids == array("q", [5, 9999 % 512])
    assert first.origin_input_ids == array("q", [5, 0])  # the first id beyond the vocabulary
    assert same.origin_input_ids == array("q", [5, 6]) and sizers.Req is sglang.schedule_batch.Req


@small
def test_sizer_by_setting(sglang: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSTAGE_SGLANG_SIZER", "1")
    monkeypatch.setattr(pp, "profile_and_fit", lambda owner: owner)
    status = sglang.load()
    assert "sizer" in status["active"] and "profiler" not in status["active"]
    owner = sglang.module("managers.scheduler_components.dynamic_chunk_sizer").DynamicChunkSizer()
    assert owner.profile_and_fit() is owner
    assert owner.predict(0) is None  # there are no plans: the static size
    monkeypatch.setattr(pp.serving, "plans", SimpleNamespace(next_chunk=lambda n: n + 1))
    assert owner.predict(41) == 42


SIZES = {"base_chunk": 4096, "context_len": 32768, "page_size": 64, "min_chunk": 64} | {
    "max_chunk": 8192
}


def test_the_sizes_of_a_queue_are_timed_within_the_cache() -> None:
    asked: list[tuple[int, int]] = []

    def time(points: Any) -> list[float]:
        asked[:] = points
        return [1.0 + size / 1000 for _, size in points]

    def times(limit: int, **changes: int) -> dict[int, float]:
        found = pp.times_for_queue(LAW, {**SIZES, **changes}, [1.0, 1.0], limit, time)
        assert all(history + size <= limit for history, size in asked)
        return found

    assert min(times(32768)) == 1024 and max(times(32768)) == 8192
    assert {history for history, _ in asked} == {2048}
    assert max(times(8192 + 1000)) == 8192 and {history for history, _ in asked} == {1000}
    assert max(times(5000)) == 4096 and min(times(32768, min_chunk=2048)) == 2048
    assert max(times(9000, max_chunk=2048)) == 2048  # max_prefill_tokens below the static size
    assert [*times(32768, base_chunk=512, max_chunk=512)] == [512]
    asked.clear()
    bad = model_of(LAW.form, usable=False)
    assert pp.times_for_queue(LAW, SIZES, [1.0], 32768, time) == {}
    assert pp.times_for_queue(LAW, SIZES, [1.0, 1.0], 60, time) == {}
    assert pp.times_for_queue(bad, SIZES, [1.0, 1.0], 32768, time) == {}
    assert not asked


def test_the_sizer_of_a_queue_goes_to_all_ranks() -> None:
    decision = json.loads(json.dumps({"queue": [(512, 3.0), (4096, 20.0)], "stages": [1.0, 3.0]}))
    queue = pp.queue_of(decision)
    assert queue is not None and queue.ms_by_size == {512: 3.0, 4096: 20.0}
    uneven = QueueSizer(queue.ms_by_size, 2, stage_factors=[1.0, 3.0])
    assert [queue.size(n) for n in (9000, 40_000)] == [uneven.size(n) for n in (9000, 40_000)]
    equal = QueueSizer(queue.ms_by_size, 2)
    assert any(equal.size(n) != uneven.size(n) for n in range(1, 40_000, 50))
    assert pp.queue_of({"queue": [], "stages": [1.0]}) is None


def test_a_static_size_that_is_as_good_stays() -> None:
    owner = SimpleNamespace(chunked_prefill_size=512)
    choices = {2048: SimpleNamespace(chunks=(512,) * 4)}
    assert pp.better_plans(owner, choices, {}) == pp.better_plans(owner, choices, {512: 1.0}) == {}
    assert pp.better_plans(owner, choices, {512: 1.0, 256: 0.7}) == {"2048": [512] * 4}
    other = {2048: SimpleNamespace(chunks=(1024, 1024))}
    assert pp.better_plans(owner, other, {}) == {"2048": [1024, 1024]}


def test_which_size_a_request_in_a_queue_gets() -> None:
    def plans() -> pp.Plans:
        queue = QueueSizer({128: 2.0, 256: 3.0, 2048: 16.0}, 4)
        return pp.Plans({4096: [512] * 8}, 8192, page_size=64, largest=1024, base=512, queue=queue)

    assert plans().in_queue(4000, 3000, 3000, 0) == plans().queue.size(6000) == 256
    assert plans().in_queue(4000, 3000, 0, 3000) == plans().in_queue(4000, 3000, 1000, 2000) == 256
    assert plans().in_queue(4000, 3000, 2999, 0) is None
    assert plans().in_queue(4000, 3000, 0, 0) is None
    assert plans().in_queue(512, 400, 0, 0) == plans().queue.size(512) == 128
    assert plans().in_queue(513, 400, 0, 0) is None
    assert plans().queue.size(10**6) == 2048 and plans().in_queue(4000, 3000, 10**6, 0) == 1024
    assert dataclasses.replace(plans(), queue=None).in_queue(512, 100, 900, 0) is None
    # A short tail goes with the chunk before it, unless others fill the chunk of the tail.
    assert [plans().in_queue(512, left, 0, 0) for left in (192, 193)] == [192, 128]
    assert plans().in_queue(512, 150, 0, 0) == 192  # whole pages
    assert plans().in_queue(512, 150, 100, 0) == 128


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(waiting_queue=[])
    monkeypatch.setattr(pp.serving, "scheduler", found)
    monkeypatch.setattr(pp.serving, "tokens", 0.0)
    monkeypatch.setattr(pp.serving, "uncached", 0.0)
    return found


def planned(monkeypatch: pytest.MonkeyPatch, times: dict[int, float]) -> QueueSizer:
    """Plans of 1,024 for long prompts, and a queue over four stages with these chunk times."""
    queue = QueueSizer(times, 4)
    plans = pp.Plans({65536: [1024] * 64}, 131072, 64, 8192, base=8192, queue=queue)
    monkeypatch.setattr(pp.serving, "plans", plans)
    return queue


def test_what_waits(scheduler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [SimpleNamespace(origin_input_ids=range(n)) for n in (10, 200, 3000)]
    scheduler.waiting_queue = requests
    assert pp.waiting_behind(requests[1]) == 3010
    assert pp.waiting_behind(object()) == 3210  # one that has begun is in the queue no more
    requests += [SimpleNamespace(origin_input_ids=range(1)) for _ in range(100)]
    assert pp.waiting_behind(object()) == 3210 + 61  # of 64 requests
    monkeypatch.setattr(pp.serving, "scheduler", object())
    assert pp.waiting_behind(object()) == 0


def adder(budget: int, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        rem_chunk_tokens=budget, can_run_list=[], dllm_config=None, page_size=64, **more
    )


def request(tokens: int, cached: int) -> SimpleNamespace:
    """Of SGLang 0.5.23."""
    ids = range(tokens)
    return SimpleNamespace(
        origin_input_ids=ids, full_untruncated_fill_ids=ids, prefix_len=cached, host_hit_length=0
    )


def test_what_is_cached_does_not_wait(
    scheduler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns of a long chat: of 30,000 tokens a few hundred are new."""
    planned(monkeypatch, {1024: 12.0, 4096: 40.0})
    for _ in range(50):
        pp.fit_batch_to(adder(8192), request(30_000, 29_500), continued=False)
    scheduler.waiting_queue = [request(30_000, 29_500)] * 2
    assert pp.waiting_behind(object()) == pytest.approx(1000, rel=0.01)
    cold = adder(8192)
    pp.fit_batch_to(cold, request(60_000, 0), continued=False)
    assert cold.rem_chunk_tokens == 1024  # its plan: little waits
    before = pp.serving.tokens
    pp.fit_batch_to(adder(8192), request(60_000, 1024), continued=True)
    assert pp.serving.tokens == before  # each request counts once
    for _ in range(200):
        pp.fit_batch_to(adder(8192), request(20_000, 0), continued=False)
    assert pp.waiting_behind(object()) == pytest.approx(60_000, rel=0.01)


def test_what_is_in_flight(scheduler: SimpleNamespace) -> None:
    mine, other = object(), object()

    def batch(tokens: int | None, extend: bool, *reqs: object) -> SimpleNamespace:
        mode = SimpleNamespace(is_extend=lambda: extend)
        return SimpleNamespace(extend_num_tokens=tokens, forward_mode=mode, reqs=reqs or [other])

    assert pp.in_flight_beside(mine) == 0
    done = batch(1000, True)
    scheduler.mbs = [batch(300, True), None, batch(70, False), done, batch(None, True)]
    scheduler.mbs += [batch(5000, True, mine), batch(600, True, other, mine)]
    scheduler.last_batch = done
    assert pp.in_flight_beside(mine) == 300
    assert pp.in_flight_beside(object()) == 5900


def test_decodes_leave_a_part_of_a_chunk(
    scheduler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = planned(monkeypatch, {1024: 12.0, 8192: 90.0})
    for decodes, budget in ((0, 1024), (200, 1024), (1100, 1024)):
        batch = adder(8192 - decodes)
        pp.fit_batch_to(batch, request(8000, 0), continued=False)
        assert batch.rem_chunk_tokens == budget
    scheduler.waiting_queue = [request(60_000, 0)] * 64
    batch = adder(8192 - 500)
    pp.fit_batch_to(batch, request(8000, 0), continued=False)
    assert batch.rem_chunk_tokens == queue.size(10**6) - 500


@pytest.mark.parametrize(
    ("limit", "expected"), [(7872, 704), (7900, 704), (8192, 1024), (100, 64), (None, None)]
)
def test_what_is_kept_for_shorter_requests_stays_free(
    limit: int | None, expected: int | None
) -> None:
    batch = adder(8192, chunked_req_limit=limit)
    pp.set_budget(batch, 1024, 64)
    assert (batch.rem_chunk_tokens, batch.chunked_req_limit) == (1024, expected)


def test_a_request_beside_one_that_has_begun_is_not_sized(
    scheduler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where SGLang leaves that one out of the batch: it can split one request at a time."""
    planned(monkeypatch, {1024: 12.0, 8192: 90.0})
    for has_chunked_req, budget in ((True, 8192), (False, 1024)):
        batch = adder(8192)
        done = plugin.sizer.add_one_req(
            lambda *_: "taken", batch, request(8000, 0), has_chunked_req, None
        )
        assert (done, batch.rem_chunk_tokens) == ("taken", budget)


def test_queues_agree_where_one_rank_drops_requests() -> None:
    class Newer:
        def _poll_timeout_aborts(self) -> None: ...

    assert pp.queues_agree(Newer()) and not pp.queues_agree(object())


@small
def test_figures_for_prometheus(sglang: Small) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    sglang.load()
    collector = sglang.module("observability.metrics_collector").SchedulerMetricsCollector
    labels = {"model_name": f"small {id(sglang)}"}
    one = collector(labels)
    sglang.run()
    (pool,) = plugin.process.pools._pools.values()
    one.log_stats(None)
    assert pool is not None
    pool.close()
    sglang.run()
    sglang.run_mixed(spec=True)
    one.log_stats(None)
    one.log_stats(None)

    def figure(name: str) -> Any:
        return prometheus.REGISTRY.get_sample_value(f"pystage_{name}", labels)

    assert figure("staged_tokens_total") == len(Small.IDS) and figure("stages_total") == 1
    assert figure("capacity_bytes") == 64 << 20
    assert figure("sglang_stagings_total") == 2 and figure("sglang_mixed_total") == 0
    for name in (*plugin.metrics.GAUGES, *(f"{n}_total" for n in plugin.metrics.OF_THE_PLUGIN)):
        assert figure(name) is not None


@small
def test_figures_that_fail_stop_nothing(sglang: Small, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("prometheus_client")
    sglang.load()
    collector = sglang.module("observability.metrics_collector").SchedulerMetricsCollector

    class Broken(collector):  # type: ignore[misc, valid-type]
        @staticmethod
        def _gauge_cls(**kwargs: Any) -> Any:
            raise ValueError("no such gauge")

    Broken({"model_name": "broken"}).log_stats(None)
    assert "no figures for Prometheus: ValueError('no such gauge')" in caplog.text
    plugin.process.state.metrics = object()  # type: ignore[assignment]
    for _ in range(2):
        Broken.log_stats(collector, None)
    assert caplog.text.count("no more figures for Prometheus") == 1


@small
def test_main_prints_one_object(sglang: Small, capsys: pytest.CaptureFixture[str]) -> None:
    def theirs() -> None:
        print("theirs")

    sglang.module("plugins").PLUGINS[:] = [theirs, plugin.plugin]
    plugin.main()
    out, err = capsys.readouterr()
    status = json.loads(out)
    assert status["active"] == PARTS and status["left"] == [] and "theirs" in err


@small
@pytest.mark.parametrize("allowed", ["another", None])
def test_main_says_why_it_was_not_loaded(
    sglang: Small,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    allowed: str | None,
) -> None:
    if allowed:
        monkeypatch.setenv("SGLANG_PLUGINS", allowed)
    else:
        monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    plugin.main()
    why = json.loads(capsys.readouterr().out)["off"]
    assert why == ("SGLANG_PLUGINS is 'another'" if allowed else "SGLang did not load it")


@small
@pytest.mark.parametrize("takes", ["server_args", "args"])
def test_the_doctor_tells_what_is_left(
    sglang: Small, monkeypatch: pytest.MonkeyPatch, takes: str
) -> None:
    """What SGLang keeps is no fault of this machine."""
    plugins = "from pystage.integrations.sglang import plugin\n\nPLUGINS = [plugin]"
    sglang.edit("plugins.__init__", "PLUGINS = []", plugins)
    sglang.edit("managers.overlap_utils", "torch.cat([", "torch.concat([")
    sglang.edit("ray.engine", "server_args, rank):", f"{takes}, rank):")
    (sglang.folder / "ray").mkdir()
    (sglang.folder / "sglang-9.9.dist-info").mkdir()
    (sglang.folder / "sglang-9.9.dist-info/METADATA").write_text("Name: sglang\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", f"{sglang.folder}{os.pathsep}{ROOT}")
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    check = doctor._sglang()
    assert check.ok and check.found.startswith("9.9; pystage ")
    assert "; left to SGLang: history (its prepare_for_extend is not that of a k" in check.found
    assert "; mixed (its resolve_forward_inputs is not that of a known release" in check.found
    ray = "; off in the schedulers of --use-ray: ray.engine:_create_scheduler_actor takes no serv"
    assert (ray in check.found) == (takes == "args")


# --- Ray ------------------------------------------------------------------------------------------


@small
def test_schedulers_of_ray_load_plugins(sglang: Small) -> None:
    """They do not by themselves. Unpickling their arguments does it, without pystage there."""
    sglang.load()
    sglang.common.configure_logger(None)  # no Ray: nothing to do
    engine = sglang.module("ray.engine")
    for _ in range(2):
        sglang.common.configure_logger(None)
    engine._create_scheduler_actor("group", {"model": "tiny"}, rank=3)
    engine._create_scheduler_actor(pg="group", server_args={"model": "tiny"}, rank=4)
    assert [rank for _, _, rank in engine.ACTORS] == [3, 4]
    hooks = sglang.module("plugins.hook_registry").HookRegistry._hooks
    assert len(hooks["sglang.srt.ray.engine._create_scheduler_actor"]) == 1
    for _, arguments, _ in engine.ACTORS:
        pickled = pickle.dumps(arguments)
        assert b"pystage" not in pickled
        code = f"""
        import pickle, sys
        sys.path.insert(0, {str(sglang.folder)!r})
        from sglang.srt import plugins
        plugins.PLUGINS.append(lambda: print("loaded"))
        print(pickle.loads({pickled!r}))
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout == "loaded\n{'model': 'tiny'}\n"


@small
@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("server_args, rank):", "args, rank):", "takes no server_args"),
        ("def _create_scheduler_actor", "def _create_actor", "no ray.engine:_create_scheduler"),
    ],
)
def test_what_to_do_where_they_cannot(
    sglang: Small, caplog: pytest.LogCaptureFixture, old: str, new: str, why: str
) -> None:
    sglang.edit("ray.engine", old, new)
    sglang.load()
    sglang.module("ray.engine")
    for _ in range(2):
        sglang.common.configure_logger(None)
    assert caplog.text.count("pystage is off in Ray's schedulers: ") == 1 and why in caplog.text
    assert "'worker_process_setup_hook': 'sglang.srt.plugins.load_plugins'" in caplog.text


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
    plan = pp.sample_plan(owner())
    assert plan.base == (0, 1024) and plan.page_size == 64
    assert max(history + chunk for history, chunk in plan.points) <= 6000 - 64
    assert max(chunk for _, chunk in plan.points) <= 1280
    assert pp.sample_plan(owner(), 8).ranks == 8  # the plans that it compares
    static = pp.sample_plan(owner(), dynamic=False)
    assert max(chunk for _, chunk in static.points) == 1024  # SGLang's buffers may end there


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
            outcome = pp._lead(
                step, pp.sample_plan(owner()), owner(), stage, lambda found, _: len(found)
            )
        except ProfileError as error:
            outcome = str(error)
    else:
        pp._follow(step, dist.group.WORLD)
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
