"""The floor under every contender: a memcpy of the ids into pinned memory, memory for the output, a
launch and an event, each timed in C (floor.cu). What a Python call costs is not in it."""

from __future__ import annotations

import ctypes
import subprocess
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

HERE = Path(__file__).resolve().parent
PARTS = ("memcpy", "allocation", "launch", "event")
GET, RELEASE = (
    ctypes.cast(function, ctypes.c_void_p)
    for function in (ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release)
)


def build() -> Path:
    """Compiles floor.cu with nvcc alone, if it is newer than what was built. Needs a toolkit."""
    source, library = HERE / "floor.cu", HERE.parent / "build" / "floor.so"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    if CUDA_HOME is None:
        raise RuntimeError("no CUDA toolkit to build bench/floor.cu with: set CUDA_HOME")
    site = Path(torch.__file__).parent
    library.parent.mkdir(exist_ok=True)
    command = [
        f"{CUDA_HOME}/bin/nvcc", "-O3", "-std=c++20", "-shared", "-cudart", "shared",
        "-Xcompiler", "-fPIC", f"-I{site}/include", str(source), "-o", str(library),
        f"-L{site}/lib", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return library


class Floor:
    """Times the parts on torch's current stream, for arrays of up to ``max_ids`` ids."""

    def __init__(self, max_ids: int) -> None:
        torch.cuda.init()  # the allocator is there from then on
        path = str(build())
        self._library = ctypes.CDLL(path)
        double = ctypes.POINTER(ctypes.c_double)
        self._library.floor_copy.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, double
        ]  # fmt: skip
        self._library.floor_issue.argtypes = [ctypes.c_size_t, ctypes.c_void_p, double]
        self._copied, self._issued = (ctypes.c_double * 1)(), (ctypes.c_double * 3)()
        self._buffers = ctypes.PyDLL(path).floor_buffers  # with the interpreter's lock
        self._buffers.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, double
        ]  # fmt: skip
        self._library.floor_open.argtypes = [ctypes.c_size_t]
        if not self._library.floor_open(8 * max_ids):
            raise RuntimeError(f"no pinned memory for {max_ids} ids")

    def buffers(self, arrays: Sequence[array[int]]) -> float:
        """Microseconds of asking each for its memory, as any reader of them must."""
        objects = (ctypes.c_void_p * len(arrays))(*map(id, arrays))  # which touches none of them
        if not self._buffers(objects, len(arrays), GET, RELEASE, self._copied):
            raise RuntimeError("an array gave no buffer")
        return self._copied[0]

    def copy(self, arrays: Sequence[array[int]]) -> float:
        """Microseconds of the memcpy of ``array('q')`` into pinned memory, one after the other."""
        ids, counts = zip(*(a.buffer_info() for a in arrays), strict=True)
        number = len(arrays)
        addresses = (ctypes.c_void_p * number)(*ids)
        sizes = (ctypes.c_size_t * number)(*(8 * count for count in counts))
        if not self._library.floor_copy(addresses, sizes, number, self._copied):
            raise RuntimeError(f"more than the floor has room for: {sum(counts)} ids")
        return self._copied[0]

    def issue(self, count: int) -> Sequence[float]:
        """Microseconds of the other parts, for so many ids."""
        stream = torch.cuda.current_stream().cuda_stream
        if not self._library.floor_issue(8 * count, stream, self._issued):
            raise RuntimeError("a CUDA call of the floor failed")
        return tuple(self._issued)

    def once(self, ids: array[int]) -> Sequence[float]:
        """Microseconds of each of `PARTS` for one `array('q')`."""
        return self.copy([ids]), *self.issue(len(ids))

    def close(self) -> None:
        """Gives the pinned memory back."""
        self._library.floor_close()
