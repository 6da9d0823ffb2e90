"""The contenders: each takes a batch of ragged ids to an int64 tensor on the device, in two calls.

``stage`` runs where the batch is made, ``resolve`` where its forward starts. References do less:
they show the cost of one part.

This is one file because every contender has the same two calls and gathers with the same helpers,
so that they can be compared side by side.
"""

from __future__ import annotations

import ctypes
import os
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain
from typing import Any, TypeAlias

import numpy as np
import torch

import pystage
from bench.common import VOCAB
from bench.device import DURING_CALL, IN_STREAM_ORDER, Absent, Host
from bench.suite import bound
from bench.suite.peers import Sources

Batch: TypeAlias = "Sequence[Any]"  # one list, array('q'), NumPy array or tensor for each request
KINDS = ("array", "list", "numpy", "tensor")
DEFERRED = "pystage deferred"
EAGER = "pystage eager"
ENGINE = "pystage copy engine"
WIDE = "pystage int64 wire"
CHECKED = "pystage, ids checked"
SGLANG = "SGLang"
BUFFER = "vLLM CpuGpuBuffer"
UVA = "vLLM UvaBufferPool"
RUNNER = "vLLM V2 runner"
TORCH = "torch, pinned array"
TORCH_LIST = "torch, list"
CUPY = "CuPy pinned pool"
BATCH = "cudaMemcpyBatchAsync"
READY = "cudaMemcpyAsync, ready buffer"
READY_BATCH = "cudaMemcpyBatchAsync, ready buffer"
EMPTY = "an empty kernel"
BOUND, TOTAL, MEMCPY, EVENT = bound.PARTS, "total", bound.MEMCPY, bound.EVENT
BUFFERS, RAGGED = "arrays asked for their memory", "write, one by one"


@dataclass(frozen=True)
class Contender:
    """One way to bring ids to the device.

    Attributes:
        role: ``"ours"``, ``"peer"`` (does the same job) or ``"reference"`` (does a part of it).
        stage: takes a batch and returns whatever ``resolve`` takes.
        resolve: returns an int64 tensor on the device, ordered on the current stream.
        takes: the kinds of requests it accepts.
        most: the largest number of ids it has room for.
        note: what a reader must know to judge its figures.
        pinned: returns the bytes of pinned memory held and the number of allocations so far. None:
            it uses torch's own allocator.
        close: releases the memory it holds.
    """

    name: str
    role: str
    stage: Callable[[Any], Any]
    resolve: Callable[[Any], Any]
    takes: Sequence[str] = KINDS
    most: int = 1 << 62
    note: str = ""
    pinned: Callable[[], tuple[int, int]] | None = None
    close: Callable[[], None] = lambda: None


def ids_of(request: Any) -> Any:
    """A request as an int64 NumPy array, copied only if necessary."""
    if isinstance(request, array):
        return np.frombuffer(request, np.int64)
    if isinstance(request, list):  # a third quicker than np.asarray
        return np.fromiter(request, np.int64, len(request))
    return np.asarray(request)


def gather(batch: Batch, into: Any) -> None:
    """Gathers a batch in the fastest way that NumPy and torch offer."""
    if isinstance(batch[0], torch.Tensor):
        torch.cat([*batch], out=torch.from_numpy(into))
    elif len(batch) == 1:
        into[:] = ids_of(batch[0])
    else:
        np.concatenate([ids_of(request) for request in batch], out=into)


def count_of(batch: Batch) -> int:
    return sum(map(len, batch))


# --- ours --------------------------------------------------------------------------------------

POOLS: dict[str, dict[str, Any]] = {
    DEFERRED: {},
    EAGER: {"issue": "eager"},
    ENGINE: {"transfer": "copy_engine", "wire": "int64"},
    WIDE: {"wire": "int64"},
}


def ours(name: str, device: Host) -> Contender:
    pool = pystage.StagingPool(device.torch, **POOLS[name])

    def pinned() -> tuple[int, int]:
        stats = pool.stats()
        return stats.reserved_bytes, stats.allocations

    note = ", ".join(f"{option}={value}" for option, value in POOLS[name].items())
    return Contender(
        name, "ours", pool.stage, pystage.resolve, note=note, pinned=pinned, close=pool.close
    )


def ours_checked(device: Host) -> Contender:
    pool = pystage.StagingPool(device.torch)
    return Contender(
        CHECKED,
        "ours",
        lambda batch: pool.stage(batch, vocab_size=VOCAB),
        pystage.resolve,
        note="each id checked against the vocabulary",
        close=pool.close,
    )


# --- peers -------------------------------------------------------------------------------------


def torch_array(device: Host) -> Contender:
    """As few copies as torch allows: gathers directly into a block of its pinned allocator."""

    def stage(batch: Batch) -> torch.Tensor:
        pinned = device.pinned(count_of(batch))
        gather(batch, pinned.numpy())
        return pinned

    return Contender(
        TORCH,
        "peer",
        stage,
        lambda pinned: pinned.to(device.torch, non_blocking=True),
        note="torch.empty(pin_memory=True), filled through NumPy, .to(non_blocking=True)",
    )


def torch_list(device: Host) -> Contender:
    def stage(batch: Batch) -> torch.Tensor:
        flat = batch[0] if len(batch) == 1 else list(chain.from_iterable(batch))
        return torch.tensor(flat, dtype=torch.int64, pin_memory=device.cuda)

    return Contender(
        TORCH_LIST,
        "peer",
        stage,
        lambda pinned: pinned.to(device.torch, non_blocking=True),
        takes=("list",),
        note="torch.tensor(list, pin_memory=True), .to(non_blocking=True)",
    )


class NoSpeculation:
    """The ``spec_algorithm`` of a batch without speculation."""

    def is_none(self) -> bool:
        return True


@dataclass
class ForwardBatch:
    """The fields of an SGLang batch that SGLang's function reads, without speculation."""

    prefill_input_ids_cpu: Any
    device: torch.device
    mix_running_indices: Any = None
    input_ids: Any = None
    enable_overlap: bool = True
    spec_algorithm: Any = field(default_factory=NoSpeculation)


@dataclass
class SglangCode:
    """SGLang's functions, unchanged from the wheel."""

    flatten: Callable[[Any, bool], torch.Tensor]
    resolve_forward_inputs: Callable[[Any, Any], None]
    get_fill_ids: Callable[[Any], Any]
    version: str


def sglang_code(sources: Sources) -> SglangCode:
    given = {"np": np, "torch": torch, "_DEBUG_ASSERT": False}
    flatten = sources.take("sglang", "srt/utils/common.py", ["flatten_arrays_to_pinned_cpu"], given)
    resolve = sources.take(
        "sglang", "srt/managers/overlap_utils.py", ["resolve_forward_inputs"], given
    )
    fill = sources.take("sglang", "srt/managers/schedule_batch.py", ["Req.get_fill_ids"], given)
    return SglangCode(
        flatten["flatten_arrays_to_pinned_cpu"],
        resolve["resolve_forward_inputs"],
        fill["Req.get_fill_ids"],
        sources.version("sglang"),
    )


def sglang(device: Host, sources: Sources) -> Contender:
    code = sglang_code(sources)

    def resolve(pinned: torch.Tensor) -> torch.Tensor:
        batch = ForwardBatch(pinned, device.torch)
        code.resolve_forward_inputs(batch, None)
        return batch.input_ids  # type: ignore[no-any-return]

    return Contender(
        SGLANG,
        "peer",
        lambda batch: code.flatten(batch, device.cuda),
        resolve,
        takes=("array", "numpy"),
        note=f"flatten_arrays_to_pinned_cpu and resolve_forward_inputs of {code.version}; the "
        "rest of prepare_for_extend, and its copy of the history, are left out",
    )


def vllm_buffer(device: Host, sources: Sources, room: int) -> Contender:
    given = {"torch": torch, "PIN_MEMORY": device.cuda}
    taken = sources.take("vllm", "v1/utils.py", ["CpuGpuBuffer"], given)
    buffer = taken["CpuGpuBuffer"](
        room, dtype=torch.int64, device=device.torch, pin_memory=device.cuda
    )

    def stage(batch: Batch) -> int:
        count = count_of(batch)
        gather(batch, buffer.np[:count])
        return count

    return Contender(
        BUFFER,
        "peer",
        stage,
        buffer.copy_to_gpu,
        most=room,
        note=f"CpuGpuBuffer of {sources.version('vllm')}; one buffer for all batches, filled "
        "without the event that vLLM waits for once a step: in its favour; of int64, as all "
        "results here, where vLLM's own ids are int32",
    )


def vllm_uva(device: Host, sources: Sources, room: int) -> Contender:
    if not device.cuda:
        raise Absent("no device that would read the host's memory")
    given = {
        "np": np,
        "torch": torch,
        "is_uva_available": lambda: True,
        "get_accelerator_view_from_cpu_tensor": device.view,
        "_DEFAULT_MAX_CONCURRENCY": 2,
    }
    names = ["UvaBuffer", "UvaBufferPool"]
    taken = sources.take("vllm", "v1/worker/gpu/buffer_utils.py", names, given)
    pool = taken["UvaBufferPool"](room, torch.int64)

    def stage(batch: Batch) -> torch.Tensor:
        flat = ids_of(batch[0]) if len(batch) == 1 else np.concatenate([*map(ids_of, batch)])
        return pool.copy_to_uva(flat)  # type: ignore[no-any-return]

    return Contender(
        UVA,
        "peer",
        stage,
        torch.clone,
        most=room,
        note=f"UvaBufferPool of {sources.version('vllm')}; the device's view of its memory is made "
        "through torch, as vLLM's own is in its compiled part; two buffers in turn, no fence; of "
        "int64, where vLLM's own ids are int32",
    )


class VllmRunner:
    """vLLM's newest model runner. A kernel writes a request's ids once into a row of host memory
    that the device can read. At each step, a kernel gathers the ids of that step from the rows.

    The number and length of the rows are what the batches seen so far need.
    """

    def __init__(self, device: Host, sources: Sources) -> None:
        if not (device.cuda or device.gpu_regimes):
            raise Absent("no device that would read the host's memory")
        try:
            import triton
            import triton.language as tl
        except ImportError as error:
            raise Absent(f"Triton is not installed ({error})") from error
        if not device.cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise Absent("its Triton kernels need a GPU, or TRITON_INTERPRET=1")
        pin = sources.take("vllm", "utils/torch_utils.py", ["async_tensor_h2d"], {
            "np": np, "torch": torch, "PIN_MEMORY": device.cuda
        })  # fmt: skip
        given = {
            "np": np,
            "torch": torch,
            "tl": tl,
            "triton": triton,
            "partial": partial,
            "is_uva_available": lambda: True,
            "get_accelerator_view_from_cpu_tensor": device.view,
            "_DEFAULT_MAX_CONCURRENCY": 2,
            "_WRITE_BLOCK_SIZE": 1024,
        }
        names = ["UvaBuffer", "NonUvaBuffer", "UvaBufferPool", "_load_ptr", "_num_write_chunks"]
        names += ["_apply_write_kernel", "StagedWriteTensor"]
        if not device.cuda:
            given["torch"] = UnpinnedTorch()
        self._rows_of = sources.take("vllm", "v1/worker/gpu/buffer_utils.py", names, given | pin)[
            "StagedWriteTensor"
        ]
        names = ["_prepare_prefill_inputs_kernel", "prepare_prefill_inputs"]
        self._gather = sources.take("vllm", "v1/worker/gpu/input_batch.py", names, given)[
            "prepare_prefill_inputs"
        ]
        self.device, self._rows, self._shapes = device, (0, 0), {}
        self._made = None

    def stage(self, batch: Batch) -> tuple[int, ...]:
        """Writes each request's ids to a row with ``stage_write`` and ``apply_write``, once."""
        lengths = tuple(map(len, batch))
        rows, longest = (1 << (n - 1).bit_length() for n in (len(lengths), max(lengths)))
        if rows > self._rows[0] or longest > self._rows[1]:
            self._rows = tuple(map(max, (rows, longest), self._rows))
            self._made = self._rows_of(
                self._rows, torch.int32, self.device.torch, uva_instead_of_gpu=True
            )
            self._shapes.clear()
        for row, ids in enumerate(batch):
            self._made.stage_write(row, 0, ids)
        self._made.apply_write()
        return lengths

    def resolve(self, lengths: tuple[int, ...], computed: int = 0) -> torch.Tensor:
        """At each step, gathers the rows' ids after the first ``computed`` with a kernel."""
        shape = self._shapes.get((lengths, computed))
        if shape is None:
            shape = self._shapes[lengths, computed] = self._shape(lengths, computed)
        self._gather(*shape)
        return shape[0]

    def _shape(self, lengths: tuple[int, ...], computed: int) -> tuple[torch.Tensor, ...]:
        """The kernel's arguments. They are made beforehand, since vLLM uses them for more than the
        ids."""
        count, where = len(lengths), self.device.torch
        new = [length - computed for length in lengths]
        starts = torch.tensor([0, *accumulate(new)], dtype=torch.int32, device=where)
        ids = torch.empty(sum(new), dtype=torch.int32, device=where)
        ahead = torch.zeros(1, count, dtype=torch.int32, device=where)
        rows = torch.arange(count, device=where)
        prefill = torch.tensor(lengths, dtype=torch.int32, device=where)
        done = torch.full((count,), computed, dtype=torch.int32, device=where)
        return ids, ahead, rows, starts, self._made.gpu, prefill, done


class UnpinnedTorch:
    """torch for trial runs on a machine that cannot pin memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs)


def vllm_runner(device: Host, sources: Sources) -> Contender:
    runner = VllmRunner(device, sources)
    return Contender(
        RUNNER,
        "peer",
        runner.stage,
        runner.resolve,
        takes=("list",),
        note=f"StagedWriteTensor and prepare_prefill_inputs of {sources.version('vllm')}, from "
        "lists as vLLM has them; gives int32 in a buffer that the next step overwrites; the small "
        "tensors beside the ids are made beforehand: in its favour",
    )


def cupy_pool(device: Host) -> Contender:
    if not device.cuda:
        raise Absent("CuPy works on CUDA devices only")
    try:
        import cupy
    except ImportError as error:
        raise Absent(f"CuPy is not installed ({error})") from error
    held = [0, 0]

    def allocate(size: int) -> Any:  # like CuPy's own allocator, but counts
        held[0] += size
        held[1] += 1
        return cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(size), 0)

    pool = cupy.cuda.PinnedMemoryPool(allocate)
    to_device = cupy.cuda.runtime.memcpyHostToDevice

    def stage(batch: Batch) -> tuple[Any, int]:
        count = count_of(batch)
        memory = pool.malloc(8 * count)
        gather(batch, np.frombuffer(memory, np.int64, count))
        return memory, count

    def resolve(staged: tuple[Any, int]) -> torch.Tensor:
        memory, count = staged
        out = torch.empty(count, dtype=torch.int64, device=device.torch)
        stream = torch.cuda.current_stream().cuda_stream
        cupy.cuda.runtime.memcpyAsync(out.data_ptr(), memory.ptr, 8 * count, to_device, stream)
        return out

    return Contender(
        CUPY,
        "peer",
        stage,
        resolve,
        note=f"cupy.cuda.PinnedMemoryPool of {cupy.__version__} and its memcpyAsync; it knows no "
        "stream, so the caller keeps the memory until the copy is done: not counted here",
        pinned=lambda: (held[0], held[1]),
    )


def memcpy_batch(device: Host) -> Contender:
    device.batch([], [], [], DURING_CALL)  # raises if there is no such call

    def resolve(batch: Batch) -> torch.Tensor:
        out = torch.empty(count_of(batch), dtype=torch.int64, device=device.torch)
        srcs, dsts, sizes, at = [], [], [], out.data_ptr()
        for request in batch:
            source, count = request.buffer_info()
            srcs.append(source)
            dsts.append(at)
            sizes.append(8 * count)
            at += 8 * count
        device.batch(dsts, srcs, sizes, DURING_CALL)()
        return out

    return Contender(
        BATCH,
        "peer",
        lambda batch: batch,
        resolve,
        takes=("array",),
        note="straight from the arrays, srcAccessOrder=DuringApiCall; called through ctypes",
    )


# --- references --------------------------------------------------------------------------------


def ready(device: Host, name: str, count: int, out: torch.Tensor | None = None) -> Contender:
    """Only the copy, from a pinned buffer that already holds the ids."""
    pinned = device.pinned(count)
    pinned.random_(0, VOCAB)
    out = torch.empty(count, dtype=torch.int64, device=device.torch) if out is None else out
    dst, src, size = out.data_ptr(), pinned.data_ptr(), 8 * count
    keep = (pinned, out)
    if name == READY_BATCH:
        call = device.batch_here([dst], [src], [size], IN_STREAM_ORDER)
    else:
        call = device.memcpy_here(dst, src, size)

    def resolve(_: Any) -> torch.Tensor:
        call()
        return keep[1]

    note = "the copy alone, into a tensor that is there; a call of the runtime bound in C (calls.c)"
    return Contender(name, "reference", lambda batch: None, resolve, note=note)


class PythonBound:
    """The lower bound without CUDA. Each part includes the cost of its call from Python."""

    parts = (*BOUND, TOTAL, MEMCPY, RAGGED)

    def __init__(self, device: Host, count: int) -> None:
        self.device, self.pinned = device, device.pinned(count)
        self._narrow = self.pinned.numpy().view(np.int32)

    def _write(self, arrays: Sequence[array[int]]) -> float:
        start, at = time.perf_counter_ns(), 0
        for ids in arrays:
            self._narrow[at : at + len(ids)] = np.frombuffer(ids, np.int64)
            at += len(ids)
        return (time.perf_counter_ns() - start) / 1e3

    def _memcpy(self, ids: array[int]) -> float:
        start = time.perf_counter_ns()
        ctypes.memmove(self.pinned.data_ptr(), ids.buffer_info()[0], 8 * len(ids))
        return (time.perf_counter_ns() - start) / 1e3

    def once(self, whole: array[int], ragged: Sequence[array[int]]) -> Sequence[float]:
        """Microseconds of each part. Reads ``whole`` as one array, ``ragged`` array by array."""
        first, one_by_one, copied = self._write([whole]), self._write(ragged), self._memcpy(whole)
        written = min(first, self._write([whole]))
        start = time.perf_counter_ns()
        out = torch.empty(count_of(ragged), dtype=torch.int64, device=self.device.torch)
        allocated = time.perf_counter_ns()
        self.device.launch()
        launched = time.perf_counter_ns()
        del out
        parts = written, (allocated - start) / 1e3, (launched - allocated) / 1e3
        return *parts, sum(parts), copied, one_by_one

    def close(self) -> None:
        """Does nothing: there is nothing to release."""


class CompiledBound:
    """The lower bound timed in C, with an event as one more part."""

    parts = (*BOUND, TOTAL, EVENT, MEMCPY, BUFFERS, RAGGED)

    def __init__(self, count: int) -> None:
        self._bound = bound.Bound(count)

    def once(self, whole: array[int], ragged: Sequence[array[int]]) -> Sequence[float]:
        # The faster of two writes: one first, as a contender's is, and one of ids that were just
        # read. The second alone took longer than pystage's whole call for 8 MiB of ids, since a
        # memcpy into the same memory comes before it.
        first = self._bound.write([whole])
        asked, one_by_one = self._bound.buffers(ragged), self._bound.write(ragged)
        copied = self._bound.memcpy([whole])
        written = min(first, self._bound.write([whole]))
        memory, launch, event = self._bound.issue(count_of(ragged))
        return written, memory, launch, written + memory + launch, event, copied, asked, one_by_one

    def close(self) -> None:
        self._bound.close()


def empty_kernel(device: Host) -> Contender:
    return Contender(EMPTY, "reference", lambda _: None, lambda _: device.launch())


# --- all of them -------------------------------------------------------------------------------


class Contenders:
    """Makes contenders. Remembers which ones are absent and why, and which ones failed."""

    def __init__(self, device: Host, sources: Sources) -> None:
        self.device, self.sources = device, sources
        self.absent: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.roles: dict[str, str] = {}

    def make(self, name: str, room: int = 1 << 20) -> Contender | None:
        """Makes a new contender of that name with room for ``room`` ids. None if it is absent."""
        device, sources = self.device, self.sources
        makers: dict[str, Callable[[], Contender]] = {
            CHECKED: lambda: ours_checked(device),
            SGLANG: lambda: sglang(device, sources),
            BUFFER: lambda: vllm_buffer(device, sources, room),
            UVA: lambda: vllm_uva(device, sources, room),
            RUNNER: lambda: vllm_runner(device, sources),
            TORCH: lambda: torch_array(device),
            TORCH_LIST: lambda: torch_list(device),
            CUPY: lambda: cupy_pool(device),
            BATCH: lambda: memcpy_batch(device),
            READY: lambda: ready(device, READY, room),
            READY_BATCH: lambda: ready(device, READY_BATCH, room),
            EMPTY: lambda: empty_kernel(device),
        }
        if name in POOLS:
            makers[name] = lambda: ours(name, device)
        try:
            contender = makers[name]()
        except Absent as why:
            self.absent[name] = str(why)
            return None
        except Exception:
            self.errors[f"making {name}"] = traceback.format_exc()
            return None
        self.roles[name], self.notes[name] = contender.role, contender.note
        return contender

    def bound(self, count: int) -> PythonBound | CompiledBound:
        """The lower bound for up to ``count`` ids. Timed from Python where C cannot be compiled."""
        failed = "making the lower bound in C"
        if self.device.cuda and failed not in self.errors:  # does not try a long compilation twice
            try:
                return CompiledBound(count)
            except Exception:
                self.errors[failed] = traceback.format_exc()
        return PythonBound(self.device, count)

    def why_not(self, name: str) -> str:
        """The reason why :meth:`make` returned None."""
        return self.absent.get(name) or f"failed: see the error of making {name}"

    def all(self, names: Sequence[str], room: int = 1 << 20) -> list[Contender]:
        """Makes the contenders of these names, without those that are absent."""
        return [c for c in (self.make(name, room) for name in names) if c is not None]


OURS = (DEFERRED, EAGER, ENGINE, WIDE, CHECKED)
PEERS = (TORCH, TORCH_LIST, SGLANG, BUFFER, UVA, RUNNER, CUPY, BATCH)
REFERENCES = (READY, READY_BATCH)
EVERYBODY = (*OURS, *PEERS, *REFERENCES)
