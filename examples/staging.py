"""Stages and resolves batches, and shows a pool's other functions. Runs with or without a GPU."""

from __future__ import annotations

from array import array

import torch

import pystage

pool = pystage.StagingPool(device=None, capacity_bytes=64 << 20)  # None: current GPU, or the CPU

# --8<-- [start:history]
prompt = array("q", range(100_000))
chunk = pool.stage([prompt], starts=[98_000], stops=[99_000])  # reads only these 1,000 ids
assert len(chunk) == 1000
# --8<-- [end:history]

# --8<-- [start:checked]
try:
    pool.stage([[5, 7], [9, 200_000]], vocab_size=128_256)
except pystage.TokenRangeError as error:
    assert (error.request, error.position, error.value) == (1, 1, 200_000)
# --8<-- [end:checked]

# --8<-- [start:resolve]
input_ids = pystage.resolve(chunk)  # int64 [1000] on pool.device
narrow = pystage.resolve(chunk, dtype=torch.int32)

static = torch.zeros(4096, dtype=torch.int64, device=pool.device)
pystage.resolve(chunk, out=static[:1000])  # into your own tensor
# --8<-- [end:resolve]
for result in (input_ids, narrow, static[:1000]):
    assert result.tolist() == list(range(98_000, 99_000))

# --8<-- [start:slice]
first, rest = chunk[:400], chunk[400:]  # these share the slot; no ids are copied
del chunk
assert pystage.resolve(rest)[0] == 98_400
assert pool.stats().leased_slots == 1  # `first` and `rest` keep the slot
del first, rest
# --8<-- [end:slice]

# --8<-- [start:host]
staged = pool.stage([[1, 2, 3]])
assert staged.shape == (3,) and staged.tolist() == [1, 2, 3]
table = torch.arange(10) * 10
assert table[staged.cpu()].tolist() == [10, 20, 30]  # .cpu() gives a torch.Tensor
# --8<-- [end:host]

# --8<-- [start:small]
lengths, temperatures = pool.small_tensors([[5, 7], [0.7, 1.0]], [torch.int64, torch.float32])
# --8<-- [end:small]
assert lengths.tolist() == [5, 7] and temperatures.shape == (2,)

# --8<-- [start:capacity]
small = pystage.StagingPool(device=None, capacity_bytes=1 << 20, at_capacity="raise")
held = small.stage([list(range(200_000))])  # 200,000 int32 ids: 0.8 MB of 1 MiB
try:
    small.stage([list(range(200_000))])
except pystage.PoolExhaustedError as error:
    assert error.stats is not None and error.stats.leased_slots == 1
# --8<-- [end:capacity]
del held
small.close()

# --8<-- [start:choices]
eager = pystage.StagingPool(device=None, issue="eager")  # stage() starts the transfer
engine = pystage.StagingPool(device=None, transfer="copy_engine")  # uses cudaMemcpyAsync
# --8<-- [end:choices]
for other in (eager, engine):
    assert pystage.resolve(other.stage([[4, 5]])).tolist() == [4, 5]
    other.close()

# --8<-- [start:stats]
stats = pool.stats()
print(f"{stats.reserved_bytes >> 20} of {stats.capacity_bytes >> 20} MiB pinned, ", end="")
print(f"{stats.stages} batches, {stats.waits} waits, {stats.fallbacks} fallbacks")
pool.close()
# --8<-- [end:stats]
