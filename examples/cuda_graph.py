"""Ids for a captured CUDA graph: resolve into the graph's static input before each replay."""

from __future__ import annotations

import torch

import pystage

if not torch.cuda.is_available():
    raise SystemExit("CUDA graphs need a GPU")

pool = pystage.StagingPool("cuda")
table = torch.arange(1000, device="cuda") * 2

# --8<-- [start:graph]
static = torch.zeros(1024, dtype=torch.int64, device="cuda")
table[static]  # a warm-up run before the capture, which torch requires
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = table[static]

for prompt in ([5, 6, 7], [8, 9]):
    staged = pool.stage([prompt])
    pystage.resolve(staged, out=static[: len(prompt)])  # outside the capture
    graph.replay()
    # --8<-- [end:graph]
    assert out[: len(prompt)].tolist() == [2 * i for i in prompt]
pool.close()
print("each replay saw its own ids")
