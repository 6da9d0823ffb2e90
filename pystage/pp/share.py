"""One rank profiles, every rank gets the samples or the failure.

Pipeline ranks must agree on every chunk size. `LatencyModel.fit` gives the same model for the same
samples, so sharing the samples is enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.distributed as dist

from pystage.pp.samples import Profile


class RemoteProfileError(RuntimeError):
    """Profiling failed on the rank that profiles; the text is that rank's error."""


def share_profile(
    profile: Callable[[], Profile],
    *,
    group: dist.ProcessGroup | None = None,
    src: int = 0,
    device: torch.device | str | None = None,
) -> Profile:
    """Runs `profile` on global rank `src` and returns its result on every rank of `group`.

    A collective call: every rank of the group makes it, only `src` runs `profile`. If that raises,
    `src` raises the error itself and every other rank `RemoteProfileError`; none is left waiting.
    The others wait as long as profiling takes, so the group's timeout must be above its budget in
    seconds. `device` carries the broadcast (default: the current CUDA device under NCCL, else CPU).
    """
    if device is None:
        nccl = dist.get_backend(group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"
    if dist.get_rank() != src:
        return _receive(group, src, torch.device(device))
    try:
        result = profile()
        text = json.dumps({"profile": result.to_json()})
    except BaseException as error:
        text = json.dumps({"error": f"{type(error).__name__}: {error}"})
        _send(text, group, src, torch.device(device))
        raise
    _send(text, group, src, torch.device(device))
    return result


def _send(text: str, group: dist.ProcessGroup | None, src: int, device: torch.device) -> None:
    payload = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).to(device)
    dist.broadcast(torch.tensor([payload.numel()], device=device), src=src, group=group)
    dist.broadcast(payload, src=src, group=group)


def _receive(group: dist.ProcessGroup | None, src: int, device: torch.device) -> Profile:
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.broadcast(size, src=src, group=group)
    payload = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(payload, src=src, group=group)
    message = json.loads(bytes(payload.cpu().numpy()))
    if "error" in message:
        raise RemoteProfileError(f"rank {src} could not profile: {message['error']}")
    return Profile.from_json(message["profile"])
