"""Host-to-device copies beside other work, from a C loop (copies.c) that does not hold the GIL."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.device import cuda_runtime

CALLS = (  # in the order that copies.c expects
    "cudaSetDevice",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
    "cudaStreamSynchronize",
    "cudaEventCreateWithFlags",
    "cudaEventDestroy",
    "cudaEventRecord",
    "cudaEventSynchronize",
    "cudaMemcpyAsync",
)


def loop_of(library: Path) -> Any:
    """The copy loop of a compiled ``library``."""
    loop = ctypes.CDLL(str(library)).copies
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    loop.argtypes = [pointer, number, pointer, pointer, size, number, number, pointer, pointer]
    return loop


class Copies:
    """Copies from pinned memory to a GPU (``device`` >= 0) or within host memory (-1)."""

    def __init__(self, device: int, library: Path) -> None:
        self._device, self._loop = device, loop_of(library)
        self._thread: threading.Thread | None = None
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._runtime = None
        if device >= 0:
            runtime = cuda_runtime()
            calls = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in CALLS]
            self._runtime = (ctypes.c_void_p * len(calls))(*calls)

    def start(self, mib: float, depth: int, pause_ms: float = 0.0) -> None:
        """Keeps ``depth`` copies of ``mib`` MiB queued. Before a pause, waits for all of them."""
        if self._thread is not None:
            raise RuntimeError("copies are running already")
        size = int(mib * 2**20)
        if size not in self._buffers:
            cuda = self._device >= 0
            where = f"cuda:{self._device}" if cuda else "cpu"
            self._buffers[size] = (
                torch.ones(size, dtype=torch.uint8, pin_memory=cuda),
                torch.empty(size, dtype=torch.uint8, device=where),
            )
            if cuda:
                torch.cuda.synchronize(self._device)
        source, target = self._buffers[size]
        self._stop, self._count, self._error = ctypes.c_int(0), ctypes.c_uint64(0), 0
        self._size, self._begun = size, time.perf_counter()

        def run() -> None:
            self._error = self._loop(
                self._runtime,
                self._device,
                target.data_ptr(),
                source.data_ptr(),
                size,
                depth,
                round(pause_ms * 1000),
                ctypes.byref(self._stop),
                ctypes.byref(self._count),
            )

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def count(self) -> int:
        """Number of copies done since the start."""
        return int(self._count.value)

    def wait_for(self, count: int) -> None:
        """Waits until that many copies are done, or the loop has ended with an error, which
        ``stop`` raises."""
        while self.count < count and self._thread is not None and self._thread.is_alive():
            time.sleep(0)

    def stop(self) -> float | None:
        """Stops the copies, and waits for those that are queued.

        Returns:
            The rate in GB/s. None if no copies were running.

        Raises:
            RuntimeError: a call of the CUDA runtime failed. The message has the error number.
        """
        if self._thread is None:
            return None
        self._stop.value = 1
        self._thread.join()
        self._thread = None
        if self._error:
            raise RuntimeError(f"copies beside: error {self._error} of the CUDA runtime")
        seconds = time.perf_counter() - self._begun
        return round(self.count * self._size / seconds / 1e9, 2)
