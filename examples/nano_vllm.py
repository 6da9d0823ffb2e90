"""The prefill path of an engine like nano-vllm, with pystage.

nano-vllm's ``ModelRunner.prepare_prefill`` appends the ids of each sequence to a Python list. It
makes each of its lists a pinned tensor and copies that to the GPU. Here ``stage`` gathers the ids
into a slot, and one kernel gets the other lists as its parameters. ``Sequence`` has the same fields
as nano-vllm's class.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

import pystage


@dataclass
class Sequence:
    token_ids: list[int]
    num_cached_tokens: int  # ids that are in the KV cache already and are not sent again
    num_scheduled_tokens: int  # ids to send in this step

    @property
    def end(self) -> int:
        return self.num_cached_tokens + self.num_scheduled_tokens


# --8<-- [start:prefill]
class ModelRunner:
    def __init__(self, device: str | None = None) -> None:
        self.pool = pystage.StagingPool(device)  # one for each rank

    def prepare_prefill(self, seqs: list[Sequence]) -> tuple[torch.Tensor, ...]:
        starts = [seq.num_cached_tokens for seq in seqs]
        ends = [seq.end for seq in seqs]
        staged = self.pool.stage([seq.token_ids for seq in seqs], starts, ends)
        input_ids = pystage.resolve(staged)

        cu_seqlens_q = [0, *accumulate(seq.num_scheduled_tokens for seq in seqs)]
        cu_seqlens_k = [0, *accumulate(ends)]
        positions = [i for start, end in zip(starts, ends, strict=True) for i in range(start, end)]
        return input_ids, *self.pool.small_tensors(
            [positions, cu_seqlens_q, cu_seqlens_k], [torch.int64, torch.int32, torch.int32]
        )
        # --8<-- [end:prefill]


if __name__ == "__main__":
    runner = ModelRunner()
    some = [Sequence([7, 8, 9, 10], 0, 3), Sequence(list(range(100)), 98, 2)]
    ids, positions, q, k = runner.prepare_prefill(some)
    assert ids.tolist() == [7, 8, 9, 98, 99] and positions.tolist() == [0, 1, 2, 98, 99]
    assert q.tolist() == [0, 3, 5] and k.tolist() == [0, 3, 103]
    print(f"{len(ids)} ids of {len(some)} sequences on {ids.device}")
