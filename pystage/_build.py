"""Versions of this installation, and how its extension was built."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from . import _C

try:
    __version__ = metadata.version("pystage-h2d")
except metadata.PackageNotFoundError as error:
    raise ImportError(
        f"pystage is imported from {Path(__file__).parent}, where it was built but not installed. "
        "Run there, one folder up: pip install --no-build-isolation -e ."
    ) from error


def _dotted(version: int) -> str | None:
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


@dataclass(frozen=True)
class BuildInfo:
    """What the extension was built with, and what it runs with.

    Attributes:
        version: pystage's version.
        cuda: whether the extension has CUDA code.
        cuda_runtime: CUDA version it was compiled with; None without CUDA code.
        cuda_architectures: architectures its kernels were compiled for; ``+PTX`` also covers later
            ones.
        cuda_driver: newest CUDA version that the driver supports; None without a driver.
        torch_built: torch version it was built against.
        torch: torch version it runs with.
    """

    version: str
    cuda: bool
    cuda_runtime: str | None
    cuda_architectures: tuple[str, ...]
    cuda_driver: str | None
    torch_built: str
    torch: str


def _driver_version() -> int:
    """Asks the driver itself. Asking through the runtime would initialise CUDA, and then a child
    that is forked later could not use the GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def build_info() -> BuildInfo:
    """Describes the build. It starts no CUDA context and works without a driver."""
    return BuildInfo(
        version=__version__,
        cuda=_C.cuda_runtime > 0,
        cuda_runtime=_dotted(_C.cuda_runtime),
        cuda_architectures=tuple(_C.cuda_architectures.split()),
        cuda_driver=_dotted(_driver_version()),
        torch_built=_C.torch_version,
        torch=str(torch.__version__),
    )
