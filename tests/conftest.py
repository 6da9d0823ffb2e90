from __future__ import annotations

import inspect
import os
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import pystage
from pystage.testing import host_stream

settings.register_profile(
    "pystage", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("pystage")

HAVE_GPU = torch.cuda.is_available() and pystage.build_info().cuda
# Sanitizers slow everything tenfold or more: PYSTAGE_TEST_SCALE=0.05 shortens stress tests.
SCALE = float(os.environ.get("PYSTAGE_TEST_SCALE", "1"))
# compute-sanitizer runs one operation at a time, so a held stream blocks all other streams.
# PYSTAGE_TEST_HOLDS=0 skips the tests that hold a stream.
HOLDS = os.environ.get("PYSTAGE_TEST_HOLDS", "1") != "0"


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    if not HOLDS:
        for item in items:
            if "hold_transfers" in inspect.getsource(item.function):
                item.add_marker(pytest.mark.skip(reason="holds a stream"))
    if not HAVE_GPU:
        skip = pytest.mark.skip(reason="needs a CUDA device and a build with CUDA code")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pool(device: str) -> Iterator[pystage.StagingPool]:
    with pystage.StagingPool(device, 1 << 20) as pool:
        yield pool
    if device != "cpu":
        torch.cuda.synchronize()


def ids(*values: int) -> array[int]:
    return array("q", values)


def run_of(start: int, count: int) -> array[int]:
    return array("q", range(start, start + count))


cuda_streams: dict[int, torch.cuda.Stream] = {}


def on_stream(device: str, number: int) -> AbstractContextManager[Any]:
    """A stream of the device. The same number always gives the same stream."""
    if device == "cpu":
        return host_stream(number)
    if number not in cuda_streams:
        cuda_streams[number] = torch.cuda.Stream()
    return torch.cuda.stream(cuda_streams[number])
