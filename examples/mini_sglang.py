"""The prefill path of an engine like mini-sglang, with pystage.

mini-sglang keeps the ids of all requests in a table on the GPU, ``token_pool``, with a row of int32
for each request. On the scheduler's stream, its prefill manager pins each request's new ids and
copies them into the row. On the engine's stream, the forward gathers its ``input_ids`` from the
table.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

import pystage

pool = pystage.StagingPool(device=None)
token_pool = torch.zeros(8, 4096, dtype=torch.int32, device=pool.device)


# --8<-- [start:add]
def add_one_req(input_ids: torch.Tensor, row: int, cached_len: int, chunk_size: int) -> None:
    """Writes the next ``chunk_size`` ids of a request into its row of the table.

    It replaces ``row_ids.copy_(input_ids[start:stop].pin_memory(), non_blocking=True)``.
    """
    stop = cached_len + chunk_size
    staged = pool.stage([input_ids], starts=[cached_len], stops=[stop])
    pystage.resolve(staged, out=token_pool[row, cached_len:stop])
    # --8<-- [end:add]


# --8<-- [start:loop]
class Scheduler:
    def __init__(self) -> None:
        cuda = pool.device.type == "cuda"
        self.stream = torch.cuda.Stream() if cuda else None
        self.engine_stream = torch.cuda.Stream() if cuda else None

    def step(self, prompt: torch.Tensor) -> torch.Tensor:
        with _on(self.stream):
            add_one_req(prompt, row=3, cached_len=0, chunk_size=len(prompt))
        if self.engine_stream is not None and self.stream is not None:
            self.engine_stream.wait_stream(self.stream)  # the forward sees the ids
        with _on(self.engine_stream):
            return token_pool[3, : len(prompt)].long()
            # --8<-- [end:loop]


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


if __name__ == "__main__":
    prompt = torch.arange(100, 1100)
    assert torch.equal(Scheduler().step(prompt).cpu(), prompt)
    print(f"{len(prompt)} ids in row 3 of the table on {pool.device}")
