"""Simulated chunk times on one pipeline stage, in ms, for several kinds of models and devices.

They have shapes of real ones (launch floors, tiles, waves, weight reads, rebuilt histories). None
is a form that the latency model itself uses. Lengths are in tokens, and arrays broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pystage.pp import Profile, SamplePlan, Timing, profile_prefill

Surface = Callable[[Any, Any], Any]


def _attention(history: Any, chunk: Any, wave: int = 1056) -> Any:
    """Area of causal attention in tokens squared, half-filled waves of query rows taken in part."""
    area = (history + chunk / 2) * chunk
    half = wave / 2
    stairs = (history + chunk / 2) * (np.ceil(chunk / half) * half)
    return 0.4 * area + 0.6 * stairs


def _tiled(chunk: Any, tile: int = 128) -> Any:
    return np.ceil(chunk / tile) * tile


def dense(history: Any, chunk: Any) -> Any:
    """Eight layers of 8B on an H100: products at some 600 TFLOPS, attention at 400."""
    work = 5.6e-3 * np.maximum(_tiled(chunk), 250) + 1.6e-7 * 2 * _attention(history, chunk)
    return np.maximum(3.0, 0.4 + work)


def fp8(history: Any, chunk: Any) -> Any:
    """Products in half the time: attention weighs twice."""
    work = 2.9e-3 * np.maximum(_tiled(chunk), 350) + 1.6e-7 * 2 * _attention(history, chunk)
    return np.maximum(3.0, 0.4 + work)


def moe(history: Any, chunk: Any) -> Any:
    """Every chunk reads nearly all experts; little work a token."""
    weights = 14.0 * (1 - np.exp(-chunk / 300.0))
    work = np.hypot(weights, 3.6e-3 * _tiled(chunk)) + 6e-8 * 2 * _attention(history, chunk, 2112)
    return np.maximum(5.0, 1.0 + work)


def mla(history: Any, chunk: Any) -> Any:
    """Keys and values of the whole history are rebuilt for every chunk."""
    rebuilt = 4.5e-4 * history * (history > 0)
    return 3.0 + rebuilt + 4.0e-3 * _tiled(chunk) + 1.4e-7 * 2 * _attention(history, chunk, 528)


def window(history: Any, chunk: Any) -> Any:
    """Three of four layers see the last 4,096 tokens alone."""
    near = _attention(np.minimum(history, 4096), np.minimum(chunk, 4096)) * (
        np.maximum(chunk, 4096) / 4096
    )
    far = _attention(history, chunk)
    return np.maximum(4.0, 0.5 + 4.5e-3 * _tiled(chunk) + 1.6e-7 * (1.5 * near + 0.5 * far))


def hybrid(history: Any, chunk: Any) -> Any:
    """A state-space model with one attention layer in eight."""
    return np.maximum(6.0, 1.0 + 5.0e-3 * _tiled(chunk, 256) + 4e-8 * _attention(history, chunk))


def launches(history: Any, chunk: Any) -> Any:
    """A small model: the host's launches take 22 ms, whatever the chunk."""
    return np.maximum(22.0, 2.0 + 1.5e-3 * _tiled(chunk) + 5e-8 * 2 * _attention(history, chunk))


def padded(history: Any, chunk: Any) -> Any:
    """CUDA graphs for multiples of 512 tokens."""
    return dense(history, np.ceil(chunk / 512) * 512)


SURFACES: dict[str, Surface] = {
    f.__name__: f for f in (dense, fp8, moe, mla, window, hybrid, launches, padded)
}


class Device:
    """A step and a timer that together behave as a device with that surface, its noise, and from
    time to time something else that runs."""

    def __init__(self, surface: Surface, noise: float, seed: int, spikes: float = 0.0) -> None:
        self.surface, self.noise, self.spikes = surface, noise, spikes
        self.rng = np.random.default_rng(seed)
        self.last = (0, 1)
        self.forwards = 0

    def step(self, history_len: int, chunk_len: int) -> None:
        self.last = (history_len, chunk_len)

    def timer(self, run: Callable[[], object]) -> Timing:
        run()
        (ms,) = self.time([self.last])
        return Timing(ms, ms)

    def time(self, points: Sequence[tuple[int, int]]) -> list[float]:
        """ms of each (history, chunk), noise and all."""
        out = []
        for history, chunk in points:
            self.forwards += 1
            ms = float(self.surface(float(history), float(chunk)))
            ms *= float(np.exp(self.noise * self.rng.standard_normal()))
            slow = self.forwards <= 2 or self.rng.random() < self.spikes
            out.append(ms * (4.0 if slow else 1.0))
        return out

    def profile(self, plan: SamplePlan) -> Profile:
        return profile_prefill(self.step, plan, timer=self.timer)
