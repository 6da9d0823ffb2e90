"""The lower bound: the steps that no way of bringing a batch to the device can avoid, timed in C
(bound.cu).

Its parts are reading the ids of one array and writing them as int32 into pinned memory, allocating
the output from the same allocator, and the driver's launch of an empty kernel. It includes neither
the cost of a Python call nor that of separate requests, which are objects that must each be asked
for their memory.
"""

from __future__ import annotations

import ctypes
import subprocess
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import CUDA_HOME

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "bound.cu", HERE.parents[1] / "csrc/gather.cpp"]
PARTS = ("write", "memory", "launch")
MEMCPY, EVENT = "memcpy of int64", "event"
GET, RELEASE = (
    ctypes.cast(function, ctypes.c_void_p)
    for function in (ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release)
)


def build() -> Path:
    """Compiles it with nvcc alone if a source is newer than the build. Needs a CUDA toolkit."""
    library = HERE.parents[1] / "build" / "bound.so"
    newest = max(source.stat().st_mtime for source in SOURCES)
    if library.exists() and library.stat().st_mtime > newest:
        return library
    if CUDA_HOME is None:
        raise RuntimeError("no CUDA toolkit to build bench/suite/bound.cu with: set CUDA_HOME")
    site = Path(torch.__file__).parent
    library.parent.mkdir(exist_ok=True)
    command = [
        f"{CUDA_HOME}/bin/nvcc", "-O3", "-std=c++20", "-shared", "-cudart", "shared",
        "-Xcompiler", "-fPIC", f"-I{site}/include", *map(str, SOURCES), "-o", str(library),
        f"-L{site}/lib", "-lc10", "-ldl",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return library


class Bound:
    """Times the parts on torch's current stream, for batches of up to ``max_ids`` ids."""

    def __init__(self, max_ids: int) -> None:
        torch.cuda.init()  # makes the allocator available
        path = str(build())
        self._library = ctypes.CDLL(path)
        double, pointer, size = ctypes.POINTER(ctypes.c_double), ctypes.c_void_p, ctypes.c_size_t
        for name in ("bound_write", "bound_memcpy"):
            getattr(self._library, name).argtypes = [pointer, pointer, size, double]
        self._library.bound_issue.argtypes = [size, pointer, double]
        self._us, self._issued = (ctypes.c_double * 1)(), (ctypes.c_double * 3)()
        self._buffers = ctypes.PyDLL(path).bound_buffers  # PyDLL keeps the GIL
        self._buffers.argtypes = [pointer, size, pointer, pointer, double]
        self._library.bound_open.argtypes = [size]
        if not self._library.bound_open(8 * max_ids):
            raise RuntimeError(f"no pinned memory for {max_ids} ids, or no empty kernel")

    def _through(self, call: Any, arrays: Sequence[array[int]]) -> float:
        addresses, counts = zip(*(a.buffer_info() for a in arrays), strict=True)
        number = len(arrays)
        given = (ctypes.c_void_p * number)(*addresses), (ctypes.c_size_t * number)(*counts)
        if not call(*given, number, self._us):
            raise RuntimeError(f"more than there is room for: {sum(counts)} ids")
        return self._us[0]

    def write(self, arrays: Sequence[array[int]]) -> float:
        """Microseconds to write ``array('q')`` as int32 into pinned memory, one after another."""
        return self._through(self._library.bound_write, arrays)

    def memcpy(self, arrays: Sequence[array[int]]) -> float:
        """Microseconds to copy the arrays without narrowing."""
        return self._through(self._library.bound_memcpy, arrays)

    def buffers(self, arrays: Sequence[array[int]]) -> float:
        """Microseconds to ask each array for its memory, as any reader must."""
        objects = (ctypes.c_void_p * len(arrays))(*map(id, arrays))  # does not touch the arrays
        if not self._buffers(objects, len(arrays), GET, RELEASE, self._us):
            raise RuntimeError("an array gave no buffer")
        return self._us[0]

    def issue(self, count: int) -> Sequence[float]:
        """Microseconds to allocate ``count`` int64 ids, to launch, and to record an event."""
        stream = torch.cuda.current_stream().cuda_stream
        if not self._library.bound_issue(8 * count, stream, self._issued):
            raise RuntimeError("a CUDA call of the lower bound failed")
        return tuple(self._issued)

    def close(self) -> None:
        """Releases the pinned memory."""
        self._library.bound_close()
