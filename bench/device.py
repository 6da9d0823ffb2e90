"""The device operations that the regimes need, for CUDA and for the host device.

The host versions do the same copies immediately, on the host. With them every line of the regimes
runs without a GPU. Of the resulting figures only host times have a meaning.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.compiled import binder

IN_STREAM_ORDER, DURING_CALL = 1, 2  # cudaMemcpySrcAccessOrder*


class Absent(Exception):
    """Something cannot be measured here. The message says why."""


class HostEvent:
    """An event that is complete as soon as it is recorded."""

    def __init__(self) -> None:
        self.at = 0

    def record(self) -> None:
        self.at = time.perf_counter_ns()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is pending."""

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) / 1e6  # ms, as in torch


class Host:
    """The host device. ``gpu_regimes``: also runs those regimes, to check that they run."""

    cuda = False

    def __init__(self, gpu_regimes: bool = False) -> None:
        self.torch = torch.device("cpu")
        self.gpu_regimes = gpu_regimes
        self.name = "host device"

    def synchronize(self) -> None:
        """Nothing is pending."""

    def new_stream(self) -> Any:
        return None

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def wait(self, stream: Any, event: Any) -> None:
        """Makes the stream wait for the event."""

    def event(self, timing: bool = False) -> Any:
        return HostEvent()

    def spin(self, us: float) -> None:
        """Does nothing: no work runs beside the host."""

    def launch(self) -> None:
        """Does nothing: there are no kernels here."""

    def pinned(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64)

    def memcpy(self, dst: int, src: int, size: int) -> None:
        ctypes.memmove(dst, src, size)

    def batch(
        self, dsts: Sequence[int], srcs: Sequence[int], sizes: Sequence[int], order: int
    ) -> Callable[[], None]:
        """A prepared call that does all these copies."""

        def copy() -> None:
            for dst, src, size in zip(dsts, srcs, sizes, strict=True):
                ctypes.memmove(dst, src, size)

        return copy

    def memcpy_here(self, dst: int, src: int, size: int) -> Callable[[], None]:
        """A prepared call that does that copy on the stream that is current now."""
        return partial(self.memcpy, dst, src, size)

    def batch_here(
        self, dsts: Sequence[int], srcs: Sequence[int], sizes: Sequence[int], order: int
    ) -> Callable[[], None]:
        """Like :meth:`batch`, but on the stream that is current now."""
        return self.batch(dsts, srcs, sizes, order)

    def move(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        """A copy by a kernel, between device and pinned memory."""
        dst.copy_(src)

    def view(self, pinned: torch.Tensor) -> torch.Tensor:
        """Pinned memory as a tensor of the device."""
        return pinned

    def pinned_bytes(self) -> tuple[int, int]:
        """The bytes that torch's host allocator holds, and how often it allocated."""
        return 0, 0

    def forget_pinned(self) -> None:
        """Makes torch's host allocator release its unused memory."""

    def kernels(self, call: Callable[[], Any]) -> dict[str, int]:
        """The kernels and copies that a call launches on the device, with their counts."""
        call()
        return {"kernels": 0, "copies": 0}


class _Attributes(ctypes.Structure):
    """``cudaMemcpyAttributes`` of CUDA 13."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("src_type", ctypes.c_int),
        ("src_id", ctypes.c_int),
        ("dst_type", ctypes.c_int),
        ("dst_id", ctypes.c_int),
        ("flags", ctypes.c_uint),
    )


def launched(profiler: torch.profiler.profile) -> list[str]:
    """The names of the kernels and copies that ran on the GPU under the profiler, in order."""
    gpu = torch.autograd.DeviceType.CUDA
    events = [event for event in profiler.events() if event.device_type == gpu]
    return [event.name for event in sorted(events, key=lambda e: e.time_range.start)]


def cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcudart" in line:
            return ctypes.CDLL(line.split()[-1])
    raise Absent("torch has loaded no libcudart")


class _ArrayInterface:
    """Memory that torch takes as a tensor of the device. The device must be able to access it."""

    def __init__(self, pinned: torch.Tensor) -> None:
        self.owner = pinned
        self.__cuda_array_interface__ = {
            "shape": tuple(pinned.shape),
            "typestr": f"<i{pinned.element_size()}",
            "data": (pinned.data_ptr(), False),
            "version": 2,
        }


class Cuda(Host):
    """A CUDA device, through torch and torch's CUDA runtime."""

    cuda = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(gpu_regimes=True)
        self.torch = device
        torch.cuda.set_device(device)
        torch.cuda.init()
        self.name = torch.cuda.get_device_name(device)
        self._runtime = cuda_runtime()
        version = ctypes.c_int()
        self._check("cudaRuntimeGetVersion", ctypes.byref(version))
        self.runtime = version.value
        size = ctypes.c_size_t
        self._memcpy = self._runtime.cudaMemcpyAsync
        self._memcpy.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            size,
            ctypes.c_int,
            ctypes.c_void_p,
        ]
        self._kept: list[Any] = []  # keeps alive what the bound calls point to
        self._cycles_per_us = self._spin_rate()

    def _check(self, name: str, *args: Any) -> None:
        code = getattr(self._runtime, name)(*args)
        if code:
            raise RuntimeError(f"{name} failed with CUDA error {code}")

    def _spin_rate(self) -> float:
        begin, end = self.event(True), self.event(True)
        for _ in range(2):
            begin.record()
            torch.cuda._sleep(2_000_000)
            end.record()
            end.synchronize()
        return 2_000_000 / (begin.elapsed_time(end) * 1e3)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def new_stream(self) -> Any:
        # torch hands out 32 streams in turn. Work on the current one would not run beside it.
        stream = torch.cuda.Stream(self.torch)
        return stream if stream != torch.cuda.current_stream() else torch.cuda.Stream(self.torch)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def event(self, timing: bool = False) -> Any:
        return torch.cuda.Event(enable_timing=timing)

    def spin(self, us: float) -> None:
        torch.cuda._sleep(int(us * self._cycles_per_us))

    def launch(self) -> None:
        torch.cuda._sleep(0)

    def pinned(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64, pin_memory=True)

    def memcpy(self, dst: int, src: int, size: int) -> None:
        # cudaMemcpyDefault: the pointers give the direction
        code = self._memcpy(dst, src, size, 4, torch.cuda.current_stream().cuda_stream)
        if code:
            raise RuntimeError(f"cudaMemcpyAsync failed with CUDA error {code}")

    def _batch_arguments(
        self, dsts: Sequence[int], srcs: Sequence[int], sizes: Sequence[int], order: int
    ) -> tuple[Any, ...]:
        """All arguments except the stream. The first three are C arrays; the fifth and the sixth
        point to one item."""
        if self.runtime < 13000:
            raise Absent(f"cudaMemcpyBatchAsync is called as in CUDA 13, this is {self.runtime}")
        count = len(sizes)
        pointers, lengths = ctypes.c_void_p * count, ctypes.c_size_t * count
        attributes, index = (_Attributes * 1)(_Attributes(order=order)), (ctypes.c_size_t * 1)(0)
        return pointers(*dsts), pointers(*srcs), lengths(*sizes), count, attributes, index, 1

    def batch(
        self, dsts: Sequence[int], srcs: Sequence[int], sizes: Sequence[int], order: int
    ) -> Callable[[], None]:
        function = self._runtime.cudaMemcpyBatchAsync
        given = self._batch_arguments(dsts, srcs, sizes, order)
        args = [ctypes.c_size_t(a) if isinstance(a, int) else a for a in given]

        def copy() -> None:
            code = function(*args, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
            if code:
                raise RuntimeError(f"cudaMemcpyBatchAsync failed with CUDA error {code}")

        return copy

    def _bound(self, name: str, *args: Any) -> Callable[[], None]:
        self._kept.append(args)
        address = ctypes.cast(getattr(self._runtime, name), ctypes.c_void_p).value
        numbers = [a if isinstance(a, int) else ctypes.addressof(a) for a in args]
        return binder()(address, *numbers, torch.cuda.current_stream().cuda_stream)

    def memcpy_here(self, dst: int, src: int, size: int) -> Callable[[], None]:
        return self._bound("cudaMemcpyAsync", dst, src, size, 4)

    def batch_here(
        self, dsts: Sequence[int], srcs: Sequence[int], sizes: Sequence[int], order: int
    ) -> Callable[[], None]:
        return self._bound("cudaMemcpyBatchAsync", *self._batch_arguments(dsts, srcs, sizes, order))

    def move(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        from bench.suite.move import move

        move(dst, src)

    def view(self, pinned: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(_ArrayInterface(pinned), device=self.torch)

    def pinned_bytes(self) -> tuple[int, int]:
        stats = torch.cuda.host_memory_stats()
        return int(stats["allocated_bytes.current"]), int(stats["num_host_alloc"])

    def forget_pinned(self) -> None:
        torch.cuda.synchronize()
        torch._C._host_emptyCache()

    def kernels(self, call: Callable[[], Any]) -> dict[str, int]:
        from torch.profiler import ProfilerActivity, profile

        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            call()
            torch.cuda.synchronize()
        on_device = launched(profiler)
        copies = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
        return {"kernels": len(on_device) - copies, "copies": copies}


def find(name: str | None, rehearse: bool) -> Host:
    """The device of that name. None: the GPU, or the host if there is none."""
    if rehearse:
        return Host(gpu_regimes=True)
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return Host()
    return Cuda(torch.device("cuda", device.index or 0))


@contextmanager
def own_stream(device: Host) -> Iterator[None]:
    """Makes a new stream current, because cudaMemcpyBatchAsync refuses the default stream."""
    stream = device.new_stream()
    with device.on(stream):
        yield
    device.synchronize()
