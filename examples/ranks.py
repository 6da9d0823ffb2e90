"""One pool in each rank: rank 0 has the requests and broadcasts them, and each rank stages them.

This runs two processes with gloo on the CPU. With GPUs, each rank has its own GPU, and NCCL is the
backend for tensors on them. The requests are still sent over gloo, because they are on the host.
"""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pystage


# --8<-- [start:rank]
def serve(rank: int, ranks: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    device = f"cuda:{rank}" if torch.cuda.device_count() >= ranks else "cpu"
    with pystage.StagingPool(device) as pool:
        batch: list[list[list[int]] | None] = [[[1, 2, 3], [4, 5]]] if rank == 0 else [None]
        dist.broadcast_object_list(batch)  # as SGLang's tensor parallelism does
        requests = batch[0]
        assert requests is not None
        input_ids = pystage.resolve(pool.stage(requests))
        # --8<-- [end:rank]
        assert input_ids.tolist() == [1, 2, 3, 4, 5]
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    mp.spawn(serve, args=(2,), nprocs=2)
    print("both ranks have the ids")
