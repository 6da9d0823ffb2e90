"""What a pool reports about itself: its repr, its figures as a table, and its log."""

from __future__ import annotations

import dataclasses
import logging
from array import array

import pytest
import torch

import pystage
from pystage import _C
from pystage.stats import in_units

from .conftest import run_of


def test_a_pool_shows_its_use(device: str) -> None:
    pool = pystage.StagingPool(device, 3 << 20, reserve_bytes=1 << 16)
    staged = pool.stage([run_of(0, 500)])
    text = repr(pool)
    assert text.startswith(
        f"<StagingPool on {pool.device}: {_C.size_class(2000) / 1024:.1f} KiB in"
    )
    assert "reserved" in text and "capacity 3.0 MiB" in text
    assert f"pool on {pool.device})" in repr(staged)
    del staged
    pool.close()
    assert repr(pool).startswith(f"<closed StagingPool on {pool.device}: 0 bytes in use of 0 bytes")


def test_figures_print_as_a_table() -> None:
    with pystage.StagingPool("cpu", 3 << 20) as pool:
        pool.stage([[1, 2, 3]])
        stats = pool.stats()
    rows = [line.split() for line in str(stats).splitlines()]
    assert [name for name, _ in rows] == [f.name for f in dataclasses.fields(stats)]
    assert ["capacity_bytes", "3,145,728"] in rows and ["tokens", "3"] in rows
    assert ["wait_seconds", "0.000"] in rows
    assert len({len(line) for line in str(stats).splitlines()}) == 1
    table = stats._repr_html_()
    assert table.count("<tr>") == len(rows)
    assert "<td>capacity_bytes</td><td>3,145,728</td>" in table


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 19, "1.5 MiB"),
     (5 << 30, "5.0 GiB"), (1 << 43, "8192.0 GiB")],
)  # fmt: skip
def test_sizes_for_a_reader(count: int, text: str) -> None:
    assert in_units(count) == text


def levels(caplog: pytest.LogCaptureFixture, said: str) -> list[int]:
    found = [r for r in caplog.records if r.name == "pystage" and said in r.getMessage()]
    return [record.levelno for record in found]


def test_growth_is_logged(device: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "pystage")
    with pystage.StagingPool(device, 1 << 20, reserve_bytes=4096) as pool:
        small = pool.stage([run_of(0, 100)])
        assert caplog.records == []  # it was reserved
        large = pool.stage([run_of(0, 20_000)])
        assert levels(caplog, f"the pool on {pool.device} has grown to ") == [logging.INFO]
        reserved = pool.stats().reserved_bytes
        assert f"has grown to {reserved} of at most {1 << 20} bytes" in caplog.text
        del small, large
        pool.stage([run_of(0, 20_000)])
    assert len(caplog.records) == 1


@pytest.mark.parametrize("how", ["small_tensors", "parcel"])
def test_growth_by_small_tensors_is_logged(
    device: str, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level(logging.DEBUG, "pystage")
    values = list(range(4096))  # with the kernel's own parameters just too many for one launch

    def known() -> torch.Tensor:
        return parcel.tensor(values, dtype=torch.int64, device=device)

    with pystage.StagingPool(device, 1 << 20, reserve_bytes=0) as pool:
        if how == "parcel":
            parcel = _C.parcel(
                pool._handle, 1 << 16, device, torch.tensor, ((known.__code__,),), (1,), None
            )
            assert known().tolist() == values
            assert caplog.records == []  # not within the code of others
            pool.stage([[1]])
        else:
            assert pool.small_tensors([values], [torch.int64])[0].tolist() == values
    assert levels(caplog, "has grown to ") == [logging.INFO]


@pytest.mark.parametrize("how", ["stage", "small_tensors"])
def test_fallbacks_are_logged(device: str, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """The first as a warning: more would fill the log of a server under load."""
    caplog.set_level(logging.DEBUG, "pystage")
    with pystage.StagingPool(device, 4096, at_capacity="fallback") as pool:
        held = pool.stage([run_of(0, 1000)])
        for _ in range(3):
            if how == "stage":
                pool.stage([run_of(0, 1000)])
            else:
                pool.small_tensors([run_of(0, 20_000)], [torch.int32])
        del held
        count = pool.stats().fallbacks
    assert count == 3
    assert levels(caplog, "has no slot") == [logging.WARNING, logging.DEBUG, logging.DEBUG]
    assert "(3 so far); raise capacity_bytes" in caplog.text


@pytest.mark.parametrize("how", ["stage", "small_tensors"])
def test_exhaustion_is_logged(caplog: pytest.LogCaptureFixture, how: str) -> None:
    caplog.set_level(logging.DEBUG, "pystage")
    with pystage.StagingPool("cpu", 4096, at_capacity="raise") as pool:
        held = pool.stage([run_of(0, 1000)])
        for _ in range(2):
            with pytest.raises(pystage.PoolExhaustedError):
                if how == "stage":
                    pool.stage([run_of(0, 1000)])
                else:
                    pool.small_tensors([run_of(0, 20_000)], [torch.int32])
        del held
    assert levels(caplog, "bytes") == [logging.WARNING, logging.DEBUG]


def test_a_log_handler_may_stage_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    """It runs when nothing of the requests is held any more."""
    ids = array("q", range(500))

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            ids.append(1)  # a BufferError while it is exported
            staged.append(pool.stage([[7]]))
            raise KeyboardInterrupt

    staged: list[pystage.StagedTokens] = []
    logger, handler = logging.getLogger("pystage"), Handler()
    logger.addHandler(handler)
    try:
        with pystage.StagingPool("cpu", 4096, at_capacity="fallback") as pool:
            held = pool.stage([[1 << 40] * 500])
            with pytest.raises(KeyboardInterrupt):
                pool.stage([ids])
            assert len(ids) == 501 and staged[0].tolist() == [7]
            del held, staged[:]
            assert pool.stats().leased_slots == 0
    finally:
        logger.removeHandler(handler)
