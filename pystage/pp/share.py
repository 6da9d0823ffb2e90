"""One rank profiles, fits and decides; every rank gets the result or the error.

Pipeline ranks must agree on every chunk size. Sharing only the samples does not ensure that. On
different CPUs a BLAS uses different kernels, so fits of the same samples end at slightly different
values, and sometimes select another form or wave. So the ranks share the fitted model, and whatever
was decided with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pystage.pp.model import LatencyModel
from pystage.pp.samples import Profile


class RemoteProfileError(RuntimeError):
    """Profiling failed on the rank that profiles. The message contains that rank's error."""


def share_profile(
    profile: Callable[[], Profile],
    *,
    group: dist.ProcessGroup | None = None,
    src: int = 0,
    device: torch.device | str | None = None,
) -> Profile:
    """Runs `profile` on global rank `src` and returns its result on every rank of `group`.

    Ranks that fit the same samples may get different models; `share_model` gives all ranks one
    model. See `share_json`.
    """
    data = share_json(lambda: profile().to_json(), group=group, src=src, device=device)
    return Profile.from_json(data)


def share_model(
    model: Callable[[], LatencyModel],
    *,
    group: dist.ProcessGroup | None = None,
    src: int = 0,
    device: torch.device | str | None = None,
) -> LatencyModel:
    """Runs `model` (profile and fit) on global rank `src`; every rank gets the same model.

    See `share_json`.
    """
    data = share_json(lambda: model().to_json(), group=group, src=src, device=device)
    return LatencyModel.from_json(data)


def share_json(
    work: Callable[[], Any],
    *,
    group: dist.ProcessGroup | None = None,
    src: int = 0,
    device: torch.device | str | None = None,
) -> Any:
    """Runs `work` on global rank `src`; every rank of `group` gets its result, sent as JSON.

    This is a collective call: every rank of the group must make it, and only `src` runs `work`. The
    other ranks wait as long as the work takes, so the group's timeout must be longer than the
    work's time budget. `device` is where the broadcast tensors are (default: the current CUDA
    device under NCCL, else the CPU). Without torch.distributed, or before it is initialized, the
    calling process runs the work itself.

    Raises:
        RemoteProfileError: on every other rank, if `work` raises. `src` raises the original error.
            No rank is left waiting.
    """
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return json.loads(json.dumps(work()))  # there is only this process
    if device is None:
        nccl = dist.get_backend(group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"
    if dist.get_rank() != src:
        return _receive(group, src, torch.device(device))
    try:
        text = json.dumps({"result": work()})
    except BaseException as error:
        text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        _send(text, group, src, torch.device(device))
        raise
    _send(text, group, src, torch.device(device))
    return json.loads(text)["result"]


def _send(text: str, group: dist.ProcessGroup | None, src: int, device: torch.device) -> None:
    payload = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).to(device)
    dist.broadcast(torch.tensor([payload.numel()], device=device), src=src, group=group)
    dist.broadcast(payload, src=src, group=group)


def _receive(group: dist.ProcessGroup | None, src: int, device: torch.device) -> Any:
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.broadcast(size, src=src, group=group)
    payload = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(payload, src=src, group=group)
    message = json.loads(bytes(payload.cpu().numpy()))
    if "error" in message:
        raise RemoteProfileError(f"rank {src} could not profile: {message['error']}")
    return message["result"]
